"""The command line in this process, without workers where a test wants none, and an adapter that kshot train made."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from experiments.cli import main
from experiments.sweep import workers
from experiments.sweep.cells import Job

TINY = ("--set", "views_per_class=4", "--set", "batch_size=4", "--set", "rank=4")
TRAINING = ("--shots", "2", *TINY, "--set", "max_side=40")


def status_of(*words: object) -> int:
    """How `kshot WORDS` ends."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["kshot", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


def in_this_process(patch: pytest.MonkeyPatch) -> list[Job]:
    """Run cells without worker processes while the patch holds; gives the list of them."""
    jobs: list[Job] = []

    def local(run: Any, mine: Sequence[Any], _: int | None = None, *, first: Sequence[Any] = (), **__: Any) -> Any:
        for job in (*first, *mine):
            jobs.extend([job] if isinstance(job, Job) else [])
            yield job, workers.call(run, job)

    patch.setattr(workers, "local", local)
    return jobs


def train(photos: Path, out: Path, *options: str) -> Path:
    """Train on two images a class of `photos`."""
    assert status_of("train", "--dataset", f"folder:{photos}", "--out", out, *TRAINING, *options) == 0
    return out
