"""`kshot data`: list, get and check data sets."""

from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from experiments.cli import options as opt
from experiments.terminal import err, out, plain_table
from kshot.errors import LISTED, DatasetError, listed

if TYPE_CHECKING:
    from data.check import CheckReport
    from data.dataset import Access, Dataset

SHOWN = 5  # files without images that are named
NAMES = 40  # classes that are named


def list_data() -> None:
    """The data sets that can be named, with their sizes, sources, licences and protocols."""
    from rich.text import Text

    from data.catalog import DATASETS

    table = plain_table(["name", "classes", "train", "test", "title, source, licence and protocols"])
    for spec in DATASETS.values():
        count = spec.protocols[0].classes if spec.protocols else len(spec.classes or ())
        small = "\n".join(filter(None, [spec.citation, spec.licence, ", ".join(p.name for p in spec.protocols)]))
        text = Text.assemble(f"{spec.title}\n", (small, "dim"), "\n")
        table.add_row(spec.name, str(count), f"{spec.train:,}", f"{spec.test:,}", text)
    table.add_row("folder:PATH", "?", "?", "?", "Your own: PATH/<class>/* or PATH/{train,test}/<class>/*\n")
    table.add_row("hub:ID", "?", "?", "?", "A set of the Hugging Face hub with class labels; hub:ID@REVISION#CONFIG")
    out.print(table, soft_wrap=False)


@opt.with_access
def get(name: opt.DatasetName, access: "Access", split_seed: opt.SplitSeed = 0) -> None:
    """Fetch or read a data set once, verify it, and keep it in the cache."""
    _loaded(name, access, split_seed)


@opt.with_access
def check(name: opt.DatasetName, access: "Access", split_seed: opt.SplitSeed = 0) -> None:
    """Decode and hash every image of a data set, and look for images that train and test share."""
    from data import check as checks

    dataset = _loaded(name, access, split_seed)
    with err.status("decoding every image"):
        report = checks.check(dataset)
    for line in _lines(dataset, report):
        out.print(line)
    if report.broken:
        raise DatasetError(listed(dataset.name, report.broken))


def _loaded(name: str, access: "Access", split_seed: int) -> "Dataset":
    """The data set, when its facts are printed."""
    from data import catalog

    with err.status(f"reading {name}"):
        dataset = catalog.load(name, access=access, split_seed=split_seed)
    for fact, value in _facts(dataset):
        out.print(f"{fact}: {value}")
    return dataset


def _facts(dataset: "Dataset") -> Iterator[tuple[str, Any]]:
    yield "data set", dataset.name
    yield "protocol", dataset.protocol
    more = ", ..." if dataset.classes[NAMES:] else ""
    yield "classes", f"{len(dataset.classes):,}: {', '.join(dataset.classes[:NAMES])}{more}"
    yield "images", f"{len(dataset.train):,} train, {len(dataset.test):,} test"
    facts = dataset.facts
    yield from (("note", note) for note in facts.get("notes", ()))
    if facts.get("images"):
        parts = ", ".join(f"{n:,} {split}" for split, n in facts["splits"].items() if split)
        yield "in the source", f"{facts['images']:,} images in {facts['labels']:,} classes{parts and f' ({parts})'}"
    for name in ("hub", "revision", "config", "label_column", "content"):
        if name in facts:
            yield name.replace("_", " "), facts[name]
    for name, md5 in facts.get("md5", {}).items():
        yield f"md5 of {name}", md5 + (" (not the published file's)" if name in facts["modified"] else "")
    if ignored := facts.get("ignored"):
        more = ", ..." if ignored[SHOWN:] else ""
        yield "no images of the set", f"{len(ignored):,}: {', '.join(ignored[:SHOWN])}{more}"


def _lines(dataset: "Dataset", report: "CheckReport") -> Iterator[str]:
    yield f"decoded: {report.images - len(report.broken):,} of {report.images:,}"
    yield f"the same image twice on one side: {report.duplicates:,}"
    yield f"same image in two classes: {len(report.two_classes):,}"
    for key, labels in islice(report.two_classes.items(), LISTED):
        yield f"  {key[:12]}: " + " and ".join(dataset.classes[label] for label in sorted(labels))
    for what, pairs in (("same image", report.exact), ("near duplicates (perceptual hash)", report.near)):
        yield f"{what} in train and test: {len(pairs):,}"
        for i, j in pairs[:LISTED]:
            pair = dataset.train[i], dataset.test[j]
            yield "  " + " and ".join(f"{dataset.classes[e.label]} {e.key[:12]}" for e in pair)
