"""An adapter that kshot train made, for the tests of train and predict."""

import sys
from pathlib import Path

import pytest

from experiments.cli import main

TINY = ("--set", "views_per_class=4", "--set", "batch_size=4", "--set", "rank=4", "--set", "max_side=40")


def train(photos: Path, out: Path, *options: str) -> Path:
    """Train on two images a class of `photos`, in this process."""
    words = ["kshot", "train", "--dataset", f"folder:{photos}", "--shots", "2", "--out", str(out), *TINY, *options]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit, match=r"^0$"):
            main.main()
    return out
