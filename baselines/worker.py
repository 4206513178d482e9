"""Calls one after the other on a thread of its own, in the order they were made. Knows nothing of what is called."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from tinker.lib.public_interfaces.api_future import AwaitableConcurrentFuture

from kshot_errors import RequestError

T = TypeVar("T")


class Worker:
    """One thread; it ends with the last reference to the worker, or at `close`."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kshot-head")

    def submit(self, call: Callable[..., T], *args: Any, **kwargs: Any) -> AwaitableConcurrentFuture[T]:
        """The SDK's future of `call(*args, **kwargs)`. Raises RequestError after `close`."""
        try:
            return AwaitableConcurrentFuture(self._thread.submit(call, *args, **kwargs))
        except RuntimeError as error:
            raise RequestError("the client is closed; make another one") from error

    def close(self) -> None:
        """Finish what was requested and end the thread."""
        self._thread.shutdown()
