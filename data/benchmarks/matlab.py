"""Reads a variable of a MATLAB 5 file, once it is known that its values need little memory.

The format (MathWorks, MAT-File Format, level 5): 128 bytes of header, then elements: type, size in bytes, content. A
compressed element holds one element; a matrix holds its flags, its dimensions, its name and its values. scipy makes
room for as many values as compressed bytes and dimensions promise, before it looks whether they are there.
"""

import io
import math
import struct
import zlib
from collections.abc import Iterator
from typing import Any

from kshot.errors import DatasetError

INFLATED = 16 << 20  # bytes of all elements; the largest file of a benchmark has about 3 MB
DEPTH = 16  # of matrices in matrices
HEADER, TAG = 128, 8  # bytes
MATRIX, COMPRESSED = 14, 15  # types of elements
CELL, STRUCT, OBJECT = 1, 2, 3  # classes of matrices whose values are matrices
VALUES = 3  # elements of another matrix before its values: flags, dimensions, name


def variable(content: bytes, name: str) -> Any:
    """The variable of that name as a one-dimensional array. Raises DatasetError."""
    from numpy import ravel
    from scipy.io import loadmat

    try:
        _check(content)
        return ravel(loadmat(io.BytesIO(content), squeeze_me=True)[name])
    except Exception as error:  # its readers raise many unrelated types on bytes that are broken
        raise DatasetError(f"the .mat file with {name} is broken ({error}); download it again") from error


def _check(content: bytes) -> None:
    """Raise ValueError, struct.error or zlib.error for a file that promises more than it holds, or more than INFLATED
    bytes."""
    if content[124:128] not in (b"\0\1IM", b"\1\0MI"):
        raise ValueError("it is no MATLAB 5 file")
    order = "<" if content[126:128] == b"IM" else ">"
    left = INFLATED
    for kind, body in _elements(content[HEADER:], order):
        if kind == COMPRESSED:
            body = zlib.decompressobj().decompress(body, left + 1)
        if (left := left - len(body)) < 0:
            raise ValueError(f"it unpacks to more than {INFLATED:,} bytes")
        for inner, matrix in _elements(body, order) if kind == COMPRESSED else [(kind, body)]:
            if inner == MATRIX:
                _check_matrix(matrix, order, DEPTH)


def _check_matrix(body: bytes, order: str, depth: int) -> None:
    """Raise ValueError for a matrix that has fewer values than it says; those of a cell or a struct are matrices."""
    if depth == 0:
        raise ValueError("its matrices are nested too deeply")
    elements = list(_elements(body, order))
    matrices = [part for kind, part in elements if kind == MATRIX]
    described = [part for kind, part in elements if kind != MATRIX]
    kind = _integers(described[0], order)[0] & 0xFF if described else 0
    if kind in (CELL, STRUCT, OBJECT):
        promised = math.prod(_integers(described[1], order))
        if kind != CELL:  # the last two: how long a field's name is, and the names
            promised *= len(described[-1]) // max(1, _integers(described[-2], order)[0])
        if promised > len(matrices):
            raise ValueError(f"it says that a matrix holds {promised:,} others, which has {len(matrices):,}")
    elif len(described) > 1:
        promised, size = math.prod(_integers(described[1], order)), len(b"".join(described[VALUES:]))
        if promised > size:  # a value takes a byte or more
            raise ValueError(f"it says that a matrix has {promised:,} values, which has {size:,} bytes of them")
    for matrix in matrices:
        _check_matrix(matrix, order, depth - 1)


def _integers(content: bytes, order: str) -> tuple[int, ...]:
    return struct.unpack(f"{order}{len(content) // 4}i", content[: len(content) // 4 * 4])


def _elements(content: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    """(type, content) of each element: of a small one both are in its tag."""
    start = 0
    while start + TAG <= len(content):
        kind, size = struct.unpack_from(f"{order}II", content, start)
        if kind >> 16:  # a small element: its size is in the upper half of the first word
            yield kind & 0xFFFF, content[start + 4 : start + 4 + min(kind >> 16, 4)]
            start += TAG
            continue
        yield kind, content[start + TAG : start + TAG + size]
        start += TAG + (size if kind == COMPRESSED else -(-size // 8) * 8)
