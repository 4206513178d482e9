"""kshot serve: one line for what is wrong, before anything is listened on or written; and what it says when it runs."""

import signal
import socket
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from tests.vlm.serving import KEY, command
from vlm import nano
from vlm.server.store import Store


@pytest.fixture
def places(tmp_path: Path) -> dict[str, Path]:
    """What the bad commands below talk about."""
    for name, text in {"short": "tml-x\n", "empty": "# none\n", "good": f"{KEY}\n", "bad": "sha256:12\n"}.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "folder").mkdir()
    return {"here": tmp_path, "state": tmp_path / "state"}


@pytest.mark.usefixtures("never")
@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("--model nope", ["unknown model 'nope'", nano.NAME]),
        ("--model a=nope", ["unknown model 'nope'"]),
        ("--model a={here}/folder", ["unknown model '{here}/folder'", "a folder with config.json"]),
        ("--model a=", ["--model 'a='", "NAME=PATH"]),
        (f"--model =kshot/{nano.NAME}", ["--model '=kshot", "NAME=PATH"]),
        (f"--model {nano.NAME} --model {nano.NAME}", [f"--model '{nano.NAME}' is given twice"]),
        (f"--model a={nano.NAME} --model a={nano.NAME}", ["--model 'a' is given twice"]),
        ("--host 0.0.0.0", ["--host 0.0.0.0 is reached by others", "--api-key-file", "127.0.0.1"]),
        ("--host ::", ["--host :: is reached by others"]),
        ("--host 127.evil.example", ["is reached by others"]),
        ("--host=", ["is reached by others"]),
        ("--host 192.0.2.1 --api-key-file {here}/good", ["cannot listen on http://192.0.2.1:", "--host"]),
        ("--host no.such.host.invalid --api-key-file {here}/good", ["cannot listen on", "--host"]),
        ("--port -1", ["'--port'", "greater than or equal to 0"]),
        ("--port 65536", ["'--port'", "65535"]),
        ("--port x", ["'--port'", "a valid integer"]),
        ("--threads 0", ["'--threads'"]),
        ("--image-log-probs much", ["'--image-log-probs'"]),
        ("--api-key-file {here}/none", ["key file {here}/none cannot be read"]),
        ("--api-key-file {here}/folder", ["key file {here}/folder cannot be read"]),
        ("--api-key-file {here}/empty", ["key file {here}/empty has no key"]),
        ("--api-key-file {here}/short", ["key file {here}/short, line 1", "16 characters"]),
        ("--api-key-file {here}/bad", ["key file {here}/bad, line 1", "64 hex digits"]),
        ("--allow-host http://a.example", ["--allow-host 'http://a.example'", "without a port"]),
        ("--allow-host a.example:80", ["--allow-host 'a.example:80'"]),
        ("--allow-host=", ["--allow-host ''"]),
        ("--device tpu", ["'tpu'", "cpu"]),
        ("--dtype float8", ["unknown dtype 'float8'", "bfloat16"]),
        ("--device cpu:2 --shard dividd", ["unknown shard 'dividd'", "did you mean 'divided'", "whole"]),
        ("--shard divided", ["shard 'divided'", f"model '{nano.NAME}' has one process alone, on cpu", "cpu:2"]),
        ("--state {here}/good", ["cannot write to {here}/good", "--state"]),
        ("--state /proc/x", ["cannot write to /proc/x", "--state"]),
        ("--keep 30", ["--keep '30'", "12h, 30d"]),
        ("--keep 0d", ["--keep '0d'"]),
        ("--shared", ["--shared is for the keys of --api-key-file"]),
        ("--statue x", ["--statue"]),
    ],
)
def test_what_is_wrong_is_one_line(refused, places: dict[str, Path], words: str, parts: list[str]) -> None:
    options = [word.format(**places) for word in words.split(" ")]
    state = [] if "--state" in options else ["--state", places["state"]]
    port = [] if "--port" in options else ["--port", "0"]
    refused("serve", *port, *state, *options, parts=[part.format(**places) for part in parts])
    assert not places["state"].exists()


@pytest.mark.usefixtures("never")
def test_a_port_that_another_program_listens_on(refused, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        parts = [f"cannot listen on http://127.0.0.1:{port}", "give another --port"]
        refused("serve", "--port", port, "--state", tmp_path / "state", parts=parts)
    assert not (tmp_path / "state").exists()


@pytest.mark.usefixtures("never")
def test_a_state_folder_that_another_server_uses(refused, tmp_path: Path) -> None:
    held = f"another server uses the folder {tmp_path}; stop it, or choose another --state"
    with closing(Store(tmp_path)):
        refused("serve", "--port", 0, "--state", tmp_path, parts=[held])


@pytest.mark.usefixtures("never")
def test_a_state_that_is_damaged_or_of_another_version(kshot, tmp_path: Path) -> None:
    (tmp_path / "server.sqlite3").write_bytes(b"no database at all, but long enough to look like one" * 99)
    ended = kshot("serve", "--port", 0, "--state", tmp_path)
    assert (ended.status, ended.out, ended.err.count("\n")) == (1, "", 1)
    assert "server.sqlite3 cannot be used" in ended.err


def test_with_keys_it_may_be_reached_by_others_until_it_is_stopped(tmp_path: Path) -> None:
    """By Ctrl-C, which what a shell starts in the background begins with ignoring."""
    keys = tmp_path / "keys"
    keys.write_text(f"# mine\n{KEY}\n")
    everywhere = "0.0.0.0"  # noqa: S104
    arguments = "--host", everywhere, "--api-key-file", str(keys)
    with command(tmp_path / "state", *arguments, in_background=True) as running:
        port = running.address.rpartition(":")[2]
        assert running.address == f"http://{everywhere}:{port}"
        here = f"http://127.0.0.1:{port}/v1/models"
        assert "runs that are over go after 30d, saved ones stay" in running.said
        for headers, status in (
            ({"X-API-Key": KEY, "Host": "a.example"}, 200),
            ({"Authorization": f"Bearer {KEY}"}, 200),
            ({"X-API-Key": "tml-some-wrong-key"}, 401),
            ({}, 401),
        ):
            assert httpx.get(here, headers=headers).status_code == status
        running.process.send_signal(signal.SIGINT)
        last = running.process.stdout.read() if running.process.stdout else ""
        assert running.process.wait(120) == 130
    assert last.startswith("kshot: stopped; ")
    assert last.count("\n") == 1, last
    with closing(Store(tmp_path / "state")):  # it has let go of the folder
        pass


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--model x=30B-A3B", "30B-A3B, by arithmetic: weights 31.1 GB divided"),
        ("--model 30B-A3B@cuda:0,1", "30B-A3B, by arithmetic: weights 31.1 GB divided"),
        ("", f"{nano.NAME}, by arithmetic: weights"),
    ],
)
def test_a_plan_is_of_what_would_be_served(kshot, words: str, said: str) -> None:
    ended = kshot("serve", *words.split(), "--plan", "2x80GB")
    assert ended.status == 0, ended.err
    assert said in " ".join(ended.out.split())


def test_a_plan_of_a_model_that_is_none(refused) -> None:
    refused("serve", "--model", "x=nope", "--plan", "2x80GB", parts=["unknown model 'nope'"])
