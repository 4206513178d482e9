"""The report of a sweep: what came out, in words, figures and tables, as report.md and report.html.

It does not know how cells are run or stored: records in, files out; the same records give the same bytes. It shows no
absolute path and no time of day, and images of a data set in report.html alone, where it is given a way to get them.

TODO The sentence of a report that says what came out for a data set, and how sure that is. Cell records in, text out.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.report.blocks import Block, Command, Heading, Notes, Paragraph, Picture, markdown
from experiments.report.comparisons import (
    Album,
    Pictures,
    Training,
    confusion_blocks,
    differences_table,
    efficiency_table,
    main_differences_table,
)
from experiments.report.figures import figure, together
from experiments.report.html import page
from experiments.report.provenance import provenance
from experiments.report.references import drawn, published_table
from experiments.report.tables import (
    Planned,
    Record,
    accuracy_table,
    all_planned,
    cost_table,
    facts_table,
    metrics_table,
    missing_table,
    percent,
    prompts_table,
    text_table,
    timings_table,
)
from experiments.sweep.intervals import Score
from experiments.sweep.metrics import scores, seeds_of
from experiments.sweep.provenance import TOGETHER, name
from experiments.sweep.series import COUNTED, by_series, choices_of, method_of, ordered, style
from kshot.files import write_file

# ---- The sentence of a report that says what came out for a data set, and how sure that is. Cell records in,

NAMED = 3  # how many methods a sentence names before it counts


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


def _share(score: Score) -> str:
    score = score._replace(over_images=None)  # brackets would have to be explained
    return f"{percent(score)} %".replace(" ", "\N{NO-BREAK SPACE}")


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


# ---- The report of a sweep: what came out, in words, figures and tables, as report.md and report.html.


def write_report(
    folder: Path,
    sweep: Record,
    cells: Sequence[Record],
    n_images: Mapping[str, int],
    *,
    n_classes: Mapping[str, int] | None = None,
    planned: Iterable[Planned] | None = None,
    failures: Mapping[Planned, str] | None = None,
    pictures: Pictures | None = None,
    training: Training | None = None,
) -> list[Path]:
    """Write figures/<data set>.png and .svg, for several data sets figures/together.png and .svg, report.md and
    report.html into the folder; return their paths.

    `sweep` and `cells` are the contents of sweep.json and cells/*.json. `n_images` and `n_classes` are test images and
    classes by data set. `planned` lists the cells that should be there, of series where there are (see `by_series`);
    by default the full grid of `sweep`. `failures` is the error of each cell that was tried in vain, by its method's
    plain name. Data sets without a cell are listed as missing, nothing more.

    Paired differences and confusions appear if the folder holds the predictions. `pictures` gives the encoded image of
    a data set's test image by its key, `training` one training image of a data set's class by its label, None for one
    that cannot be had; without `pictures` the report has no image of a data set, and report.md never has.

    Raises ResultsError when predictions that should be of the same images are not, and for a cell or a prediction that
    does not fit the sweep; ImageError for a picture that is none.
    """
    n_classes = n_classes or {}
    sweep, cells = by_series(sweep, cells)
    cells = sorted(cells, key=lambda cell: (cell["dataset"], cell["method"], cell["shots"], cell["seed"]))
    run = [dataset for dataset in sweep["datasets"] if any(cell["dataset"] == dataset for cell in cells)]
    files = _figures(folder / "figures", sweep, cells, run, n_classes)
    album = Album(pictures, training) if pictures else None
    title = f"Accuracy over examples per class: {name(sweep['name'])}"
    blocks: list[Block] = [
        Heading(1, title),
        *_together(files, run),
        *(Paragraph(headline(cells, dataset)) for dataset in run),
        *([Notes(tuple(sweep["notes"]))] if sweep.get("notes") else []),
        *([prompts] if (prompts := prompts_table(sweep)) else []),
        *(block for dataset in run for block in _dataset(folder, sweep, cells, dataset, files[dataset], album)),
        *_appendix(sweep, cells, n_images, n_classes),
        *_missing(cells, all_planned(sweep, cells) if planned is None else planned, failures),
        *_command(sweep),
    ]
    texts = {"report.md": markdown(blocks), "report.html": page(title, blocks)}
    written = [write_file(folder / file, text.encode()) for file, text in texts.items()]
    return [path for pair in files.values() for path in pair] + written


def _figures(
    folder: Path, sweep: Record, cells: Sequence[Record], run: Sequence[str], n_classes: Mapping[str, int]
) -> dict[str | None, Sequence[Path]]:
    """(PNG, SVG) of each data set, and under None that of all together where there are several."""
    several = {None: together(cells, run, folder, n_classes)} if len(run) > 1 else {}
    backbones = sweep.get("settings", {}).get("backbone", ())
    backbones = [backbones] if isinstance(backbones, str) else backbones
    return several | {
        d: figure(cells, d, folder, n_classes=n_classes.get(d), published=drawn(d, backbones)) for d in run
    }


def _together(files: Mapping[str | None, Sequence[Path]], run: Sequence[str]) -> Iterator[Block]:
    if None in files:
        _, svg = files[None]
        names = ", ".join(map(name, run))
        alt = f"Line charts side by side: accuracy over labelled examples per class on {names}; numbers are below."
        yield Heading(2, "All data sets")
        yield Picture(svg.read_bytes(), f"figures/{TOGETHER}.png", alt)


def _dataset(
    folder: Path, sweep: Record, cells: Sequence[Record], dataset: str, files: Sequence[Path], album: Album | None
) -> Iterator[Block]:
    png, svg = files
    yield Heading(2, name(dataset))
    alt = (
        f"Line chart: accuracy over labelled examples per class on {name(dataset)}; its numbers are in the table below."
    )
    yield Picture(svg.read_bytes(), f"figures/{png.name}", alt)
    yield accuracy_table(cells, dataset)
    yield from _under("Published elsewhere", published_table(dataset))
    yield from _under("Examples needed", efficiency_table(cells, dataset))
    yield from _under("Answers in text", text_table(cells, dataset))
    yield from _under("All metrics", metrics_table(cells, dataset))
    tests = differences_table(folder, cells, dataset), main_differences_table(folder, cells, dataset)
    yield from _under("Paired differences", *tests)
    if classes := sweep.get("classes", {}).get(dataset):
        yield from _under("Worst confusions", *confusion_blocks(folder, cells, dataset, classes, album))


def _under(heading: str, *blocks: Block | None) -> Iterator[Block]:
    """The blocks that are there under a heading; nothing where there are none."""
    if found := [block for block in blocks if block]:
        yield Heading(3, heading)
        yield from found


def _appendix(
    sweep: Record, cells: Sequence[Record], n_images: Mapping[str, int], n_classes: Mapping[str, int]
) -> Iterator[Block]:
    yield Heading(2, "How it was run")
    yield facts_table(sweep, cells, n_images, n_classes)
    if cells:
        yield from _under("Cost", timings_table(cells), cost_table(cells))
    yield from _under("Where the numbers come from", *provenance(sweep, cells))


def _missing(
    cells: Sequence[Record], planned: Iterable[Planned], failures: Mapping[Planned, str] | None
) -> Iterator[Block]:
    yield Heading(2, "Missing cells")
    yield missing_table(planned, cells, failures) or Paragraph("None: every planned cell has been run.")


def _command(sweep: Record) -> Iterator[Block]:
    if sweep.get("command"):
        yield Heading(2, "Run it again")
        yield Command(sweep["command"])
