"""`kshot data`: list, get and check data sets. Prints; the work is done in `data`."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from experiments.terminal import err, out, plain_table
from kshot.errors import DatasetError

if TYPE_CHECKING:
    from data.check import CheckReport
    from data.dataset import Access, Dataset

app = typer.Typer(name="data", help="The data sets.")
SHOWN = 5  # pairs of duplicates that are named

Name = Annotated[str, typer.Argument(help="A name of `kshot data list`, folder:PATH or hub:ID.")]
Source = Annotated[str, typer.Option("--source", help="hub, or archive: the original files in --root.")]
Root = Annotated[Path | None, typer.Option("--root", help="Folder of the original files.")]
Protocol = Annotated[str, typer.Option("--protocol", help="recipe, official or coop.")]
SplitFile = Annotated[Path | None, typer.Option("--split-file", help="For coop: its JSON file.")]
Modified = Annotated[bool, typer.Option("--allow-modified", help="Take files whose checksums are not the originals'.")]
SplitSeed = Annotated[int, typer.Option("--split-seed", min=0, help="Draws the split of a set without one.")]


@app.command("list")
def list_data() -> None:
    """The data sets that can be named, with their sizes, protocols and licences."""
    from data.catalog import DATASETS

    table = plain_table(["name", "classes", "train", "test", "title, licence and protocols"])
    for row in DATASETS.values():
        count = row.protocols[0].classes if row.protocols else len(row.classes or ())
        protocols = f"\n[dim]{', '.join(p.name for p in row.protocols)}[/dim]" if row.protocols else ""
        text = f"{row.title}\n[dim]{row.licence}[/dim]{protocols}\n"
        table.add_row(row.name, str(count), f"{row.train:,}", f"{row.test:,}", text)
    table.add_row("folder:PATH", "?", "?", "?", "Your own: PATH/<class>/* or PATH/{train,test}/<class>/*\n")
    table.add_row(
        "hub:ID", "?", "?", "?", "Any set of the Hugging Face hub with images and class labels; also hub:ID@REVISION"
    )
    out.print(table, soft_wrap=False)


@app.command("get")
def get(
    name: Name,
    source: Source = "",
    root: Root = None,
    protocol: Protocol = "",
    split_file: SplitFile = None,
    allow_modified: Modified = False,
    split_seed: SplitSeed = 0,
) -> None:
    """Fetch or read a data set once, verify it, and keep it in the cache."""
    _print_facts(_load(name, access_of(source, root, protocol, split_file, allow_modified), split_seed))


@app.command("check")
def check(
    name: Name,
    source: Source = "",
    root: Root = None,
    protocol: Protocol = "",
    split_file: SplitFile = None,
    allow_modified: Modified = False,
    split_seed: SplitSeed = 0,
) -> None:
    """Decode and hash every image of a data set, and look for images that train and test share."""
    from data import check as checking

    dataset = _load(name, access_of(source, root, protocol, split_file, allow_modified), split_seed)
    _print_facts(dataset)
    with err.status("decoding every image"):
        found = checking.check(dataset)
    for line in _lines(dataset, found):
        out.print(line, markup=False, highlight=False)
    if found.broken:
        more = f" and {len(found.broken) - 1} more" if len(found.broken) > 1 else ""
        raise DatasetError(f"{dataset.name}: {found.broken[0]}{more}")


def access_of(source: str, root: Path | None, protocol: str, split_file: Path | None, modified: bool) -> "Access":
    """What the options of the command line say together."""
    from data.dataset import Access

    return Access(source, root, protocol, split_file, modified)


def _load(name: str, access: "Access", split_seed: int) -> "Dataset":
    from data import catalog

    with err.status(f"reading {name}"):
        return catalog.load(name, access=access, split_seed=split_seed)


def _print_facts(dataset: "Dataset") -> None:
    for name, value in _facts(dataset):
        out.print(f"{name}: {value}", markup=False, highlight=False)


def _facts(dataset: "Dataset") -> Iterator[tuple[str, Any]]:
    yield "data set", dataset.name
    yield "protocol", dataset.protocol
    yield "classes", f"{len(dataset.classes):,}"
    yield "images", f"{len(dataset.train):,} train, {len(dataset.test):,} test"
    facts = dataset.facts
    if facts.get("images"):
        parts = ", ".join(f"{n:,} {split}" for split, n in facts["splits"].items() if split)
        yield "in the source", f"{facts['images']:,} images in {facts['labels']:,} classes{parts and f' ({parts})'}"
    for name in ("hub", "revision", "content"):
        if name in facts:
            yield name, facts[name]
    for name, md5 in facts.get("md5", {}).items():
        yield f"md5 of {name}", md5 + (" (not the published file's)" if name in facts["modified"] else "")
    if ignored := facts.get("ignored"):
        yield (
            "no images of the set",
            f"{len(ignored):,}: {', '.join(ignored[:SHOWN])}{', ...' if ignored[SHOWN:] else ''}",
        )


def _lines(dataset: "Dataset", found: "CheckReport") -> Iterator[str]:
    yield f"decoded: {found.images - len(found.broken):,} of {found.images:,}"
    yield f"the same image twice on one side: {found.duplicates:,}"
    for what, pairs in (("same image", found.exact), ("near duplicates (perceptual hash)", found.near)):
        yield f"{what} in train and test: {len(pairs):,}"
        for i, j in pairs[:SHOWN]:
            one, other = dataset.train[i], dataset.test[j]
            names = " and ".join(f"{dataset.classes[e.label]} {e.key[:12]}" for e in (one, other))
            yield f"  {names}"
