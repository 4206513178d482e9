"""Reading sets of the Hugging Face hub: downloads, the cache, and what is refused; against a stand-in on the loopback,
several reads in a process."""

import hashlib
import io
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hub_server import BARE_CARD, CUT, RESET, HubRepo, ask, class_label, one_file, parquet, serve, value

from data import hub
from kshot.errors import DatasetError

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
        found = hub.read(hub.HubName.parse(request[0]), *request[1:])
        assert iter(found.items) is found.items
        items = [(i.path, i.split, i.label, i.key, len(stored_bytes(i.stored))) for i in found.items]
        return {"revision": found.revision, "items": items}
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

Answers = list[dict[str, Any]]


def damaged(content: bytes, column: str) -> bytes:
    """The same file with bytes in place of a column's values that cannot be read."""
    groups, broken = pq.ParquetFile(io.BytesIO(content)).metadata, bytearray(content)
    for chunk in (groups.row_group(g).column(c) for g in range(groups.num_row_groups) for c in range(4)):
        if chunk.path_in_schema == column:
            start = chunk.dictionary_page_offset or chunk.data_page_offset
            broken[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    return bytes(broken)


def labelled(images: Sequence[Any], labels: Sequence[int | None] | None = None) -> bytes:
    """A file of these images, labelled 0, 1, 2, 0, ... unless it is said."""
    return parquet(images, label=(class_label(*CLASSES), labels or [n % 3 for n in range(len(images))]))


@dataclass
class Story:
    """What the reads answered, process by process, and what the first, which reads two sets twice, asked of the hub."""

    images: list[bytes]
    cars: HubRepo
    first: Answers
    downloads: list[str]
    ranges: list[str]
    offline: Answers
    unreachable: Answers


def repos(images: Sequence[bytes], elsewhere: Path) -> dict[str, HubRepo]:
    """elsewhere: a file of this machine that one of the cards names as its data."""
    names_it = f"---\nconfigs:\n- {{config_name: default, data_files: {elsewhere}}}\n---\n"
    big, path = "data/train-00000-of-00002.parquet", {"bytes": None, "path": "/etc/hostname"}
    cars = {
        "README.md": CARD,
        "cars.py": b"raise SystemExit('a script was run')",
        "set.py": b"raise SystemExit('a script was run')",
        big: labelled(images[:5]),
        "data/train-00001-of-00002.parquet": labelled(images[5:7]),
        "data/test-00000-of-00001.parquet": damaged(labelled(images[7:10]), "note"),
        "data/contrast-00000-of-00001.parquet": labelled(images[10:12]),
    }
    folder = {f"{split}/{'ab'[n % 2]}/{n} [x]*.png": images[n] for split in ("train", "test") for n in range(10)}
    return {
        "o/cars": HubRepo(cars, drops={big: [CUT, RESET]}),
        "o/gated": HubRepo(cars, gated=True),
        "o/folder": HubRepo({"README.md": BARE_CARD, **folder}),
        "o/plain": one_file(parquet(images[:2], label=(value("int64"), [0, 1]))),
        "o/no-image": one_file(labelled([*images[:3], None])),
        "o/null-label": one_file(labelled(images[:2], [None, -1])),
        "o/no-class": one_file(labelled(images[:1], [3])),
        "o/path": one_file(labelled([path])),
        "o/broken": one_file(b"not parquet"),
        "o/table": HubRepo({"README.md": BARE_CARD, "train.csv": b"image,label\n1,2\n"}),
        "o/zips": HubRepo({"README.md": BARE_CARD, "train.zip": b"PK"}),
        "o/outside": HubRepo({"README.md": names_it.encode(), "a.parquet": b""}),
    }


# What is refused: the request, and words of the answer.
REFUSED: dict[str, tuple[tuple[str, list[str]], list[str]]] = {
    "split": (("o/cars", ["train", "tset"]), ["'tset'", "did you mean 'test'", "train, test, contrast"]),
    "revision": (("o/cars@v9", []), ["no revision 'v9'", "https://huggingface.co/datasets/o/cars/commits"]),
    "commit": ((f"o/cars@{COMMIT_OF_NOTHING}", []), ["no revision", COMMIT_OF_NOTHING]),
    "config": (("o/cars#fine", []), ["unknown config", "'fine'", "choose from: default"]),
} | {
    name: ((name, []), words)
    for name, words in {
        "o/none": ["no set o/none", "private", "hf auth login"],
        "a/b/c": ["'a/b/c'", "OWNER/NAME"],
        "o/gated": ["gated", "https://huggingface.co/datasets/o/gated", "HF_TOKEN", "hf auth login"],
        "o/plain": [
            "no column of class labels",
            "image (Image), label (int64), note (string)",
            "--label-column: label",
        ],
        "o/no-image": ["no image in row 3 of split 'train'"],
        "o/null-label": ["no row with a label"],
        "o/no-class": ["label 3 in row 0 of split 'train' is of none of its 3 classes"],
        "o/path": ["'/etc/hostname'", "none of its files"],
        "o/broken": ["o/broken cannot be read", "another revision"],
        "o/table": ["stored as csv", "parquet, arrow, imagefolder"],
        "o/zips": ["parquet, arrow, imagefolder", "refs/convert/parquet"],
        "o/outside": ["card of o/outside", "none of its files"],
    }.items()
}
CARS, CONTRAST, FOLDER = ("o/cars", ["train", "test"]), ("o/cars", ["contrast"]), ("o/folder",)


@pytest.fixture(scope="module")
def story(make_image: Callable[..., bytes], tmp_path_factory: pytest.TempPathFactory) -> Story:
    images, home = [make_image(seed) for seed in range(12)], tmp_path_factory.mktemp("hub")
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "train.parquet"
    elsewhere.write_bytes(labelled(images))
    with serve(repos(images, elsewhere)) as hub:
        cars = hub.repos["o/cars"]
        first = ask(hub.url, home, DRIVER, [CARS, FOLDER, *(request for request, _ in REFUSED.values()), CARS, FOLDER])
        downloads = [path for method, path, _ in hub.requests if method == "GET" and "/resolve/" in path]
        ranges = [asked for _, _, asked in hub.requests if asked]
        offline = ask(hub.url, home, DRIVER, [CARS, (f"o/cars@{cars.commit}", ["test"]), CONTRAST, ("o/none",)], "1")
    unreachable = ask(hub.url, home, DRIVER, [CARS, FOLDER, ("o/none",)])
    return Story(images, cars, first, downloads, ranges, offline, unreachable)


def expected(split: str, images: Sequence[bytes], labels: Sequence[str]) -> list[list[Any]]:
    keys = [hashlib.sha256(image).hexdigest() for image in images]
    return [[f"{split}/{n}", split, labels[n], keys[n], len(images[n])] for n in range(len(images))]


def cars_items(story: Story) -> list[list[Any]]:
    labels = [CLASSES[n % 3] for n in (0, 1, 2, 3, 4, 0, 1)]
    return expected("train", story.images[:7], labels) + expected("test", story.images[7:10], CLASSES)


def test_the_items_are_the_rows_with_their_bytes_as_stored(story: Story) -> None:
    found = story.first[0]
    assert found["revision"] == story.cars.commit
    assert found["items"] == cars_items(story)


def test_a_folder_of_images_is_a_set_too(story: Story) -> None:
    order = [0, 2, 4, 6, 8, 1, 3, 5, 7, 9]  # by class, then by name
    images, labels = [story.images[n] for n in order], ["a"] * 5 + ["b"] * 5
    assert story.first[1]["items"] == expected("train", images, labels) + expected("test", images, labels)


def test_only_the_files_of_the_splits_asked_for_are_downloaded_and_no_code(story: Story) -> None:
    assert any(path.endswith("data/test-00000-of-00001.parquet") for path in story.downloads)
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
    assert sum(path.endswith(f"/o/cars/resolve/{story.cars.commit}/{big}") for path in story.downloads) == 3


def test_a_second_read_downloads_nothing(story: Story) -> None:
    assert story.first[-2:] == story.first[:2]
    of_both = Counter(path for path in story.downloads if "/o/cars/" in path or "/o/folder/" in path)
    assert [path.rpartition("/")[2] for path, n in of_both.items() if n > 1] == ["train-00000-of-00002.parquet"]


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
    assert all(word in answer["text"] for word in (request[0].split("@")[0].split("#")[0], *words)), answer


def test_of_several_columns_the_ones_of_the_usual_names() -> None:
    from datasets import ClassLabel, Image, Value

    pug = ClassLabel(names=["pug"])
    features = {"mask": Image(), "image": Image(), "species": ClassLabel(names=["cat"]), "label": pug}
    assert hub._columns("me/pets", features) == hub.Columns("image", "label", ("pug",))
    assert hub._columns("me/pets", features, "species") == hub.Columns("image", "species", ("cat",), usual=False)
    one = {"photo": Image(), "breed": pug, "note": Value("string"), "weight": Value("float32")}
    assert hub._columns("me/pets", one) == hub._columns("me/pets", one, "breed")
    assert hub._columns("me/pets", one, "note") == hub.Columns("photo", "note", (), usual=False)
    for column, wrong in (
        ("weight", "no column 'weight' of labels, texts or whole numbers"),
        ("", "none called label"),
    ):
        with pytest.raises(DatasetError, match=rf"me/pets has .*{wrong}.*--label-column: breed, kind"):
            hub._columns("me/pets", {**one, "kind": pug}, column)
    with pytest.raises(DatasetError, match=r"no column of images and no column of class labels; .*folder:PATH"):
        hub._columns("me/pets", {"note": Value("string")})


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("me/pets", ("me/pets", "", "")),
        ("me/pets@v1", ("me/pets", "v1", "")),
        ("me/pets#fine", ("me/pets", "", "fine")),
        ("me/pets@refs/convert/parquet#fine", ("me/pets", "refs/convert/parquet", "fine")),
    ],
)
def test_a_name_with_its_revision_and_config(text: str, parts: tuple[str, str, str]) -> None:
    name = hub.HubName.parse(text)
    assert name == parts
    assert hub.HubName.parse(name.with_config("new").removeprefix("hub:")) == (*parts[:2], "new")


