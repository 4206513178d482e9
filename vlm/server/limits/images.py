"""What images of clients may take: fewer pixels than on the command line, and memory by what their headers say.

A few kB may unpack to gigabytes. So sizes and modes are read from the headers before anything is decoded, and what
decoding takes is a part of the request's reservation. tests/vlm/test_server_memory.py compares it with reality.
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, TypeVar

from kshot.errors import ImageError, TooLargeError
from kshot.images import image_key, open_header

T = TypeVar("T")
MAX_PIXELS = 1 << 25  # of one image: 33 megapixels, more than most cameras make
MAX_REQUEST = 1 << 28  # of all images of a request: seconds to decode
AT_ONCE = 2  # threads that decode images ahead; beside them the engine's own decodes one
# Bytes a pixel while it is decoded, turned to RGB and cut to patches; of 16 bits numbers of 64 are made on the way.
PLAIN, WITH_ALPHA, DEEP = 48, 64, 80
ENCODED = 4  # bytes a pixel of what is encoded again, since it is no upright RGB
AT_HAND = 1 << 17  # bytes of images whose headers are read on the event loop, which takes less than a thread's turn
KNOWN = 1 << 14  # images whose headers are remembered: few-shot training sends the same ones again and again
_known = dict[str, tuple[int, int]]()  # key → pixels, bytes a pixel


@cache
def _threads() -> ThreadPoolExecutor:
    """Beside the event loop's own, of which others have need."""
    return ThreadPoolExecutor(AT_ONCE, "kshot-images")


async def in_thread(call: Callable[..., T], *args: Any) -> T:
    """A call about images, on a thread of their own."""
    return await asyncio.get_running_loop().run_in_executor(_threads(), call, *args)


def close() -> None:
    """End the threads, when they are done; a later call has new ones."""
    threads = _threads()
    _threads.cache_clear()
    threads.shutdown()


async def decoding_bytes(images: Sequence[bytes]) -> int:
    """`image_bytes`, on a thread where reading the headers takes long."""
    small = sum(map(len, images)) <= AT_HAND
    return image_bytes(images) if small else await in_thread(image_bytes, images)


def image_bytes(images: Sequence[bytes]) -> int:
    """Bytes that decoding images takes. Raises TooLargeError for more than MAX_PIXELS in one or MAX_REQUEST in all.

    What is no image takes none: whoever decodes it says what is wrong.
    """
    total, sizes = 0, list[int]()
    for number, data in enumerate(images):
        pixels, of_pixel = _header(data)
        total += pixels
        if pixels > MAX_PIXELS or total > MAX_REQUEST:
            what, most = ("image", MAX_PIXELS) if pixels > MAX_PIXELS else ("images up to", MAX_REQUEST)
            count = pixels if pixels > MAX_PIXELS else total
            raise TooLargeError(f"{what} {number} of the request: {count:,} pixels, at most {most:,}; make it smaller")
        sizes.append(pixels * of_pixel)
    return sum(sorted(sizes)[-AT_ONCE - 1 :]) + ENCODED * total


def _header(data: bytes) -> tuple[int, int]:
    """Pixels, and the bytes that each takes; none of what is no image."""
    key = image_key(data)
    if (known := _known.get(key)) is None:
        try:
            with open_header(data) as header:
                deep, alpha = header.mode[0] in "IF", header.has_transparency_data
                known = header.width * header.height, DEEP if deep else WITH_ALPHA if alpha else PLAIN
        except ImageError:
            known = 0, 0
        if len(_known) >= KNOWN:
            _known.clear()
        _known[key] = known
    return known
