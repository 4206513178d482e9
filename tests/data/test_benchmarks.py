"""The benchmarks from stand-ins for their original files: items, protocols, checksums, splits that others have drawn,
and one set from two sources."""

import json
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from data import catalog, hub
from data.benchmarks import layouts, sources
from data.benchmarks.archives import SourceFiles
from data.benchmarks.protocols import from_file
from data.benchmarks.specs import BENCHMARKS
from data.dataset import Access, Item, SplitProtocol, clean_name, content_key
from data.fewshot import k_shot
from kshot.errors import DatasetError, InputError, UnknownNameError
from tests.data import published
from tests.data.published import SETS, SMALL, load, row

EXPECTED = {
    "cars": {
        ("cars_train/00001.jpg", "train", "AM General Hummer SUV 2000"),
        ("cars_test/00001.jpg", "test", "Audi A5 Coupe 2012"),
    },
    "flowers": {
        ("image_00001.jpg", "train", "pink primrose"),
        ("image_00004.jpg", "validation", "hard-leaved pocket orchid"),
    },
    "pets": {("Abyssinian_1.jpg", "train", "Abyssinian"), ("american_bulldog_20.jpg", "test", "american_bulldog")},
    "caltech101": {("Faces_easy/image_0000.jpg", "", "Faces_easy")},
}


@pytest.mark.parametrize("name", SETS)
def test_every_image_with_its_class_and_its_side(root: Path, name: str) -> None:
    ignored: list[str] = []
    items = list(layouts.LAYOUTS[name](SourceFiles(root / name, row(name).files, ""), ignored))
    assert {(i.path, i.split, i.label) for i in items} >= EXPECTED[name]
    assert all(isinstance(i.stored, bytes) and i.key == content_key(i.stored) for i in items)
    passed_over = {"caltech101": ["BACKGROUND_Google/tmp"], "pets": ["images/Abyssinian_100.mat", "images/._pug_1.jpg"]}
    assert ignored == passed_over.get(name, [])


@pytest.mark.parametrize("name", SETS)
def test_a_set_from_its_files(root: Path, name: str) -> None:
    dataset, protocol = load(row(name), root / name, source=""), SMALL[name]
    assert dataset.facts["source"] == "archive"  # where a root is given
    counts = len(dataset.classes), len(dataset.train), len(dataset.test)
    assert counts == (protocol.classes, protocol.train, protocol.test)
    assert {example.label for example in dataset.train} == set(range(protocol.classes))
    assert all(content_key(example.image) == example.key for example in (*dataset.train, *dataset.test))
    assert "modified" in dataset.protocol  # no stand-in has the checksums of the published files


@pytest.mark.parametrize("name", SETS)
def test_unpacked_files_are_the_same_set(root: Path, name: str, tmp_path: Path) -> None:
    packed = load(row(name), root / name)
    for archive in sorted((root / name).glob("*.t*gz")):
        shutil.unpack_archive(archive, root / name, format="gztar", filter="data")
        archive.unlink()
    unpacked = load(row(name), root / name)
    for one, other in ((unpacked.train, packed.train), (unpacked.test, packed.test)):
        assert sorted((e.key, e.label) for e in one) == sorted((e.key, e.label) for e in other)
    assert unpacked.facts["content"] == packed.facts["content"]


def test_caltech_in_a_zip_around_it(root: Path) -> None:
    home = root / "caltech101"
    with zipfile.ZipFile(home / "caltech-101.zip", "w") as archive:
        archive.write(home / "101_ObjectCategories.tar.gz", "caltech-101/101_ObjectCategories.tar.gz")
        archive.writestr("caltech-101/Annotations/readme", b"annotations")
    expected = load(row("caltech101"), home).facts["content"]
    (home / "101_ObjectCategories.tar.gz").unlink()
    assert load(row("caltech101"), home).facts["content"] == expected


def test_the_images_of_caltech_are_vouched_for_by_their_content(root: Path) -> None:
    """Whatever the archive's own checksum: it may have been packed again."""
    dataset = load(row("caltech101"), root / "caltech101")
    known = replace(row("caltech101"), content=dataset.facts["content"])
    assert load(known, root / "caltech101", allow_modified=False).protocol == "official-0"
    with pytest.raises(DatasetError, match=r"checksum of 101_ObjectCategories.tar.gz is not that .* --allow-modified"):
        load(row("caltech101"), root / "caltech101", allow_modified=False)


