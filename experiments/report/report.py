"""The report of a sweep: what came out, in words, figures and tables, as report.md and report.html.

Records in, files out; the same records give the same bytes. It shows no absolute path and no time of day.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from experiments.report import comparisons, runs, tables
from experiments.report.comparisons import ImageSources
from experiments.report.document import Block, Command, Heading, Notes, Paragraph, Picture, html, markdown
from experiments.report.figures import write_dataset_figure, write_overview_figure
from experiments.report.references import published_table
from experiments.report.runs import CellId
from experiments.report.summary import headline
from experiments.report.tables import Record
from experiments.sweep.provenance import name
from experiments.sweep.series import by_series
from kshot.files import write_file


def write_report(
    folder: Path,
    sweep: Record,
    cells: Sequence[Record],
    n_images: Mapping[str, int],
    *,
    n_classes: Mapping[str, int] | None = None,
    failures: Mapping[CellId, str] | None = None,
    images: ImageSources | None = None,
) -> list[Path]:
    """Write figures/<data set>.png and .svg, for several data sets figures/together.png and .svg, report.md,
    report.html and results.csv into the folder; return their paths.

    `sweep` and `cells` are the contents of sweep.json and of the cells' records. `n_images` and `n_classes` are test
    images and classes by data set. `failures` is the error of each cell that was tried and failed, by its method's name
    without what is compared. Paired differences and confusions appear if the folder holds the predictions, images of
    confusions where `images` are given.

    Raises ResultsError for a cell or a prediction that does not fit the sweep or the others; ImageError for an image
    that cannot be decoded.
    """
    n_classes = n_classes or {}
    sweep, cells = by_series(sweep, cells)
    cells = sorted(cells, key=lambda cell: (cell["dataset"], cell["method"], cell["shots"], cell["seed"]))
    datasets = [dataset for dataset in sweep["datasets"] if any(cell["dataset"] == dataset for cell in cells)]
    out, backbones = folder / "figures", runs.as_list(sweep.get("settings", {}).get("backbone", ()))
    together = write_overview_figure(cells, datasets, out, n_classes) if len(datasets) > 1 else []
    figures = {
        each: write_dataset_figure(cells, each, out, n_classes=n_classes.get(each), backbones=backbones)
        for each in datasets
    }
    title = f"Accuracy over examples per class: {name(sweep['name'])}"
    blocks: list[Block] = [
        *(Paragraph(headline(folder, cells, dataset)) for dataset in datasets),
        *([Notes(tuple(sweep["notes"]))] if sweep.get("notes") else []),
        *([Command(sweep["command"], "Run it again")] if sweep.get("command") else []),
        *_overview(together, datasets),
        *([prompts] if (prompts := runs.prompts_table(sweep)) else []),
        *(block for dataset in datasets for block in _dataset(folder, sweep, cells, dataset, figures[dataset], images)),
        Heading(2, "How it was run"),
        runs.facts_table(sweep, cells, n_images, n_classes),
        *(_section("Cost", runs.timings_table(cells), runs.cost_table(cells)) if cells else []),
        *_section("Where the numbers come from", *runs.provenance_tables(sweep, cells)),
    ]
    if missing := runs.missing_table(sweep, cells, failures or {}):
        blocks += [Heading(2, "Missing cells"), missing]
    documents = {"report.md": markdown(title, blocks), "report.html": html(title, blocks)}
    documents["results.csv"] = tables.csv_of(cells)
    written = [write_file(folder / file, text.encode()) for file, text in documents.items()]
    return [*together, *(path for pair in figures.values() for path in pair), *written]


def _overview(figure: Sequence[Path], datasets: Sequence[str]) -> Iterator[Block]:
    if figure:
        png, svg = figure
        names = ", ".join(map(name, datasets))
        alt = f"Line charts side by side: accuracy over labelled examples per class on {names}; numbers are below."
        yield Heading(2, "All data sets")
        yield Picture(svg.read_bytes(), f"figures/{png.name}", alt)


def _dataset(
    folder: Path,
    sweep: Record,
    cells: Sequence[Record],
    dataset: str,
    figure: Sequence[Path],
    images: ImageSources | None,
) -> Iterator[Block]:
    png, svg = figure
    yield Heading(2, name(dataset))
    what = f"accuracy over labelled examples per class on {name(dataset)}"
    alt = f"Line chart: {what}; its numbers are in the table below."
    yield Picture(svg.read_bytes(), f"figures/{png.name}", alt)
    yield tables.accuracy_table(cells, dataset)
    yield from _section("Published elsewhere", published_table(dataset))
    yield from _section("Examples needed", comparisons.efficiency_table(cells, dataset))
    yield from _section("Answers in text", tables.text_table(cells, dataset))
    yield from _section("Thoughts", tables.thoughts_table(cells, dataset))
    yield from _section("All metrics", tables.metrics_table(cells, dataset))
    yield from _section("Paired differences", *comparisons.difference_tables(folder, cells, dataset))
    if classes := sweep.get("classes", {}).get(dataset):
        yield from _section("Worst confusions", *comparisons.confusion_blocks(folder, cells, dataset, classes, images))


def _section(heading: str, *blocks: Block | None) -> Iterator[Block]:
    """A heading and the blocks that are there; nothing where there are none."""
    if present := [block for block in blocks if block]:
        yield Heading(3, heading)
        yield from present
