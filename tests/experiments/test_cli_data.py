"""kshot data: what it says of a set, its exit status, and a sweep on a benchmark from its original files."""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from data import catalog, hub
from data.benchmarks.protocols import per_class
from data.dataset import Item, SplitProtocol, content_key
from tests.data import published

SMALL = SplitProtocol("official", "", per_class(3), 3, 9, 3, seeded=True)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Caltech-101 with three classes of four images."""
    published.caltech101(tmp_path)
    small = replace(catalog.DATASETS["caltech101"], protocols=(SMALL,))
    monkeypatch.setitem(catalog.DATASETS, "caltech101", small)
    monkeypatch.setenv("KSHOT_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_get_and_check(root: Path, kshot, refused) -> None:
    options = ("caltech101", "--source", "archive", "--root", root)
    refused("data", "get", *options, parts=["--allow-modified"])
    got = kshot("data", "get", *options, "--allow-modified")
    assert (got.status, got.err) == (0, "")
    assert "images: 9 train, 3 test" in got.out
    assert "in the source: 12 images in 3 classes" in got.out
    assert "no images of the set: 1: BACKGROUND_Google/tmp" in got.out
    assert "(not the published file's)" in got.out
    checked = kshot("data", "check", *options, "--allow-modified")
    assert checked.status == 0
    assert checked.out.startswith(got.out)
    assert "decoded: 12 of 12" in checked.out
    assert "same image in train and test: 0" in checked.out


def test_a_set_with_a_bad_image_fails(root: Path, kshot) -> None:
    members = published.caltech_members()
    members["101_ObjectCategories/wild_cat/image_0002.jpg"] = b"text"
    published.tar(root / "101_ObjectCategories.tar.gz", members)
    options = ("caltech101", "--source", "archive", "--root", root, "--allow-modified")
    assert kshot("data", "get", *options).status == 0
    checked = kshot("data", "check", *options)
    assert (checked.status, checked.err.count("\n")) == (2, 1)
    assert "not an image in a known format; replace or remove it" in checked.err
    assert "decoded: 11 of 12" in checked.out
    swept = kshot("sweep", "--dataset", *options, "--method", "pixel-knn", "--shots", "1", "--out", root / "out")
    assert (swept.status, swept.err.splitlines()[-1]) == (2, checked.err.strip())


@pytest.mark.parametrize("name", ["icons", "digits"])
def test_the_embedded_sets_are_sound(kshot, name: str) -> None:
    ended = kshot("data", "check", name)
    assert ended.status == 0
    assert "same image in train and test: 0" in ended.out


def test_a_sweep_from_the_original_files(root: Path, kshot, ran) -> None:
    out = root / "out"
    options = ("--source", "archive", "--root", root, "--allow-modified", "--protocol", "official")
    method = ("--method", "pixel-knn", "--shots", "1,2", "--seeds", "0", "--out", out)
    ended = kshot("sweep", "--dataset", "caltech101", *options, *method)
    assert ended.status == 0, ended.err
    content = json.loads((out / "sweep.json").read_text())
    assert content["protocols"]["caltech101"].startswith("official-0-modified-")
    assert content["data"]["caltech101"]["modified"] == ["101_ObjectCategories.tar.gz"]
    assert "caltech101: 101_ObjectCategories.tar.gz is not the published file (--allow-modified)." in content["notes"]
    cells = [json.loads(path.read_text()) for path in out.glob("cells/*.json")]
    assert {cell["protocol"] for cell in cells} == {content["protocols"]["caltech101"]}
    report = (out / "report.md").read_text()
    again = "--source archive --protocol official --root PATH/TO/THE/ORIGINAL/FILES --allow-modified"
    assert again in report
    assert str(root) not in report + (out / "sweep.json").read_text()


@pytest.mark.parametrize(
    ("command", "part"),
    [
        ("data get flowerz", "did you mean 'flowers'?"),
        ("data get pets --source archive", "no --root was given"),
        ("data get icons --source archive", "icons has no choice of it"),
        ("data check pets --source ftp", "unknown source 'ftp'"),
        ("sweep --dataset digits --source archive", "digits has no choice of it"),
        ("sweep --dataset digits --protocol coop", "digits has no choice of it"),
        ("sweep --dataset pets --source archive --root no/where", "--root no/where is no folder"),
    ],
)
def test_bad_input_is_one_line(refused, command: str, part: str) -> None:
    refused(*command.split(), parts=[part])


def test_long_and_foreign_class_names(tmp_path: Path, kshot, ran, make_image) -> None:
    """As long as a file system allows, in other scripts, with markup, decomposed: as they read, composed, and safe."""
    names = ("a" * 250, "日本語の花", "cafe\u0301", "<script>alert(1)", "x & 'y' \"z\" | %s {0}")
    for c, name in enumerate(names):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for n in range(3):
            (tmp_path / "photos" / name / f"<b>{n}.png").write_bytes(make_image(10 * c + n))
    methods = ("--method", "vlm-zero-shot", "--method", "pixel-knn", "--shots", "1", "--seeds", "0")
    ended = kshot("sweep", "demo", "--dataset", f"folder:{tmp_path / 'photos'}", *methods, "--out", tmp_path / "out")
    assert ended.status == 0, ended.err
    (classes,) = json.loads((tmp_path / "out/sweep.json").read_text())["classes"].values()
    assert set(classes) == {*names[:2], "caf\u00e9", *names[3:]}
    page = (tmp_path / "out/report.html").read_text()
    assert "<script>alert" not in page
    assert "<b>" not in page


@pytest.fixture
def twins(tmp_path: Path, make_image) -> Path:
    """Forty-five classes of four images; of two pairs of classes one image is the same."""
    folder = tmp_path / "set"
    for c in range(45):
        (folder / f"c{c:02}").mkdir(parents=True)
        for n in range(4):
            (folder / f"c{c:02}/{n}.png").write_bytes(make_image(4 * c + n, 16, 16))
    for c in (3, 7):
        (folder / f"c{c + 1:02}/0.png").write_bytes((folder / f"c{c:02}/0.png").read_bytes())
    (folder / "notes.txt").touch()
    return folder


def test_an_image_in_two_classes_is_refused_unless_it_is_allowed(twins: Path, kshot, ran) -> None:
    sweep = ("sweep", "--dataset", f"folder:{twins}", "--method", "pixel-knn", "--shots", "1", "--seeds", "0")
    out = twins.parent / "out"
    for command in (("data", "check", f"folder:{twins}"), (*sweep, "--out", out)):
        ended = kshot(*command)
        assert (ended.status, ended.out) == (2, "")
        assert ended.err.splitlines() == [
            f"kshot: folder:{twins}: the same image in two classes (no answer is right for both); "
            "remove one, or keep both with --allow-shared: 2 problems",
            "  c03/0.png and c04/0.png",
            "  c07/0.png and c08/0.png",
        ]
    checked = kshot("data", "check", f"folder:{twins}", "--allow-shared")
    assert (checked.status, checked.err) == (0, "")
    assert f"classes: 45: {', '.join(f'c{c:02}' for c in range(40))}, ...\n" in checked.out
    assert "note: skipped, since they are no images: 1 (1 .txt)\n" in checked.out
    assert "same image in two classes: 2\n" in checked.out
    assert ": c07 and c08\n" in checked.out
    ended = kshot(*sweep, "--allow-shared", "--out", out)
    assert ended.status == 0, ended.err
    note = "folder:set: images that are in two classes (--allow-shared): 2; no answer is right for both."
    content = json.loads((out / "sweep.json").read_text())
    assert (note in content["notes"], content["data"]["folder:set"]["allow_shared"]) == (True, True)
    assert note in ended.out.splitlines()
    report = (out / "report.md").read_text()
    assert note in report
    assert " --allow-shared" in report


def test_a_sweep_says_config_and_label_column_of_a_hub_set(root: Path, kshot, ran, monkeypatch) -> None:
    images = [published.picture(n) for n in range(12)]
    splits = ["train"] * 6 + ["val"] * 3 + ["extra"] * 3
    items = [Item(str(n), splits[n], "ab"[n % 2], image, content_key(image)) for n, image in enumerate(images)]
    found = hub.HubSet("f" * 40, iter(items), ["split 'test' has no labels and is not used"], "breed")
    monkeypatch.setattr(hub, "read", lambda name, splits, column: found)
    options = ("--method", "pixel-knn", "--shots", "1", "--seeds", "0", "--out", root / "out")
    ended = kshot("sweep", "--dataset", "hub:me/pets#fine", "--label-column", "breed", *options)
    assert ended.status == 0, ended.err
    content = json.loads((root / "out/sweep.json").read_text())
    assert content["protocols"]["hub:me/pets#fine"].startswith("given-split-val-by-breed-")
    facts = content["data"]["hub:me/pets#fine"]
    assert (facts["config"], facts["label_column"]) == ("fine", "breed")
    for note in (
        "split 'test' has no labels and is",
        "split 'val' is the test side",
        "splits that are not used: 'extra'",
    ):
        assert sum(line.startswith(f"hub:me/pets#fine: {note}") for line in content["notes"]) == 1
        assert f"hub:me/pets#fine: {note}" in ended.out
    line = next(x for x in (root / "out/report.md").read_text().splitlines() if x.startswith("kshot sweep"))
    again = kshot(*shlex.split(line)[1:], "--out", root / "out")
    assert (again.status, again.err.splitlines()[-1]) == (0, "all 1 cells are there: nothing to compute"), again.err
