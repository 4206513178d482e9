"""The report of a sweep: what came out, in words, figures and tables, as report.md and report.html.

Records in, files out; the same records give the same bytes. It shows no absolute path and no time of day.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.report import comparisons, tables
from experiments.report.comparisons import ImageSources
from experiments.report.document import Block, Command, Heading, Notes, Paragraph, Picture, html, markdown
from experiments.report.figures import write_dataset_figure, write_overview_figure
from experiments.report.references import published_table
from experiments.report.tables import CellId, Record
from experiments.sweep.intervals import Score
from experiments.sweep.metrics import scores, seeds_of
from experiments.sweep.provenance import name
from experiments.sweep.series import COUNTED, by_series, choices_of, method_of, ordered, style
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
    """Write figures/<data set>.png and .svg, for several data sets figures/together.png and .svg, report.md and
    report.html into the folder; return their paths.

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
    out, backbones = folder / "figures", tables.as_list(sweep.get("settings", {}).get("backbone", ()))
    together = write_overview_figure(cells, datasets, out, n_classes) if len(datasets) > 1 else []
    figures = {
        each: write_dataset_figure(cells, each, out, n_classes=n_classes.get(each), backbones=backbones)
        for each in datasets
    }
    title = f"Accuracy over examples per class: {name(sweep['name'])}"
    blocks: list[Block] = [
        *_overview(together, datasets),
        *(Paragraph(headline(cells, dataset)) for dataset in datasets),
        *([Notes(tuple(sweep["notes"]))] if sweep.get("notes") else []),
        *([prompts] if (prompts := tables.prompts_table(sweep)) else []),
        *(block for dataset in datasets for block in _dataset(folder, sweep, cells, dataset, figures[dataset], images)),
        Heading(2, "How it was run"),
        tables.facts_table(sweep, cells, n_images, n_classes),
        *(_section("Cost", tables.timings_table(cells), tables.cost_table(cells)) if cells else []),
        *_section("Where the numbers come from", *tables.provenance_tables(sweep, cells)),
        Heading(2, "Missing cells"),
        tables.missing_table(sweep, cells, failures or {}) or Paragraph("None: every planned cell has been run."),
    ]
    if sweep.get("command"):
        blocks += [Heading(2, "Run it again"), Command(sweep["command"])]
    documents = {"report.md": markdown(title, blocks), "report.html": html(title, blocks)}
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


# The sentence of a data set

NAMED = 3  # how many methods a sentence names before it counts


def headline(cells: Sequence[Record], dataset: str) -> str:
    """One sentence: what was compared, what was best at the smallest and the largest shots, and how sure that is."""
    table = scores(cells, dataset)
    methods = {method_of(series) for series in table}
    shots = sorted({k for row in table.values() for k in row if k})
    under = ", ".join([_count(len(seeds_of(cells, dataset)), "seed"), *_compared(table)])
    opening = f"{_count(len(methods), 'method')} {'was' if len(methods) == 1 else 'were'} compared on {name(dataset)}"
    parts = [f"at {k} per class, {_leader(table, k)}" for k in dict.fromkeys([*shots[:1], *shots[-1:]])]
    zero_shot = [f"{style(m).title} reaches {_share(table[m][0])}" for m in ordered(table) if 0 in table[m]]
    if zero_shot:
        parts.append(f"with no example at all, {_and(zero_shot)}")
    span = f"{shots[0]} to {shots[-1]}" if len(shots) > 1 else "".join(map(str, shots)) or "no"
    examples = "example" if shots == [1] else "examples"
    return f"{opening} with {span} labelled {examples} per class ({under}): {'; '.join(parts)}."


def _compared(table: Iterable[str]) -> list[str]:
    """How many values of each setting are compared: `2 prompts`."""
    values: dict[str, set[Any]] = defaultdict(set)
    for choice in (choice for series in table for choice in choices_of(series) if not choice.idle):
        values[choice.setting].add(choice.value)
    return [_count(len(each), COUNTED.get(setting, setting)) for setting, each in values.items()]


def _leader(table: Mapping[str, Mapping[int, Score]], shots: int) -> str:
    column = {method: table[method][shots] for method in ordered(table) if shots in table[method]}
    top = max(score.mean for score in column.values())
    leaders = [method for method, score in column.items() if score.mean == top]
    names, share = _and([style(method).title for method in leaders]), _share(column[leaders[0]])
    if len(column) == 1:
        return f"{names} reaches {share}"
    best = f"{names} {'is' if len(leaders) == 1 else 'are'} best with {share}"
    rivals = [method for method in column if method not in leaders]
    return f"{best}{_certainty(column, leaders, rivals)}" if rivals else best


def _certainty(column: Mapping[str, Score], leaders: Sequence[str], rivals: Sequence[str]) -> str:
    if column[leaders[0]].half_width is None:
        return " (one seed, so without an interval over seeds)"
    intervals = {method: score.interval or (score.mean, score.mean) for method, score in column.items()}
    lowest = min(intervals[leader][0] for leader in leaders)
    overlapping = [style(m).title for m in rivals if intervals[m][1] >= lowest]
    if not overlapping:
        return ", with a 95% interval above all others"
    more = [f"{len(overlapping) - NAMED} more"] if len(overlapping) > NAMED else []
    that = "that" if len(overlapping) == 1 else "those"
    return f", but the 95% interval overlaps with {that} of {_and(overlapping[:NAMED] + more)}"


def _share(score: Score) -> str:
    score = score._replace(over_images=None)  # brackets would have to be explained
    return f"{tables.percent(score)} %".replace(" ", "\N{NO-BREAK SPACE}")


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
