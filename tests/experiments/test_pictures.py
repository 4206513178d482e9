"""Which images an argument of kshot predict means: files, folders, patterns, standard input; nothing passed over."""

import io
import os
from pathlib import Path

import pytest

from experiments.adapters import predict as module
from experiments.adapters.predict import in_line, pictures
from kshot.errors import ImageError, InputError

NETPBM = [  # images of which bytes and text are the same
    b"P1\n2 2\n0 1 1 0\n",
    b"P2 2 2 255\n9 9 9 9\n",
    b"P3\r\n# a comment\r\n2 2\r\n255\r\n" + b"9 9 9\n" * 4,
    b"P4\n8 1\nA",
    b"P5\n2 2\n255\nABCD",
    b"P6\n#" + b"long " * 40 + b"\n2 2\n255\n" + b"A" * 12,
]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files that hold their own name."""
    seen = ("b.png", "a.png", "sub/c.png", "sub/deep/d.JPG", "z/note.txt", "[ab].png", "x[1].png")
    for name in (*seen, "sub/.hidden.png", ".git/x.png", "Thumbs.db"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "empty/.only").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(*arguments: str, stdin: bytes = b"") -> list[str]:
    """Names that can be read, and the errors of those that cannot."""
    read = []
    for picture in pictures(arguments, lambda: io.BytesIO(stdin)):
        try:
            picture.read()
        except ImageError as error:
            read.append(str(error))
        else:
            read.append(picture.name)
    return read


def test_files_in_the_order_given(here: Path) -> None:
    assert names("b.png", "a.png", "./b.png", f"{here}/a.png") == ["b.png", "a.png", "./b.png", f"{here}/a.png"]
    (read, *_) = pictures(["a.png"], io.BytesIO)
    assert read.read() == b"a.png"


def test_a_folder_is_searched_by_name_without_hidden_files(here: Path) -> None:
    assert names("sub") == ["sub/c.png", "sub/deep/d.JPG"]
    below = ["[ab].png", "a.png", "b.png", "sub/c.png", "sub/deep/d.JPG", "x[1].png", "z/note.txt"]
    assert names(".") == [f"./{name}" for name in below]
    assert names("sub/") == ["sub/c.png", "sub/deep/d.JPG"]
    assert names(".git") == [".git/x.png"]  # asked for by name


def test_patterns(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert names("?.png") == ["a.png", "b.png"]
    assert names("**/*.png") == ["[ab].png", "a.png", "b.png", "sub/c.png", "x[1].png"]
    assert names("s*") == ["sub/c.png", "sub/deep/d.JPG"]  # as the shell's s*: folders are searched
    assert names("sub/**") == ["sub/c.png", "sub/deep/d.JPG"]  # each once, though folder and file match
    monkeypatch.setenv("HOME", str(here / "sub"))
    assert names("~/*.png") == [f"{here}/sub/c.png"]


def test_a_name_that_is_there_is_no_pattern(here: Path) -> None:
    assert names("[ab].png", "x[1].png") == ["[ab].png", "x[1].png"]
    (here / "[ab].png").unlink()
    assert names("[ab].png") == ["a.png", "b.png"]


def test_what_holds_nothing_or_is_not_there_is_named(here: Path) -> None:
    assert names("gone.png", "*.gif", "empty") == [
        "gone.png: there is no such file",
        "*.gif: no file has such a name; in a pattern, ** is for any folders",
        "empty: no image is in this folder; hidden files are passed over",
    ]


def test_what_cannot_be_read_is_named(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(here / "sub/e.pipe")
    (here / "sub/f.png").symlink_to("nowhere")
    assert names("sub")[2:] == ["sub/e.pipe: not a regular file", "sub/f.png: there is no such file"]
    monkeypatch.setattr(module, "MAX_BYTES", 3)
    assert names("a.png") == ["a.png: larger than 3 bytes; make it smaller"]
    assert names("x" * 300) == [f"{'x' * 300}: cannot be read (File name too long)"]


def test_a_folder_that_cannot_be_read_is_named_and_the_rest_is_there(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def listed(path: str, listdir=os.listdir) -> list[str]:
        if path.endswith("deep"):
            raise PermissionError(13, "Permission denied")
        return listdir(path)

    monkeypatch.setattr(os, "listdir", listed)
    assert names("sub") == ["sub/c.png", "sub/deep: this folder cannot be read (Permission denied)"]


def test_links_are_followed_and_do_not_lead_in_circles(here: Path) -> None:
    (here / "sub/deep/up").symlink_to(here / "sub")
    (here / "sub/link").symlink_to(here / "z")
    assert names("sub") == ["sub/c.png", "sub/deep/d.JPG", "sub/link/note.txt"]


def test_standard_input_is_an_image_or_a_list(here: Path, make_image) -> None:
    image = make_image(1)
    (picture,) = pictures(["-"], lambda: io.BytesIO(image))
    assert (picture.name, picture.read()) == ("-", image)
    listed = "\ufeffb.png\r\n\nsub\n[ab].png\ngone\n-".encode()
    missing = ["gone: there is no such file", "-: there is no such file"]
    assert names("-", "a.png", stdin=listed) == [
        *["b.png", "sub/c.png", "sub/deep/d.JPG", "[ab].png"],
        *missing,
        "a.png",
    ]
    for nothing in (b"", b"\n \n"):
        assert names("-", stdin=nothing) == ["-: standard input holds neither an image nor a path"]
    for image in (b"BM" + bytes(20), *NETPBM):
        (picture,) = pictures(["-"], lambda image=image: io.BytesIO(image))
        assert (picture.name, picture.read()) == ("-", image)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-8-sig", "utf-8"])
def test_lists_as_other_programs_write_them(here: Path, encoding: str) -> None:
    (here / "é b.png").touch()
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    for end in ("\n", "\r\n"):
        assert names("-", stdin=f"{mark}b.png{end}é b.png{end}".encode(encoding)) == ["b.png", "é b.png"]


@pytest.mark.parametrize("listed", [b"\xff\xfea\0\0", b"\xff\xfea\0\0\0", b"\xff\xfe\0\xd8", b"a\0b", b"\xe9.png"])
def test_what_is_no_text_is_no_list(here: Path, listed: bytes) -> None:
    (picture,) = pictures(["-"], lambda: io.BytesIO(listed))
    assert (picture.name, picture.read()) == ("-", listed)


def test_a_list_may_begin_with_the_letters_of_an_image(here: Path) -> None:
    for name in ("P3", "P6 12", "BM.png"):
        (here / name).touch()
    assert names("-", stdin=b"P3\nP6 12\nBM.png\n") == ["P3", "P6 12", "BM.png"]


def test_standard_input_is_read_once_and_not_without_end(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="given twice"):
        pictures(["-", "a.png", "-"], io.BytesIO)
    monkeypatch.setattr(module, "MAX_BYTES", 3)
    assert names("-", stdin=b"\xff" * 5) == ["-: standard input is longer than 3 bytes"]


def test_names_are_shown_in_one_line_that_steers_no_terminal() -> None:
    assert in_line("日本語 é a  b\\n") == "日本語 é a  b\\n"
    assert in_line("a\x1b[2J\n\udcff") == "a\\x1b[2J\\n\\udcff"
    assert in_line(in_line("a\n")) == in_line("a\n")
