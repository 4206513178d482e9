"""Sweeps: their configuration, their cells, who runs them, and their results."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from experiments.sweep.store import Results

log = logging.getLogger("kshot.sweep")


def sweep(
    preset: str | None = None,
    folder: Path | str | None = None,
    *,
    datasets: Sequence[str] | None = None,
    methods: Sequence[str] | None = None,
    shots: Sequence[int] | None = None,
    seeds: Sequence[int] | None = None,
    settings: Mapping[str, Any] | None = None,
    **options: Any,
) -> "Results":
    """Run a sweep as `kshot sweep` does and return its results; cells that the folder has already are not run again.

    preset: a preset's name or a YAML file; datasets, methods, shots and seeds replace its own. None: the demo, and for
        images of your own the models that `experiments.sweep.choice` finds best for this machine, which is logged.
    folder: where results are kept (default: runs/NAME).
    settings: {name: value}, or a tuple of values to compare; see `experiments.sweep.config.Settings`.
    options: of `experiments.sweep.grid.RunOptions` (device, workers, executor, service, ...).

    Reports are not written: `kshot report FOLDER` does that. Workers are processes of their own, so a script calls this
    below `if __name__ == "__main__":`. Raises InputError for what is wrong before anything runs, KshotError where cells
    failed.
    """
    from experiments.sweep.choice import choose
    from experiments.sweep.config import load
    from experiments.sweep.grid import RunOptions, run_sweep
    from experiments.sweep.preflight import unread

    settings = dict(settings or {})
    given = [*settings]
    if preset is None:
        named, service = (settings.get("model"), settings.get("backbone")), options.get("service", "local")
        chosen = choose(datasets or (), methods or (), *named, options.get("device") or "", service=service)
        methods, settings, options["device"] = chosen.methods or methods, settings | chosen.settings, chosen.device
        for line in chosen.lines:
            log.warning(line)
    grid = {"datasets": datasets, "methods": methods, "shots": shots, "seeds": seeds}
    overrides = {name: tuple(values) for name, values in grid.items() if values is not None}
    content = load(preset or "demo", overrides, settings)
    for line in unread(given, content.methods, content.variants):
        log.warning(line)
    return run_sweep(content, folder or Path("runs") / content.name, RunOptions(**options))
