"""The official recipes, unmodified, in an environment of their own: how the tests find, prepare and run them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

RUNNER = Path(__file__).parents[3] / "shared/tools/cookbook_recipe"
MODEL = "Qwen/Qwen3-VL-30B-A3B-Instruct"
MINUTES = 60.0
MARKS = [
    pytest.mark.slow,
    pytest.mark.network,
    pytest.mark.skipif(not RUNNER.exists(), reason="the official recipe's runner is not beside this checkout"),
]


def prepared(factory: pytest.TempPathFactory) -> Path:
    """The recipes' environment, and model and data of the one on images; KSHOT_RECIPE names a folder that keeps them
    for the next time."""
    kept = os.environ.get("KSHOT_RECIPE")
    folder = Path(kept) if kept else factory.getbasetemp() / "recipe"
    if not (folder / MODEL / "config.json").exists():
        recipe("prepare", folder)
    return folder


def recipe(stage: str, work: Path, *arguments: str) -> str:
    """What the runner prints, once it has ended well."""
    done = subprocess.run(
        [sys.executable, RUNNER, stage, "--work", work, *arguments],
        capture_output=True,
        text=True,
        timeout=20 * MINUTES,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout + done.stderr
