"""Bounds on memory in tests."""

import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def traced(most: int) -> Iterator[None]:
    """Within: Python and numpy take at most so many bytes at once, on all threads of this process."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()
