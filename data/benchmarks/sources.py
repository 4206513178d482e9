"""Loads the benchmarks and sets of the hub: from a DatasetSpec and an Access to a Dataset under one named protocol.

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
from data.benchmarks.archives import SourceFiles, modified
from data.benchmarks.protocols import stamp as stamp_of
from data.dataset import (
    SIDES,
    Access,
    Dataset,
    DatasetSpec,
    Item,
    SplitProtocol,
    clean_classes,
    clean_name,
    digest,
    examples_of,
    shared_images,
)
from data.fewshot import given_sides, one_in_five, split_items
from kshot.errors import DatasetError, UnknownNameError


def load(spec: DatasetSpec, *, root: Path | None, split_seed: int, access: Access) -> Dataset:
    """The data set under the requested protocol. root: the cache for its pack.

    Raises UnknownNameError (source, protocol), DatasetError (files that are missing, broken or not as published; counts
    or class names that are not the protocol's).
    """
    source, protocol = choose_source(spec, access)
    split = split_seed, access.split_file
    stamp = stamp_of(protocol, *split)  # first: it tells whether there is a split file at all
    items, facts = items_of(spec, source, protocol, access, root)
    every = with_clean_labels(spec, items)
    facts["content"] = _content(every)
    unverified = _unverified(spec, protocol, facts, access)
    # A rule may bring new class names.
    train, test = (with_clean_labels(spec, part) for part in protocol.rule(every, *split))
    classes = _classes([*train, *test])
    _check_counts(spec, protocol, classes, train, test)
    stamp += unverified and f"{unverified}-{fingerprint(train, test)}"
    return _dataset(spec, stamp, classes, train, test, {"source": source, "protocol": protocol.name, **facts})


def load_hub(spec: DatasetSpec, *, root: Path | None, split_seed: int, access: Access) -> Dataset:
    """A set of the hub: its own train and test; validation is test where there is no other; drawn by seed where it
    lacks one side. A label column that is not the usual one is part of the protocol's name."""
    items, facts = _hub_items(hub.HubName.parse(spec.location), (), root, access.label_column)
    items = with_clean_labels(spec, items)
    splits, notes = [*dict.fromkeys(item.split for item in items)], [*facts.get("notes", ())]
    if sides := given_sides(splits):
        train, test = ([item for item in items if item.split == side] for side in sides)
        name = "given-split"
        if sides[1].lower() not in SIDES["test"]:
            name += f"-{sides[1]}"
            notes.append(f"split {sides[1]!r} is the test side")
        if unused := [repr(split) for split in splits if split not in sides]:
            notes.append(f"splits that are not used: {', '.join(unused)}")
    else:
        train, test = split_items(items, test_size=one_in_five, seed=split_seed)
        name = f"{spec.protocol}-{split_seed}"
        notes.append(f"test is drawn by seed, one image in five of each class, from all images ({', '.join(splits)})")
    name += f"-by-{facts['label_column']}" if "label_column" in facts else ""
    if len(classes := _classes([*train, *test])) < 2:
        raise DatasetError(f"{spec.name} has one class ({classes[0]!r}); classification needs two or more")
    facts = {**facts, "notes": notes} if notes else facts
    return _dataset(spec, f"{name}-{fingerprint(train, test)}", classes, train, test, facts)


def _dataset(
    spec: DatasetSpec,
    protocol: str,
    classes: tuple[str, ...],
    train: Sequence[Item],
    test: Sequence[Item],
    facts: dict[str, Any],
) -> Dataset:
    facts |= shared_images(train, test)
    return Dataset(spec.name, protocol, classes, examples_of(train, classes), examples_of(test, classes), facts)


def fingerprint(train: Sequence[Item], test: Sequence[Item]) -> str:
    """12 hex digits for all that results depend on: the images, their classes and their split; not for the source."""
    splits = (("train", train), ("test", test))
    return digest((split, item.label, item.key) for split, items in splits for item in items)[:12]


def choose_source(spec: DatasetSpec, access: Access) -> tuple[str, SplitProtocol]:
    """Source and protocol, the usual ones where none is named; with a --root the source is the archive.

    Raises UnknownNameError; DatasetError where they do not go together, or not with the other options.
    """
    source = access.kind
    if source and source not in spec.sources:
        raise UnknownNameError("source", source, spec.sources)
    by_name = {protocol.name: protocol for protocol in spec.protocols}
    if access.protocol and access.protocol not in by_name:
        raise UnknownNameError("protocol", access.protocol, by_name)
    protocols = [by_name[access.protocol]] if access.protocol else spec.protocols
    pairs = [(s, p) for s in ([source] if source else spec.sources) for p in protocols if s in p.sources]
    if not pairs:
        needed = " or ".join(protocols[0].sources)
        raise DatasetError(f"{spec.name}: the protocol {access.protocol} needs --source {needed}, not {source}")
    _refuse_unused_options(spec, *pairs[0], access)
    return pairs[0]


def _refuse_unused_options(spec: DatasetSpec, source: str, protocol: SplitProtocol, access: Access) -> None:
    unused = {
        "--root": access.root and source == "hub",
        "--allow-modified": access.allow_modified and source == "hub",
        "--split-file": access.split_file and not protocol.from_file,
    }
    if wrong := [option for option, is_unused in unused.items() if is_unused]:
        choice = f"source {source}" if wrong[0] != "--split-file" else f"protocol {protocol.name}"
        raise DatasetError(f"{spec.name}: {wrong[0]} has no meaning with {choice}; leave it out or choose another")


def items_of(
    spec: DatasetSpec, source: str, protocol: SplitProtocol, access: Access, cache: Path | None
) -> tuple[list[Item], dict[str, Any]]:
    """All items of the source, and what is on record about it; read once into a pack in the cache."""
    if source == "hub":
        return _hub_items(hub.HubName(spec.hub, spec.revision), protocol.splits, cache)
    if access.root is None or not access.root.is_dir():
        problem = "no --root was given" if access.root is None else f"--root {access.root} is no folder"
        raise DatasetError(f"{problem}; it must be the folder with the original files of {spec.name} ({spec.url})")
    files = SourceFiles(access.root, spec.files, spec.url)
    name = f"{spec.name}-archive-{files.identity()}"
    items, facts = pack.open_or_make(name, lambda facts: _archive(spec, files, facts, protocol, access), cache)
    return items, {**facts, "modified": modified(spec.files, facts["md5"])}


def _archive(
    spec: DatasetSpec, files: SourceFiles, facts: dict[str, Any], protocol: SplitProtocol, access: Access
) -> Iterator[Item]:
    """The items, once the checksums are those that were published or the user allows others. Where the images
    themselves are vouched for, an archive may have been packed again: then these are checked, at the end."""
    facts["md5"] = files.checksums()
    doubted = [] if access.allow_modified else modified(spec.files, facts["md5"])
    by_content = bool(spec.content) and protocol.seeded
    if doubted and not by_content:
        raise _not_published(spec, doubted)
    ignored, read = list[str](), list[Item]()
    for item in layouts.LAYOUTS[spec.name](files, ignored):
        read += [replace(item, stored=b"")] if doubted else []
        yield item
    if doubted and _content(with_clean_labels(spec, read)) != spec.content:
        raise _not_published(spec, doubted)
    facts["ignored"] = sorted(ignored)


def hub_pack(name: hub.HubName, splits: Sequence[str], label_column: str = "") -> str:
    """The name of the pack that a set of the hub is kept in."""
    words = [name.hub_id, name.revision, *splits]
    words += [f"#{name.config}"] if name.config else []
    words += [f"label {label_column}"] if label_column else []
    return "hub-" + hashlib.sha256("\0".join(words).encode()).hexdigest()[:16]


def _hub_items(
    name: hub.HubName, splits: Sequence[str], cache: Path | None, label_column: str = ""
) -> tuple[list[Item], dict[str, Any]]:
    """A set once packed stays at its commit until another revision is asked for or the pack is removed."""

    def fill(facts: dict[str, Any]) -> Iterator[Item]:
        hub_set = hub.read(name, splits, label_column)
        yield from hub_set.items
        facts.update(hub=name.hub_id, revision=hub_set.revision)
        more = {"config": name.config, "label_column": hub_set.label_column, "notes": [*hub_set.notes]}
        facts.update({key: value for key, value in more.items() if value})

    return pack.open_or_make(hub_pack(name, splits, label_column), fill, cache)


def _unverified(spec: DatasetSpec, protocol: SplitProtocol, facts: dict[str, Any], access: Access) -> str:
    """What the protocol's name in results says of the files: "" where checksums cover all that the protocol uses."""
    if spec.content == facts["content"] and protocol.seeded:  # it covers images and classes, not a split
        return ""
    if "hub" in facts:
        return "-hub"
    wrong = facts["modified"] or (["the images"] if spec.content else [])
    if wrong and not access.allow_modified:
        raise _not_published(spec, wrong)
    if wrong:
        return "-modified"
    return "" if len(facts["md5"]) == len(spec.files) else "-unpacked"


def _not_published(spec: DatasetSpec, wrong: Sequence[str]) -> DatasetError:
    return DatasetError(
        f"{spec.name}: the checksum of {', '.join(wrong)} is not that of the published files; "
        f"get the originals from {spec.url}, or pass --allow-modified, which results will state"
    )


def _content(items: Sequence[Item]) -> str:
    """What `DatasetSpec.content` is of: images and their cleaned classes."""
    return digest((item.label, item.key) for item in items)


def with_clean_labels(spec: DatasetSpec, items: Sequence[Item]) -> list[Item]:
    """The items with their classes as a model reads them. Raises DatasetError where two names become one."""
    labels = sorted({item.label for item in items})
    cleaned = clean_classes(spec.name, [spec.spellings.get(label, label) for label in labels])
    names = dict(zip(labels, cleaned, strict=True))
    return [replace(item, label=names[item.label]) for item in items]


def _classes(items: Sequence[Item]) -> tuple[str, ...]:
    """In alphabetical order, the same for every source."""
    return tuple(sorted({item.label for item in items}))


def _check_counts(
    spec: DatasetSpec, protocol: SplitProtocol, classes: Sequence[str], train: Sequence[Item], test: Sequence[Item]
) -> None:
    counts = {"classes": len(classes), "train images": len(train), "test images": len(test)}
    wanted = {"classes": protocol.classes, "train images": protocol.train, "test images": protocol.test}
    for what, count in wanted.items():
        if counts[what] == 0 or (count and counts[what] != count):
            expected = f", not {count:,}" if count else ""
            problem = f"{counts[what]:,} {what}{expected}"
            raise DatasetError(f"{spec.name}, protocol {protocol.name}: {problem}; check its files")
    stated = {clean_name(name) for name in spec.classes or ()}
    if stated and not protocol.from_file and (odd := sorted({*classes} - stated)):
        problem = f"the source has a class {odd[0]!r}, which the set does not have"
        raise DatasetError(f"{spec.name}: {problem}; check its files")
