"""A pack: the images of one source in one file, with an index, in the user's cache; made once, read in slices.

A compressed archive can only be read from its beginning, a pack anywhere: so images stay on disk until they are asked
for. Knows nothing of archives, hubs or protocols; what `facts` says is for the record.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from data.core import Item, Slice, content, content_key
from kshot_errors import DatasetError
from kshot_files import cache_folder, write_folder

VERSION = 1  # raise it when what is in a pack changes
IMAGES, INDEX, FACTS = "images.bin", "index.parquet", "facts.json"
COLUMNS = ("path", "split", "label", "key", "offset", "length")

Fill = Callable[[dict[str, Any]], Iterator[Item]]


def open_or_make(name: str, fill: Fill, cache: Path | None = None) -> tuple[list[Item], dict[str, Any]]:
    """The items, whose images lie in the pack of that name, and its facts; `fill` yields them where there is no pack.

    fill: called with a dictionary to which it adds the facts while it yields. name: must change with the content.
    Raises DatasetError where the cache cannot be written, and whatever fill raises: then nothing is left behind.
    """
    folder = (cache or cache_folder()) / f"{name}-{VERSION}"
    try:
        write_folder(folder, lambda target: _write(target, fill))
        return _items(folder), json.loads((folder / FACTS).read_bytes())
    except OSError as error:
        raise DatasetError(f"cannot write {folder} ({error.strerror}); set KSHOT_CACHE to another folder") from error


def made(name: str, cache: Path | None = None) -> Path | None:
    """The folder of that pack, if there is one."""
    folder = (cache or cache_folder()) / f"{name}-{VERSION}"
    return folder if folder.is_dir() else None


def digest(keys: Iterable[str]) -> str:
    """What images a set holds, in whatever order and under whatever names: the SHA-256 of their sorted keys, in hex."""
    return hashlib.sha256("\n".join(sorted(keys)).encode()).hexdigest()


def _write(folder: Path, fill: Fill) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    facts: dict[str, Any] = {}
    rows: list[tuple[str, str, str, str, int, int]] = []
    with (folder / IMAGES).open("wb") as images:
        for item in fill(facts):
            image = content(item.stored)
            rows.append((item.path, item.split, item.label, content_key(image), images.tell(), len(image)))
            images.write(image)
    splits = Counter(row[1] for row in rows)
    facts.update(images=len(rows), labels=len({row[2] for row in rows}), splits=dict(sorted(splits.items())))
    facts["content"] = digest(row[3] for row in rows)
    columns = list(zip(*rows, strict=True)) or [()] * len(COLUMNS)
    pq.write_table(pa.table(dict(zip(COLUMNS, columns, strict=True))), folder / INDEX)
    (folder / FACTS).write_text(json.dumps(facts), encoding="utf-8")


def _items(folder: Path) -> list[Item]:
    import pyarrow.parquet as pq

    table, images = pq.read_table(folder / INDEX), folder / IMAGES
    rows = zip(*(table[name].to_pylist() for name in COLUMNS), strict=True)
    return [Item(path, split, label, Slice(images, start, size), key) for path, split, label, key, start, size in rows]
