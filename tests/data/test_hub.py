"""Sets of the Hugging Face hub, against a stand-in on the loopback. The hub's libraries read their settings when they
are imported: so the reads run in processes of their own, several in each."""

import hashlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import CUT, RESET, HubRepo, serve

from data import hub
from kshot.errors import DatasetError

ROOT = Path(__file__).parents[2]
CLASSES = ("cat", "dog", "eel")
COMMIT_OF_NOTHING = "0" * 40
DRIVER = """
import json, sys
from huggingface_hub import constants
constants.DOWNLOAD_CHUNK_SIZE = 1 << 10  # bytes; as it is, a small file is one piece and nothing is kept of a part
from data import hub
from data.dataset import stored_bytes
from kshot.errors import KshotError

def answer(request):
    try:
        found = hub.read(*request)
        assert iter(found.items) is found.items
        items = [(i.path, i.split, i.label, i.key, len(stored_bytes(i.stored))) for i in found.items]
        return {"revision": found.revision, "classes": found.classes, "items": items}
    except KshotError as error:
        return {"error": type(error).__name__, "text": str(error), "status": error.exit_status}

print(json.dumps([answer(request) for request in json.loads(sys.argv[1])]))
"""
CARD = b"""---
configs:
- config_name: default
  data_files:
  - {split: train, path: data/train-*}
  - {split: test, path: data/test-*}
  - {split: contrast, path: data/contrast-*}
---
"""
BARE_CARD = b"---\nlicense: mit\n---\n"

Row = tuple[dict[str, Any] | None, int | None]
Answers = list[dict[str, Any]]


def parquet(rows: Sequence[Row], label: dict[str, Any] | None = None) -> bytes:
    """Columns image, label and note, with the features in the schema as the hub writes them; two rows a group."""
    features = {
        "image": {"_type": "Image"},
        "label": label or {"names": list(CLASSES), "_type": "ClassLabel"},
        "note": {"dtype": "string", "_type": "Value"},
    }
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    schema = pa.schema({"image": image, "label": pa.int64(), "note": pa.string()}, metadata)
    images, labels = zip(*rows, strict=True)
    table = pa.table({"image": images, "label": labels, "note": ["a note"] * len(rows)}, schema)
    stream = io.BytesIO()
    pq.write_table(table, stream, row_group_size=2)
    return stream.getvalue()


