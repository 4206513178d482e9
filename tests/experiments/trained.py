"""The command line in this process, and an adapter that kshot train made."""

import sys
from pathlib import Path

import pytest

from experiments.cli import main

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


def train(photos: Path, out: Path, *options: str) -> Path:
    """Train on two images a class of `photos`."""
    assert status_of("train", "--dataset", f"folder:{photos}", "--out", out, *TRAINING, *options) == 0
    return out
