"""The report of a sweep: what came out, in words, figures and tables, as report.md and report.html.

It does not know how cells are run or stored: records in, files out; the same records give the same bytes. It shows no
image of a data set, no absolute path and no time of day.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.display import name
from experiments.intervals import Score
from experiments.metrics import scores, seeds_of
from experiments.plot import figure
from experiments.references import published_table
from experiments.report_blocks import Block, Command, Heading, Notes, Paragraph, Picture
from experiments.report_html import page
from experiments.report_markdown import markdown
from experiments.series import by_series, choices_of, method_of
from experiments.styles import COUNTED, ordered, style
from experiments.tables import Record, accuracy_table, metrics_table, percent, text_table
from experiments.tables_run import (
    Planned,
    all_planned,
    facts_table,
    missing_table,
    prompts_table,
    settings_table,
    timings_table,
)
from experiments.tables_stored import confusion_tables, differences_table
from kshot_files import write_file

NAMED = 3  # how many methods a sentence names before it counts


def write_report(
    folder: Path,
    sweep: Record,
    cells: Sequence[Record],
    n_images: Mapping[str, int],
    *,
    n_classes: Mapping[str, int] | None = None,
    planned: Iterable[Planned] | None = None,
) -> list[Path]:
    """Write figures/<data set>.png and .svg, report.md and report.html into the folder; return their paths.

    `sweep` and `cells` are the contents of sweep.json and cells/*.json. `n_images` and `n_classes` are test images and
    classes by data set. `planned` lists the cells that should be there, of series where there are (see `by_series`);
    by default the full grid of `sweep`. Data sets without a cell are listed as missing, nothing more. Paired
    differences and confusions appear if the folder holds the predictions. Raises ResultsError when predictions that
    should be of the same images are not, and for a cell or a prediction that does not fit the sweep.
    """
    n_classes = n_classes or {}
    sweep, cells = by_series(sweep, cells)
    cells = sorted(cells, key=lambda cell: (cell["dataset"], cell["method"], cell["shots"], cell["seed"]))
    run = [dataset for dataset in sweep["datasets"] if any(cell["dataset"] == dataset for cell in cells)]
    files = {d: figure(cells, d, folder / "figures", n_classes=n_classes.get(d)) for d in run}
    title = f"Accuracy over examples per class: {name(sweep['name'])}"
    blocks: list[Block] = [
        Heading(1, title),
        *(Paragraph(headline(cells, dataset)) for dataset in run),
        *([Notes(tuple(sweep["notes"]))] if sweep.get("notes") else []),
        *([prompts] if (prompts := prompts_table(sweep)) else []),
        *(block for dataset in run for block in _dataset(folder, sweep, cells, dataset, files[dataset])),
        *_appendix(sweep, cells, n_images, n_classes, all_planned(sweep, cells) if planned is None else planned),
    ]
    texts = {"report.md": markdown(blocks), "report.html": page(title, blocks)}
    written = [write_file(folder / file, text.encode()) for file, text in texts.items()]
    return [path for pair in files.values() for path in pair] + written


def headline(cells: Sequence[Record], dataset: str) -> str:
    """One sentence: what was compared, what was best at the smallest and the largest shots, and how sure that is.

    The methods of the cells may be series (see `by_series`).
    """
    table = scores(cells, dataset)
    methods = {method_of(m) for m in table}
    shots = sorted({k for row in table.values() for k in row if k})
    under = ", ".join([_count(len(seeds_of(cells, dataset)), "seed"), *_compared(table)])
    opening = f"{_count(len(methods), 'method')} {'was' if len(methods) == 1 else 'were'} compared on {name(dataset)}"
    blind = [f"{style(m).title} reaches {_share(table[m][0])}" for m in ordered(table) if 0 in table[m]]
    without = [f"with no example at all, {_and(blind)}"] if blind else []
    ends = [f"at {k} per class, {_lead(table, k)}" for k in dict.fromkeys([*shots[:1], *shots[-1:]])]
    span = f"{shots[0]} to {shots[-1]}" if len(shots) > 1 else "".join(map(str, shots[:1])) or "no"
    examples = "example" if shots == [1] else "examples"
    return f"{opening} with {span} labelled {examples} per class ({under}): {'; '.join(ends + without)}."


def _compared(table: Iterable[str]) -> list[str]:
    """How many values of each setting are compared: `2 prompts`."""
    found: dict[str, set[Any]] = defaultdict(set)
    for choice in (choice for series in table for choice in choices_of(series)):
        found[choice.setting].add(choice.value)
    return [_count(len(values), COUNTED.get(setting, setting)) for setting, values in found.items()]


def _lead(table: Mapping[str, Mapping[int, Score]], shots: int) -> str:
    column = {method: table[method][shots] for method in ordered(table) if shots in table[method]}
    top = max(score.mean for score in column.values())
    leaders = [method for method, score in column.items() if score.mean == top]
    if len(column) == 1:
        return f"{style(leaders[0]).title} reaches {_share(column[leaders[0]])}"
    names = _and([style(method).title for method in leaders])
    best = f"{names} {'is' if len(leaders) == 1 else 'are'} best with {_share(column[leaders[0]])}"
    rivals = [method for method in column if method not in leaders]
    return f"{best}{_hedge(column, leaders, rivals)}" if rivals else best


def _hedge(column: Mapping[str, Score], leaders: Sequence[str], rivals: Sequence[str]) -> str:
    if column[leaders[0]].half_width is None:
        return " (one seed, so without an interval over seeds)"
    near = [style(m).title for m in rivals if any(_overlap(column[leader], column[m]) for leader in leaders)]
    if not near:
        return ", with a 95% interval above all others"
    more = [f"{len(near) - NAMED} more"] if len(near) > NAMED else []
    that = "that" if len(near) == 1 else "those"
    return f", but the 95% interval overlaps with {that} of {_and(near[:NAMED] + more)}"


def _overlap(best: Score, other: Score) -> bool:
    (low, _), (_, high) = (score.interval or (score.mean, score.mean) for score in (best, other))
    return low <= high


def _dataset(
    folder: Path, sweep: Record, cells: Sequence[Record], dataset: str, files: Sequence[Path]
) -> Iterator[Block]:
    png, svg = files
    yield Heading(2, name(dataset))
    alt = (
        f"Line chart: accuracy over labelled examples per class on {name(dataset)}; its numbers are in the table below."
    )
    yield Picture(svg.read_bytes(), f"figures/{png.name}", alt)
    yield accuracy_table(cells, dataset)
    if references := published_table(dataset):
        yield references
    if answers := text_table(cells, dataset):
        yield answers
    yield metrics_table(cells, dataset)
    if differences := differences_table(folder, cells, dataset):
        yield differences
    if classes := sweep.get("classes", {}).get(dataset):
        yield from confusion_tables(folder, cells, dataset, classes)


def _appendix(
    sweep: Record,
    cells: Sequence[Record],
    n_images: Mapping[str, int],
    n_classes: Mapping[str, int],
    planned: Iterable[Planned],
) -> Iterator[Block]:
    yield Heading(2, "How it was run")
    yield facts_table(sweep, cells, n_images, n_classes)
    if cells:
        yield timings_table(cells)
    if sweep.get("settings"):
        yield settings_table("Settings of the sweep.", "setting", sweep["settings"])
    if cells:
        yield settings_table("Versions.", "package", *(cell["versions"] for cell in cells))
    yield Heading(2, "Missing cells")
    yield missing_table(planned, cells) or Paragraph("None: every planned cell has been run.")
    if sweep.get("command"):
        yield Heading(2, "Run it again")
        yield Command(sweep["command"])


def _share(score: Score) -> str:
    score = score._replace(over_images=None)  # brackets would have to be explained
    return f"{percent(score)} %".replace(" ", "\N{NO-BREAK SPACE}")


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