def damaged(content: bytes, column: str) -> bytes:
    """The same file with bytes in place of a column's values that cannot be read."""
    groups, broken = pq.ParquetFile(io.BytesIO(content)).metadata, bytearray(content)
    for chunk in (groups.row_group(g).column(c) for g in range(groups.num_row_groups) for c in range(4)):
        if chunk.path_in_schema == column:
            start = chunk.dictionary_page_offset or chunk.data_page_offset
            broken[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    return bytes(broken)


def rows(images: Sequence[bytes]) -> list[Row]:
    """Labelled 0, 1, 2, 0, ...; with the names of files that are not there, as the hub keeps them beside the bytes."""
    return [({"bytes": image, "path": f"{n}.png"}, n % 3) for n, image in enumerate(images)]


def one_file(content: bytes) -> HubRepo:
    return HubRepo({"README.md": BARE_CARD, "data/train-00000-of-00001.parquet": content})


@dataclass
class Story:
    """What the reads answered, process by process, and what each process asked of the hub."""

    images: list[bytes]
    cars: HubRepo
    first: Answers
    downloads: list[str]
    ranges: list[str]
    second: Answers
    second_downloads: list[str]
    offline: Answers
    unreachable: Answers


def read_all(url: str, home: Path, requests: Sequence[Sequence[Any]], offline: str = "0") -> Answers:
    ours = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    hub = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_OFFLINE": offline, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-c", DRIVER, json.dumps(requests)]
    env = {**ours, **hub, "NO_PROXY": "127.0.0.1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # nothing else is printed


def repos(images: Sequence[bytes], elsewhere: Path) -> dict[str, HubRepo]:
    """elsewhere: a file of this machine that one of the cards names as its data."""
    names_it = f"---\nconfigs:\n- {{config_name: default, data_files: {elsewhere}}}\n---\n"
    big, path = "data/train-00000-of-00002.parquet", {"bytes": None, "path": "/etc/hostname"}
    cars = {
        "README.md": CARD,
        "cars.py": b"raise SystemExit('a script was run')",
        "set.py": b"raise SystemExit('a script was run')",
        big: parquet(rows(images[:5])),
        "data/train-00001-of-00002.parquet": parquet(rows(images[5:7])),
        "data/test-00000-of-00001.parquet": damaged(parquet(rows(images[7:10])), "note"),
        "data/contrast-00000-of-00001.parquet": parquet(rows(images[10:12])),
    }
    folder = {f"{split}/{'ab'[n % 2]}/{n} [x]*.png": images[n] for split in ("train", "test") for n in range(10)}
    return {
        "o/cars": HubRepo(cars, drops={big: [CUT, RESET]}),
        "o/gated": HubRepo(cars, gated=True),
        "o/folder": HubRepo({"README.md": BARE_CARD, **folder}),
        "o/plain": one_file(parquet(rows(images[:2]), {"dtype": "int64", "_type": "Value"})),
        "o/no-image": one_file(parquet([*rows(images[:3]), (None, 1)])),
        "o/no-label": one_file(parquet([*rows(images[:2]), (rows(images)[2][0], -1)])),
        "o/null-label": one_file(parquet([(rows(images)[0][0], None)])),
        "o/no-class": one_file(parquet([(rows(images)[0][0], 3)])),
        "o/path": one_file(parquet([(path, 1)])),
        "o/broken": one_file(b"not parquet"),
        "o/table": HubRepo({"README.md": BARE_CARD, "train.csv": b"image,label\n1,2\n"}),
        "o/zips": HubRepo({"README.md": BARE_CARD, "train.zip": b"PK"}),
        "o/outside": HubRepo({"README.md": names_it.encode(), "a.parquet": b""}),
    }


# What is refused: the request, and words of the answer.
REFUSED: dict[str, tuple[tuple[str, str | None, list[str] | None], list[str]]] = {
    "split": (("o/cars", None, ["train", "tset"]), ["'tset'", "did you mean 'test'", "train, test, contrast"]),
    "revision": (("o/cars", "v9", None), ["no revision 'v9'", "https://huggingface.co/datasets/o/cars/commits"]),
    "commit": (("o/cars", COMMIT_OF_NOTHING, None), ["no revision", COMMIT_OF_NOTHING]),
} | {
    name: ((name, None, None), words)
    for name, words in {
        "o/none": ["no set o/none", "private", "hf auth login"],
        "a/b/c": ["'a/b/c'", "OWNER/NAME"],
        "o/gated": ["gated", "https://huggingface.co/datasets/o/gated", "HF_TOKEN", "hf auth login"],
        "o/plain": ["image (Image), label (int64), note (string)", "one ClassLabel", "folder:PATH"],
        "o/no-image": ["no image in row 3 of split 'train'"],
        "o/no-label": ["no label of its classes in row 2 of split 'train'"],
        "o/null-label": ["no label of its classes in row 0 of split 'train'"],
        "o/no-class": ["no label of its classes in row 0 of split 'train'"],
        "o/path": ["'/etc/hostname'", "none of its files"],
        "o/broken": ["o/broken cannot be read", "another revision"],
        "o/table": ["stored as csv", "parquet, arrow, imagefolder"],
        "o/zips": ["parquet, arrow, imagefolder", "refs/convert/parquet"],
        "o/outside": ["card of o/outside", "none of its files"],
    }.items()
}
CARS, CONTRAST, FOLDER = ("o/cars", None, ["train", "test"]), ("o/cars", None, ["contrast"]), ("o/folder", None, None)


@pytest.fixture(scope="module")
def story(make_image: Callable[..., bytes], tmp_path_factory: pytest.TempPathFactory) -> Story:
    images, home = [make_image(seed) for seed in range(12)], tmp_path_factory.mktemp("hub")
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "train.parquet"
    elsewhere.write_bytes(parquet(rows(images)))
    with serve(repos(images, elsewhere)) as hub:
        cars = hub.repos["o/cars"]
        first = read_all(hub.url, home, [CARS, FOLDER, *(request for request, _ in REFUSED.values())])
        downloads, ranges = hub.downloads(), [r[2] for r in hub.requests if r[2]]
        hub.requests.clear()
        second = read_all(hub.url, home, [CARS, FOLDER])
        second_downloads = hub.downloads()
        offline = read_all(hub.url, home, [CARS, ("o/cars", cars.commit, ["test"]), CONTRAST, ("o/none",)], "1")
    unreachable = read_all(hub.url, home, [CARS, FOLDER, ("o/none",)])
    return Story(images, cars, first, downloads, ranges, second, second_downloads, offline, unreachable)


def expected(split: str, images: Sequence[bytes], labels: Sequence[str]) -> list[list[Any]]:
    keys = [hashlib.sha256(image).hexdigest() for image in images]
    return [[f"{split}/{n}", split, labels[n], keys[n], len(images[n])] for n in range(len(images))]


def cars_items(story: Story) -> list[list[Any]]:
    labels = [CLASSES[n % 3] for n in (0, 1, 2, 3, 4, 0, 1)]
    return expected("train", story.images[:7], labels) + expected("test", story.images[7:10], CLASSES)


def test_the_items_are_the_rows_with_their_bytes_as_stored(story: Story) -> None:
    found = story.first[0]
    assert found["revision"] == story.cars.commit
    assert found["classes"] == list(CLASSES)
    assert found["items"] == cars_items(story)


def test_a_folder_of_images_is_a_set_too(story: Story) -> None:
    order = [0, 2, 4, 6, 8, 1, 3, 5, 7, 9]  # by class, then by name
    images, labels = [story.images[n] for n in order], ["a"] * 5 + ["b"] * 5
    found = story.first[1]
    assert found["classes"] == ["a", "b"]
    assert found["items"] == expected("train", images, labels) + expected("test", images, labels)


def test_only_the_files_of_the_splits_asked_for_are_downloaded_and_no_code(story: Story) -> None:
    assert "data/test-00000-of-00001.parquet" in story.downloads
    assert not [name for name in story.downloads if "contrast" in name or name.endswith((".py", ".csv", ".zip"))]


def test_columns_that_are_not_needed_are_not_read(story: Story) -> None:
    content = story.cars.files["data/test-00000-of-00001.parquet"]
    with pytest.raises(OSError, match="page header"):
        pq.read_table(io.BytesIO(content), columns=["note"])
    assert "error" not in story.first[0]


def test_a_dropped_download_goes_on_where_it_broke_off(story: Story) -> None:
    big = "data/train-00000-of-00002.parquet"
    assert story.cars.drops[big] == []  # ended early, then was reset
    (first, *_) = story.ranges
    assert int(first.removeprefix("bytes=").rstrip("-")) > 0
    assert story.downloads.count(big) == 3


def test_a_second_read_downloads_nothing(story: Story) -> None:
    assert story.second == story.first[:2]
    assert story.second_downloads == []


def test_offline_the_cache_answers_at_the_commit_it_has(story: Story) -> None:
    assert story.offline[0] == story.first[0]
    assert story.offline[1]["items"] == cars_items(story)[7:]
    assert story.unreachable[:2] == story.first[:2]


@pytest.mark.parametrize(
    ("answers", "n", "why"),
    [("offline", 2, "HF_HUB_OFFLINE"), ("offline", 3, "HF_HUB_OFFLINE"), ("unreachable", 2, "ConnectError")],
)
def test_what_the_cache_lacks_says_how_to_go_on(story: Story, answers: str, n: int, why: str) -> None:
    answer = getattr(story, answers)[n]
    assert (answer["error"], answer["status"]) == ("KshotError", 1)
    assert all(word in answer["text"] for word in (why, "--source archive", "HF_ENDPOINT")), answer


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_is_one_line_that_names_the_set_and_the_way_out(story: Story, name: str) -> None:
    request, words = REFUSED[name]
    answer = story.first[2 + list(REFUSED).index(name)]
    assert answer["error"] in ("DatasetError", "UnknownNameError"), answer
    assert answer["status"] == 2
    assert "\n" not in answer["text"]
    assert all(word in answer["text"] for word in (request[0], *words)), answer


def test_of_several_columns_the_ones_of_the_usual_names() -> None:
    from datasets import ClassLabel, Image, Value

    features = {
        "mask": Image(),
        "image": Image(),
        "species": ClassLabel(names=["cat"]),
        "label": ClassLabel(names=["pug"]),
    }
    assert hub._columns("me/pets", features) == hub.Columns("image", "label", ("pug",))
    one = {"photo": Image(), "breed": ClassLabel(names=["pug"]), "note": Value("string")}
    assert hub._columns("me/pets", one) == hub.Columns("photo", "breed", ("pug",))
    with pytest.raises(DatasetError, match=r"me/pets has the columns .*not one Image and one ClassLabel"):
        hub._columns("me/pets", {**one, "kind": ClassLabel(names=["cat"])})
