"""A server that is killed: what it has acknowledged is there for the next one, and nothing that is half done."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinker
from tinker import types

from kshot.checks import folder_of
from tests.vlm.raw import PROMPT, accepted, refused, talking
from tests.vlm.services import PATIENCE, close, connected, log_probs, saved_on, step
from tests.vlm.serving import command, served
from vlm import nano
from vlm.inputs import datum, model_input
from vlm.local.registry import LocalServiceClient

ADAM = types.AdamParams(learning_rate=1e-2, eps=1e-8)
GREEDY = types.SamplingParams(max_tokens=6, temperature=0.0, stop=[])
ANSWER = [900, 901, 902, 903]
TEXTS = [datum(model_input([*range(500, end)]), ANSWER) for end in (505, 509)]
SAVES = 40
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


@dataclass(frozen=True)
class Restarted:
    """A server that was killed and started again, and what was seen before. client, sampler: the SDK's, of before.
    paths: what was saved of `run`; saver: a run of whose SAVES three were acknowledged. finished, open: requests that
    had an answer, and had none."""

    address: str
    client: Any
    sampler: Any
    written: list[int]
    run: str
    paths: list[str]
    saver: str
    finished: str
    answer: Any
    open: str


@pytest.fixture(scope="module")
def restarted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Restarted]:
    """Killed right after a save was acknowledged, with other saves and steps under way."""
    state = tmp_path_factory.mktemp("state")
    arguments = ["--model", nano.NAME, "--threads", "1"]
    with command(state, *arguments) as server, talking(server.address) as raw, connected(server.address) as client:
        run, saver = (client.create_lora_training_client(nano.NAME, rank=4, seed=7).result(PATIENCE) for _ in range(2))
        for _ in range(2):
            step(run, TEXTS, ADAM)
        paths = [run.save_weights_for_sampler("second").result(PATIENCE).path]
        sampler = client.create_sampling_client(model_path=paths[0]).result(PATIENCE)
        written = greedy(sampler)
        by_hand = raw.run(raw.session())
        finished = accepted(raw.pass_of(by_hand, 1, TEXTS))
        answer = raw.answer(finished)
        waiting = accepted(raw.pass_of(by_hand, 3, TEXTS))  # for the second
        paths.append(run.save_state("second").result(PATIENCE).path)
        for _ in range(3):
            run.forward_backward(TEXTS, "cross_entropy")
            run.optim_step(ADAM)
        paths.append(run.save_state("fifth").result(PATIENCE).path)
        saving = []
        for n in range(SAVES):
            saving.append(saver.save_state(f"s{n}"))
            run.forward_backward(TEXTS, "cross_entropy")
            run.optim_step(ADAM)
        for each in saving[:3]:
            each.result(PATIENCE)
        server.kill()
        beside = folder_of(state, paths[0]).parent
        (beside / HALF).mkdir()  # as if it had been writing another
        shutil.copy(folder_of(state, paths[0]) / "kshot.json", beside / HALF)
        (beside / "torn").mkdir()
        with served(state, port=int(server.address.rpartition(":")[2])) as again:
            seen = written, run.model_id, paths, saver.model_id, finished, answer, waiting
            yield Restarted(again.address, client, sampler, *seen)
            client.close("success").result(PATIENCE)


def test_every_acknowledged_checkpoint_is_there_and_nothing_half_done(restarted: Restarted) -> None:
    found = saved_on(restarted.address)
    saved = [path for path in found if restarted.saver in path]
    assert [path for path in found if path not in saved] == sorted(restarted.paths)
    assert {f"tinker://{restarted.saver}/weights/s{n}" for n in range(3)} <= set(saved)
    assert len(saved) < SAVES
    with connected(restarted.address) as client:
        client.create_training_client_from_state(restarted.paths[0]).result(PATIENCE)
        for path in (*restarted.paths[1:], *saved):
            resumed = client.create_training_client_from_state_with_optimizer(path).result(PATIENCE)
        assert np.isfinite(step(resumed, TEXTS, ADAM))
        with pytest.raises(tinker.APIStatusError, match="torn does not exist"):
            client.create_sampling_client(model_path=f"tinker://{restarted.run}/sampler_weights/torn").result()


def test_a_run_goes_on_as_if_nothing_had_happened(restarted: Restarted, tmp_path: Path) -> None:
    reference = uninterrupted(tmp_path, 6)
    with connected(restarted.address) as fresh:
        for client, path, done in ((fresh, restarted.paths[2], 5), (restarted.client, restarted.paths[1], 2)):
            run = client.create_training_client_from_state_with_optimizer(path).result(PATIENCE)
            for expected in reference[done:]:
                assert close(log_probs(run, TEXTS), expected)
                step(run, TEXTS, ADAM)


def test_the_old_run_says_where_to_go_on(restarted: Restarted) -> None:
    way = f"go on from '{restarted.paths[2]}' with create_training_client_from_state_with_optimizer"
    with talking(restarted.address) as raw:
        refused(raw.pass_of(restarted.run, 999), 404, way)
        refused(raw.post("get_info", model_id=restarted.run), 404, way)
        assert raw.get(f"training_runs/{restarted.run}").json()["last_checkpoint"]["tinker_path"] == restarted.paths[2]


def test_finished_answers_are_kept_and_open_requests_are_lost(restarted: Restarted) -> None:
    with talking(restarted.address) as raw:
        assert raw.answer(restarted.finished) == restarted.answer
        refused(raw.retrieve(restarted.open), 410, "not finished when the server ended")
        answer = raw.retrieve(restarted.open, **{"X-Tinker-Request-Type": "ForwardBackward"})
        refused(answer, 200, "not finished when the server ended")


def test_a_sampler_of_saved_weights_goes_on(restarted: Restarted) -> None:
    assert greedy(restarted.sampler) == restarted.written
