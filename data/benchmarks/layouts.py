"""The original files of the four benchmarks, as their authors publish them: which file in an archive is which image, of
which class, in which split.

Each function yields the items of one data set from its original files; files that it skips on purpose are added to
`ignored`. Paths are those that CoOp's split files use. Anything unexpected is an error: nothing is skipped silently.

The class names are in class_names.json: of Caltech-101 the folders of the archive; of Flowers by the numbers in
imagelabels.mat, from 1 on; of Cars in the order of the devkit's cars_meta.mat.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data.benchmarks.archives import SourceFiles
from data.benchmarks.matlab import variable
from data.dataset import Item, content_key, is_system_file
from kshot.errors import DatasetError

CLASSES: dict[str, tuple[str, ...]] = {
    name: tuple(classes)
    for name, classes in json.loads(Path(__file__).with_name("class_names.json").read_text(encoding="utf-8")).items()
}
CALTECH101, CARS, FLOWERS, PETS = (CLASSES[name] for name in ("caltech101", "cars", "flowers", "pets"))
# As the authors of the set and some copies of it spell them.
FLOWER_SPELLINGS = {"barbeton daisy": "barberton daisy", "pink-yellow dahlia?": "pink-yellow dahlia"}
FLOWER_SPLITS = {"trnid": "train", "valid": "validation", "tstid": "test"}  # setid.mat's names
NO_IMAGES = {"BACKGROUND_Google/tmp"}  # Caltech-101's archive holds this one


def caltech101(files: SourceFiles, ignored: list[str]) -> Iterator[Item]:
    """101_ObjectCategories/<class>/image_NNNN.jpg; no split."""
    for name, image in files.members("images"):
        path = name.partition("101_ObjectCategories/")[2]
        if is_system_file(name.rpartition("/")[2]) or name.startswith("__MACOSX") or path in NO_IMAGES:
            ignored.append(path or name)
        elif path.count("/") == 1 and path.endswith(".jpg"):
            yield Item(path, "", path.partition("/")[0], image, content_key(image))
        elif path:  # the archive around this one holds annotations as well
            raise DatasetError(f"{files.path('images')}: {name} is neither an image nor known; remove it")


def flowers(files: SourceFiles, ignored: list[str]) -> Iterator[Item]:
    """jpg/image_NNNNN.jpg; imagelabels.mat holds the class of image N, setid.mat which numbers are in which split."""
    labels = variable(files.read("labels", "imagelabels.mat"), "labels")
    ids = files.read("split", "setid.mat")
    split = {int(n): name for key, name in FLOWER_SPLITS.items() for n in variable(ids, key)}
    numbers = {f"image_{n:05d}.jpg": n for n in range(1, len(labels) + 1)}
    for path, image in _images(files, numbers, ignored):
        n = numbers[path]
        if n not in split:
            raise DatasetError(f"setid.mat has image {n} in no split; download it again")
        yield Item(path, split[n], _class(FLOWERS, labels[n - 1], "imagelabels.mat"), image, content_key(image))


def pets(files: SourceFiles, ignored: list[str]) -> Iterator[Item]:
    """images/<id>.jpg; annotations/{trainval,test}.txt list the ids, which are <Class_name>_<number>."""
    lists = {"trainval.txt": "train", "test.txt": "test"}
    listed: dict[str, tuple[str, str]] = {}
    for name, split in lists.items():
        for line in files.read("annotations", name).decode(errors="replace").splitlines():
            if line.strip() and not line.startswith("#"):
                identity = line.split()[0]
                listed[f"{identity}.jpg"] = (split, identity.rpartition("_")[0])
    for path, image in _images(files, listed, ignored):
        yield Item(path, *listed[path], image, content_key(image))


def cars(files: SourceFiles, ignored: list[str]) -> Iterator[Item]:
    """cars_{train,test}/NNNNN.jpg; the devkit's .mat files hold the class names and the class of each image."""
    names = [str(name) for name in variable(files.read("devkit", "cars_meta.mat"), "class_names")]
    sides = {
        "train": files.read("devkit", "cars_train_annos.mat"),
        "test": files.read("test labels", "cars_test_annos_withlabels.mat"),
    }
    for split, annotations in sides.items():
        rows = variable(annotations, "annotations")
        label = {str(row["fname"]): _class(names, row["class"], "the devkit") for row in rows}
        for path, image in _images(files, label, ignored, split):
            yield Item(f"cars_{split}/{path}", split, label[path], image, content_key(image))


LAYOUTS = {"caltech101": caltech101, "flowers": flowers, "pets": pets, "cars": cars}


def _images(
    files: SourceFiles, listed: dict[str, Any], ignored: list[str], part: str = "images"
) -> Iterator[tuple[str, bytes]]:
    """(file name, content) of the listed images. Images that no list names are ignored; a listed one must be there."""
    missing = dict.fromkeys(listed)
    for name, image in files.members(part):
        file = name.rpartition("/")[2]
        if file in missing:
            del missing[file]
            yield file, image
        elif file in listed:
            raise DatasetError(f"{files.path(part)} has {file} twice, the second time as {name}; remove one")
        else:
            ignored.append(name)
    if missing:
        lacking = f"{next(iter(missing))} and {len(missing) - 1} more that are listed"
        raise DatasetError(f"{files.path(part)} lacks {lacking}")


def _class(names: Sequence[str], number: Any, where: str) -> str:
    """The class of that number, from 1 on."""
    if not 1 <= int(number) <= len(names):
        known = f"classes go from 1 to {len(names)}"
        raise DatasetError(f"{where} has a class {int(number)}, but {known}; get the original")
    return names[int(number) - 1]
