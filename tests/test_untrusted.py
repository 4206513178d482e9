"""kshot.untrusted: files of others that are no files, damaged, or made to fill the memory."""

import logging
import os
import socket
from pathlib import Path

import pytest

from kshot.untrusted import DAMAGED, YAML_NODES, is_beside, parse_json, parse_yaml, read_file, set_damaged_aside
from tests.traced import traced

DEEP = 100_000


def test_what_is_no_regular_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # opening it would wait until somebody writes
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        for path in (tmp_path / "pipe", tmp_path / "socket", Path("/dev/zero")):
            with pytest.raises(OSError, match="not a regular file"):
                read_file(path)
    with pytest.raises(IsADirectoryError):
        read_file(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_file(tmp_path / "none")


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    assert read_file(tmp_path / "a", 5) == b"12345"
    with pytest.raises(OSError, match="more than 4 bytes"):
        read_file(tmp_path / "a", 4)


def test_reading_takes_no_more_memory_than_the_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    with traced(1 << 20):
        assert read_file(tmp_path / "a") == b"12345"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system has no /proc")
def test_a_file_of_no_size_is_read_to_its_end() -> None:
    assert read_file("/proc/self/status").endswith(b"\n")
    with pytest.raises(OSError, match="more than 9 bytes"):
        read_file("/proc/self/status", 9)


def test_a_file_that_has_become_a_pipe_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr("kshot.untrusted.check_regular", lambda path: None)
    with pytest.raises(OSError, match="not a regular file"):
        read_file(tmp_path / "pipe")


@pytest.mark.parametrize(
    "text", ["!!bool maybe", "!!int ''", "!!float ''", "!!timestamp foo", "!!int x", "!!binary é", "!!set {[]: 1}"]
)
def test_a_value_that_does_not_fit_its_tag(text: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - PyYAML has its own words for some
        parse_yaml(f"a: {text}")
    assert "\n" not in str(caught.value)


def bomb(levels: int) -> str:
    """Lines of which each repeats the one before nine times."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels)]
    return "\n".join([*lines, f"name: *a{levels - 1}\n"])


def test_aliases_that_make_gigabytes() -> None:
    """9^9 values in half a kilobyte."""
    with traced(4 << 20), pytest.raises(ValueError, match=f"its aliases .* more than {YAML_NODES:,} values"):
        parse_yaml(bomb(9))
    with pytest.raises(ValueError, match="its aliases"):
        parse_yaml("a: &a [*a]")  # without end
    assert parse_yaml("a: &a [1, 2]\nb: [*a, *a]") == {"a": [1, 2], "b": [[1, 2], [1, 2]]}
    assert parse_yaml("") is None


def test_nesting_without_end() -> None:
    for parse in (parse_json, parse_yaml):
        with pytest.raises(ValueError, match="nested too deeply"):
            parse("[" * (DEEP if parse is parse_json else 500))
    with pytest.raises(ValueError, match="expected"):
        parse_yaml("a: [1, 2\nb: 3")


def test_names_that_lead_out_of_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a").write_bytes(b"")
    (tmp_path / "b").write_bytes(b"")
    (folder / "link").symlink_to(tmp_path / "b")
    (folder / "alias").symlink_to(folder / "a")
    assert is_beside(folder, "a")
    assert is_beside(folder, "alias")
    assert not any(is_beside(folder, name) for name in ("../b", str(folder / "a"), "link", "..", ".", "", "./a"))


def test_in_a_snapshot_of_the_hub_links_lead_to_its_blobs(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--o--n/blobs", tmp_path / "models--o--n/snapshots/0a1b"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (blobs / "5e").write_bytes(b"")
    (snapshot / "a.safetensors").symlink_to("../../blobs/5e")
    (snapshot / "b.safetensors").symlink_to("../../refs")
    assert is_beside(snapshot, "a.safetensors")
    assert not is_beside(snapshot, "b.safetensors")


def test_what_is_damaged_is_set_aside_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.parquet"
    for content in (b"first", b"second"):
        path.write_bytes(content)
        with caplog.at_level(logging.WARNING):
            set_damaged_aside(path)
        assert not path.exists()
        assert (tmp_path / f"a.parquet{DAMAGED}").read_bytes() == content
    assert f"{path} is damaged; set aside as a.parquet{DAMAGED}: it is computed again" in caplog.text
    set_damaged_aside(path)  # another process was faster
