"""A server that is killed: what it has acknowledged is there for the next one, and nothing that is half done."""

import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinker
from tinker import types

from kshot.checks import folder_of
from kshot.errors import InputError
from tests.vlm.raw import PROMPT, Raw, accepted, refused, talking
from tests.vlm.services import PATIENCE, close, connected, log_probs, step
from tests.vlm.serving import HEADERS, command, served
from vlm import nano
from vlm.inputs import datum, model_input
from vlm.local.registry import EngineRegistry, LocalServiceClient
from vlm.server.app import Options
from vlm.server.serve import serve

ADAM = types.AdamParams(learning_rate=1e-2, eps=1e-8)
GREEDY = types.SamplingParams(max_tokens=6, temperature=0.0, stop=[])
ANSWER = [900, 901, 902, 903]
TEXTS = [datum(model_input([*range(500, end)]), ANSWER) for end in (505, 509)]
HALF = ".half.0123456789ab.tmp"  # as a writer names a folder that is not finished


def uninterrupted(folder: Path, steps: int) -> list[list[np.ndarray]]:
    """The log-probabilities after each step of a run on the engine of this process."""
    service = LocalServiceClient(folder)
    run = service.create_lora_training_client(nano.NAME, rank=4, seed=7).result()
    found = [log_probs(run, TEXTS)]
    for _ in range(steps):
        step(run, TEXTS, ADAM)
        found.append(log_probs(run, TEXTS))
    service.close()
    return found


def greedy(sampler: Any) -> list[int]:
    tokens: list[int] = sampler.sample(PROMPT, 1, GREEDY).result(PATIENCE).sequences[0].tokens
    return tokens


def listed(address: str) -> list[str]:
    rest = tinker.RestClient(base_url=address, api_key=HEADERS["X-API-Key"])
    return sorted(each.tinker_path for each in rest.list_user_checkpoints(1000).result(PATIENCE).checkpoints)


@dataclass
class Before:
    """What was seen before the server was killed. finished, open: requests that had an answer, and had none."""

    run: str = ""
    paths: list[str] = field(default_factory=list)
    written: list[int] = field(default_factory=list)
    finished: str = ""
    answer: Any = None
    open: str = ""


@dataclass(frozen=True)
class Restarted:
    """The server after it was killed and started again. client, sampler: the SDK's, of before."""

    address: str
    state: Path
    before: Before
    client: Any
    sampler: Any


@pytest.fixture(scope="module")
def restarted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Restarted]:
    """Killed right after the second of two saves was acknowledged, with steps under way."""
    state, before = tmp_path_factory.mktemp("state"), Before()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    arguments = ["--model", nano.NAME, "--threads", "1", "--port", port]
    with command(state, *arguments) as server, talking(server.address) as raw, connected(server.address) as client:
        run = client.create_lora_training_client(nano.NAME, rank=4, seed=7).result(PATIENCE)
        before.run = run.model_id
        for _ in range(2):
            step(run, TEXTS, ADAM)
        saved = run.save_weights_for_sampler("second").result(PATIENCE).path
        sampler = client.create_sampling_client(model_path=saved).result(PATIENCE)
        before.written = greedy(sampler)
        _by_hand(raw, before)
        before.paths = [saved, run.save_state("second").result(PATIENCE).path]
        for _ in range(3):
            run.forward_backward(TEXTS, "cross_entropy")
            run.optim_step(ADAM)
        before.paths.append(run.save_state("fifth").result(PATIENCE).path)
        for _ in range(20):
            run.forward_backward(TEXTS, "cross_entropy")
            run.optim_step(ADAM)
        server.kill()
        (folder_of(state, saved).parent / HALF).mkdir()  # as if it had been writing another
        shutil.copy(folder_of(state, saved) / "kshot.json", folder_of(state, saved).parent / HALF)
        (folder_of(state, saved).parent / "torn").mkdir()
        with command(state, *arguments) as again:
            assert again.address == server.address
            yield Restarted(again.address, state, before, client, sampler)
            client.close("success").result(PATIENCE)


