"""CONTRIBUTING shows three ways through the project; here each is gone, and the files entered are those it lists."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
HEADINGS = {
    "cell": "From a data set to the result of a cell",
    "image": "From an image's bytes to the vision tower",
    "request": "From an HTTP forward_backward to the engine",
}


@pytest.fixture(scope="module")
def entered() -> dict[str, list[str]]:
    command = [sys.executable, "-W", "ignore", "-m", "tests.ways"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, list[str]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("way", HEADINGS)
def test_a_way_enters_the_files_that_are_listed(entered: dict[str, list[str]], way: str) -> None:
    section = TEXT.split(f"### {HEADINGS[way]}\n")[1].split("\n### ")[0]
    block = re.search(r"```\n(.*?)```", section, re.DOTALL)
    assert block
    assert entered[way] == sorted(line.split()[0] for line in block[1].splitlines() if line)
