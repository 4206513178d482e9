"""What a results folder says: `kshot report`, and the table on the terminal at the end of a sweep."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from experiments.cli import options as opt
from experiments.cli.adapters import check_push, offer
from experiments.terminal import err, out, plain_table, print_paths

if TYPE_CHECKING:
    from experiments.report.comparisons import ImageSources
    from experiments.sweep.grid import Plan
    from experiments.sweep.intervals import Score
    from experiments.sweep.store import Results


def report(
    folder: Annotated[Path, typer.Argument(help="A results folder.")],
    pack: Annotated[bool, typer.Option("--pack", help="Put the records of all cells into one file.")] = False,
    push_to_hub: opt.PushToHub = None,
    yes: opt.Yes = False,
    public: opt.Public = False,
) -> None:
    """Compute the metrics of a results folder from its stored predictions, draw the figures and write the reports,
    without example images: those are in the reports that kshot sweep writes."""
    from experiments.sweep.store import Results

    check_push(push_to_hub, yes, public)
    results = Results(folder)
    content = results.sweep()
    with results.writing():
        if not results.has_predictions():
            out.print(f"{folder} has no predictions: its metrics are taken as they are recorded", style="yellow")
        elif wrong := results.recompute():
            out.print(f"metrics of {wrong} cells did not fit their predictions and are corrected", style="yellow")
        if pack:
            results.pack()
        paths = report_of(results, content)
    print_paths(paths)
    if push_to_hub is not None:
        offer(folder, push_to_hub, yes, public)


def report_of(results: "Results", content: dict[str, Any], planned: "Plan | None" = None) -> list[Path]:
    """Write the reports of what is stored and print their summary. planned: where their example images come from; None:
    they have none."""
    from experiments.report.comparisons import training_notes
    from experiments.report.report import write_report
    from experiments.sweep.config import command

    with err.status("drawing the report"):
        cells = results.cells()
        # training that fell behind is said anew each time: it changes as cells come
        notes = [*content["notes"], *training_notes(results.folder, content, cells)]
        content = {**content, "notes": notes, "command": command(content)}
        images = {cell["dataset"]: cell["test_images"] for cell in cells}
        counts = {dataset: len(names) for dataset, names in content["classes"].items()}
        shown = _image_sources(planned) if planned else None
        failures = {(f["dataset"], f["method"], f["shots"], f["seed"]): f["error"] for f in results.failures()}
        paths = write_report(results.folder, content, cells, images, n_classes=counts, failures=failures, images=shown)
    print_summary(content, cells)
    return paths


def _image_sources(planned: "Plan") -> "ImageSources":
    """Where the report gets images: a test image by its key, and the first training image of a class."""
    from experiments.report.comparisons import ImageSources

    sets = {dataset.name: dataset for dataset in planned.datasets.values()}
    tests = {(name, e.key): e for name, dataset in sets.items() for e in dataset.test}
    firsts = {(name, e.label): e for name, dataset in sets.items() for e in reversed(dataset.train)}
    return ImageSources(
        lambda name, key: tests[name, key].image if (name, key) in tests else None,
        lambda name, label: firsts[name, label].image if (name, label) in firsts else None,
    )


def print_summary(content: dict[str, Any], cells: list[dict[str, Any]]) -> None:
    """Accuracy by method (and what is compared) and shots for each data set, and what must be said of the models."""
    from experiments.sweep.metrics import scores
    from experiments.sweep.series import by_series, from_zero, method_of

    sweep, records = by_series(content, cells)
    numbers = _numbers(sweep["methods"])
    for dataset in content["datasets"]:
        accuracies = from_zero(scores(records, dataset))
        shots = sorted({k for each in accuracies.values() for k in each})
        table = plain_table(["method", *(f"k={k}" for k in shots)])
        for series in sweep["methods"]:
            under = _choices(series)
            title = method_of(series) + (f" #{numbers[under]}" if under else "")  # 80 columns are few
            table.add_row(title, *(_mean(accuracies.get(series, {}).get(k)) for k in shots))
        out.print(f"{dataset}: accuracy in %, and its 95% interval over seeds and test images", style="bold")
        out.print(table, soft_wrap=False)
        out.print()
    for under, number in numbers.items():
        out.print(f"#{number}: {under}")
    for note in content["notes"]:
        out.print(note, style="yellow")


def _numbers(methods: Iterable[str]) -> dict[str, int]:
    """What series are run under → the number that stands for it, from 1: prompts first, as they are numbered."""
    from experiments.sweep.series import PROMPT, choices_of

    series = sorted(methods, key=lambda each: PROMPT not in {choice.setting for choice in choices_of(each)})
    texts = dict.fromkeys(under for each in series if (under := _choices(each)))
    return {under: number for number, under in enumerate(texts, 1)}


def _choices(series: str) -> str:
    """What a series is run under of what is compared, a prompt with its words."""
    from experiments.sweep.series import PROMPT, choice_text, choices_of

    told = [choice for choice in choices_of(series) if not choice.idle]
    return ", ".join(f"prompt {c.value}" if c.setting == PROMPT else choice_text(c) for c in told)


def _mean(score: "Score | None") -> str:
    if score is None:
        return ""
    low, high = score.interval or (score.mean, score.mean)
    ends = f"\n{100 * low:.0f}-{100 * high:.0f}" if score.n > 1 else ""
    return f"{100 * score.mean:.1f}{ends}"
