"""Models over several processes behind `kshot serve`: killed ranks, two models at once, torchrun."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tinker
import torch
from tinker import types

import vlm
from kshot.errors import InputError, UnknownNameError
from tests.vlm.serving import HEADERS, KEY, Server, served
from vlm import nano
from vlm.local.model.load import Outline
from vlm.local.ranks.group import LOOPBACK
from vlm.local.ranks.rank import ModelOptions
from vlm.local.registry import EngineRegistry, LocalServiceClient
from vlm.places import parted, place_of

pytestmark = pytest.mark.ranks
ADAM = types.AdamParams(learning_rate=1e-3)
PATIENCE = 300.0


def test_places_stand_behind_names() -> None:
    assert parted("2B@cuda:1,2") == ("2B", "cuda:1,2")
    assert parted("Qwen/Qwen3-VL-2B-Instruct@0123abc") == ("Qwen/Qwen3-VL-2B-Instruct@0123abc", "")
    assert parted("a=/x/y@cpu:2") == ("a=/x/y", "cpu:2")
    assert place_of("cpu:3").devices == ("cpu", "cpu", "cpu")
    assert place_of("cuda:0,2").devices == ("cuda:0", "cuda:2")
    for wrong in ("a@cuda:", "a@cpu:0", "a@cuda:1,1", "a@all:2"):
        with pytest.raises(InputError, match="place"):
            parted(wrong)


def test_processes_of_a_model_share_what_it_may_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter is in each of them."""
    made = list[ModelOptions]()

    def engine(options: ModelOptions, devices: list[str], threads: int, **_: object) -> Any:
        made.append(options)
        return SimpleNamespace(
            model=Outline(nano.NAME, torch.device("cpu"), None, nano.NAME, []), start_ranks=None, end=lambda: None
        )

    monkeypatch.setattr("vlm.local.ranks.inference.RanksEngine", engine)
    monkeypatch.setattr("vlm.local.registry.memory_limit", lambda: 3000)
    lora = {"rank": 4}
    alone = EngineRegistry(tmp_path).run_bytes(nano.NAME, lora)
    for cache_bytes, each in ((None, 1000), (3000, 3000)):
        registry = EngineRegistry(tmp_path, device="cpu:3", cache_bytes=cache_bytes)
        assert registry.run_bytes(nano.NAME, lora) == 3 * alone
        assert made.pop().cache_bytes == each


def test_a_shard_of_the_local_service_is_checked(tmp_path: Path) -> None:
    for shard, kind in (("dividd", UnknownNameError), ("divided", InputError)):
        client = LocalServiceClient(tmp_path, shard=shard)
        with pytest.raises(kind, match="shard"):
            client.create_sampling_client(base_model=nano.NAME).result()


def steps(run: Any, data: list[tinker.Datum], count: int) -> list[float]:
    losses = []
    for _ in range(count):
        passed, stepped = run.forward_backward(data, "cross_entropy"), run.optim_step(ADAM)
        losses.append(passed.result(PATIENCE).metrics["loss:sum"])
        stepped.result(PATIENCE)
    return losses


@pytest.mark.slow
def test_a_killed_rank_ends_its_runs_and_what_was_saved_goes_on(
    tmp_path: Path, mixed: list[tinker.Datum], service: LocalServiceClient
) -> None:
    expected = steps(service.create_lora_training_client(nano.NAME, rank=4, seed=3).result(), mixed, 5)
    registry = EngineRegistry(tmp_path, device="cpu:2", model_paths={nano.NAME: nano.NAME})
    registry.load()
    try:
        with served(tmp_path, registry) as server:
            client = vlm.connect(server.address)
            run = client.create_lora_training_client(nano.NAME, rank=4, seed=3).result(PATIENCE)
            first = steps(run, mixed, 2)
            saved = run.save_state("kept").result(PATIENCE).path
            engine: Any = registry.engines[nano.NAME]
            os.kill(engine.processes[1], signal.SIGKILL)
            with pytest.raises(tinker.TinkerError, match=r"rank 1 of 2 \(cpu\) died \(SIGKILL\)"):
                steps(run, mixed, 1)
            other = client.create_training_client_from_state_with_optimizer(saved).result(PATIENCE)
            assert [*first, *steps(other, mixed, 3)] == pytest.approx(expected, rel=1e-3)
            sampler = client.create_sampling_client(base_model=nano.NAME).result(PATIENCE)
            params = types.SamplingParams(max_tokens=2, temperature=0.0)
            assert sampler.sample(mixed[2].model_input, 1, params).result(PATIENCE).sequences
    finally:
        registry.close()


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Server]:
    paths = {"one": nano.NAME, "other": nano.NAME}
    registry = EngineRegistry(tmp_path, model_paths=paths, places={"one": "cpu", "other": "cpu"}, threads=1)
    registry.load()
    with served(tmp_path, registry) as server:
        yield server
    registry.close()


def busy(server: Server) -> dict[str, float]:
    request = urllib.request.Request(f"{server.address}/metrics", headers=HEADERS)
    with urllib.request.urlopen(request) as answer:
        text = answer.read().decode()
    found = re.findall(r'kshot_model_busy_seconds_total\{model="(\w+)"\} ([\d.e-]+)', text)
    return {name: float(seconds) for name, seconds in found}


@pytest.mark.slow
def test_two_models_work_at_once(two: Server, mixed: list[tinker.Datum]) -> None:
    client = vlm.connect(two.address)
    runs = [client.create_lora_training_client(name, rank=4, seed=3).result(PATIENCE) for name in ("one", "other")]
    for run in runs:
        steps(run, mixed, 1)
    before, begun = busy(two), time.perf_counter()
    threads = [threading.Thread(target=steps, args=(run, mixed * 40, 3)) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wall = time.perf_counter() - begun
    each = [seconds - before[name] for name, seconds in busy(two).items()]
    overlap = (sum(each) - wall) / min(each)  # `wall` is no shorter than the time in which any of them worked
    assert overlap >= 0.85, (each, wall)


@pytest.mark.slow
def test_torchrun_starts_the_ranks(tmp_path: Path, mixed: list[tinker.Datum], service: LocalServiceClient) -> None:
    expected = steps(service.create_lora_training_client(nano.NAME, rank=4, seed=3).result(), mixed, 2)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "kshot", "serve", "--port", "0"]
    environment = {**os.environ, "TINKER_API_KEY": KEY, "COLUMNS": "200", "GLOO_SOCKET_IFNAME": LOOPBACK}
    process = subprocess.Popen(
        [*command, "--state", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    try:
        address, said = "", ""
        assert process.stdout
        for line in process.stdout:
            said += line
            if found := re.search(r"at (http://\S+)", line):
                address = found[1]
                break
        assert address, said
        run = vlm.connect(address).create_lora_training_client(nano.NAME, rank=4, seed=3).result(PATIENCE)
        assert steps(run, mixed, 2) == pytest.approx(expected, rel=1e-4)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        finally:
            process.kill()
            process.stdout.close()  # type: ignore[union-attr]
