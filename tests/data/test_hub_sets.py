"""Hub sets of every shape as data sets: which split is train and which test, the classes of which column, and what is
said of it. All are loaded from the stand-in in one process."""

import hashlib
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
from hub_server import BARE_CARD, HubRepo, ask, class_label, one_file, parquet, serve, value

DRIVER = """
import json, sys
from data import catalog
from data.dataset import Access
from kshot.errors import KshotError

def answer(name, label_column=""):
    try:
        found = catalog.load(name, access=Access(label_column=label_column))
    except KshotError as error:
        return {"error": str(error), "status": error.exit_status}
    sides = {side: [[found.classes[e.label], e.key] for e in getattr(found, side)] for side in ("train", "test")}
    return {"protocol": found.protocol, "classes": found.classes, "facts": found.facts, **sides}

print(json.dumps([answer(*request) for request in json.loads(sys.argv[1])]))
"""
PETS = class_label("cat", "dog")
CONFIGS = """---
configs:
- config_name: coarse
  data_files: [{split: train, path: coarse/train.parquet}, {split: test, path: coarse/test.parquet}]
- config_name: fine
  default: IS_DEFAULT
  data_files: [{split: train, path: fine/train.parquet}, {split: test, path: fine/test.parquet}]
---
"""
SPLITS = b"""---
configs:
- config_name: default
  data_files: [{split: Train, path: a.parquet}, {split: dev, path: b.parquet}]
---
"""
TABLE = "\n".join(["file_name,kind", *(f"{n}.png,{'pq'[n % 2]}" for n in range(6))]).encode()
TWICE = b"""---
dataset_info:
  features: [{name: image, dtype: image}, {name: label, dtype: {class_label: {names: {'0': cat, '1': dog, '2': cat}}}}]
---
"""


def splits(**files: bytes) -> HubRepo:
    return HubRepo({"README.md": BARE_CARD, **{f"data/{s}-00000-of-00001.parquet": f for s, f in files.items()}})


def repos(x: list[bytes]) -> dict[str, HubRepo]:
    """x: 12 different images."""

    def pets(start: int, stop: int, *labels: int | None) -> bytes:
        images = x[start:stop]
        return parquet(images, label=(PETS, labels or [n % 2 for n in range(len(images))]))

    def of_values(dtype: str, *values: Any) -> HubRepo:
        return one_file(parquet([x[n % 12] for n in range(len(values))], kind=(value(dtype), values)))

    train, test, two = pets(0, 6), pets(6, 9), {"species": (PETS, [0, 1, 0, 1]), "breed": (PETS, [0, 0, 1, 1])}
    fine, pug = class_label("pug", "tabby"), parquet(x[:4], label=(class_label("pug", "tabby"), [0, 1, 0, 1]))
    configs = {"coarse/train.parquet": train, "coarse/test.parquet": test, "fine/train.parquet": pug}
    configs |= {"fine/test.parquet": parquet(x[4:6], label=(fine, [0, 1]))}
    odd = class_label("cat", "_", "Cat", " ", "dog ", "Dog")
    return {
        "o/validation": splits(train=train, validation=test),
        "o/three": splits(train=train, validation=pets(9, 12), test=test),
        "o/dev": HubRepo({"README.md": SPLITS, "a.parquet": train, "b.parquet": test}),
        "o/one": splits(train=pets(0, 12)),
        "o/folder": HubRepo({f"{'train' if n < 6 else 'val'}/{'ab'[n % 2]}/{n}.png": x[n] for n in range(12)}),
        "o/metadata": HubRepo({"metadata.csv": TABLE, **{f"{n}.png": x[n] for n in range(6)}}),
        "o/configs": HubRepo({"README.md": CONFIGS.replace("IS_DEFAULT", "true").encode(), **configs}),
        "o/no-default": HubRepo({"README.md": CONFIGS.replace("IS_DEFAULT", "false").encode(), **configs}),
        "o/two": one_file(parquet(x[:4], **two)),
        "o/hidden": splits(train=train, validation=pets(9, 12), test=pets(6, 9, -1, -1, -1)),
        "o/some": splits(train=pets(0, 6, 0, -1, 1, None, 0, 1), test=test),
        "o/texts": of_values("string", "b", "a", "b", "", "a", "b", "a"),
        "o/signs": of_values("int64", 1, -1, 1, -1, 1),
        "o/counted": of_values("int64", 1, 0, -1, 1, 0),
        "o/single": of_values("string", "a", "a", "b", "c"),
        "o/many": of_values("int64", *range(1001)),
        "o/alone": one_file(pets(0, 3, 1, 1, 1)),
        "o/broken": one_file(parquet([None] * 24 + x[:2], label=(PETS, [0] * 24 + [7, 1]))),
        "o/twice": HubRepo({"README.md": TWICE, "train.parquet": train}),
        "o/odd": one_file(parquet(x[:6], label=(odd, [0, 1, 2, 3, 4, 5]))),
    }


