"""The figure of a sweep: accuracy over labelled examples per class, one line per method, with intervals over seeds.

It does not know how cells were made: records in, a PNG and an SVG out, the same bytes for the same records. matplotlib
is used through its object API, so nothing global is left behind.
"""

import io
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.display import file_stem, name
from experiments.metrics import Score, scores, seeds_of
from kshot_errors import ResultsError
from kshot_files import write_file

SIZE = (7.2, 5.6)  # inches
DPI = 160
GREY = "#555555"
RC: dict[Any, Any] = {
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 10,
    "svg.hashsalt": "kshot",  # ids in the SVG come from the content, not from chance
    "text.parse_math": False,  # a data set may be called "$x$"
}


class Style(NamedTuple):
    """How one method is written and drawn."""

    title: str
    colour: str
    marker: str
    line: str = "-"


# Colours of Okabe and Ito (2008), their yellow replaced by the olive of Tol's "muted" set: yellow is too pale on white.
STYLES = {
    "vlm-zero-shot": Style("VLM zero-shot", "#E69F00", "*"),
    "vlm-lora": Style("VLM + LoRA", "#D55E00", "o"),
    "vlm-vision-linear": Style("VLM vision tower + linear", "#CC79A7", "D"),
    "dinov2-logreg": Style("DINOv2 + logistic regression", "#0072B2", "s", "--"),
    "dinov2-ridge": Style("DINOv2 + ridge", "#56B4E9", "^", "--"),
    "dinov2-knn": Style("DINOv2 + kNN", "#009E73", "v", "--"),
    "dinov2-mean": Style("DINOv2 + nearest mean", "#999933", "P", "--"),
    "dinov2-lora": Style("DINOv2 + LoRA", "#000000", "X", "--"),
    "pixel-knn": Style("pixel kNN", "#888888", "h", ":"),
}
SPARE = (("#332288", ">"), ("#882255", "<"), ("#44AA99", "p"), ("#AA4499", "d"), ("#117733", "8"))


def style(method: str) -> Style:
    """The method's row, or a spare one chosen by its name."""
    colour, marker = SPARE[crc32(method.encode()) % len(SPARE)]
    return STYLES.get(method) or Style(method, colour, marker, "-.")


def ordered(methods: Iterable[str]) -> list[str]:
    """Methods in the order of the table, then the others by name."""
    rank = {method: index for index, method in enumerate(STYLES)}
    return sorted(set(methods), key=lambda method: (rank.get(method, len(rank)), method))


def figure(cells: Sequence[Mapping[str, Any]], dataset: str, out: Path, *, n_classes: int | None = None) -> list[Path]:
    """Draw one data set's cells; write `<file_stem(dataset)>.png` and `.svg` into the folder `out` (made if absent).

    `n_classes` adds the line of chance. Raises ResultsError when no cell is of this data set.
    """
    table = scores(cells, dataset)
    if not table:
        raise ResultsError(f"no cell of data set {dataset!r} to draw")
    out.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a name in a script that the font lacks
        mpl.rcdefaults()  # a matplotlibrc of the user's must not change the bytes
        mpl.rcParams.update(RC)
        drawn = _draw(table, _title(cells, dataset), n_classes)
        return [_save(drawn, out / f"{file_stem(dataset)}.{suffix}") for suffix in ("png", "svg")]


def _title(cells: Sequence[Mapping[str, Any]], dataset: str) -> str:
    seeds = len(seeds_of(cells, dataset))
    spread = f"mean and 95% interval over {seeds} seeds" if seeds > 1 else "one seed, no interval"
    return f"{name(dataset)}: {spread}"


def _draw(table: dict[str, dict[int, Score]], title: str, n_classes: int | None) -> Figure:
    drawn = Figure(figsize=SIZE, layout="constrained")
    FigureCanvasAgg(drawn)
    axes = drawn.add_subplot()
    axes.grid(axis="y", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    place = _x_axis(axes, sorted({k for row in table.values() for k in row}))
    for index, method in enumerate(ordered(table)):
        # Bars of methods with the same accuracy stay apart by a hair's breadth.
        _draw_method(axes, method, table[method], place, 0.03 * (index - (len(table) - 1) / 2))
    if n_classes:
        axes.axhline(100 / n_classes, color=GREY, linewidth=1, dashes=(6, 3), label=f"chance (1/{n_classes})", zorder=1)
    _y_axis(axes, table, n_classes)
    axes.set_title(title, loc="left", fontsize=11)
    drawn.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9.5, handlelength=3)
    return drawn


def _x_axis(axes: Axes, shots: Sequence[int]) -> dict[int, float]:
    """Ticks at the shots, log2 apart; 0 has no logarithm and sits left of the rest behind a gap. {shots: position}."""
    first = min((math.log2(k) for k in shots if k), default=0.0)
    place = {k: math.log2(k) if k else first - 1 for k in shots}
    axes.set_xticks([place[k] for k in shots], [str(k) for k in shots])
    axes.set_xlim(min(place.values()) - 0.35, max(place.values()) + 0.35)
    axes.set_xlabel("labelled examples per class (log scale)")
    if 0 in place and len(shots) > 1:
        _gap(axes, first - 0.5)
    return place


def _gap(axes: Axes, x: float) -> None:
    over: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "clip_on": False}
    axes.plot([x - 0.05, x + 0.05], [0, 0], color="white", linewidth=3, zorder=10, **over)
    slash = [(-0.6, -1.0), (0.6, 1.0)]
    axes.plot([x - 0.05, x + 0.05], [0, 0], linestyle="", marker=slash, color="black", markersize=10, zorder=11, **over)


def _draw_method(axes: Axes, method: str, row: dict[int, Score], place: dict[int, float], shift: float) -> None:
    look = style(method)
    if 0 in row:
        axes.axhline(100 * row[0].mean, color=look.colour, linestyle=":", linewidth=1, alpha=0.6, zorder=1)
    shots = sorted(row)
    # Without an interval the bar is NaN: not drawn, unlike one of length 0.
    bars = [100 * half if (half := row[k].half_width) is not None else math.nan for k in shots]
    axes.errorbar(
        [place[k] + (shift if k else 0) for k in shots],
        [100 * row[k].mean for k in shots],
        yerr=bars,
        color=look.colour,
        marker=look.marker,
        linestyle=look.line,
        label=look.title,
        markersize=9 if look.marker == "*" else 6,
        linewidth=1.6,
        elinewidth=1,
        capsize=2.5,
    )


def _y_axis(axes: Axes, table: dict[str, dict[int, Score]], n_classes: int | None) -> None:
    """Percent; only as much of 0..100 as there is to see, widened to tens. Intervals beyond it are cut."""
    points = [score for row in table.values() for score in row.values()]
    low = min(score.mean - (score.half_width or 0) for score in points)
    high = max(score.mean + (score.half_width or 0) for score in points)
    low = min(low, 1 / n_classes) if n_classes else low
    bottom = max(0, 10 * math.floor(10 * low - 0.1))
    top = min(100, 10 * math.ceil(10 * high + 0.1))
    margin = (top - bottom) / 50  # a marker at the very edge stays whole
    axes.set_ylim(bottom - margin, top + margin)
    axes.set_ylabel("accuracy on the test images (%)")


def _save(drawn: Figure, path: Path) -> Path:
    blank = {"Date": None, "Creator": None} if path.suffix == ".svg" else {"Software": None}
    buffer = io.BytesIO()
    drawn.savefig(buffer, format=path.suffix[1:], dpi=DPI, metadata=blank)
    return write_file(path, buffer.getvalue())
