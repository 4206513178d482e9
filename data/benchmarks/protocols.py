"""Which images of a benchmark are train and which are test: one pure function per rule.

A rule takes the items of a source, the split seed and the user's split file, and returns (train, test).
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from data.dataset import Item, Split, SplitProtocol, SplitRule
from data.fewshot import split_items
from kshot.errors import DatasetError


def given(train: Sequence[str] = ("train",), test: Sequence[str] = ("test",)) -> SplitRule:
    """The source's own split; what is in none of the named ones (validation, say) is left out."""

    def rule(items: Sequence[Item], seed: int, file: Path | None) -> Split:
        return [i for i in items if i.split in train], [i for i in items if i.split in test]

    return rule


def per_class(count: int) -> SplitRule:
    """`count` images of each class, drawn by the split seed, are train; the rest are test."""

    def rule(items: Sequence[Item], seed: int, file: Path | None) -> Split:
        test, train = split_items(items, test_size=lambda _: count, seed=seed)
        return train, test

    return rule


def from_file(items: Sequence[Item], seed: int, file: Path | None) -> Split:
    """The train and test lists of a split file in CoOp's format (Zhou et al. 2022), class names as it writes them.

    The file is JSON: {"train": [[path, label, class name], ...], "val": ..., "test": ...}; paths are those of the
    archive's images. Raises DatasetError where there is no file, it is no such JSON, or it names an image that the
    source does not have.
    """
    by_path, parts = {item.path: item for item in items}, _parts(file)
    paths = Counter(str(entry[0]) for part in parts for entry in part)
    if twice := [path for path, count in paths.items() if count > 1]:
        raise DatasetError(f"{file} lists the image {twice[0]!r} more than once; mend the file")
    train, test = ([_listed(by_path, entry, file) for entry in part] for part in parts)
    return train, test


def _listed(by_path: dict[str, Item], entry: Sequence[object], file: Path | None) -> Item:
    path, name = str(entry[0]), str(entry[2])
    if path not in by_path:
        raise DatasetError(f"{file} names the image {path!r}, which the archive does not have; are they of one set?")
    return replace(by_path[path], label=name)


def _parts(file: Path | None) -> tuple[list[list[object]], list[list[object]]]:
    content = json.loads(_read(file))
    parts = [content.get(part) if isinstance(content, dict) else None for part in ("train", "test")]
    entries = [entry for part in parts for entry in (part if isinstance(part, list) else [part])]
    if not all(
        isinstance(e, list) and len(e) == 3 and isinstance(e[0], str) and isinstance(e[2], str) for e in entries
    ):
        raise DatasetError(f'{file} is no split file; it must be {{"train": [[path, label, class], ...], "test": ...}}')
    return parts[0] or [], parts[1] or []


def _read(file: Path | None) -> bytes:
    if file is None:
        raise DatasetError("this protocol reads a split that others have drawn; give its JSON file with --split-file")
    try:
        content = file.read_bytes()
        json.loads(content)
    except OSError as error:
        raise DatasetError(f"split file {file} cannot be read ({error.strerror}); check --split-file") from error
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"split file {file} is not JSON ({error}); check --split-file") from error
    return content


def stamp(protocol: SplitProtocol, seed: int, file: Path | None) -> str:
    """The protocol's name in results: another one wherever the split may differ."""
    if protocol.seeded:
        return f"{protocol.name}-{seed}"
    if protocol.from_file:
        return f"{protocol.name}-{hashlib.sha256(_read(file)).hexdigest()[:12]}"
    return protocol.name
