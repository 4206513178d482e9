"""A pipe in the place of each file of the user's: one line, and nobody waits for what is never written."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from baselines.weights import config as backbone_config
from data import catalog
from data.benchmarks.protocols import from_file
from data.dataset import Access
from experiments.adapters.folder import read_card
from experiments.cli.adapters import predict
from experiments.sweep.config import load
from experiments.sweep.store import Results
from kshot.errors import KshotError

READERS: dict[str, Callable[[Path], object]] = {
    "sweep.yaml": lambda path: load(str(path), {}, {}),
    "names.txt": lambda path: predict(["-"], class_file=path),
    "split.json": lambda path: from_file([], 0, path),
    "classifier.json": lambda path: read_card(path.parent),
    "sweep.json": lambda path: Results(path.parent).sweep(),
    "cells.jsonl": lambda path: Results(path.parent).failures(),
    "predictions/key.parquet": lambda path: Results(path.parents[1]).predictions("key"),
    "101_ObjectCategories.tar.gz": lambda path: catalog.load(
        "caltech101", access=Access(root=path.parent), split_seed=0
    ),
}


@pytest.mark.parametrize("name", READERS)
def test_a_pipe_is_one_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    os.mkfifo(path)
    with pytest.raises(KshotError, match=r"not a regular file|cannot be read") as caught:
        READERS[name](path)
    assert "\n" not in str(caught.value)


def test_a_backbone_whose_config_is_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    assert backbone_config(tmp_path) is None


@pytest.mark.parametrize("text", ["name: " + "[" * 500, "a: &a [*a]", "\xff"])
def test_a_preset_that_is_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(KshotError, match=r"sweep.yaml cannot be read as YAML: .+") as caught:
        load(str(path), {}, {})
    assert "\n" not in str(caught.value)