def test_files_that_are_not_the_published_ones(root: Path) -> None:
    with pytest.raises(DatasetError, match=r"checksum of 102flowers.tgz, imagelabels.mat, setid.mat is not that"):
        load(row("flowers"), root / "flowers", allow_modified=False)
    unknown = {key: dict.fromkeys(names, "") for key, names in row("flowers").files.items()}
    same = replace(row("flowers"), files=unknown)
    assert load(same, root / "flowers", allow_modified=False).protocol == "official"
    before = load(row("flowers"), root / "flowers").protocol
    published.tar(
        root / "flowers/102flowers.tgz", {f"jpg/image_{n:05d}.jpg": published.picture(n + 9) for n in range(1, 7)}
    )
    assert load(row("flowers"), root / "flowers").protocol != before


def test_one_seed_one_split_and_another_seed_another(root: Path) -> None:
    first, again, other = (load(row("caltech101"), root / "caltech101", seed=seed) for seed in (0, 0, 1))
    assert [e.key for e in first.train] == [e.key for e in again.train]
    assert {e.key for e in first.train} != {e.key for e in other.train}
    assert not {e.key for e in first.train} & {e.key for e in first.test}


@pytest.fixture
def on_the_hub(root: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[tuple[object, ...]]]:
    """A hub that holds the stand-in's images under the class names of its own."""

    def put(name: str) -> list[tuple[object, ...]]:
        asked: list[tuple[object, ...]] = []

        def read(name_on_hub: hub.HubName, splits: tuple[str, ...], label_column: str) -> hub.HubSet:
            asked.append((*name_on_hub, splits, label_column))
            originals = layouts.LAYOUTS[name](SourceFiles(root / name, row(name).files, ""), [])
            items = [
                replace(i, path=f"{i.split or 'train'}/{n}", split=i.split or "train", label=i.label.lower())
                for n, i in enumerate(originals)
            ]
            return hub.HubSet("f" * 40, iter(items))

        monkeypatch.setattr(hub, "read", read)
        return asked

    return put


@pytest.mark.parametrize("name", SETS)
def test_the_same_set_from_the_hub(root: Path, on_the_hub: Callable[[str], list[object]], name: str) -> None:
    asked = on_the_hub(name)
    archive, downloaded = load(row(name), root / name), load(row(name), None, source="hub")
    names = [tuple(map(clean_name, dataset.classes)) for dataset in (archive, downloaded)]
    assert names[0] == names[1]
    for left, right in ((archive.train, downloaded.train), (archive.test, downloaded.test)):
        assert sorted((e.key, e.label) for e in left) == sorted((e.key, e.label) for e in right)
    chosen = [
        {dataset.train[n].key for n in k_shot(dataset.train, names[0], 1, 0)} for dataset in (archive, downloaded)
    ]
    assert chosen[0] == chosen[1]
    assert downloaded.facts["revision"] == "f" * 40
    load(row(name), None, source="hub")
    assert len(asked) == 1  # the pack is read from then on


def test_any_set_of_the_hub(on_the_hub: Callable[[str], list[object]]) -> None:
    asked = on_the_hub("pets")
    dataset = catalog.load("hub:me/pets@v1")
    assert (dataset.name, dataset.classes) == ("hub:me/pets@v1", ("abyssinian", "american bulldog"))
    assert (len(dataset.train), len(dataset.test)) == (4, 2)
    assert dataset.protocol.startswith("given-split-")
    on_the_hub("caltech101")
    drawn = catalog.load("hub:me/objects", split_seed=3)  # has no test split
    assert drawn.protocol.startswith("seeded-split-3-")
    assert len(drawn.test) == 3
    assert asked == [("me/pets", "v1", "", (), "")]


def test_copies_of_a_set_may_spell_a_flower_otherwise() -> None:
    flower = catalog.DATASETS["flowers"]
    items = [Item(f"train/{n}", "train", label, b"", "") for n, label in enumerate(("barbeton daisy", "Rose"))]
    assert [item.label for item in sources.with_clean_labels(flower, items)] == ["barberton daisy", "rose"]
    assert set(flower.spellings.values()) <= set(flower.classes or ())
    twice = [*items, replace(items[0], label="barberton daisy")]
    with pytest.raises(DatasetError, match="both read 'barberton daisy'"):
        sources.with_clean_labels(flower, twice)


