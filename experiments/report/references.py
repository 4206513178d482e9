"""Accuracies that others have published on the benchmarks, and the table that shows them beside ours.

They are in published.csv, typed from the sources that each row names; nothing there was measured by us. Numbers that a
source gives only as a figure are left out.
"""

import csv
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.resources import files
from typing import NamedTuple

from experiments.report.document import Table
from experiments.report.tables import NONE

ALL = "all"  # the full training data
COLUMNS: tuple[int | str, ...] = (0, 1, 2, 4, 8, 16, ALL)
IN_FIGURES = ("zero-shot CLIP", "Tip-Adapter-F")
BACKBONES = {  # timm's name: the method that has it
    "vit_small_patch14_dinov2.lvd142m": "DINOv2 ViT-S/14",
    "vit_base_patch14_dinov2.lvd142m": "DINOv2 ViT-B/14",
    "vit_large_patch14_dinov2.lvd142m": "DINOv2 ViT-L/14",
    "vit_giant_patch14_dinov2.lvd142m": "DINOv2 ViT-g/14",
}


# What is published as a mean of several data sets alone, and so is no row of one.
MEANS = (
    "Second-hand, of Qwen2-VL-2B: Visual-RFT (ICCV 2025, arXiv 2503.01785) gains over the untuned model, as the mean "
    "of Flowers, Pets, Aircraft and Cars, 24.3, 27.5, 25.9, 29.1 and 29.3 points at 1, 2, 4, 8 and 16 shots; "
    "ReFine-RFT (CVPR 2026 Findings) has a mean of 86.5% at 4 shots."
)


class Reference(NamedTuple):
    """One published row of one data set.

    values: {shots, or ALL: accuracy in percent}. decimals: of the source. marks: what must be said with the numbers.
    "second-hand": they are not from their authors but from somebody who plotted or copied them; "best epoch on test":
    the epoch was chosen by the accuracy reported; "mean per class": they are the mean of the classes' accuracies;
    "another model": a vision-language model that is none of ours.
    """

    dataset: str
    method: str
    protocol: str
    source: str
    values: Mapping[int | str, float]
    decimals: int
    marks: str = ""


@cache
def references() -> tuple[Reference, ...]:
    """Every published row, in the order of the file."""
    rows = csv.DictReader((files("experiments") / "report/published.csv").read_text("utf-8").splitlines())
    texts = [name for name in Reference._fields if name not in ("values", "decimals")]
    made = []
    for row in rows:
        given = {column: row[str(column)] for column in COLUMNS if row[str(column)]}
        decimals = max(len(text.partition(".")[2]) for text in given.values())
        values = {column: float(text) for column, text in given.items()}
        made.append(Reference(values=values, decimals=decimals, **{name: row[name] for name in texts}))
    return tuple(made)


def published(dataset: str) -> list[Reference]:
    """The rows of a data set of the catalog; none where nothing is known to compare with."""
    return [row for row in references() if row.dataset == dataset]


def references_to_draw(dataset: str, backbones: Iterable[str]) -> list[Reference]:
    """The few rows that a figure has room for: without training, the best few-shot curve, and with the full data the
    DINOv2 that a backbone of the sweep is."""
    wanted = {*IN_FIGURES, *(BACKBONES.get(backbone) for backbone in backbones)}
    return [row for row in published(dataset) if row.method in wanted]


def published_table(dataset: str) -> Table | None:
    """What others have published on the data set, with the decimals of the sources; None where there is nothing."""
    rows = [
        (
            f"{row.method} ({row.marks})" if row.marks else row.method,
            *(f"{row.values[k]:.{row.decimals}f}" if k in row.values else NONE for k in COLUMNS),
            row.protocol,
            row.source,
        )
        for row in published(dataset)
    ]
    caption = (
        "Published, not measured here: accuracy in percent by labelled examples per class, or with all the training "
        "data, as the sources give it. Protocols differ: the rows with CLIP follow CoOp's, which has its own splits "
        "and classes, and have another backbone (RN50); those of DINOv2 learn from the full training data; a mean per "
        "class is no share of the test images. So a difference from our numbers is no difference between methods. "
        "Second-hand: not taken from the authors. Another model: a vision-language model, tuned on CoOp's data. "
        + MEANS
    )
    return Table(caption, ("method", *map(str, COLUMNS), "protocol", "source"), tuple(rows)) if rows else None
