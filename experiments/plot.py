"""The figure of a data set: accuracy over labelled examples per class, one line per series, with 95% intervals.

It does not know how cells were made: records in, a PNG and an SVG out, the same bytes for the same records. matplotlib
is used through its object API, so nothing global is left behind.
"""

import io
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.display import file_stem, name
from experiments.metrics import scores, seeds_of
from experiments.plot_axes import Table, own_range, panel, shots_of
from experiments.plot_published import label, remark, within
from experiments.references import Reference
from experiments.styles import ordered, style
from kshot_errors import ResultsError
from kshot_files import write_file

SIZE = (7.2, 5.6)  # inches, with a legend of at most ROWS rows; each further one adds ROW
ROWS, ROW = 6, 0.21
TWO_COLUMNS = 42  # characters of a title, at most, for a legend of two columns
DPI = 160
RC: dict[Any, Any] = {
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 10,
    "svg.hashsalt": "kshot",  # ids in the SVG come from the content, not from chance
    "text.parse_math": False,  # a data set may be called "$x$"
}


def figure(
    cells: Sequence[Mapping[str, Any]],
    dataset: str,
    out: Path,
    *,
    n_classes: int | None = None,
    published: Sequence[Reference] = (),
) -> list[Path]:
    """Draw one data set's cells; write `<file_stem(dataset)>.png` and `.svg` into the folder `out` (made if absent).

    `n_classes` adds the line of chance; `published` rows are drawn in grey as far as the axis that our own numbers need
    has room for them, else named below it. Raises ResultsError when no cell is of this data set.
    """
    table = scores(cells, dataset)
    if not table:
        raise ResultsError(f"no cell of data set {dataset!r} to draw")
    title = f"{name(dataset)}: {spread(table, len(seeds_of(cells, dataset)))}"
    return save(lambda: _draw(table, title, n_classes, published), out, file_stem(dataset))


def spread(table: Table, seeds: int) -> str:
    """What points and bars are."""
    over_images = any(score.over_images for row in table.values() for score in row.values())
    if seeds > 1:
        return f"mean and 95% interval over {seeds} seeds{' (single runs: over test images)' if over_images else ''}"
    return f"one seed, {'95% interval over test images' if over_images else 'no interval'}"


def save(draw: Callable[[], Figure], out: Path, stem: str) -> list[Path]:
    """Draw with settings that are always the same; write `<stem>.png` and `.svg` into the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a name in a script that the font lacks
        mpl.rcdefaults()  # a matplotlibrc of the user's must not change the bytes
        mpl.rcParams.update(RC)
        drawn = draw()
        return [_write(drawn, out / f"{stem}.{suffix}") for suffix in ("png", "svg")]


def canvas(width: float, height: float) -> Figure:
    """An empty figure of that size in inches."""
    drawn = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(drawn)
    return drawn


def grid_of(titles: Sequence[str]) -> tuple[int, int]:
    """(columns, rows) of a legend of these titles."""
    columns = 2 if max(map(len, titles)) <= TWO_COLUMNS else 1
    return columns, math.ceil(len(titles) / columns)


def draw_legend(drawn: Figure, titles: Sequence[str], said: str = "") -> None:
    """A legend below all axes: what these titles are of, in their order, each once; above it what is `said`."""
    found = {t: h for axes in drawn.axes for h, t in zip(*axes.get_legend_handles_labels(), strict=True)}
    drawn.legend(
        [found[title] for title in titles],
        titles,
        loc="outside lower center",
        ncols=grid_of(titles)[0],
        frameon=False,
        fontsize=9.5,
        handlelength=3,
        title=said or None,
        title_fontsize=8.5,
    )


def _draw(table: Table, title: str, n_classes: int | None, published: Sequence[Reference] = ()) -> Figure:
    shots, chance = shots_of(table), f"chance (1/{n_classes})"
    inside, outside = within(published, own_range(table, n_classes), shots)
    named = [*(style(series).title for series in ordered(table)), *([chance] if n_classes else []), *map(label, inside)]
    said = remark(inside, outside, shots)
    # The axes stay as large however many series there are.
    drawn = canvas(SIZE[0], SIZE[1] + ROW * max(0, grid_of(named)[1] + len(said.splitlines()) - ROWS))
    axes = drawn.add_subplot()
    panel(axes, table, n_classes, shots=shots, chance=chance, published=inside)
    axes.set_ylabel("accuracy on the test images (%)")
    axes.set_title(title, loc="left", fontsize=11)
    draw_legend(drawn, named, said)
    return drawn


def _write(drawn: Figure, path: Path) -> Path:
    blank = {"Date": None, "Creator": None} if path.suffix == ".svg" else {"Software": None}
    buffer = io.BytesIO()
    drawn.savefig(buffer, format=path.suffix[1:], dpi=DPI, metadata=blank)
    return write_file(path, buffer.getvalue())
