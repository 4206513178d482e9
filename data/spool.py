"""Bytes put aside on disk: kept in a temporary file that nobody sees, read again when they are asked for.

The file has no name and goes when the last reference to it dies, or with the process. It lies in kshot's cache folder,
since /tmp may be memory. Knows nothing of what the bytes mean.
"""

import os
import tempfile
from dataclasses import dataclass
from threading import Lock
from weakref import WeakValueDictionary

from kshot_errors import DatasetError
from kshot_files import cache_folder

SEGMENT = 256 << 20  # bytes after which a new file is begun, so that space comes back while some references live


class _Segment:
    """One file, shared by the calls of a process: open are as many as SEGMENTs are kept, not as many as calls."""

    def __init__(self) -> None:
        folder = cache_folder()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - lives as long as we do
        except OSError as error:
            raise _unwritable(error) from error
        self.end = 0

    def __del__(self) -> None:
        if file := getattr(self, "file", None):  # which is missing where it could not be opened
            file.close()

    def write(self, content: bytes, offset: int) -> None:
        rest, descriptor = memoryview(content), self.file.fileno()
        try:
            while rest:
                written = os.pwrite(descriptor, rest, offset)
                rest, offset = rest[written:], offset + written
        except OSError as error:
            raise _unwritable(error) from error


@dataclass(frozen=True, slots=True)
class Kept:
    """`length` bytes of the spool from `offset` on, for the process that kept them."""

    segment: _Segment
    offset: int
    length: int

    def read(self) -> bytes:
        """The bytes; any thread may ask."""
        return os.pread(self.segment.file.fileno(), self.length, self.offset)


_current: WeakValueDictionary[int, _Segment] = WeakValueDictionary()  # by process: a fork must not write into ours
_lock = Lock()


def keep(content: bytes) -> Kept:
    """Put bytes aside; any thread may do so. Raises DatasetError where the cache folder cannot be written."""
    kept = _reserve(len(content))
    kept.segment.write(content, kept.offset)
    return kept


def _reserve(length: int) -> Kept:
    with _lock:
        segment = _current.get(os.getpid())
        if segment is None or segment.end >= SEGMENT:
            segment = _current[os.getpid()] = _Segment()
        kept = Kept(segment, segment.end, length)
        segment.end += length
    return kept


def _unwritable(error: OSError) -> DatasetError:
    return DatasetError(
        f"the cache folder {cache_folder()} cannot be written ({error.strerror}); set KSHOT_CACHE to one that can"
    )
