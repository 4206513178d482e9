"""Small stand-ins for the original files of the four benchmarks, in their layouts: archives, lists, .mat files."""

import io
import tarfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

from data import catalog
from data.benchmarks import sources
from data.benchmarks.protocols import given, per_class
from data.dataset import Access, Dataset, DatasetSpec, SplitProtocol

SETS = ("caltech101", "cars", "flowers", "pets")
SMALL = {  # what the stand-ins hold, under the official protocols
    "caltech101": SplitProtocol("official", "", per_class(3), 3, 9, 3, seeded=True),
    "cars": SplitProtocol("official", "", given(), 2, 3, 2),
    "flowers": SplitProtocol("official", "", given(), 3, 3, 2),
    "pets": SplitProtocol("official", "", given(train=("train", "validation")), 2, 4, 2),
}
FLOWER_LABELS = [1, 1, 2, 2, 2, 102]
BREEDS = ("Abyssinian", "american_bulldog")


def picture(seed: int) -> bytes:
    """A JPEG of its own."""
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def tar(path: Path, members: Mapping[str, bytes]) -> None:
    """A compressed archive of these files."""
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def caltech_members(per_class: int = 4) -> dict[str, bytes]:
    """Three folders, and the file that is no image."""
    classes = ("BACKGROUND_Google", "Faces_easy", "wild_cat")
    images = {
        f"101_ObjectCategories/{name}/image_{n:04d}.jpg": picture(100 * c + n)
        for c, name in enumerate(classes)
        for n in range(per_class)
    }
    return {**images, "101_ObjectCategories/BACKGROUND_Google/tmp": b"no image"}


def caltech101(root: Path) -> None:
    tar(root / "101_ObjectCategories.tar.gz", caltech_members())


def flowers(root: Path) -> None:
    tar(root / "102flowers.tgz", {f"jpg/image_{n:05d}.jpg": picture(n) for n in range(1, 7)})
    savemat(root / "imagelabels.mat", {"labels": np.array([FLOWER_LABELS], np.uint8)})
    savemat(root / "setid.mat", {"trnid": [[1, 3, 6]], "valid": [[4]], "tstid": [[2, 5]]})


def pets(root: Path) -> None:
    names = [f"{breed}_{n}" for breed in BREEDS for n in (1, 10, 20)]
    images = {f"images/{name}.jpg": picture(n) for n, name in enumerate(names)}
    tar(root / "images.tar.gz", {**images, "images/Abyssinian_100.mat": b"x", "images/._pug_1.jpg": b"x"})
    lines = [f"{name} {1 + n // 3} 1 1" for n, name in enumerate(names)]
    lists = {"trainval.txt": [*lines[:2], *lines[3:5]], "test.txt": [lines[2], lines[5]]}
    tar(root / "annotations.tar.gz", {f"annotations/{k}": "\n".join(v).encode() for k, v in lists.items()})


def cars(root: Path) -> None:
    names = ("AM General Hummer SUV 2000", "Audi A5 Coupe 2012")
    for split in ("train", "test"):
        seeds = range(3) if split == "train" else range(10, 12)
        tar(root / f"cars_{split}.tgz", {f"cars_{split}/{n + 1:05d}.jpg": picture(s) for n, s in enumerate(seeds)})
    kind = [("class", object), ("fname", object)]
    train = np.array([(1, "00001.jpg"), (2, "00002.jpg"), (2, "00003.jpg")], kind)
    test = np.array([(2, "00001.jpg"), (1, "00002.jpg")], kind)
    meta, annotations = io.BytesIO(), io.BytesIO()
    savemat(meta, {"class_names": np.array(names, object)})
    savemat(annotations, {"annotations": train})
    tar(
        root / "car_devkit.tgz",
        {"devkit/cars_meta.mat": meta.getvalue(), "devkit/cars_train_annos.mat": annotations.getvalue()},
    )
    savemat(root / "cars_test_annos_withlabels.mat", {"annotations": test})


def row(name: str, *more: SplitProtocol) -> DatasetSpec:
    """The set's own row with the sizes of its stand-in."""
    return replace(catalog.DATASETS[name], protocols=(SMALL[name], *more), content="")


def load(row: DatasetSpec, root: Path | None, *, seed: int = 0, **access: object) -> Dataset:
    """The set from the stand-in's files in root; without a root, from wherever `access` says."""
    usual = {"source": "archive", "root": root, "allow_modified": root is not None}
    way = Access(**{**usual, **access})  # type: ignore[arg-type]
    return sources.load(row, root=None, split_seed=seed, access=way)