class Shape(NamedTuple):
    """What is asked for; how the protocol begins; how each note begins; the classes; the images of train and of test,
    None where they are drawn."""

    request: tuple[str, ...]
    protocol: str
    notes: Sequence[str] = ()
    classes: Sequence[str] = ("cat", "dog")
    sides: tuple[range, range] | None = None


GIVEN, VALIDATION, DRAWN = "given-split-", "given-split-validation-", "seeded-split-0-"
TEST, SEEDED = "split 'validation' is the test side", "test is drawn by seed"
UNKNOWN = "rows without a label are not used"
SIX, FOUR, FINE = (range(6), range(6, 9)), (range(4), range(4, 6)), ("pug", "tabby")
SHAPES = {
    "train and validation": Shape(("hub:o/validation",), VALIDATION, [TEST], sides=SIX),
    "all three": Shape(("hub:o/three",), GIVEN, ["splits that are not used: 'validation'"], sides=SIX),
    "a card's splits": Shape(("hub:o/dev",), "given-split-dev-", ["split 'dev' is the test side"], sides=SIX),
    "one split": Shape(("hub:o/one",), DRAWN, [SEEDED]),
    "folders": Shape(("hub:o/folder",), VALIDATION, [TEST], ("a", "b"), (range(6), range(6, 12))),
    "the default config": Shape(
        ("hub:o/configs",), GIVEN, ["config 'fine' is used, the default; hub:o/configs#CONFIG takes coarse"], FINE, FOUR
    ),
    "a config": Shape(("hub:o/configs#coarse",), GIVEN, sides=SIX),
    "a config of a revision": Shape(("hub:o/no-default@main#fine",), GIVEN, [], FINE, FOUR),
    "a label column": Shape(("hub:o/two", "breed"), DRAWN + "by-breed-", [SEEDED]),
    "the usual label column": Shape(("hub:o/validation", "label"), VALIDATION, [TEST], sides=SIX),
    "hidden labels": Shape(
        ("hub:o/hidden",),
        VALIDATION,
        ["split 'test' has no labels and is not used", TEST],
        sides=(range(6), range(9, 12)),
    ),
    "texts": Shape(("hub:o/texts", "kind"), DRAWN + "by-kind-", [UNKNOWN + ": 1 of", SEEDED], ("a", "b")),
    "a table beside images": Shape(("hub:o/metadata", "kind"), DRAWN + "by-kind-", [SEEDED], ("p", "q")),
    "signs": Shape(("hub:o/signs", "kind"), DRAWN + "by-kind-", [SEEDED], ("-1", "1")),
    "numbers from 0": Shape(("hub:o/counted", "kind"), DRAWN + "by-kind-", [UNKNOWN + ": 1 of", SEEDED], ("0", "1")),
}
REFUSED: dict[str, tuple[tuple[str, ...], list[str]]] = {
    "no default config": (
        ("hub:o/no-default",),
        ["several configs and no default", "hub:o/no-default#CONFIG: coarse, fine"],
    ),
    "another config": (
        ("hub:o/configs#fin",),
        ["unknown config of o/configs 'fin' (did you mean 'fine'?)", "coarse, fine"],
    ),
    "two label columns": (
        ("hub:o/two",),
        ["several columns of class labels and none called label", "--label-column: species, breed"],
    ),
    "texts": (("hub:o/texts",), ["no column of class labels", "--label-column: kind, note"]),
    "another column": (("hub:o/two", "bred"), ["no column 'bred'", "--label-column: species, breed"]),
    "values of one row": (("hub:o/single", "kind"), ["column 'kind': 2 problems", "'b' is the value of", "'c' is the"]),
    "too many values": (("hub:o/many", "kind"), ["1,001 different values, more than 1,000", "--label-column"]),
    "one class": (("hub:o/alone",), ["one class ('dog')"]),
    "broken rows": (
        ("hub:o/broken",),
        ["25 problems", "\n  label 7 in row 24", "row 18 of split 'train'\n  ... and 5 more"],
    ),
    "names twice": (("hub:o/twice",), ["several classes of one name: 'cat'"]),
    "odd names": (
        ("hub:o/odd",),
        [
            "hub:o/odd: 4 problems",
            "class ' ' has no",
            "class '_' has no",
            "'Cat' and 'cat' both",
            "'Dog' and 'dog ' both",
        ],
    ),
    "a label column of no hub set": (
        ("icons", "kind"),
        ["--label-column kind is for hub:ID; icons has no choice of it"],
    ),
}


