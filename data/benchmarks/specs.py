"""The specs of the four benchmarks: what they are, where to get them, and how their papers split them.

MD5 sums are those that torchvision and earlier versions of it check; the content digest of Caltech-101
was taken of the photographs as CaltechDATA publishes them. Where a commit of the hub is not named, the newest is taken
and recorded.
"""

from typing import Any

from data.benchmarks import layouts
from data.benchmarks.protocols import from_file, given, per_class
from data.dataset import DatasetSpec, SplitProtocol

BOTH = ("train", "test")


def _benchmark(name: str, coop_classes: int, recipe: SplitProtocol, official: SplitProtocol, **row: Any) -> DatasetSpec:
    """What the four have in common; `recipe` is the usual protocol."""
    about = "CoOp's own split and class names (Zhou et al. 2022), read from its split file"
    coop = SplitProtocol("coop", about, from_file, coop_classes, sources=("archive",), from_file=True)
    return DatasetSpec(
        name=name,
        protocol=recipe.name,
        loader="data.benchmarks.sources:load",
        train=official.train,
        test=official.test,
        choices=("source", "root", "protocol", "split_file", "allow_modified"),
        sources=("hub", "archive"),
        protocols=(recipe, official, coop),
        **row,
    )


def _recipe(classes: int, train: int = 0, test: int = 0) -> SplitProtocol:
    about = "train and test of the hub's copy, as the official vlm_classifier recipe uses them"
    return SplitProtocol("recipe", about, given(), classes, train, test, sources=("hub",), splits=BOTH)


BENCHMARKS = (
    _benchmark(
        "caltech101",
        100,
        _recipe(102),
        SplitProtocol(
            "official",
            "30 images of each of the 102 folders, drawn by the split seed, are train; the rest are test",
            per_class(30),
            102,
            3060,
            6084,
            seeded=True,
        ),
        title="Caltech-101: photographs of 101 kinds of objects, and background",
        licence="CC-BY-4.0",
        citation="Li, Andreeto, Ranzato and Perona, Caltech 101, CaltechDATA, 2022",
        url="https://doi.org/10.22002/D1.20086",
        classes=layouts.CALTECH101,
        hub="dpdl-benchmark/caltech101",
        files={
            "images": {
                "101_ObjectCategories.tar.gz": "b224c7392d521a49829488ab0f1120d9",
                "caltech-101.zip": "3138e1922a9193bfa496528edbbc45d0",
                "101_ObjectCategories": "",
            }
        },
        content="16173827d4a2d8dad71a8630fa04c24a2b9ff05c08a4decaad5779586db1f2a8",
    ),
    _benchmark(
        "cars",
        196,
        _recipe(196, 8144, 8041),
        SplitProtocol("official", "the authors' train and test", given(), 196, 8144, 8041, splits=BOTH),
        title="Stanford Cars: photographs of 196 makes, models and years of cars",
        licence="not stated",
        citation="Krause, Stark, Deng and Fei-Fei, 3D Object Representations for Fine-Grained Categorization, 2013",
        url="https://ai.stanford.edu/~jkrause/cars/car_dataset.html",
        hub="tanganke/stanford_cars",
        files={
            "train": {"cars_train.tgz": "065e5b463ae28d29e77c1b4b166cfe61", "cars_train": ""},
            "test": {"cars_test.tgz": "4ce7ebf6a94d07f1952d94dd34c4d501", "cars_test": ""},
            "devkit": {"car_devkit.tgz": "c3b158d763b6e2245038c8ad08e45376", "devkit": ""},
            "test labels": {"cars_test_annos_withlabels.mat": "b0a2b23655a3edd16d84508592a98d10"},
        },
    ),
    _benchmark(
        "flowers",
        102,
        _recipe(102, 1020, 6149),
        SplitProtocol(
            "official",
            "the authors' train and test; their validation images (1,020) take no part",
            given(),
            102,
            1020,
            6149,
            splits=BOTH,
        ),
        title="Oxford Flowers-102: photographs of 102 flowers of the United Kingdom",
        licence="not stated",
        citation="Nilsback and Zisserman, Automated Flower Classification over a Large Number of Classes, 2008",
        url="https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
        classes=layouts.FLOWERS,
        hub="dpdl-benchmark/oxford_flowers102",
        files={
            "images": {"102flowers.tgz": "52808999861908f626f3c1f4e79d11fa", "jpg": ""},
            "labels": {"imagelabels.mat": "e0620be6f572b9609742df49c70aed4d"},
            "split": {"setid.mat": "a5357ecc9cb78c4bef273ce3793fc85c"},
        },
        spellings=layouts.FLOWER_SPELLINGS,
    ),
    _benchmark(
        "pets",
        37,
        _recipe(37),
        SplitProtocol(
            "official", "the authors' trainval and test", given(train=("train", "validation")), 37, 3680, 3669
        ),
        title="Oxford-IIIT Pet: photographs of 37 breeds of cats and dogs",
        licence="CC-BY-SA-4.0",
        citation="Parkhi, Vedaldi, Zisserman and Jawahar, Cats and Dogs, 2012",
        url="https://www.robots.ox.ac.uk/~vgg/data/pets/",
        classes=layouts.PETS,
        hub="dpdl-benchmark/oxford_iiit_pet",
        files={
            "images": {"images.tar.gz": "5c4f3ee8e5d25df40f4fd59a7f44e54c", "images": ""},
            "annotations": {"annotations.tar.gz": "95a8c909bbe2e81eed6a22bccdf3f68f", "annotations": ""},
        },
    ),
)