def _by_hand(raw: Raw, before: Before) -> None:
    """One request that is finished, and one that waits for those before it."""
    run = raw.run(raw.session())
    before.finished = accepted(raw.pass_of(run, 1, TEXTS))
    before.answer = raw.answer(before.finished)
    before.open = accepted(raw.pass_of(run, 3, TEXTS))


def test_every_acknowledged_checkpoint_is_there_and_nothing_half_done(restarted: Restarted) -> None:
    assert listed(restarted.address) == sorted(restarted.before.paths)
    with connected(restarted.address) as client:
        for path in restarted.before.paths:
            client.create_training_client_from_state(path).result(PATIENCE)
        with pytest.raises(tinker.APIStatusError, match="torn does not exist"):
            client.create_sampling_client(model_path=f"tinker://{restarted.before.run}/sampler_weights/torn").result()


def test_a_run_goes_on_as_if_nothing_had_happened(restarted: Restarted, tmp_path: Path) -> None:
    reference = uninterrupted(tmp_path, 7)
    with connected(restarted.address) as fresh:
        for client, path, done in (
            (fresh, restarted.before.paths[2], 5),
            (restarted.client, restarted.before.paths[1], 2),
        ):
            run = client.create_training_client_from_state_with_optimizer(path).result(PATIENCE)
            for expected in reference[done:]:
                assert close(log_probs(run, TEXTS), expected)
                step(run, TEXTS, ADAM)


def test_the_old_run_says_where_to_go_on(restarted: Restarted) -> None:
    way = f"go on from '{restarted.before.paths[2]}' with create_training_client_from_state_with_optimizer"
    with talking(restarted.address) as raw:
        refused(raw.pass_of(restarted.before.run, 999), 404, way)
        refused(raw.post("get_info", model_id=restarted.before.run), 404, way)
        row = raw.get(f"training_runs/{restarted.before.run}").json()
        assert row["last_checkpoint"]["tinker_path"] == restarted.before.paths[2]


def test_finished_answers_are_kept_and_open_requests_are_lost(restarted: Restarted) -> None:
    with talking(restarted.address) as raw:
        assert raw.answer(restarted.before.finished) == restarted.before.answer
        refused(raw.retrieve(restarted.before.open), 410, "not finished when the server ended")
        answer = raw.retrieve(restarted.before.open, **{"X-Tinker-Request-Type": "ForwardBackward"})
        refused(answer, 200, "not finished when the server ended")


def test_a_sampler_of_saved_weights_goes_on(restarted: Restarted) -> None:
    assert greedy(restarted.sampler) == restarted.before.written


def test_a_folder_has_one_server(restarted: Restarted) -> None:
    host = EngineRegistry(restarted.state, model_paths={nano.NAME: nano.NAME})
    with pytest.raises(InputError, match=f"another server uses the folder {restarted.state}"):
        serve(host, Options(port=0), pytest.fail)
    host.scheduler.close()


def test_saves_that_are_cut_off_are_there_or_not_at_all(tmp_path: Path) -> None:
    """Killed with many saves under way: those acknowledged are there, each other one is whole or absent."""
    with command(tmp_path, "--threads", "1") as server, connected(server.address, bereaved=True) as client:
        run = client.create_lora_training_client(nano.NAME, rank=4, seed=7).result(PATIENCE)
        saving = [run.save_state(f"s{n}") for n in range(40)]
        for n in range(3):
            saving[n].result(PATIENCE)
        server.kill()
        with served(tmp_path) as again, connected(again.address) as fresh:
            paths = listed(again.address)
            assert {f"tinker://{run.model_id}/weights/s{n}" for n in range(3)} <= set(paths)
            assert len(paths) < 40
            for path in paths:
                resumed = fresh.create_training_client_from_state_with_optimizer(path).result(PATIENCE)
            assert np.isfinite(step(resumed, TEXTS, ADAM))
