"""The figure of all data sets: small multiples with one legend and the same shots, each with its own accuracies.

It does not know how cells were made, and draws nothing that others published: that is in the figure of each set.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from experiments.display import TOGETHER, name
from experiments.metrics import scores, seeds_of
from experiments.plot import ROW, canvas, draw_legend, grid_of, save, spread
from experiments.plot_axes import Table, panel, shots_of
from experiments.styles import ordered, style

PANEL = (3.5, 3.0)  # inches
COLUMNS = 3  # at most
WRAP = 36  # characters of a panel's title
CHANCE = "chance"


def together(
    cells: Sequence[Mapping[str, Any]], datasets: Sequence[str], out: Path, n_classes: Mapping[str, int]
) -> list[Path]:
    """Draw these data sets, each of which has a cell, side by side; write `together.png` and `.svg` into `out`.

    n_classes: classes by data set; adds the line of chance where it is known.
    """
    tables = {dataset: scores(cells, dataset) for dataset in datasets}
    said = {spread(tables[dataset], len(seeds_of(cells, dataset))) for dataset in datasets}
    title = said.pop() if len(said) == 1 else "means and 95% intervals"
    return save(lambda: _draw(tables, title, n_classes), out, TOGETHER)


def _draw(tables: Mapping[str, Table], title: str, n_classes: Mapping[str, int]) -> Figure:
    series = ordered(each for table in tables.values() for each in table)
    named = [*(style(each).title for each in series), *([CHANCE] if n_classes.keys() & tables.keys() else [])]
    across = min(COLUMNS, math.ceil(math.sqrt(len(tables))))
    down = math.ceil(len(tables) / across)
    drawn = canvas(PANEL[0] * across, PANEL[1] * down + ROW * (grid_of(named)[1] + 1))
    shots = sorted({k for table in tables.values() for k in shots_of(table)})
    for place, (dataset, table) in enumerate(tables.items()):
        axes = drawn.add_subplot(down, across, place + 1)
        panel(axes, table, n_classes.get(dataset), shots=shots, chance=CHANCE, published=())
        axes.set_title(textwrap.fill(name(dataset), WRAP), loc="left", fontsize=10)
        if place + across < len(tables):  # another is below it
            axes.set_xlabel("")
    drawn.suptitle(f"All data sets: {title}", fontsize=11)
    drawn.supylabel("accuracy on the test images (%)", fontsize=10)
    draw_legend(drawn, named)
    return drawn
