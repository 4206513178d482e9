"""How much memory a body takes once it is parsed: upper bounds from a look at its bytes, before anything is built.

A few kB may unpack to millions of empty messages or wrong values, each of which becomes an object or an error of some
hundred bytes. So they are counted first, and too many are refused. tests/vlm/test_server_memory.py compares the bounds
with what is really taken.
"""

from collections.abc import Iterator
from typing import Any

from pydantic_core import from_json

from kshot.errors import RequestError, TooLargeError

# JSON

VALUES = 4096  # of a plain body: of each an error may be made, which takes 0.1 ms
TEXTS = 16  # times as many brackets, and commas where no list may be long, are refused unparsed: a text has few
VALUE = 4096  # bytes of what is built of a value: an object of a request, or errors that it is wrong
NUMBER = 128  # of a number in a list: it is parsed twice where there are many
COPIES = 4  # of the body's bytes: itself, its texts, images out of base64, and what is made of them
Path = tuple[str, ...]  # names of fields from the outermost in; "*" for each item of a list


def json_bytes(body: bytes, most: int) -> int:
    """Of a JSON body of at most so many values, beside long lists of whole numbers."""
    commas, brackets = body.count(b","), body.count(b"[") + body.count(b"{")
    return COPIES * len(body) + VALUE * min(commas + brackets + 1, most) + NUMBER * (commas + brackets)


def check_json(body: bytes, most: int, lists: frozenset[Path]) -> None:
    """Raise TooLargeError for a JSON body of more than `most` values; a list of whole numbers at one of the paths
    counts as one. What is no JSON is left to whoever reads it."""
    brackets = body.count(b"[") + body.count(b"{")
    marks = body.count(b",") + brackets
    if marks < most:
        return
    if (brackets if lists else marks) > TEXTS * most:
        raise TooLargeError(f"the body has more than {most:,} values; send it in smaller parts")
    try:
        left: list[tuple[Any, set[Path]]] = [(from_json(body), {*lists})]
    except ValueError:
        return
    count = 1
    while left:
        value, paths = left.pop()
        items = list(value.items() if isinstance(value, dict) else value if isinstance(value, list) else ())
        if isinstance(value, list) and () in paths and {*map(type, value)} <= {int}:
            continue
        count += len(items)
        if count > most:
            raise TooLargeError(f"the body has more than {most:,} values; send it in smaller parts")
        for item in items:
            name, inner = item if isinstance(value, dict) else ("*", item)
            if isinstance(inner, dict | list):
                left.append((inner, {path[1:] for path in paths if path[:1] == (name,)}))


# Protobuf

MAX_FIELDS = 1 << 17  # of a request and its datums; a batch of the SDK's, of 1,024 datums, has some 8,000
MESSAGE = 1024  # bytes of a datum, a chunk or a tensor: protobuf's own messages, their wrappers, the SDK's types
TEXT = 12  # bytes for each of a text's: it becomes a list of Python's integers
TENSOR = 12  # for each of a tensor's: its sparse indices become lists too, its shape takes eight bytes a byte
OTHERS = 4  # for each of all others: in the message, in the SDK's type, and on the way there
_DATA, _INPUT, _IMAGE = 3 << 3 | 2, 1 << 3 | 2, 2 << 3 | 2  # tags of ForwardBackwardRequest, Datum and Chunk
_MALFORMED = "the body is no protobuf ForwardBackwardRequest; send it with the tinker SDK"


def protobuf_bytes(body: bytes) -> int:
    """Of a ForwardBackwardRequest. Raises TooLargeError for one of more than MAX_FIELDS fields, RequestError for what
    is none.

    Reads the wire format (https://protobuf.dev/programming-guides/encoding/) of the request and of its datums. What is
    in those is not repeated, and so bounded by its bytes.
    """
    size, left = MESSAGE + OTHERS * len(body), MAX_FIELDS
    for tag, start, end in _fields(body, 0, len(body), MAX_FIELDS):
        size, left = size + MESSAGE, left - 1
        if tag == _DATA:
            for inner, first, last in _fields(body, start, end, left):
                text = inner == _INPUT and not _is_image(body, first, last)
                factor = TEXT if text else OTHERS if inner == _INPUT else TENSOR
                size, left = size + MESSAGE + factor * (last - first), left - 1
    return size


def _fields(body: bytes, start: int, end: int, most: int) -> Iterator[tuple[int, int, int]]:
    """Tag, start and end of each field of a message. Raises as `protobuf_bytes`."""
    for _ in range(most):
        if start >= end:
            return
        try:
            tag, start = _varint(body, start)
            wire, last = tag & 7, start
            if wire == 2:
                length, start = _varint(body, start)
                last = start + length
            elif wire == 0:
                last = _varint(body, start)[1]
            else:
                last = start + {1: 8, 5: 4}[wire]
        except (IndexError, KeyError) as error:  # the body's end, or a kind of field that nobody writes
            raise RequestError(_MALFORMED) from error
        if last > end or not tag >> 3:
            raise RequestError(_MALFORMED)
        yield tag, start, last
        start = last
    raise TooLargeError(f"the request has more than {MAX_FIELDS:,} fields; send it in smaller parts")


def _varint(body: bytes, position: int) -> tuple[int, int]:
    """A number and where it ends. Raises IndexError at the body's end, RequestError for more than ten bytes."""
    value = body[position]
    if value < 128:
        return value, position + 1
    value &= 127
    for shift in range(7, 70, 7):
        position += 1
        byte = body[position]
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position + 1
    raise RequestError(_MALFORMED)


def _is_image(body: bytes, start: int, end: int) -> bool:
    """Whether a chunk is an image and nothing besides."""
    return end - start > 2 and body[start] == _IMAGE and sum(_varint(body, start + 1)[::-1]) == end
