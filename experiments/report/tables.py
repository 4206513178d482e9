"""The tables of a report: accuracy and other metrics, cost, what was run, and where the numbers come from.

Cell records and the content of sweep.json in, tables out.
"""

import csv
import io
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

from experiments.report.document import Best, Table
from experiments.sweep.config import MODELS, capped
from experiments.sweep.intervals import Score
from experiments.sweep.methods import METHODS
from experiments.sweep.metrics import SHARES, scores, seeds_of
from experiments.sweep.provenance import name
from experiments.sweep.series import by_series, from_zero, method_of, ordered, style, zero_shot_of

Record = Mapping[str, Any]
CellId = tuple[str, str, int, int]  # dataset, method or series, shots, seed
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
PHASES = ("fit", "predict", "answer")
WORK = {"vision_forwards": "vision forwards", "train_tokens": "training tokens"}  # what a record may count


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


# Cost


def timings_table(cells: Sequence[Record]) -> Table:
    """Median seconds per cell to fit and to predict, by method."""
    rows = []
    for title, group in _by_method(cells).items():
        times = [_known(group, "timings", f"{phase}_seconds") for phase in ("fit", "predict")]
        rows.append((title, *(f"{median(seconds):.2f}" if seconds else NONE for seconds in times)))
    caption = (
        "Median seconds per cell. What an earlier cell has loaded, or an earlier cell or sweep has encoded, costs "
        "nothing again."
    )
    return Table(caption, ("method", "fit", "predict"), tuple(rows))


def cost_table(cells: Sequence[Record]) -> Table:
    """What all cells of each method took, and below them those of the sweep."""
    counted = [kind for kind in WORK if _known(cells, "work", kind)]
    groups = {**_by_method(cells), "the whole sweep": cells}
    rows = [_cost_row(title, group, counted) for title, group in groups.items()]
    caption = (
        "Cost: seconds that the cells took, summed, and in hours of a core; a cell has one core, or on a GPU the hours "
        "are those of that GPU. What another cell or sweep has loaded or encoded before costs nothing again."
    )
    if counted:
        caption += (
            " Counts are of the cells that recorded any: images that the vision tower saw, and tokens trained on."
        )
    header = ("method", "cells", *PHASES, "all seconds", "per cell", "core-hours", *(WORK[kind] for kind in counted))
    return Table(caption, header, tuple(rows))


def _by_method(cells: Sequence[Record]) -> dict[str, list[Record]]:
    """{title of a method: its cells}."""
    return {
        style(method).title: [cell for cell in cells if cell["method"] == method]
        for method in ordered(cell["method"] for cell in cells)
    }


def _known(cells: Sequence[Record], record: str, key: str) -> list[Any]:
    """The values of the cells that recorded one."""
    return [value for cell in cells if (value := cell.get(record, {}).get(key)) is not None]


def _cost_row(title: str, cells: Sequence[Record], counted: Sequence[str]) -> tuple[str, ...]:
    phases = [_known(cells, "timings", f"{phase}_seconds") for phase in PHASES]
    seconds = sum(second for known in phases for second in known)
    totals = (f"{seconds:,.1f}", f"{seconds / len(cells):,.2f}", f"{seconds / 3600:,.3f}")
    counts = [_known(cells, "work", kind) for kind in counted]
    return (
        title,
        str(len(cells)),
        *(f"{sum(known):,.1f}" if known else NONE for known in phases),
        *(totals if any(phases) else [NONE] * 3),
        *(f"{sum(known):,}" if known else NONE for known in counts),
    )


# What was run


def facts_table(
    sweep: Record, cells: Sequence[Record], n_images: Mapping[str, int], n_classes: Mapping[str, int]
) -> Table:
    """Per data set: classes, test images, seeds, cells; where models were trained, how often images were mirrored."""
    rows: list[tuple[str, ...]] = []
    for dataset in sweep["datasets"]:
        here = [cell for cell in cells if cell["dataset"] == dataset]
        counts = n_classes.get(dataset, NONE), n_images.get(dataset, NONE), len(seeds_of(here, dataset)), len(here)
        hflips = ", ".join(f"{hflip:g}" for hflip in sorted({*_known(here, "settings", "hflip")}))
        rows.append((name(dataset), *map(str, counts), hflips or NONE))
    header: tuple[str, ...] = ("data set", "classes", "test images", "seeds", "cells", "hflip")
    if all(row[-1] == NONE for row in rows):
        return Table("What was run.", header[:-1], tuple(row[:-1] for row in rows))
    caption = "What was run. hflip: the share of training views that were mirrored, as it was set."
    return Table(caption, header, tuple(rows))


def prompts_table(sweep: Record) -> Table | None:
    """The prompts by the numbers that name them; None where there are not several."""
    rows = [(str(number), text) for number, text in enumerate(sweep.get("prompts", ()), 1)]
    return Table("Prompts.", ("prompt", "text"), tuple(rows)) if len(rows) > 1 else None


