"""The table of data sets, one row per set, and `load`, the one way to get a Dataset by name.

Knows titles, licences, sizes and where the loader of a set is; knows nothing of how images are read. It imports the
standard library only, and a loader when its set is asked for, so that listing the table costs milliseconds.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

from data.core import Dataset
from kshot_errors import DatasetError, UnknownNameError

FOLDER = "folder:"


def clean_name(name: str) -> str:
    """The class name as text: `_ . -` become spaces, lower case, single spaces, composed characters (NFC).

    Some file systems write é as two characters, tokenizers as one: an answer could then never equal its class.
    """
    return unicodedata.normalize("NFC", " ".join(re.sub(r"[_.\-]", " ", name).lower().split()))


@dataclass(frozen=True)
class Row:
    """One data set: what a reader, a trainer and a loader need to know of it.

    classes: class names in label order; None where only the data tell.
    protocol: name of the split; "seeded-split" is drawn from the split seed and is recorded with it.
    hflip: probability of a horizontal flip of an image in training; 0 where a mirrored image is another thing.
    loader: "module:function"; called as function(row, root=..., split_seed=...) it returns a Dataset.
    location: what the loader reads: a folder, a hub identifier or an address; "" where it needs none.
    train, test: number of images, about; 0 where only the data tell.
    clean: class name as its source writes it → as a model reads it.
    """

    name: str
    title: str
    licence: str
    citation: str
    url: str
    protocol: str
    hflip: float
    loader: str
    classes: tuple[str, ...] | None = None
    location: str = ""
    train: int = 0
    test: int = 0
    clean: Callable[[str], str] = clean_name


DATASETS: dict[str, Row] = {
    row.name: row
    for row in (
        Row(
            name="icons",
            title="Icons by many designers from 10 open icon fonts, drawn as interfaces show them (64x64)",
            licence="OFL-1.1 (Font Awesome, Elusive Icons), Apache-2.0 (Material Design Icons, Remix Icon), "
            "MIT (Phosphor), CC-BY-4.0 (Codicons); QtAwesome, the package that holds them: MIT",
            citation="The icon fonts in QtAwesome, Spyder Project Contributors",
            url="https://github.com/spyder-ide/qtawesome",
            protocol="seeded-split",
            hflip=0.5,
            loader="data.icons:load",
            classes=(
                *("star", "camera", "cloud", "heart", "lock", "key", "clock", "bell", "phone", "book"),
                *("car", "home", "train", "flag", "folder", "battery", "calendar", "cart", "music", "shield"),
            ),
            train=1411,
            test=570,
        ),
        Row(
            name="digits",
            title="Handwritten digits of scikit-learn, 8x8 drawn at 64x64",
            licence="CC-BY-4.0 (UCI Repository); scikit-learn, the package that holds them: BSD-3-Clause",
            citation="E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998",
            url="https://doi.org/10.24432/C50P49",
            protocol="seeded-split",
            hflip=0.0,
            loader="data.digits:load",
            classes=("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
            train=1297,
            test=500,
        ),
    )
}


def find(name: str) -> Row:
    """The row of a data set.

    name: a key of DATASETS or "folder:PATH", whose row has PATH as its location.
    Raises UnknownNameError.
    """
    if name in DATASETS:
        return DATASETS[name]
    if name.startswith(FOLDER) and name != FOLDER:
        return _folder_row(name)
    raise UnknownNameError("data set", name, [*DATASETS, f"{FOLDER}PATH"])


def load(name: str, *, root: Path | None = None, split_seed: int = 0) -> Dataset:
    """The data set of that name, its class names cleaned.

    root: folder for the files that a set builds or downloads (default: the user's cache).
    split_seed: draws the split of a set that comes without one; a given split does not depend on it.
    Raises UnknownNameError, DatasetError, ImageError.
    """
    row = find(name)
    module, function = row.loader.split(":")
    dataset: Dataset = getattr(import_module(module), function)(row, root=root, split_seed=split_seed)
    return replace(dataset, classes=_clean_classes(row, dataset.classes))


def _folder_row(name: str) -> Row:
    return Row(
        name=name,
        title="A folder of images, one sub-folder per class",
        licence="that of its images",
        citation="",
        url="",
        protocol="seeded-split",
        hflip=0.5,
        loader="data.sources:load_folder",
        location=name.removeprefix(FOLDER),
    )


def _clean_classes(row: Row, names: Sequence[str]) -> tuple[str, ...]:
    origin: dict[str, str] = {}
    for name in names:
        cleaned = row.clean(name)
        if not cleaned:
            raise DatasetError(f"{row.name}: class {name!r} has no letters left once cleaned; rename it")
        if cleaned in origin:
            both = f"{origin[cleaned]!r} and {name!r}"
            raise DatasetError(f"{row.name}: classes {both} both read {cleaned!r}; rename or merge them")
        origin[cleaned] = name
    return tuple(origin)
