"""The catalog of data sets, one DatasetSpec each, and `load`, the one way to get a Dataset by name.

It imports a loader only when its data set is loaded, so that listing the catalog takes milliseconds.
"""

from dataclasses import fields, replace
from importlib import import_module
from pathlib import Path

from data.benchmarks.specs import BENCHMARKS
from data.dataset import Access, Dataset, DatasetSpec, clean_classes
from kshot.errors import InputError, UnknownNameError

FOLDER, HUB = "folder:", "hub:"

DATASETS: dict[str, DatasetSpec] = {
    spec.name: spec
    for spec in (
        DatasetSpec(
            name="icons",
            title="Icons by many designers from 10 open icon fonts, drawn as interfaces show them (64x64)",
            licence="OFL-1.1 (Font Awesome, Elusive Icons), Apache-2.0 (Material Design Icons, Remix Icon), "
            "MIT (Phosphor), CC-BY-4.0 (Codicons); QtAwesome, the package that holds them: MIT",
            citation="The icon fonts in QtAwesome, Spyder Project Contributors",
            url="https://github.com/spyder-ide/qtawesome",
            protocol="seeded-split",
            hflip=0.5,
            loader="data.embedded.icons:load",
            classes=(
                *("star", "camera", "cloud", "heart", "lock", "key", "clock", "bell", "phone", "book"),
                *("car", "home", "train", "flag", "folder", "battery", "calendar", "cart", "music", "shield"),
            ),
            train=1411,
            test=570,
        ),
        DatasetSpec(
            name="digits",
            title="Handwritten digits of scikit-learn, 8x8 drawn at 64x64",
            licence="CC-BY-4.0 (UCI Repository); scikit-learn, the package that holds them: BSD-3-Clause",
            citation="E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998",
            url="https://doi.org/10.24432/C50P49",
            protocol="seeded-split",
            hflip=0.0,
            loader="data.embedded.digits:load",
            classes=("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
            train=1297,
            test=500,
        ),
        *BENCHMARKS,
    )
}


def find(name: str) -> DatasetSpec:
    """The spec of a data set.

    name: a key of DATASETS, "folder:PATH", whose spec has PATH as its location, or "hub:ID" or "hub:ID@REVISION".
    Raises UnknownNameError.
    """
    if name in DATASETS:
        return DATASETS[name]
    if name.startswith(FOLDER) and name != FOLDER:
        return _user_spec(name, "A folder of images, one sub-folder per class", "data.folder:load_folder", FOLDER)
    if name.startswith(HUB) and name != HUB:
        return _user_spec(name, "A set of the Hugging Face hub", "data.benchmarks.sources:load_hub", HUB)
    raise UnknownNameError("data set", name, [*DATASETS, f"{FOLDER}PATH", f"{HUB}ID"])


def load(name: str, *, root: Path | None = None, split_seed: int = 0, access: Access | None = None) -> Dataset:
    """The data set of that name, its class names cleaned.

    root: folder for the files that a set builds or downloads (default: the user's cache).
    split_seed: draws the split of a set that comes without one; a given split does not depend on it.
    access: for the benchmarks: where to get them and which protocol to follow.
    Raises UnknownNameError, DatasetError, ImageError; InputError for access options that the set does not have.
    """
    spec, access = find(name), access or Access()
    module, function = spec.loader.split(":")
    options = {"access": access} if spec.sources else _refuse_access(spec, access)
    dataset: Dataset = getattr(import_module(module), function)(spec, root=root, split_seed=split_seed, **options)
    return replace(dataset, classes=clean_classes(spec, dataset.classes))


def _refuse_access(spec: DatasetSpec, access: Access) -> dict[str, Access]:
    """For a set with a single source. Raises InputError where another one is requested."""
    others = ", ".join(other.name for other in BENCHMARKS)
    for field in fields(Access):
        if value := getattr(access, field.name):
            option = f"--{field.name.replace('_', '-')}" + ("" if value is True else f" {value}")
            raise InputError(f"{option} is for {others}; {spec.name} has no choice of it")
    return {}


def _user_spec(name: str, title: str, loader: str, kind: str) -> DatasetSpec:
    return DatasetSpec(
        name=name,
        title=title,
        licence="that of its images",
        citation="",
        url="",
        protocol="seeded-split",
        hflip=0.5,
        loader=loader,
        location=name.removeprefix(kind),
    )
