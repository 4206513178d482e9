"""Accuracies that others have published on the benchmarks, and the table that shows them beside ours.

Typed from the sources that each row names; nothing here was measured. Numbers that a source gives only as a figure are
left out.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from experiments.report.document import Table
from experiments.report.tables import NONE

SHOTS = (1, 2, 4, 8, 16)
ALL = "all"  # the full training data
SECOND_HAND = "second-hand"  # the numbers are not from their authors but from somebody who plotted them
BEST_EPOCH = "best epoch on test"  # the epoch was chosen by the accuracy reported
PER_CLASS = "mean per class"  # the accuracy is the mean of the classes' accuracies

Values = Mapping[int | str, float]  # {shots, or ALL: accuracy in percent}


class Reference(NamedTuple):
    """One published row of one data set. marks: what must be said with its numbers."""

    dataset: str
    method: str
    protocol: str
    source: str
    values: Values
    marks: tuple[str, ...] = ()


TIP = "log published with Tip-Adapter (Zhang et al., ECCV 2022)"
PLOTTED = "a third party's plotting script; the method: {}"
OQUAB = "Oquab et al., 2023 (arXiv 2304.07193)"
COOP = {
    "caltech101": "CoOp's split, 100 classes; CLIP RN50",
    "cars": "CoOp's split; CLIP RN50",
    "flowers": "CoOp's re-split; CLIP RN50",
    "pets": "CoOp's re-split; CLIP RN50",
}
LINEAR = "frozen features, logistic regression"


def _few_shot(
    method: str, source: str, *marks: str, shots: tuple[int, ...] = SHOTS, **values: tuple[float, ...]
) -> list[Reference]:
    """The rows of a method in CoOp's protocol. values: by data set one for each of `shots`."""
    return [
        Reference(dataset, method, COOP[dataset], source, dict(zip(shots, row, strict=True)), marks)
        for dataset, row in values.items()
    ]


def _full(method: str, **values: float) -> list[Reference]:
    """The rows of a DINOv2; of all sets but Cars the mean per class is reported."""
    return [
        Reference(dataset, method, LINEAR, OQUAB, {ALL: value}, () if dataset == "cars" else (PER_CLASS,))
        for dataset, value in values.items()
    ]


ROWS: tuple[Reference, ...] = (
    *_few_shot(
        "zero-shot CLIP",
        TIP,
        shots=(0,),
        caltech101=(85.92,),
        cars=(55.74,),
        flowers=(66.02,),
        pets=(85.83,),
    ),
    *_few_shot(
        "CLIP linear probe",
        PLOTTED.format("Radford et al., 2021"),
        SECOND_HAND,
        caltech101=(70.62, 78.72, 84.34, 87.78, 90.63),
        cars=(24.64, 36.53, 48.42, 60.82, 70.08),
        flowers=(58.07, 73.35, 84.80, 92.00, 94.95),
        pets=(30.14, 43.47, 56.35, 65.94, 76.42),
    ),
    *_few_shot(
        "CoOp",
        PLOTTED.format("Zhou et al., 2022"),
        SECOND_HAND,
        caltech101=(87.80, 87.87, 89.57, 90.10, 92.07),
        cars=(56.23, 58.73, 62.90, 67.85, 73.33),
        flowers=(69.07, 78.00, 85.80, 91.40, 94.73),
        pets=(85.87, 82.03, 87.03, 85.40, 86.30),
    ),
    *_few_shot(
        "Tip-Adapter",
        TIP,
        caltech101=(87.18, 88.44, 89.39, 89.83, 90.18),
        cars=(57.54, 57.93, 61.45, 62.93, 66.77),
        flowers=(73.12, 79.13, 83.80, 87.98, 89.89),
        pets=(86.10, 87.03, 86.45, 87.03, 88.14),
    ),
    *_few_shot(
        "Tip-Adapter-F",
        TIP,
        BEST_EPOCH,
        caltech101=(89.33, 89.74, 90.56, 91.44, 92.86),
        cars=(58.86, 61.50, 64.57, 69.25, 75.74),
        flowers=(79.98, 82.30, 88.83, 91.51, 94.80),
        pets=(87.00, 87.03, 87.54, 88.09, 89.70),
    ),
    *_full("DINOv2 ViT-S/14", caltech101=97.0, cars=81.6, flowers=99.6, pets=95.1),
    *_full("DINOv2 ViT-B/14", caltech101=96.1, cars=88.2, flowers=99.6, pets=96.2),
    *_full("DINOv2 ViT-L/14", caltech101=97.5, cars=90.1, flowers=99.7, pets=96.6),
    *_full("DINOv2 ViT-g/14", caltech101=97.6, cars=91.4, flowers=99.7, pets=96.7),
)

IN_FIGURES = ("zero-shot CLIP", "Tip-Adapter-F")
BACKBONES = {  # timm's name: the row that has it
    "vit_small_patch14_dinov2.lvd142m": "DINOv2 ViT-S/14",
    "vit_base_patch14_dinov2.lvd142m": "DINOv2 ViT-B/14",
    "vit_large_patch14_dinov2.lvd142m": "DINOv2 ViT-L/14",
    "vit_giant_patch14_dinov2.lvd142m": "DINOv2 ViT-g/14",
}


def published(dataset: str) -> list[Reference]:
    """The rows of a data set of the catalog; none where nothing is known to compare with."""
    return [row for row in ROWS if row.dataset == dataset]


def references_to_draw(dataset: str, backbones: Iterable[str]) -> list[Reference]:
    """The few rows that a figure has room for: without training, the best few-shot curve, and with the full data the
    DINOv2 that a backbone of the sweep is."""
    wanted = {*IN_FIGURES, *(BACKBONES.get(backbone) for backbone in backbones)}
    return [row for row in published(dataset) if row.method in wanted]


def published_table(dataset: str) -> Table | None:
    """What others have published on the data set; None where there is nothing."""
    columns: tuple[int | str, ...] = (0, *SHOTS, ALL)
    rows = [
        (_title(row), *(_value(row, column) for column in columns), row.protocol, row.source)
        for row in published(dataset)
    ]
    caption = (
        "Published, not measured here: accuracy in percent by labelled examples per class, or with all the training "
        "data, as the sources give it. Protocols differ: the rows with CLIP follow CoOp's, which has its own splits "
        "and classes, and have another backbone (RN50); those of DINOv2 learn from the full training data; a mean per "
        "class is no share of the test images. So a difference from our numbers is no difference between methods. "
        "Second-hand: not taken from the authors."
    )
    return Table(caption, ("method", *map(str, columns), "protocol", "source"), tuple(rows)) if rows else None


def _title(row: Reference) -> str:
    return f"{row.method} ({', '.join(row.marks)})" if row.marks else row.method


def _value(row: Reference, column: int | str) -> str:
    """The number with the decimals of its source: two, or one of the full training data."""
    if column not in row.values:
        return NONE
    return f"{row.values[column]:.{1 if column == ALL else 2}f}"
