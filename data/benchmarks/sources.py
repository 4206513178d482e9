"""The benchmarks and sets of the hub: from a row and the user's access to a Dataset under one named protocol.

Whatever the source, an image keeps its bytes and so its key; classes are in the order of their names. What differs from
what is published is an error, or, where the user allows it, part of the protocol's name.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data import hub, pack
from data.benchmarks import layouts
from data.benchmarks.archives import Files, modified
from data.benchmarks.protocols import stamp as stamp_of
from data.dataset import Access, Dataset, DatasetSpec, Example, Item, SplitOptions, SplitProtocol, clean_classes, digest
from data.fewshot import stratified_split
from kshot.errors import DatasetError, UnknownNameError

TEST_SHARE = 5  # of a hub's set without a test split one image of five goes to test, at least one per class


def load(row: DatasetSpec, *, root: Path | None, split_seed: int, access: Access) -> Dataset:
    """The set under the protocol asked for. root: the cache for its pack.

    Raises UnknownNameError (source, protocol), DatasetError (files that are missing, broken or not as published; counts
    or class names that are not the protocol's).
    """
    source, protocol = chosen(row, access)
    ask = SplitOptions(split_seed, access.split_file)
    stamp = stamp_of(protocol, ask)  # first: it tells whether there is a split file at all
    items, facts = items_of(row, source, protocol, access, root)
    every = named(row, items)
    facts["content"] = digest((item.label, item.key) for item in every)
    doubt = _doubt(row, protocol, facts, access)
    train, test = (named(row, part) for part in protocol.rule(every, ask))  # a rule may bring new names
    classes = _classes([*train, *test])
    _check_counts(row, protocol, classes, train, test)
    stamp += doubt and f"{doubt}-{fingerprint(train, test)}"
    about = {"source": source, "protocol": protocol.name, **facts, "shared": _shared(train, test)}
    return Dataset(row.name, stamp, classes, _examples(train, classes), _examples(test, classes), about)


def load_hub(row: DatasetSpec, *, root: Path | None, split_seed: int) -> Dataset:
    """hub:ID or hub:ID@REVISION: its train and test as they are, or drawn by seed where one of them is missing."""
    identity, _, revision = row.location.partition("@")
    items, facts = _hub_items(identity, revision, (), root)
    items = named(row, items)
    splits = {item.split for item in items}
    if {"train", "test"} <= splits:
        train, test = ([item for item in items if item.split == split] for split in ("train", "test"))
        name = "given-split"
    else:
        train, test = _drawn(items, split_seed)
        name = f"{row.protocol}-{split_seed}"
    classes = _classes(items)
    stamp, about = f"{name}-{fingerprint(train, test)}", {**facts, "shared": _shared(train, test)}
    return Dataset(row.name, stamp, classes, _examples(train, classes), _examples(test, classes), about)


def fingerprint(train: Sequence[Item], test: Sequence[Item]) -> str:
    """12 hex digits for all that results depend on: the images, their classes and their sides; not for the source."""
    sides = (("train", train), ("test", test))
    return digest((side, item.label, item.key) for side, items in sides for item in items)[:12]


def chosen(row: DatasetSpec, access: Access) -> tuple[str, SplitProtocol]:
    """Source and protocol, the usual ones where none is named; the source of a --root is the archive.

    Raises UnknownNameError; DatasetError where they do not go together, or with what else is asked for.
    """
    source = access.source or ("archive" if access.root else "")
    if source and source not in row.sources:
        raise UnknownNameError("source", source, row.sources)
    by_name = {protocol.name: protocol for protocol in row.protocols}
    if access.protocol and access.protocol not in by_name:
        raise UnknownNameError("protocol", access.protocol, by_name)
    named = [by_name[access.protocol]] if access.protocol else row.protocols
    pairs = [(s, p) for s in ([source] if source else row.sources) for p in named if s in p.sources]
    if not pairs:
        needed = " or ".join(named[0].sources)
        raise DatasetError(f"{row.name}: the protocol {access.protocol} needs --source {needed}, not {source}")
    _refuse_idle_options(row, *pairs[0], access)
    return pairs[0]


def _refuse_idle_options(row: DatasetSpec, source: str, protocol: SplitProtocol, access: Access) -> None:
    idle = {
        "--root": access.root and source == "hub",
        "--allow-modified": access.allow_modified and source == "hub",
        "--split-file": access.split_file and not protocol.from_file,
    }
    if wrong := [option for option, is_idle in idle.items() if is_idle]:
        how = f"source {source}" if wrong[0] != "--split-file" else f"protocol {protocol.name}"
        raise DatasetError(f"{row.name}: {wrong[0]} has no meaning with {how}; leave it out or choose another")


def items_of(
    row: DatasetSpec, source: str, protocol: SplitProtocol, access: Access, cache: Path | None
) -> tuple[list[Item], dict[str, Any]]:
    """All items of the source, and what is on record about it; read once into a pack in the cache."""
    if source == "hub":
        return _hub_items(row.hub, row.revision, protocol.splits, cache)
    if access.root is None or not access.root.is_dir():
        given = "no --root was given" if access.root is None else f"--root {access.root} is no folder"
        raise DatasetError(f"{given}; it must be the folder with the original files of {row.name} ({row.url})")
    files = Files(access.root, row.parts, row.url)
    name = f"{row.name}-archive-{files.identity()}"
    items, facts = pack.open_or_make(name, lambda facts: _archive(row, files, facts), cache)
    return items, {**facts, "modified": modified(row.parts, facts["md5"])}


def _archive(row: DatasetSpec, files: Files, facts: dict[str, Any]) -> Iterator[Item]:
    ignored: list[str] = []
    yield from layouts.LAYOUTS[row.name](files, ignored)
    facts.update(md5=files.checksums(), ignored=sorted(ignored))


def _hub_items(
    identity: str, revision: str, splits: Sequence[str], cache: Path | None
) -> tuple[list[Item], dict[str, Any]]:
    """A set once packed stays at its commit until another revision is asked for or the pack is removed."""
    name = hashlib.sha256("\0".join((identity, revision, *splits)).encode()).hexdigest()[:16]

    def fill(facts: dict[str, Any]) -> Iterator[Item]:
        found = hub.read(identity, revision or None, splits or None)
        yield from found.items
        facts.update(hub=identity, revision=found.revision)

    return pack.open_or_make(f"hub-{name}", fill, cache)


def _doubt(row: DatasetSpec, protocol: SplitProtocol, facts: dict[str, Any], access: Access) -> str:
    """What the protocol's stamp says of the files: nothing where a checksum vouches for all that it uses of them."""
    if row.content == facts["content"] and protocol.seeded:  # it vouches for images and classes, not for a split
        return ""
    if "hub" in facts:
        return "-hub"
    wrong = facts["modified"] or (["the images"] if row.content else [])
    if wrong and not access.allow_modified:
        raise DatasetError(
            f"{row.name}: the checksum of {', '.join(wrong)} is not that of the published files; "
            f"get the originals from {row.url}, or pass --allow-modified, which results will state"
        )
    if wrong:
        return "-modified"
    return "" if len(facts["md5"]) == len(row.parts) else "-unpacked"


def _shared(train: Sequence[Item], test: Sequence[Item]) -> int:
    """How many images are on both sides."""
    return len({item.key for item in train} & {item.key for item in test})


def named(row: DatasetSpec, items: Sequence[Item]) -> list[Item]:
    """The items with their classes as a model reads them. Raises DatasetError where two names become one."""
    labels = sorted({item.label for item in items})
    cleaned = clean_classes(row, [row.spellings.get(label, label) for label in labels])
    names = dict(zip(labels, cleaned, strict=True))
    return [replace(item, label=names[item.label]) for item in items]


def _classes(items: Sequence[Item]) -> tuple[str, ...]:
    """In alphabetical order: that of no source, so that of all."""
    return tuple(sorted({item.label for item in items}))


def _check_counts(
    row: DatasetSpec, protocol: SplitProtocol, classes: Sequence[str], train: Sequence[Item], test: Sequence[Item]
) -> None:
    found = {"classes": len(classes), "train images": len(train), "test images": len(test)}
    wanted = {"classes": protocol.classes, "train images": protocol.train, "test images": protocol.test}
    for what, count in wanted.items():
        if found[what] == 0 or (count and found[what] != count):
            stated = f", not {count:,}" if count else ""
            raise DatasetError(f"{row.name}, protocol {protocol.name}: {found[what]:,} {what}{stated}; check its files")
    known = {row.clean(name) for name in row.classes or ()}
    if known and not protocol.from_file and (odd := sorted({*classes} - known)):
        raise DatasetError(
            f"{row.name}: the source has a class {odd[0]!r}, which the set does not have; check its files"
        )


def _drawn(items: Sequence[Item], seed: int) -> tuple[list[Item], list[Item]]:
    keys, labels = [item.key for item in items], [item.label for item in items]
    train, test = stratified_split(keys, labels, test_size=lambda count: max(1, count // TEST_SHARE), seed=seed)
    return [items[n] for n in train], [items[n] for n in test]


def _examples(items: Sequence[Item], classes: Sequence[str]) -> list[Example]:
    labels = {name: label for label, name in enumerate(classes)}
    return [Example(item.key, item.stored, labels[item.label]) for item in items]
