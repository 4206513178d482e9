"""A pack: the images of one source in one file, with an index, in the user's cache; made once, read in slices.

A compressed archive can only be read from its beginning, a pack anywhere: so images stay on disk until they are
needed. `facts` are for the record.
"""

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data.dataset import Item, Slice, stored_bytes
from kshot.errors import DatasetError
from kshot.files import cache_folder, remove_stale, replace_folder, write_folder
from kshot.untrusted import parse_json

VERSION = 2  # raise it when what is in a pack changes
IMAGES, INDEX, FACTS = "images.bin", "index.parquet", "facts.json"
COLUMNS = ("path", "split", "label", "key", "offset", "length")

log = logging.getLogger("kshot.files")

Fill = Callable[[dict[str, Any]], Iterator[Item]]


def open_or_make(name: str, fill: Fill, cache: Path | None = None) -> tuple[list[Item], dict[str, Any]]:
    """The items, whose images lie in the pack of that name, and its facts; `fill` yields them where there is no pack.

    fill: called with a dictionary to which it adds the facts while it yields. name: must change with the content.
    A pack that is damaged is made anew, and the log says so.
    Raises DatasetError where the cache cannot be written, and whatever fill raises, which is a KshotError: then nothing
    is left behind.
    """
    folder = (cache or cache_folder()) / f"{name}-{VERSION}"
    try:
        if (pack := _open(folder)) is not None:
            return pack
        remove_stale(folder)
        if damaged := folder.exists():  # it has gigabytes, and another process may just have put a good one there
            log.warning("%s is damaged; its data set is read again", folder)
        (replace_folder if damaged else write_folder)(folder, lambda target: _write(target, fill))
        pack = _open(folder)
    except OSError as error:
        raise DatasetError(f"cannot write {folder} ({error.strerror}); set KSHOT_CACHE to another folder") from error
    if pack is None:
        raise DatasetError(f"{folder} was damaged as soon as it was written; set KSHOT_CACHE to another disk")
    return pack


def is_here(name: str, cache: Path | None = None) -> bool:
    """Whether there is a pack of that name."""
    return ((cache or cache_folder()) / f"{name}-{VERSION}" / FACTS).is_file()


def _write(folder: Path, fill: Fill) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    facts: dict[str, Any] = {}
    rows: list[tuple[str, str, str, str, int, int]] = []
    with (folder / IMAGES).open("wb") as images:
        for item in fill(facts):
            image = stored_bytes(item.stored)
            rows.append((_text(item.path), item.split, _text(item.label), item.key, images.tell(), len(image)))
            images.write(image)
    splits = Counter(row[1] for row in rows)
    facts.update(images=len(rows), labels=len({row[2] for row in rows}), splits=dict(sorted(splits.items())))
    columns = list(zip(*rows, strict=True)) or [()] * len(COLUMNS)
    pq.write_table(pa.table(dict(zip(COLUMNS, columns, strict=True))), folder / INDEX)
    (folder / FACTS).write_text(json.dumps(facts), encoding="utf-8")


def _text(name: str) -> str:
    """A name that is not UTF-8 in its archive as text that can be written."""
    return name.encode("utf-8", "replace").decode()


def _open(folder: Path) -> tuple[list[Item], dict[str, Any]] | None:
    """The items and facts of a complete pack, as far as sizes show; None for any other."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = folder / IMAGES
    try:
        table, facts = pq.read_table(folder / INDEX), parse_json((folder / FACTS).read_bytes())
        rows = list(zip(*(table[name].to_pylist() for name in COLUMNS), strict=True))
        if images.stat().st_size != sum(row[-1] for row in rows) or facts["images"] != len(rows):
            return None
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
        return None
    return [
        Item(path, split, label, Slice(images, start, size), key) for path, split, label, key, start, size in rows
    ], facts
