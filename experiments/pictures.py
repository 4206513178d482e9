"""What `kshot predict` is asked about: its arguments become images with a name, in order. Decodes none, knows no model.

A folder is searched recursively, by name; hidden files and folders, and the system's own, are passed over. Nothing else
is: what is missing or cannot be read is in the list too, and says so when it is read. A pattern is expanded here
unless a file has its very name; folders that it matches are searched as well.
"""

import glob
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

from data.sources import SYSTEM_FILES
from kshot_errors import ImageError, InputError

STDIN = "-"
MAX_BYTES = 1 << 30  # of a file; more than any image within the limit of pixels takes


@dataclass(frozen=True)
class Picture:
    """name: as it was given or found. read: its encoded bytes, or ImageError in one line that begins with the name."""

    name: str
    read: Callable[[], bytes]


def pictures(arguments: Iterable[str], stdin: Callable[[], BinaryIO]) -> Iterator[Picture]:
    """The images of all arguments (file, folder, pattern or -), each found when it is asked for.

    stdin: gives the standard input, where one of them is -.
    Raises InputError, before the first, where standard input is asked for twice.
    """
    given = list(arguments)
    if given.count(STDIN) > 1:
        raise InputError("standard input (-) is given twice, and can be read once; leave one out")
    return (picture for one in given for picture in (_from_stdin(stdin()) if one == STDIN else _expand(one)))


def shown(text: str) -> str:
    """Text that a terminal shows as it is, in one line: what steers one, and broken UTF-8, is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def _expand(argument: str) -> Iterator[Picture]:
    if os.path.isdir(argument):
        yield from _or(_walk(argument), argument, "no image is in this folder; hidden files are passed over")
    elif os.path.lexists(argument) or not glob.has_magic(argument):
        yield _of_file(argument)
    else:
        yield from _or(_matching(argument), argument, "no file has such a name; in a pattern, ** is for any folders")


def _or(found: Iterator[Picture], name: str, reason: str) -> Iterator[Picture]:
    """What was found, or where that is nothing the reason."""
    first = next(found, None)
    yield _failing(name, reason) if first is None else first
    yield from found


def _walk(top: str) -> Iterator[Picture]:
    """The files below a folder, or the file itself. Links are followed; into a folder they stand in they lead no
    further, since its images are there already."""
    waiting: list[tuple[str, frozenset[tuple[int, int]]]] = [(top, frozenset())]
    while waiting:
        path, above = waiting.pop()
        if not os.path.isdir(path):
            yield _of_file(path)
            continue
        try:
            status, names = os.stat(path), sorted(filter(_is_visible, os.listdir(path)), reverse=True)
        except OSError as error:
            yield _failing(path, f"this folder cannot be read ({error.strerror})")
            continue
        here = status.st_dev, status.st_ino
        if here not in above:
            waiting += [(os.path.join(path, name), above | {here}) for name in names]


def _is_visible(name: str) -> bool:
    return not name.startswith(".") and name.lower() not in SYSTEM_FILES


def _matching(pattern: str) -> Iterator[Picture]:
    """The files that match, and those in folders that do, each once."""
    done: set[str] = set()
    for path in sorted(glob.iglob(os.path.expanduser(pattern), recursive=True)):
        for picture in _walk(path):
            if picture.name not in done:
                done.add(picture.name)
                yield picture


def _from_stdin(stdin: BinaryIO) -> Iterator[Picture]:
    """One image, or where the bytes are text the image of each line."""
    data = stdin.read(MAX_BYTES + 1)
    text = _text(data)
    if len(data) > MAX_BYTES:
        yield _failing(STDIN, f"standard input is longer than {MAX_BYTES:,} bytes")
    elif text is None:
        yield Picture(STDIN, lambda: data)
    else:
        lines = [line.removesuffix("\r") for line in text.split("\n")]
        found = (picture for line in lines if line.strip() for picture in _expand(line))
        yield from _or(found, STDIN, "standard input holds neither an image nor a path")


def _text(data: bytes) -> str | None:
    """Bytes as text; None for an image: no format in use is UTF-8 without a zero byte."""
    try:
        return None if b"\0" in data else data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None


def _of_file(path: str) -> Picture:
    return Picture(path, partial(_read, path))


def _failing(name: str, reason: str) -> Picture:
    return Picture(name, partial(_fail, name, reason))


def _read(path: str) -> bytes:
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            return _fail(path, "not a regular file")  # a pipe would be read for ever
        if status.st_size > MAX_BYTES:
            return _fail(path, f"larger than {MAX_BYTES:,} bytes; make it smaller")
        return Path(path).read_bytes()
    except FileNotFoundError:
        return _fail(path, "there is no such file")
    except OSError as error:
        return _fail(path, f"cannot be read ({error.strerror})")


def _fail(name: str, reason: str) -> bytes:
    raise ImageError(f"{shown(name)}: {reason}")
