"""Which images of a benchmark are train and which are test: one pure function per rule.

A rule takes the items of a source, the split seed and the user's split file, and returns (train, test).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data.dataset import Item, Split, SplitProtocol, SplitRule
from data.fewshot import split_items
from kshot.errors import DatasetError
from kshot.untrusted import parse_json, read_file


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
    by_path, content, listed = {item.path: item for item in items}, _read(file)[1], set[str]()
    sides: Split = [], []
    for name, side in zip(("train", "test"), sides, strict=True):
        entries = content.get(name) if isinstance(content, dict) else None
        for entry in entries if isinstance(entries, list) else [None]:
            match entry:
                case [str(path), _, _] if path in listed:
                    raise DatasetError(f"{file} lists the image {path!r} more than once; mend the file")
                case [str(path), _, str(_)] if path not in by_path:
                    problem = f"{file} names the image {path!r}, which the archive does not have"
                    raise DatasetError(f"{problem}; are they of one set?")
                case [str(path), _, str(label)]:
                    listed.add(path)
                    side.append(replace(by_path[path], label=label))
                case _:
                    form = '{"train": [[path, label, class], ...], "test": ...}'
                    raise DatasetError(f"{file} is no split file; it must be {form}")
    return sides


def _read(file: Path | None) -> tuple[bytes, Any]:
    """The bytes of a JSON file, and its content."""
    if file is None:
        raise DatasetError("this protocol reads a split that others have drawn; give its JSON file with --split-file")
    try:
        raw = read_file(file)
        return raw, parse_json(raw)
    except OSError as error:
        raise DatasetError(f"split file {file} cannot be read ({error.strerror}); check --split-file") from error
    except ValueError as error:
        raise DatasetError(f"split file {file} is not JSON ({error}); check --split-file") from error


def stamp(protocol: SplitProtocol, seed: int, file: Path | None) -> str:
    """The protocol's name in results: another one wherever the split may differ."""
    if protocol.seeded:
        return f"{protocol.name}-{seed}"
    if protocol.from_file:
        return f"{protocol.name}-{hashlib.sha256(_read(file)[0]).hexdigest()[:12]}"
    return protocol.name