def missing_table(sweep: Record, cells: Sequence[Record], failures: Mapping[CellId, str]) -> Table | None:
    """The cells of the grid that are missing, one row per (data set, method, seed) and error; None when none is.
    failures: the error of those that were tried and failed, by the method's name without what is compared."""
    present = {(cell["dataset"], cell["method"], cell["shots"], cell["seed"]) for cell in cells}
    missing: dict[tuple[str, str, int, str], list[int]] = defaultdict(list)
    for dataset, method, shots, seed in full_grid(sweep, cells):
        if (dataset, method, shots, seed) not in present:
            error = failures.get((dataset, method_of(method), shots, seed), "")
            missing[dataset, method, seed, error].append(shots)
    if not missing:
        return None
    caption = f"Cells not run yet: {sum(map(len, missing.values()))}."
    header: tuple[str, ...] = ("data set", "method", "seed", "shots", "error")
    rows = [
        (name(dataset), style(method).title, str(seed), ", ".join(map(str, sorted(shots))), error or NONE)
        for (dataset, method, seed, error), shots in missing.items()
    ]
    failed = sum(len(shots) for (*_, error), shots in missing.items() if error)
    if not failed:
        return Table(caption, header[:-1], tuple(row[:-1] for row in rows))
    caption += f" Of them {failed} failed, with the error that is shown; {NONE}: not tried."
    return Table(caption, header, tuple(rows), prose=True)


def full_grid(sweep: Record, cells: Sequence[Record]) -> list[CellId]:
    """All cells of the sweep, a method with each combination of what is compared and it reads. A zero-shot method
    counts once per data set and series: under the seed it ran with, else 0."""
    sweep, cells = by_series(sweep, cells)
    grid: list[CellId] = []
    for dataset in sweep["datasets"]:
        shots = capped(sweep["shots"], sweep.get("most_shots", {}).get(dataset))
        for method in sweep["methods"]:
            if method_of(method) in METHODS and not METHODS[method_of(method)].learns:
                seeds = [c["seed"] for c in cells if c["dataset"] == dataset and c["method"] == method]
                grid.append((dataset, method, 0, min(seeds, default=0)))
            else:
                grid += [(dataset, method, k, seed) for k in shots if k for seed in sweep["seeds"]]
    return grid


# Where the numbers come from


def provenance_tables(sweep: Record, cells: Sequence[Record]) -> Iterator[Table]:
    """Data, models, machines, settings and versions, each where something is recorded of it."""
    if sweep.get("protocols"):
        yield _data_table(sweep)
    if models := _models_table(sweep):
        yield models
    if cells:
        yield _machines_table(cells)
    if sweep.get("settings"):
        yield _settings_table("Settings of the sweep.", "setting", sweep["settings"])
    if cells:
        yield _settings_table("Versions.", "package", *(cell["versions"] for cell in cells))


def _data_table(sweep: Record) -> Table:
    """Per data set its protocol, and what is recorded of its files: their source and fingerprints."""
    rows = []
    for dataset, protocol in sweep["protocols"].items():
        facts = [f"{key}: {value}" for key, value in _leaves(sweep.get("data", {}).get(dataset, {})) if value]
        rows.append((name(dataset), protocol, "; ".join(facts) or NONE))
    if all(row[-1] == NONE for row in rows):
        return Table("Data: the protocol.", ("data set", "protocol"), tuple(row[:-1] for row in rows), prose=True)
    caption = "Data: the protocol, and its files as they were found."
    return Table(caption, ("data set", "protocol", "files"), tuple(rows), prose=True)


def _models_table(sweep: Record) -> Table | None:
    """The models that the methods read, with their revisions, each of several that are compared in a row of its own;
    None where they read none."""
    settings, methods = sweep.get("settings", {}), map(method_of, sweep["methods"])
    read = {setting for method in methods if method in METHODS for setting in METHODS[method].settings}
    rows: list[tuple[str, ...]] = []
    for kind in (kind for kind in MODELS if kind in settings and kind in read):
        names, revisions = (as_list(settings.get(key)) for key in (kind, f"{kind}_revision"))
        revisions = revisions if len(revisions) == len(names) else revisions * len(names)
        rows += [
            (kind, _value(model), NONE if revision is None else _value(revision))
            for model, revision in zip(names, revisions, strict=True)
        ]
    caption = f"Models: the revision is a fingerprint of the weights. {NONE}: of a hub, its newest at the time."
    return Table(caption, ("setting", "model", "revision"), tuple(rows), prose=True) if rows else None


def _machines_table(cells: Sequence[Record]) -> Table:
    """The kinds of machines and services that ran the cells, and how many cells each."""
    counts = Counter((cell["versions"].get("machine", NONE), cell["versions"].get("service", NONE)) for cell in cells)
    rows = tuple((machine, service, str(count)) for (machine, service), count in sorted(counts.items()))
    caption = "Machines: system, processor and device, and the service that computed."
    return Table(caption, ("machine", "service", "cells"), rows)


def _settings_table(caption: str, header: str, *records: Record) -> Table:
    """Nested settings, one row per leaf in order of name; records that differ show every value."""
    leaves: dict[str, set[str]] = defaultdict(set)
    for record in records:
        for key, value in _leaves(record):
            leaves[key].add(value)
    rows = [(name(key), "; ".join(sorted(values))) for key, values in sorted(leaves.items())]
    return Table(caption, (header, "value"), tuple(rows))


def as_list(value: Any) -> list[Any]:
    """The values of a setting: several where they are compared."""
    return list(value) if isinstance(value, list | tuple) else [value]


def _leaves(record: Record, prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _value(value)


def _value(value: Any) -> str:
    if isinstance(value, str):
        return name(value)
    if isinstance(value, list | tuple):
        return ", ".join(map(_value, value))
    return json.dumps(value, sort_keys=True)