@pytest.fixture(scope="module")
def images(make_image: Callable[..., bytes]) -> list[bytes]:
    return [make_image(seed, 16, 16) for seed in range(12)]


@pytest.fixture(scope="module")
def answers(images: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    requests = {name: shape.request for name, shape in SHAPES.items()} | {"rows without labels": ("hub:o/some",)}
    requests |= {f"no {name}": request for name, (request, _) in REFUSED.items()}
    with serve(repos(images)) as hub:
        found = ask(hub.url, tmp_path_factory.mktemp("hub"), DRIVER, [*requests.values()], silent=True)
    return dict(zip(requests, found, strict=True))


@pytest.mark.parametrize("name", SHAPES)
def test_a_set_of_that_shape(name: str, answers: dict[str, dict[str, Any]], images: list[bytes]) -> None:
    shape, found = SHAPES[name], answers[name]
    assert re.fullmatch(f"{shape.protocol}[0-9a-f]{{12}}", found.get("protocol", "")), found
    assert found["classes"] == [*shape.classes]
    notes = found["facts"].get("notes", [])
    assert len(notes) == len(shape.notes)
    assert all(note.startswith(begin) for note, begin in zip(notes, shape.notes, strict=True)), notes
    if shape.sides:
        keys = [sorted(hashlib.sha256(images[n]).hexdigest() for n in side) for side in shape.sides]
        assert [sorted(key for _, key in found[side]) for side in ("train", "test")] == keys
    assert found["facts"].get("label_column", "label") == (*shape.request, "label")[1]
    assert found["facts"].get("config", "") == shape.request[0].partition("#")[2]


def test_rows_without_a_label_are_left_out_and_counted(answers: dict[str, Any], images: list[bytes]) -> None:
    found, keys = answers["rows without labels"], [hashlib.sha256(image).hexdigest() for image in images]
    assert sorted(found["train"]) == sorted([["cat", keys[0]], ["dog", keys[2]], ["cat", keys[4]], ["dog", keys[5]]])
    assert found["facts"]["notes"] == ["rows without a label are not used: 2 of split 'train'"]


def test_the_classes_are_those_of_the_column_that_is_named(answers: dict[str, Any], images: list[bytes]) -> None:
    key = {hashlib.sha256(image).hexdigest(): n for n, image in enumerate(images)}
    found = answers["a label column"]
    assert {key[k]: c for c, k in (*found["train"], *found["test"])} == {0: "cat", 1: "cat", 2: "dog", 3: "dog"}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_said_at_once(name: str, answers: dict[str, dict[str, Any]]) -> None:
    found = answers[f"no {name}"]
    assert found.get("status") == 2, found
    assert all(words in found["error"] for words in REFUSED[name][1]), found["error"]
