"""What the tests of reports share: a sweep, its cells with made-up accuracies, and the report written of them."""

from contextlib import nullcontext
from html.parser import HTMLParser
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pyarrow as pa
from matplotlib.figure import Figure
from pyarrow import parquet

from experiments.report.report import write_report

NASTY = f"folder:/home/lovelace/<script>alert(1)|{'x' * 90}"
SWEEP = {
    "name": "demo",
    "datasets": ["icons"],
    "methods": ["vlm-zero-shot", "vlm-lora", "pixel-knn"],
    "shots": [1, 4],
    "seeds": [0, 1, 2],
    "settings": {"root": "/home/lovelace/my data", "adam": {"lr": 1e-4, "betas": [0.9, 0.95]}},
    "notes": ["The nano models have <random> weights."],
    "command": "kshot sweep demo --root /home/lovelace/data --shots 1,4",
}
ACCURACY = {
    ("vlm-zero-shot", 0): [0.25],
    ("vlm-lora", 1): [0.30, 0.32, 0.34],
    ("vlm-lora", 4): [0.80, 0.82, 0.84],
    ("pixel-knn", 1): [0.31, 0.33, 0.35],
    ("pixel-knn", 4): [0.40, 0.42, 0.44],
}


class Page(HTMLParser):
    """Tags in order with attributes; complains when they do not nest."""

    EMPTY = frozenset({"meta", "img", "br", "source"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def cell(method: str, shots: int, seed: int, accuracy: float, dataset: str = "icons") -> dict:
    answers = method in ("vlm-lora", "vlm-zero-shot")
    return {
        "key": f"{method}-{shots}-{seed}",
        "dataset": dataset,
        "protocol": "kshot",
        "method": method,
        "shots": shots,
        "seed": seed,
        "settings": {},
        "metrics": {
            "accuracy": accuracy,
            "accuracy_strict": accuracy / 2 if answers else None,
            "accuracy_constrained": accuracy if answers else None,
            "top5": 0.9,
            "mean_per_class": accuracy,
            "nll": 1.5 if answers else None,
            "ece": 0.1 if answers else None,
            "unparseable": 0.05 if answers else None,
        },
        "timings": {"fit_seconds": 2.0 + seed, "predict_seconds": 0.5},
        "versions": {"python": "3.11.2", "torch": "2.15.0"},
    }


def grid(dataset: str = "icons") -> list[dict]:
    return [cell(m, k, seed, a, dataset) for (m, k), row in ACCURACY.items() for seed, a in enumerate(row)]


def written(folder: Path, sweep: dict, cells: list[dict], *, drawn: bool = False, **more) -> tuple[str, str]:
    """report.md and report.html. Unless they are `drawn`, the files of figures are empty: drawing takes most of the
    time."""
    with nullcontext() if drawn else patch.object(Figure, "savefig"):
        write_report(folder, sweep, cells, {"icons": 120}, **more)
    return (folder / "report.md").read_text(), (folder / "report.html").read_text()


def store_predictions(folder: Path, cells: list[dict], images: int = 200, classes: int = 10) -> None:
    """Predictions of some images: right from the first on as often as the record says, else one of the next classes."""
    (folder / "predictions").mkdir()
    number = np.arange(images)
    label, key = number % classes, [str(n) for n in number]
    for each in cells:
        wrong = (label + 1 + (number % 3 > 0)) % classes
        prediction = np.where(number < round(images * each["metrics"]["accuracy"]), label, wrong)
        table = pa.table({"key": key, "label": label, "prediction": prediction})
        parquet.write_table(table, folder / "predictions" / f"{each['key']}.parquet")


def axes_height(figure: Figure) -> float:
    """Inches of the first axes; the legend must be wholly on the page, below them."""
    figure.draw_without_rendering()
    (legend,) = figure.legends
    box, axes = legend.get_window_extent(), figure.axes[0].get_window_extent()
    assert min(box.x0, box.y0) >= 0
    assert box.x1 <= figure.bbox.width
    assert box.y1 < axes.y0
    return axes.height / figure.dpi
