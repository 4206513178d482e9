"""kshot.files: files and folders that are complete or not there."""

import sys
import threading
from pathlib import Path

import pytest

from kshot.files import cache_folder, fingerprint, remove_unfinished, replace_folder, write_file, write_folder


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KSHOT_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache_folder() == Path("/a")
    monkeypatch.delenv("KSHOT_CACHE")
    assert cache_folder() == Path("/b/kshot")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert cache_folder() == Path("/home/me/.cache/kshot")


def test_a_file_that_cannot_be_finished_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_file(tmp_path / "a.json", b"old")

    def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        write_file(path, b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert path.read_bytes() == b"old"


def test_a_folder_whose_filling_fails_is_not_there(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "half").write_bytes(b"")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_folder(tmp_path / "model", fill)
    assert list(tmp_path.iterdir()) == []


def test_the_loser_of_a_race_takes_the_winners_folder(tmp_path: Path) -> None:
    target = tmp_path / "model"

    def fill(folder: Path) -> None:
        (folder / "weights").write_bytes(b"late")
        target.mkdir()
        (target / "weights").write_bytes(b"first")

    assert (write_folder(target, fill) / "weights").read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [target]


def test_what_a_killed_writer_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in (".a.json.0123.tmp", "a.json", ".lock", "b.tmp"):
        (tmp_path / name).write_bytes(b"")
    remove_unfinished(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "a.json", "b.tmp"]


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "checkpoint"
    for content in (b"old", b"new"):
        replace_folder(target, lambda folder, content=content: (folder / "a").write_bytes(content))
        assert (target / "a").read_bytes() == content
    monkeypatch.setattr("sys.platform", "darwin")  # where two renames are all there is
    rename = Path.rename

    def failing(path: Path, to: Path) -> Path:
        if to == target and (path / "b").exists():
            raise OSError("disk gone")
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="disk gone"):
        replace_folder(target, lambda folder: (folder / "b").write_bytes(b""))
    assert (target / "a").read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can exchange two folders at once")
def test_a_folder_that_is_replaced_is_there_at_every_moment(tmp_path: Path) -> None:
    target, missing, over = tmp_path / "checkpoint", list[bool](), threading.Event()
    replace_folder(target, lambda folder: (folder / "a").write_bytes(b"0"))

    def watch() -> None:
        while not over.is_set():
            missing.append(not (target / "a").exists())

    watcher = threading.Thread(target=watch)
    watcher.start()
    for n in range(300):
        replace_folder(target, lambda folder, n=n: (folder / "a").write_bytes(str(n).encode()))
    over.set()
    watcher.join()
    assert len(missing) > 300
    assert not any(missing)
    assert (target / "a").read_bytes() == b"299"


def test_a_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    import kshot.files as kshot_files

    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "large").write_bytes(bytes(kshot_files.WHOLE + 1))
    first = fingerprint(tmp_path)
    assert first == fingerprint(tmp_path)
    (tmp_path / ".hidden").write_text("x")
    assert fingerprint(tmp_path) == first
    with (tmp_path / "large").open("r+b") as file:
        file.seek(kshot_files.WHOLE)
        file.write(b"1")
    assert fingerprint(tmp_path) != first
