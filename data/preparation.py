"""Image bytes in, image bytes out: the one rule by which every model's input is prepared.

Both sides of a comparison get exactly the bytes made here. Prepared images are spooled to a temporary file without a
name, which the system removes with the last reference to it or with the process. It is in kshot's cache folder, since
/tmp may be memory.
"""

import io
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from threading import Lock
from weakref import WeakValueDictionary

from PIL import Image, ImageOps

from data.dataset import Example, Slice, content_key
from kshot.errors import DatasetError, InputError
from kshot.files import cache_folder
from kshot.images import MAX_RATIO, EncodedImage, Size, image_key, open_image

MAX_COMMENT = 65_533  # bytes that a JPEG can hold
SEGMENT = 256 << 20  # bytes after which a new file is begun, so that space comes back while some references live


def prepare(data: bytes, *, max_side: int = 480, name: str = "image") -> EncodedImage:
    """The image as models get it: JPEG bytes (Pillow's default quality), RGB, longest side at most max_side pixels.

    Resized with LANCZOS, never enlarged; the short side is rounded down, as in the reference recipe, unless the image
    would be too narrow then for a model. The same bytes as that recipe gives, except for a JPEG four times as large or
    more, which `kshot.images.open_image` decodes smaller.
    Raises ImageError; InputError if max_side < 1.
    """
    return _encode(decode(data, max_side=max_side, name=name))


def prepare_all(examples: Sequence[Example], *, max_side: int = 480, hflip: bool) -> list[Example]:
    """The examples in order with prepared images, key and label kept; read, prepared and spooled in a thread pool.

    In memory is one image a thread; the prepared ones go to disk and are read when they are accessed.
    hflip: also make `mirrored`, the prepared image flipped left to right; else mirrored is None.
    Raises ImageError; InputError if max_side < 1; DatasetError where images cannot be read or spooled.
    """

    def one(example: Example) -> Example:
        image = decode(_checked(example), max_side=max_side, name=f"image {example.key[:12]}")
        mirrored = spool(_encode(ImageOps.mirror(image))) if hflip else None
        return replace(example, stored=spool(_encode(image)), stored_mirrored=mirrored)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(one, examples))


def _checked(example: Example) -> bytes:
    """The image. Raises DatasetError where it is no longer the one that the example was made of."""
    image = example.image
    if content_key(image) != example.key:
        where = f" in {example.stored.path}" if isinstance(example.stored, Slice) else ""
        raise DatasetError(f"image {example.key[:12]}{where} has changed; delete that file, or get the data again")
    return image


def decode(data: bytes, *, max_side: int = 480, name: str = "image") -> Image.Image:
    """The pixels that `prepare` encodes: RGB, upright, longest side at most max_side. Raises as `prepare` does."""
    if max_side < 1:
        raise InputError(f"max_side must be 1 pixel or more, not {max_side}")
    return open_image(data, name, partial(_fit, max_side=max_side))


def _fit(size: Size, max_side: int) -> Size:
    longest = max(size)
    if longest <= max_side:
        return size
    least = -(-max_side // MAX_RATIO)
    width, height = (max(least, side * max_side // longest) for side in size)
    return width, height


def _encode(image: Image.Image) -> EncodedImage:
    buffer, comment = io.BytesIO(), image.info.get("comment", b"")  # Pillow writes it, as it does for the recipe
    if len(comment.encode() if isinstance(comment, str) else comment) > MAX_COMMENT:
        del image.info["comment"]
    image.save(buffer, "JPEG")
    return EncodedImage(buffer.getvalue())


# Spooling to disk


class _Segment:
    """One file, shared by the calls of a process: few files are open, however many calls there are."""

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
class SpooledBytes:
    """`length` bytes of the spool from `offset` on, for the process that wrote them; key: see `image_key`."""

    segment: _Segment
    offset: int
    length: int
    key: str

    def read(self) -> EncodedImage:
        """The bytes; any thread may read."""
        image = EncodedImage(os.pread(self.segment.file.fileno(), self.length, self.offset))
        image.key = self.key
        return image


_current: WeakValueDictionary[int, _Segment] = WeakValueDictionary()  # by process: a fork must not write into ours
_lock = Lock()


def spool(content: bytes) -> SpooledBytes:
    """Write bytes to the spool; any thread may do so. Raises DatasetError where the cache folder cannot be written."""
    with _lock:
        segment = _current.get(os.getpid())
        if segment is None or segment.end >= SEGMENT:
            segment = _current[os.getpid()] = _Segment()
        offset = segment.end
        segment.end += len(content)
    segment.write(content, offset)
    return SpooledBytes(segment, offset, len(content), image_key(content))


def _unwritable(error: OSError) -> DatasetError:
    return DatasetError(
        f"the cache folder {cache_folder()} cannot be written ({error.strerror}); set KSHOT_CACHE to one that can"
    )
