"""The tables of a report on what came out: accuracy and other metrics. Cell records in, tables out."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from experiments.report.document import Best, Table
from experiments.sweep.intervals import Score
from experiments.sweep.metrics import SHARES, scores
from experiments.sweep.provenance import name
from experiments.sweep.series import from_zero, method_of, ordered, style, zero_shot_of

Record = Mapping[str, Any]
NONE = "\N{EN DASH}"


class Metric(NamedTuple):
    """How a metric is shown: its column, what it is multiplied by, decimals, whether more is better."""

    header: str
    factor: int
    decimals: int
    more_is_better: bool


METRICS = {
    "accuracy": Metric("accuracy %", 100, 1, True),
    "accuracy_constrained": Metric("constrained %", 100, 1, True),
    "accuracy_strict": Metric("strict %", 100, 1, True),
    "top5": Metric("top-5 %", 100, 1, True),
    "mean_per_class": Metric("mean per class %", 100, 1, True),
    "nll": Metric("NLL, nats", 1, 2, False),
    "ece": Metric("ECE %", 100, 1, False),
    "unparseable": Metric("unparseable %", 100, 1, False),
}
THOUGHT_METRICS = {
    "accuracy": Metric("with %", 100, 1, True),
    "accuracy_without_thought": Metric("without %", 100, 1, True),
    "thoughts_closed": Metric("closed %", 100, 1, True),
    "thoughts_unfinished": Metric("unfinished %", 100, 1, False),
    "thought_tokens": Metric("tokens", 1, 1, False),
}
TEXT_METRICS = ("accuracy_constrained", "accuracy_strict", "unparseable")  # of answers in text


def percent(score: Score | None) -> str:
    """`45.2 [42.3, 48.1]` over test images (and seeds), `45.2 ± 3.1` over seeds, or `45.2` without an interval."""
    if score is None or score.within is None:
        return _number(score, METRICS["accuracy"])
    low, high = score.within
    return f"{100 * score.mean:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def accuracy_table(cells: Sequence[Record], dataset: str) -> Table:
    """Accuracy by method and shots; a mean over fewer seeds than others have says over how many."""
    measured = scores(cells, dataset)
    curves = from_zero(measured)
    shown = [score for row in curves.values() for score in row.values()]
    most_seeds = max(score.n for score in shown)
    shots = sorted({k for row in curves.values() for k in row})
    columns = {k: {m: row[k] for m, row in curves.items() if k in row} for k in shots}
    best = {k: _best(column, more_is_better=True) for k, column in columns.items()}

    def field(series: str, k: int) -> str:
        score = columns[k].get(series)
        few = f" (n={score.n})" if score and k and score.n < most_seeds else ""
        return _marked(percent(score) + few, series in best[k])

    rows = [(style(series).title, *(field(series, k) for k in columns)) for series in ordered(curves)]
    caption = f"Accuracy in percent by labelled examples per class: {_intervals(shown)}; the best of a column is bold."
    return Table(caption + _untuned(measured), ("method", *map(str, columns)), tuple(rows))


def text_table(cells: Sequence[Record], dataset: str) -> Table | None:
    """What the methods that answer in text wrote, at every shots; None where there is none. A zero-shot method that
    another one tunes has its row there, at 0."""
    measured = {metric: scores(cells, dataset, metric) for metric in TEXT_METRICS}
    curves = {metric: from_zero(table) for metric, table in measured.items()}
    constrained = curves["accuracy_constrained"]
    tuned = {zero_shot_of(series) for series in constrained}
    rows = [
        (style(series).title, str(k), *(percent(curves[metric].get(series, {}).get(k)) for metric in TEXT_METRICS))
        for series in ordered(constrained)
        if series not in tuned
        for k in sorted(constrained[series])
    ]
    if not rows:
        return None
    shown = [score for table in measured.values() for row in table.values() for score in row.values()]
    calibrated = any(cell["settings"].get("calibration", "none") != "none" for cell in cells)
    limits = {cell["settings"]["answer_tokens"] for cell in cells if "answer_tokens" in cell["settings"]}
    limit = f", of at most {' or '.join(map(str, sorted(limits)))} tokens," if limits else ","
    caption = (
        f"Answers in text, in percent, by labelled examples per class (k): {_intervals(shown)}. Constrained: the model "
        f"restricted to the class names, by its exact posterior{' as calibrated' if calibrated else ''}, ties to the "
        f"lower label. Strict: the model's greedy free answer{limit} is the class name, after its last colon (the rule "
        "of the official recipe). Unparseable: the free answers that name no class."
    )
    caption += _untuned(measured["accuracy_constrained"])
    return Table(caption, ("method", "k", *(METRICS[metric].header for metric in TEXT_METRICS)), tuple(rows))


def thoughts_table(cells: Sequence[Record], dataset: str) -> Table | None:
    """Of methods that thought before they answered: accuracy with and without, and how thoughts ended, at every shots;
    None where there is none."""
    measured = {metric: scores(cells, dataset, metric) for metric in THOUGHT_METRICS}
    without = measured["accuracy_without_thought"]

    def field(metric: str, series: str, k: int) -> str:
        score, shown = measured[metric].get(series, {}).get(k), THOUGHT_METRICS[metric]
        return percent(score) if metric in SHARES else _number(score, shown)

    rows = [
        (style(series).title, str(k), *(field(metric, series, k) for metric in THOUGHT_METRICS))
        for series in ordered(without)
        for k in sorted(without[series])
    ]
    if not rows:
        return None
    limits = {cell["settings"]["thinking"] for cell in cells if "thinking" in cell["settings"]}
    most = " or ".join(map(str, sorted(limits)))
    caption = (
        f"Thoughts of at most {most} tokens before the answer, by labelled examples per class (k): accuracy with and "
        "without them, the share that the model itself ended and the share that ran out and was closed by force, and "
        "their mean length. The classes are scored exactly after each thought, and an image's thoughts are averaged."
    )
    return Table(caption, ("method", "k", *(shown.header for shown in THOUGHT_METRICS.values())), tuple(rows))


def metrics_table(cells: Sequence[Record], dataset: str) -> Table:
    """Every metric that has a value, at the largest shots, and of the zero-shot methods at 0."""
    largest = largest_shots(cells, dataset)
    last = [cell for cell in cells if cell["dataset"] == dataset and cell["shots"] in (0, largest)]
    every = {metric: {m: max(row.items())[1] for m, row in scores(last, dataset, metric).items()} for metric in METRICS}
    columns = _distinct({metric: column for metric, column in every.items() if column})
    best = {metric: _best(column, METRICS[metric].more_is_better) for metric, column in columns.items()}
    rows = [
        (
            style(series).title,
            *(_marked(_mean(columns[m].get(series), METRICS[m]), series in best[m]) for m in columns),
        )
        for series in ordered(cell["method"] for cell in last)
    ]
    caption = (
        f"All metrics at {largest} labelled examples per class (zero-shot: at none), means over seeds; the best of a "
        f"column is bold. {NONE}: no meaning or no value."
    )
    return Table(caption, ("method", *(METRICS[metric].header for metric in columns)), tuple(rows))


def _distinct(columns: Mapping[str, Mapping[str, Score]]) -> dict[str, Mapping[str, Score]]:
    """Without columns that say of each method what one before says of it."""
    kept: dict[str, Mapping[str, Score]] = {}
    for metric, column in columns.items():
        means = {series: score.mean for series, score in column.items()}
        if not any(means.items() <= {s: score.mean for s, score in other.items()}.items() for other in kept.values()):
            kept[metric] = column
    return kept


def _mean(score: Score | None, metric: Metric) -> str:
    return _number(score and score._replace(half_width=None), metric)


def largest_shots(cells: Sequence[Record], dataset: str) -> int:
    """The most labelled examples per class that any cell of the data set had."""
    return max(cell["shots"] for cell in cells if cell["dataset"] == dataset)


def _number(score: Score | None, metric: Metric) -> str:
    if score is None:
        return NONE
    mean, *half_width = (
        f"{metric.factor * value:.{metric.decimals}f}" for value in (score.mean, score.half_width) if value is not None
    )
    return " ± ".join([mean, *half_width])


def _best(column: Mapping[str, Score], more_is_better: bool) -> set[str]:
    """The methods at the top (ties included); none where all are the same."""
    means = {score.mean for score in column.values()}
    top = (max if more_is_better else min)(means, default=None)
    return {method for method, score in column.items() if score.mean == top} if len(means) > 1 else set()


def _marked(text: str, best: bool) -> str:
    return Best(text) if best else text


def _intervals(shown: Sequence[Score]) -> str:
    """What a number of the table is, for its caption; of each kind of interval only where one is shown."""
    both = any(score.within and score.n > 1 for score in shown)
    over_images = any(score.within and score.n == 1 for score in shown)
    over_seeds = any(score.half_width is not None and not score.within for score in shown)
    texts = {
        "mean, and in brackets its 95% interval over seeds and test images (Student's over seeds and Wilson's over "
        "images, their distances added in squares)": both,
        "mean ± half-width of the 95% Student-t interval over seeds": over_seeds or not (both or over_images),
        "where there is a single run, in brackets the 95% Wilson score interval over test images": over_images,
    }
    return "; ".join(text for text, shows in texts.items() if shows)


def _untuned(measured: Mapping[str, Mapping[int, Score]]) -> str:
    """For a caption: which methods begin at 0 shots with the value of another."""
    curves = from_zero(measured)
    titles = {
        style(method_of(series)).title: style(method_of(untuned)).title
        for series in ordered(curves)
        if 0 in curves[series].keys() - measured[series].keys() and (untuned := zero_shot_of(series))
    }
    return "".join(f" {title} at 0 is {untuned}: the model before it is tuned." for title, untuned in titles.items())


def csv_of(cells: Sequence[Record]) -> str:
    """A row a cell, for spreadsheets and other programs: what it is, every metric (shares as fractions), seconds, and a
    column for each setting. Without absolute paths."""
    plain = ("dataset", "protocol", "method", "shots", "seed", "test_images")
    metrics, settings, times = (
        sorted({key for cell in cells for key in cell.get(part, {})}) for part in ("metrics", "settings", "timings")
    )
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*plain, *metrics, *times, *(f"setting.{key}" for key in settings)])
    for cell in cells:
        values = [cell.get(key) for key in plain]
        for part, keys in (("metrics", metrics), ("timings", times), ("settings", settings)):
            values += [cell.get(part, {}).get(key) for key in keys]
        writer.writerow([name(str(v)) if isinstance(v, str) else v for v in values])
    return file.getvalue()
