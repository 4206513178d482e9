"""The table: complete rows, and names that resolve."""

from importlib import import_module

import pytest

from data import catalog
from data.dataset import Dataset, clean_classes, clean_name
from kshot.errors import DatasetError, UnknownNameError


@pytest.mark.parametrize("name", catalog.DATASETS)
def test_a_row_is_complete(name: str) -> None:
    row = catalog.DATASETS[name]
    assert row.name == name
    assert all((row.title, row.licence, row.citation, row.url.startswith("https://"), row.protocol))
    assert 0 <= row.hflip <= 0.5
    module, function = row.loader.split(":")
    assert callable(getattr(import_module(module), function))


@pytest.mark.parametrize(("name", "hflip"), [("icons", 0.5), ("digits", 0.0)])  # a mirrored digit is no digit
def test_a_row_tells_the_truth(name: str, hflip: float, request: pytest.FixtureRequest) -> None:
    row, dataset = catalog.DATASETS[name], request.getfixturevalue(name)
    assert row.hflip == hflip
    assert isinstance(dataset, Dataset)
    assert dataset.name == name
    assert dataset.classes == row.classes
    assert len(dataset.train) == pytest.approx(row.train, rel=0.05)
    assert len(dataset.test) == pytest.approx(row.test, rel=0.05)


@pytest.mark.parametrize("name", ["icon", "folder", "folder:", ""])
def test_an_unknown_name(name: str) -> None:
    with pytest.raises(
        UnknownNameError,
        match=r"unknown data set .*choose from: icons, digits, caltech101, cars, flowers, pets, folder:PATH, hub:ID",
    ):
        catalog.load(name)


def test_a_folder_has_a_row() -> None:
    row = catalog.find("folder:some/where:else")
    assert (row.name, row.location, row.hflip) == ("folder:some/where:else", "some/where:else", 0.5)


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("great_dane", "great dane"),
        ("Faces-easy", "faces easy"),
        ("AM General Hummer SUV 2000", "am general hummer suv 2000"),
        ("  wild.cat__x ", "wild cat x"),
        ("Cafe\u0301", "caf\u00e9"),  # decomposed, as folder names on some file systems are
        *(
            (number, number)
            for number in ("-1", "1", "1.5", "+3", "-0.5", "-.5", "1,000", "-1,000.25", "1e-5", "-2E+3")
        ),
        *(("1-2", "1 2"), ("1.2.3", "1 2 3"), ("2020-01-02", "2020 01 02"), ("1.", "1"), ("-x", "x"), ("v1.5", "v1 5")),
    ],
)
def test_clean_name(raw: str, cleaned: str) -> None:
    assert clean_name(raw) == cleaned


def test_names_that_fall_together() -> None:
    with pytest.raises(DatasetError, match=r"'wild_cat' and 'Wild-Cat' both read 'wild cat'; rename or merge them"):
        clean_classes("folder:x", ["wild_cat", "dog", "Wild-Cat"])