@pytest.mark.parametrize("text", ["me/pets#fine@v1", "me/pets@", "me/pets#", "@v1", "#fine", "me/pets@a@b", ""])
def test_another_order_is_refused(text: str) -> None:
    with pytest.raises(DatasetError, match="hub:ID, hub:ID@REVISION, hub:ID#CONFIG or hub:ID@REVISION#CONFIG"):
        hub.HubName.parse(text)


def test_a_damaged_file_of_the_cache_is_downloaded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    content, name, downloads = b"PAR1 and so on", "data/train.parquet", list[str]()
    blob, link = tmp_path / "blobs" / hashlib.sha256(content).hexdigest(), tmp_path / "snapshots/0a" / name
    link.parent.mkdir(parents=True)
    blob.parent.mkdir()

    def download(hub_id: str, name: str, **_: object) -> str:
        if not link.exists():
            downloads.append(name)
            blob.write_bytes(content if len(downloads) < 4 else b"another")
            link.symlink_to(blob)
        return str(link)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    for damage in (content, b"", content[:-1] + b"0"):  # none, no bytes, a bit
        blob.parent.joinpath(blob.name).write_bytes(damage)
        hub._download_file("o/s", "0a", name)
        assert link.read_bytes() == content
    assert len(downloads) == 3
    assert f"{blob} is damaged; {name} of o/s is downloaded again" in caplog.text
    assert [*blob.parent.iterdir()] == [blob]
    link.unlink()
    with pytest.raises(DatasetError, match=f"{name} of o/s comes with another content than the hub states"):
        hub._download_file("o/s", "0a", name)
