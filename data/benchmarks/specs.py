"""The specs of the four benchmarks: what they are, where to get them, and how their papers split them.

MD5 sums are those that torchvision and earlier versions of it check; the content digest of Caltech-101 was taken of the
photographs as CaltechDATA publishes them. Where a commit of the hub is not named, the newest is taken and recorded.
"""

from data.benchmarks import layouts
from data.benchmarks.protocols import from_file, given, per_class
from data.dataset import DatasetSpec, SourceFile, SplitProtocol

LOADER = "data.benchmarks.sources:load"
BOTH = ("train", "test")


def _recipe(classes: int, train: int = 0, test: int = 0) -> SplitProtocol:
    about = "train and test of the hub's copy, as the official vlm_classifier recipe uses them"
    return SplitProtocol("recipe", about, given(), classes, train, test, sources=("hub",), splits=BOTH)


def _coop(classes: int) -> SplitProtocol:
    about = "CoOp's own split and class names (Zhou et al. 2022), read from its split file"
    return SplitProtocol("coop", about, from_file, classes, sources=("archive",), from_file=True)


BENCHMARKS = (
    DatasetSpec(
        name="caltech101",
        title="Caltech-101: photographs of 101 kinds of objects, and background",
        licence="CC-BY-4.0",
        citation="Li, Andreeto, Ranzato and Perona, Caltech 101, CaltechDATA, 2022",
        url="https://doi.org/10.22002/D1.20086",
        protocol="recipe",
        hflip=0.5,
        loader=LOADER,
        classes=layouts.CALTECH101,
        train=3060,
        test=6084,
        sources=("hub", "archive"),
        hub="dpdl-benchmark/caltech101",
        files={
            "images": SourceFile(
                ("101_ObjectCategories.tar.gz", "caltech-101.zip", "101_ObjectCategories"),
                {
                    "101_ObjectCategories.tar.gz": "b224c7392d521a49829488ab0f1120d9",
                    "caltech-101.zip": "3138e1922a9193bfa496528edbbc45d0",
                },
            )
        },
        content="16173827d4a2d8dad71a8630fa04c24a2b9ff05c08a4decaad5779586db1f2a8",
        protocols=(
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
            _coop(100),
        ),
    ),
    DatasetSpec(
        name="cars",
        title="Stanford Cars: photographs of 196 makes, models and years of cars",
        licence="not stated",
        citation="Krause, Stark, Deng and Fei-Fei, 3D Object Representations for Fine-Grained Categorization, 2013",
        url="https://ai.stanford.edu/~jkrause/cars/car_dataset.html",
        protocol="recipe",
        hflip=0.5,
        loader=LOADER,
        train=8144,
        test=8041,
        sources=("hub", "archive"),
        hub="tanganke/stanford_cars",
        files={
            "train": SourceFile(
                ("cars_train.tgz", "cars_train"), {"cars_train.tgz": "065e5b463ae28d29e77c1b4b166cfe61"}
            ),
            "test": SourceFile(("cars_test.tgz", "cars_test"), {"cars_test.tgz": "4ce7ebf6a94d07f1952d94dd34c4d501"}),
            "devkit": SourceFile(("car_devkit.tgz", "devkit"), {"car_devkit.tgz": "c3b158d763b6e2245038c8ad08e45376"}),
            "test labels": SourceFile(
                ("cars_test_annos_withlabels.mat",),
                {"cars_test_annos_withlabels.mat": "b0a2b23655a3edd16d84508592a98d10"},
            ),
        },
        protocols=(
            _recipe(196, 8144, 8041),
            SplitProtocol("official", "the authors' train and test", given(), 196, 8144, 8041, splits=BOTH),
            _coop(196),
        ),
    ),
    DatasetSpec(
        name="flowers",
        title="Oxford Flowers-102: photographs of 102 flowers of the United Kingdom",
        licence="not stated",
        citation="Nilsback and Zisserman, Automated Flower Classification over a Large Number of Classes, 2008",
        url="https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
        protocol="recipe",
        hflip=0.5,
        loader=LOADER,
        classes=layouts.FLOWERS,
        train=1020,
        test=6149,
        sources=("hub", "archive"),
        hub="dpdl-benchmark/oxford_flowers102",
        files={
            "images": SourceFile(("102flowers.tgz", "jpg"), {"102flowers.tgz": "52808999861908f626f3c1f4e79d11fa"}),
            "labels": SourceFile(("imagelabels.mat",), {"imagelabels.mat": "e0620be6f572b9609742df49c70aed4d"}),
            "split": SourceFile(("setid.mat",), {"setid.mat": "a5357ecc9cb78c4bef273ce3793fc85c"}),
        },
        protocols=(
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
            _coop(102),
        ),
        spellings=layouts.FLOWER_SPELLINGS,
    ),
    DatasetSpec(
        name="pets",
        title="Oxford-IIIT Pet: photographs of 37 breeds of cats and dogs",
        licence="CC-BY-SA-4.0",
        citation="Parkhi, Vedaldi, Zisserman and Jawahar, Cats and Dogs, 2012",
        url="https://www.robots.ox.ac.uk/~vgg/data/pets/",
        protocol="recipe",
        hflip=0.5,
        loader=LOADER,
        classes=layouts.PETS,
        train=3680,
        test=3669,
        sources=("hub", "archive"),
        hub="dpdl-benchmark/oxford_iiit_pet",
        files={
            "images": SourceFile(("images.tar.gz", "images"), {"images.tar.gz": "5c4f3ee8e5d25df40f4fd59a7f44e54c"}),
            "annotations": SourceFile(
                ("annotations.tar.gz", "annotations"), {"annotations.tar.gz": "95a8c909bbe2e81eed6a22bccdf3f68f"}
            ),
        },
        protocols=(
            _recipe(37),
            SplitProtocol(
                "official",
                "the authors' trainval and test",
                given(train=("train", "validation")),
                37,
                3680,
                3669,
            ),
            _coop(37),
        ),
    ),
)