@pytest.mark.parametrize(
    ("access", "kind", "message"),
    [
        (Access("archive"), DatasetError, "no --root was given; it must be the folder with the original files of pets"),
        (Access("archive", Path("no/where")), DatasetError, "--root no/where is no folder"),
        (Access("ftp"), UnknownNameError, "unknown source 'ftp'.*hub, archive"),
        (Access(protocol="blog"), UnknownNameError, "unknown protocol 'blog'.*recipe, official, coop"),
        (Access("archive", protocol="recipe"), DatasetError, "the protocol recipe needs --source hub, not archive"),
        (Access("hub", protocol="coop"), DatasetError, "the protocol coop needs --source archive, not hub"),
        (Access("archive", Path(), "coop"), DatasetError, "give its JSON file with --split-file"),
        (Access("hub", Path()), DatasetError, "pets: --root has no meaning with source hub"),
        (Access("hub", allow_modified=True), DatasetError, "pets: --allow-modified has no meaning with"),
        (Access("archive", Path(), split_file=Path("x")), DatasetError, "pets: --split-file has no meaning with"),
    ],
)
def test_ways_that_a_set_is_not_had(access: Access, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        catalog.load("pets", access=access)


@pytest.mark.parametrize(
    "access",
    [
        Access("archive"),
        Access(root=Path("x")),
        Access(protocol="coop"),
        Access(split_file=Path("x")),
        Access(allow_modified=True),
    ],
)
def test_embedded_sets_have_no_choice(access: Access) -> None:
    with pytest.raises(InputError, match="is for caltech101, cars, flowers, pets; digits has no choice of it"):
        catalog.load("digits", access=access)


def test_counts_that_are_not_the_protocols(root: Path) -> None:
    wrong = replace(row("pets"), protocols=(replace(SMALL["pets"], test=3),))
    with pytest.raises(DatasetError, match="pets, protocol official: 2 test images, not 3"):
        load(wrong, root / "pets")
    more = replace(row("pets"), classes=("Abyssinian", "Beagle"))
    with pytest.raises(DatasetError, match="the source has a class 'american bulldog'"):
        load(more, root / "pets")


def test_rows_state_their_protocols() -> None:
    stated = {(r.name, p.name): (p.classes, p.train, p.test) for r in BENCHMARKS for p in r.protocols}
    assert stated["caltech101", "official"] == (102, 3060, 6084)
    assert stated["flowers", "official"] == (102, 1020, 6149)
    assert stated["pets", "official"] == (37, 3680, 3669)
    assert stated["cars", "official"] == (196, 8144, 8041)
    assert stated["caltech101", "coop"][0] == 100
    for r in BENCHMARKS:
        assert [p.name for p in r.protocols] == ["recipe", "official", "coop"]
        assert len(r.classes or ()) in (0, r.protocols[0].classes)
        assert all(len(md5) in (0, 32) for names in r.files.values() for md5 in names.values())


def test_other_labels_or_another_split_are_other_data(root: Path) -> None:
    """The same images: the protocol's name in results still tells them apart."""
    home = root / "flowers"
    stamps = [load(row("flowers"), home).protocol]
    rolled = published.FLOWER_LABELS[1:] + published.FLOWER_LABELS[:1]  # each the next image's
    savemat(home / "imagelabels.mat", {"labels": np.array([rolled], np.uint8)})
    stamps.append(load(row("flowers"), home).protocol)
    savemat(home / "setid.mat", {"trnid": [[1, 3, 5]], "valid": [[4]], "tstid": [[2, 6]]})
    stamps.append(load(row("flowers"), home).protocol)
    assert len(set(stamps)) == 3


def test_the_right_photographs_under_wrong_classes_are_not_the_published_set(root: Path) -> None:
    known = replace(row("caltech101"), content=load(row("caltech101"), root / "caltech101").facts["content"])
    members = published.caltech_members()
    one, other = (f"101_ObjectCategories/{name}/image_0000.jpg" for name in ("Faces_easy", "wild_cat"))
    members[one], members[other] = members[other], members[one]
    published.tar(root / "caltech101/101_ObjectCategories.tar.gz", members)
    with pytest.raises(DatasetError, match="--allow-modified"):
        load(known, root / "caltech101", allow_modified=False)


def test_images_that_train_and_test_share_are_on_record(root: Path) -> None:
    pictures = {f"jpg/image_{n:05d}.jpg": published.picture(min(n, 5)) for n in range(1, 7)}  # 6 (train) is 5 (test)
    published.tar(root / "flowers/102flowers.tgz", pictures)
    assert load(row("flowers"), root / "flowers").facts["shared"] == 1


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
