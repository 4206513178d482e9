"""What leaves through the API: the SDK's own command line, the cookbook's requests, older SDKs' archive.

The adapter that arrives is read by stock PEFT; addresses that were not signed lead nowhere.
"""

import io
import json
import os
import subprocess
import sys
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tinker
from tinker import types

from kshot.checks import folder_of
from tests.vlm.raw import DATA, refused
from tests.vlm.services import PATIENCE, close, log_probs, peft, step, target_log_probs
from tests.vlm.serving import KEY, Server, served
from vlm import nano
from vlm.inputs import ImageRule
from vlm.server import guard
from vlm.server.guard import Keys
from vlm.server.tinker import downloads

PEFT_FILES = {"adapter_config.json", "adapter_model.safetensors", "kshot.json"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One that asks for a key."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(KEY)
    with served(tmp_path_factory.mktemp("state"), keys=Keys.read(keys)) as server:
        yield server


@pytest.fixture(scope="module")
def rest(server: Server) -> Any:
    return tinker.RestClient(base_url=server.address, api_key=KEY)


@pytest.fixture(scope="module")
def run(server: Server) -> Iterator[Any]:
    """A run that has learnt something."""
    client = tinker.ServiceClient(base_url=server.address, api_key=KEY)
    made = client.create_lora_training_client(nano.NAME, rank=4, seed=7).result(PATIENCE)
    step(made, DATA, types.AdamParams(learning_rate=1e-2, eps=1e-2))
    yield made
    client.close("success").result(PATIENCE)


def fetched(url: str) -> bytes:
    """As the SDK's command line and the cookbook fetch: without any key."""
    with urllib.request.urlopen(url, timeout=60) as response:
        content: bytes = response.read()
        assert int(response.headers["Content-Length"]) == len(content)
    return content


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_the_sdks_own_command_downloads_an_adapter_for_peft(
    server: Server, rest: Any, run: Any, stock: Any, rule: ImageRule, tmp_path: Path
) -> None:
    path = run.save_state("trained").result(PATIENCE).path
    words = [sys.executable, "-m", "tinker.cli", "checkpoint", "download", path, "--output", str(tmp_path)]
    env = {**os.environ, "TINKER_BASE_URL": server.address, "TINKER_API_KEY": KEY, "TINKER_TELEMETRY": "0"}
    ended = subprocess.run(words, env=env, capture_output=True, text=True, timeout=PATIENCE)
    assert ended.returncode == 0, ended.stderr
    (folder,) = tmp_path.iterdir()
    assert {*files_of(folder)} == PEFT_FILES
    plain = peft(stock, folder)
    assert close(log_probs(run, DATA), [target_log_probs(plain, datum, rule) for datum in DATA], 1e-4)
    listed = rest.list_user_checkpoints(1000).result(PATIENCE).checkpoints
    assert not [each for each in listed if each.checkpoint_type == "external"]  # it takes its export away again


def test_external_weights_are_listed_and_fetched_file_by_file(server: Server, rest: Any, run: Any) -> None:
    path = run.save_weights_external("mine", ttl_seconds=3600).result(PATIENCE).path
    assert path == f"tinker://{run.model_id}/external_weights/mine"
    (row,) = [
        each for each in rest.list_checkpoints(run.model_id).result(PATIENCE).checkpoints if each.tinker_path == path
    ]
    assert (row.checkpoint_type, row.checkpoint_id) == ("external", "external_weights/mine")
    assert row.expires_at is not None
    answer = rest.get_external_weights_urls(path).result(PATIENCE)
    assert {*answer.urls} == PEFT_FILES
    here = folder_of(server.state.registry.state, path)
    assert {name: fetched(url) for name, url in answer.urls.items()} == files_of(here)
    with pytest.raises(tinker.RequestFailedError, match=f"{path} exists; give another name"):
        run.save_weights_external("mine").result(PATIENCE)
    rest.delete_checkpoint_from_tinker_path(path).result(PATIENCE)
    with pytest.raises(urllib.error.HTTPError) as gone:
        fetched(answer.urls["kshot.json"])
    assert gone.value.code == 404


def test_the_cookbooks_download_is_encrypted_for_it(server: Server, rest: Any, run: Any, tmp_path: Path) -> None:
    """`tinker_cookbook.weights.download` of 0.6: a temporary export, encrypted to a key made for it, deleted after."""
    pyrage = pytest.importorskip("pyrage")
    identity = pyrage.x25519.Identity.generate()
    keys = [str(identity.to_public())]
    path = run.save_weights_external("download", 3600, age_encryption_recipients=keys).result(PATIENCE).path
    answer = rest.get_external_weights_urls(path).result(PATIENCE)
    rest.set_checkpoint_ttl_from_tinker_path(path, 3600).result(PATIENCE)
    assert {*answer.urls} == {f"{name}.age" for name in PEFT_FILES}
    arrived = {name.removesuffix(".age"): pyrage.decrypt(fetched(url), [identity]) for name, url in answer.urls.items()}
    plain = folder_of(server.state.registry.state, run.save_weights_external("plain").result(PATIENCE).path)
    expected = files_of(plain)
    record = json.loads(arrived.pop("kshot.json"))
    assert record.pop("expires") > time.time()
    assert record == json.loads(expected.pop("kshot.json"))
    assert arrived == expected
    assert not (folder_of(server.state.registry.state, path) / "adapter_model.safetensors").exists()
    with pytest.warns(FutureWarning), pytest.raises(tinker.RequestFailedError, match="is encrypted"):
        run.load_state(path).result(PATIENCE)
    rest.delete_checkpoint_from_tinker_path(path).result(PATIENCE)


@pytest.mark.parametrize(("keys", "named"), [(["age1no"], "a key is none of age's"), (["x"] * 11, "at most 10")])
def test_keys_that_nothing_can_be_encrypted_to(run: Any, keys: list[str], named: str) -> None:
    pytest.importorskip("pyrage")
    with pytest.raises(tinker.RequestFailedError, match=named):
        run.save_weights_external("never", age_encryption_recipients=keys).result(PATIENCE)


def test_without_pyrage_encryption_says_how_to_get_it(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyrage", None)
    with pytest.raises(tinker.RequestFailedError, match="pip install pyrage"):
        run.save_weights_external("never", age_encryption_recipients=["age1"]).result(PATIENCE)


@pytest.mark.parametrize("kind", ["weights", "sampler_weights"])
def test_older_sdks_are_redirected_to_an_archive(server: Server, run: Any, kind: str, tmp_path: Path) -> None:
    save = run.save_state if kind == "weights" else run.save_weights_for_sampler
    path = save("archived").result(PATIENCE).path
    address = f"{server.address}/api/v1/training_runs/{run.model_id}/checkpoints/{kind}/archived/archive"
    answer = httpx.get(address, headers={"X-API-Key": KEY, "Accept": "application/gzip"})
    assert answer.status_code == 302
    assert parsedate_to_datetime(answer.headers["Expires"]).timestamp() > 0
    with tarfile.open(fileobj=io.BytesIO(fetched(answer.headers["Location"]))) as tar:
        assert {*tar.getnames()} == PEFT_FILES  # the optimizer's state stays here
        tar.extractall(tmp_path, filter="data")
    here = files_of(folder_of(server.state.registry.state, path))
    assert files_of(tmp_path) == {name: here[name] for name in PEFT_FILES}
    assert httpx.get(address).status_code == 401


def test_an_archive_is_sent_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "PART", 1000)
    contents = {f"{size}": np.random.default_rng(size).bytes(size) for size in (0, 1, 511, 512, 513, 5000)}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    files = [tmp_path / name for name in contents]
    parts = list(downloads._tar(files, [file.stat().st_size for file in files]))
    assert max(map(len, parts)) <= 1024
    assert int(downloads._archive(files).headers["Content-Length"]) == sum(map(len, parts))
    with tarfile.open(fileobj=io.BytesIO(b"".join(parts))) as tar:
        assert {each.name: tar.extractfile(each).read() for each in tar} == contents  # type: ignore[union-attr]


def test_only_what_was_signed_is_given(server: Server, rest: Any, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = run.save_weights_external("signed").result(PATIENCE).path
    run.save_state("private").result(PATIENCE)
    url = rest.get_external_weights_urls(path).result(PATIENCE).urls["kshot.json"]
    assert fetched(url)
    changed = [
        url[:-1] + ("0" if url[-1] != "0" else "1"),
        url.replace("kshot.json", "adapter_config.json"),
        url.replace("/external_weights/signed/kshot.json", "/weights/private/adapter_config.json"),
        url.replace("kshot.json", "..%2Fkshot.json"),
        url.replace("signature=", "signature=%C3%A9%00"),
        url.replace("expires=", "expires=9"),
        url.replace("expires=", "expires=" + "9" * 5000),
        url.partition("?")[0] + "?expires=99999999999&signature=",
        url.partition("?")[0],
        url.replace("/download/", "/training_runs/"),
    ]
    for each in changed:
        refused(httpx.get(each), 401)
    assert httpx.delete(url).status_code == 405
    with httpx.Client(headers={"X-API-Key": KEY}) as keyed:  # a key does as well
        assert keyed.get(url.partition("?")[0]).content == fetched(url)
        for place in ("optimizer.safetensors", "..%2F..%2Fserver.sqlite3", "none"):
            address = url.partition("?")[0].replace("/external_weights/signed/kshot.json", f"/weights/private/{place}")
            refused(keyed.get(address), 404)
    monkeypatch.setattr(guard.time, "time", lambda now=time.time: now() + downloads.LIFETIME + 1)
    refused(httpx.get(url), 401)


@pytest.mark.parametrize("what", ["external_weights_urls", "archive"])
def test_checkpoints_that_are_not_there(server: Server, run: Any, what: str) -> None:
    for place, status in (("weights/none", 404), ("optimizer/x", 400), ("weights/..", 400)):
        address = f"{server.address}/api/v1/training_runs/{run.model_id}/checkpoints/{place}/{what}"
        answer = httpx.get(address, headers={"X-API-Key": KEY})
        assert answer.status_code in (status, 404), answer.text
