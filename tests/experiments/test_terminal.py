"""Names that would steer a terminal, or that rich would read as markup: shown, on the terminal and in both reports."""

import io

import pytest

from experiments.cli import main
from experiments.report.document import Command, Paragraph, Table, html, markdown
from experiments.terminal import Terminal, plain_table
from kshot.errors import shown

ESCAPE = "\x1b]0;title\x07\x1b[2J\x9b31m"  # sets a window's title, clears the screen, one-byte CSI
TURNED = "\u202egpj.exe"  # written from right to left
SAID = r"\x1b]0;title\x07\x1b[2J\x9b31m"


def terminal(encoding: str = "utf-8") -> tuple[Terminal, io.BytesIO]:
    written = io.BytesIO()
    file = io.TextIOWrapper(written, encoding=encoding, write_through=True)
    return Terminal(file=file, force_terminal=True, markup=False, color_system=None, width=200), written


def test_what_steers_a_terminal_is_escaped() -> None:
    assert shown(f"a{ESCAPE}\nb") == f"a{SAID}\nb"
    assert shown(TURNED) == r"\u202egpj.exe"
    assert shown("caf\u00e9 \udcff \u5b57 12\u00a0%") == "caf\u00e9 \\udcff \u5b57 12\u00a0%"
    joined = "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645 \U0001f469\u200d\U0001f33e Donau\u00addampf"
    assert shown(joined) == joined


def test_in_lines_tables_and_waiting() -> None:
    console, written = terminal()
    table = plain_table(["name"])
    table.add_row(f"x{ESCAPE}")
    console.print(f"line {ESCAPE} [/dim] \udcff")
    console.print(table)
    console.print(console.status(f"reading [/dim] {ESCAPE}").renderable)
    text = written.getvalue().decode()
    assert text.count(r"\x1b]0;title") == 3
    assert "[/dim] \\udcff" in text
    assert "reading [/dim]" in text
    assert not {"\x1b", "\x07", "\x9b"} & set(text)


def test_what_an_encoding_lacks() -> None:
    console, written = terminal("ascii")
    console.print("caf\u00e9")
    assert written.getvalue() == b"caf\\xe9\n"


def test_in_both_reports() -> None:
    blocks = [Paragraph(ESCAPE), Table(TURNED, ("a", "b"), ((ESCAPE, "1"),)), Command(f"kshot sweep {ESCAPE}")]
    for text in (markdown(f"title {ESCAPE}", blocks), html(f"title {ESCAPE}", blocks)):
        assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(text)
        assert "u202egpj.exe" in text


def test_a_name_that_is_not_utf8_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def app(**_: object) -> None:
        "folder-\udcff".encode()

    monkeypatch.setattr(main, "app", app)
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == "kshot: the name folder-\\udcff is not UTF-8; rename it\n"
