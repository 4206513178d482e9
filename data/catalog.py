"""The catalog of data sets, one DatasetSpec each, and `load`, the one way to get a Dataset by name.

It imports a loader only when its data set is loaded, so that listing the catalog takes milliseconds.
"""

from collections.abc import Sequence
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
            title="Icons by many designers from 9 open icon fonts, drawn as interfaces show them (64x64)",
            licence="OFL-1.1 (Font Awesome, Elusive Icons), Apache-2.0 (Remix Icon), MIT (Phosphor); "
            "QtAwesome, the package that holds them: MIT",
            citation="The icon fonts in QtAwesome, Spyder Project Contributors",
            url="https://github.com/spyder-ide/qtawesome",
            loader="data.embedded.icons:load",
            classes=(
                *("star", "camera", "cloud", "heart", "lock", "hand", "clock", "bell", "phone", "book"),
                *("car", "home", "map", "flag", "folder", "battery", "calendar", "wifi", "music", "shield"),
            ),
            train=701,
            test=337,
        ),
        DatasetSpec(
            name="digits",
            title="Handwritten digits of scikit-learn, 8x8 drawn at 64x64",
            licence="CC-BY-4.0 (UCI Repository); scikit-learn, the package that holds them: BSD-3-Clause",
            citation="E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998",
            url="https://doi.org/10.24432/C50P49",
            hflip=0.0,
            loader="data.embedded.digits:load",
            classes=("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
            train=1297,
            test=500,
        ),
        *BENCHMARKS,
    )
}


USERS = {  # the users' own: a name begins with the key, and the rest of it is the location
    FOLDER: DatasetSpec(
        name="folder:PATH",
        title="A folder of images, one sub-folder per class",
        licence="that of its images",
        loader="data.folder:load_folder",
        choices=("allow_shared",),
    ),
    HUB: DatasetSpec(
        name="hub:ID",
        title="A set of the Hugging Face hub",
        licence="that of its images",
        loader="data.benchmarks.sources:load_hub",
        choices=("label_column",),
    ),
}


def full_name(name: str) -> str:
    """What a name stands for: one like a path, and that of a folder which is there, are folders of images."""
    if name in DATASETS or name.startswith(tuple(USERS)):
        return name
    return f"{FOLDER}{name}" if name.startswith((".", "/", "~")) or Path(name).is_dir() else name


def find(name: str) -> DatasetSpec:
    """The spec of a data set.

    name: a key of DATASETS, "folder:PATH", whose spec has PATH as its location, or "hub:ID" (see `data.hub.HubName`);
    see `full_name` too. Raises UnknownNameError.
    """
    name = full_name(name)
    if name in DATASETS:
        return DATASETS[name]
    for kind, spec in USERS.items():
        if name.startswith(kind) and name != kind:
            return replace(spec, name=name, location=name.removeprefix(kind))
    raise UnknownNameError("data set", name, [*DATASETS, *(spec.name for spec in USERS.values())])


def load(name: str, *, root: Path | None = None, split_seed: int = 0, access: Access | None = None) -> Dataset:
    """The data set of that name, its class names cleaned.

    root: folder for the files that a set builds or downloads (default: the user's cache).
    split_seed: draws the split of a set that comes without one; a given split does not depend on it.
    access: how to get it, as far as that can be chosen.
    Raises UnknownNameError, DatasetError, ImageError; InputError for access options that the set does not have.
    """
    spec, access = find(name), access or Access()
    check_access(access, spec)
    module, function = spec.loader.split(":")
    options = {"access": access} if spec.choices else {}
    dataset: Dataset = getattr(import_module(module), function)(spec, root=root, split_seed=split_seed, **options)
    return replace(dataset, classes=clean_classes(spec.name, dataset.classes))


def check_access(access: Access, *specs: DatasetSpec) -> None:
    """Raises InputError for an option that none of these sets has."""
    for field in fields(Access):
        value = getattr(access, field.name)
        if value and not any(field.name in spec.choices for spec in specs):
            option = f"--{field.name.replace('_', '-')}" + ("" if value is True else f" {value}")
            others = ", ".join(s.name for s in (*DATASETS.values(), *USERS.values()) if field.name in s.choices)
            names = ", ".join(spec.name for spec in specs)
            raise InputError(f"{option} is for {others}; {names} has no choice of it")


def accesses(names: Sequence[str], access: Access, usual: str = "") -> dict[str, Access]:
    """How each of several data sets is had: with the options that it has.

    usual: the protocol where `access` names none. Where other sets have the protocol, or it is the usual one, a set
    without it follows its own: see `unused`. Raises as `check_access` does, and UnknownNameError for a usual protocol
    that no benchmark has.
    """
    if usual and not any(row.has_protocol(usual, "") for row in BENCHMARKS):
        raise UnknownNameError("protocol", usual, dict.fromkeys(p.name for row in BENCHMARKS for p in row.protocols))
    specs = {name: find(name) for name in names}
    check_access(access, *specs.values())
    protocol = access.protocol or usual
    have = {name for name, spec in specs.items() if spec.has_protocol(protocol, access.kind)}
    if access.protocol and not have:  # the first with a choice says what is wrong
        have = {name for name, spec in specs.items() if spec.protocols}
    taken = {name: Access(**{each: getattr(access, each) for each in spec.choices}) for name, spec in specs.items()}
    return {name: replace(each, protocol=protocol if name in have else "") for name, each in taken.items()}


def unused(asked: Access, taken: Access) -> list[str]:
    """The names of the fields that are given in one access and left open in another."""
    return [field.name for field in fields(Access) if getattr(asked, field.name) and not getattr(taken, field.name)]
