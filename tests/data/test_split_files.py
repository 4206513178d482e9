"""Splits that others have drawn, read from their file."""

import json
from pathlib import Path

import pytest

from data.benchmarks.specs import from_file
from data.dataset import SplitProtocol
from kshot.errors import DatasetError
from tests.data.published import load, row

COOP = {
    "train": [["Faces_easy/image_0000.jpg", 0, "face"], ["wild_cat/image_0001.jpg", 1, "wildcat"]],
    "val": [["Faces_easy/image_0003.jpg", 0, "face"]],
    "test": [["Faces_easy/image_0001.jpg", 0, "face"], ["wild_cat/image_0000.jpg", 1, "wildcat"]],
}


OWN = SplitProtocol("coop", "", from_file, 2, sources=("archive",), from_file=True)


def test_a_split_that_others_have_drawn(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "split.json"
    file.write_text(json.dumps(COOP))
    dataset = load(row("caltech101", OWN), root / "caltech101", protocol="coop", split_file=file)
    assert dataset.classes == ("face", "wildcat")
    assert (len(dataset.train), len(dataset.test)) == (2, 2)
    assert [dataset.classes[e.label] for e in dataset.test] == ["face", "wildcat"]
    file.write_text(json.dumps({**COOP, "val": []}))
    again = load(row("caltech101", OWN), root / "caltech101", protocol="coop", split_file=file)
    assert again.protocol != dataset.protocol  # the stamp tells files apart


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ([], "is no split file"),
        ({"train": [["a", 1]], "test": []}, "is no split file"),
        ({"train": [["no/such.jpg", 0, "x"]], "test": []}, "names the image 'no/such.jpg'"),
        (None, "cannot be read"),
        ({**COOP, "test": COOP["train"]}, "lists the image 'Faces_easy/image_0000.jpg' more than once"),
        ({**COOP, "train": 5}, "is no split file"),
        ({**COOP, "train": [["Faces_easy/image_0000.jpg", 0, None]]}, "is no split file"),
    ],
)
def test_a_split_file_that_cannot_be_used(root: Path, tmp_path: Path, content: object, message: str) -> None:
    file = tmp_path / "split.json"
    if content is not None:
        file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(DatasetError, match=message):
        load(row("caltech101", OWN), root / "caltech101", protocol="coop", split_file=file)
