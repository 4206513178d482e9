"""Many clients of the SDK at once, each with a run of its own: nothing is lost, reordered or mixed up."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tinker import types

import vlm
from tests.vlm.helpers import Pictured
from tests.vlm.services import saved_on
from tests.vlm.serving import served
from vlm import nano
from vlm.local.registry import LocalServiceClient
from vlm.prompts import Prompt

CLIENTS, STEPS = 12, 7
RANKS = (1, 2, 4, 8)
ADAM = types.AdamParams(learning_rate=3e-3, eps=1e-8)
GREEDY = types.SamplingParams(max_tokens=3, temperature=0.0)


def work(service: Any, kind: int, prompt: Prompt, examples: list[Pictured]) -> dict[str, Any]:
    """20 operations whose numbers all depend on those before them. kind: what makes a run's numbers its own."""
    data = [prompt.datum(examples[(kind + n) % len(examples)].image, n) for n in range(2)]
    question = prompt.question(examples[kind].image)
    client = service.create_lora_training_client(nano.NAME, rank=RANKS[kind % 4], seed=kind).result()
    passes, steps = [], []
    for n in range(STEPS):  # all are submitted before any is awaited
        passes.append(client.forward_backward([data[n % 2]], "cross_entropy"))
        steps.append(client.optim_step(ADAM))
    scores = client.forward(data[:1], "cross_entropy")  # 15
    saved = client.save_state("end")  # 16
    sampler = client.save_weights_and_get_sampling_client().result()  # 17
    answers = [sampler.sample(question, n + 1, GREEDY) for n in range(2)]  # 19
    log_probs = sampler.compute_logprobs(question)  # 20
    return {
        "losses": [future.result().metrics["loss:sum"] for future in passes],
        "norms": [future.result().metrics["grad_norm:mean"] for future in steps],
        "forward": [each["logprobs"].to_numpy() for each in scores.result().loss_fn_outputs],
        "path": saved.result().path,
        "tokens": [[list(s.tokens) for s in future.result().sequences] for future in answers],
        "log_probs": np.array(log_probs.result(), np.float64),
        "model": client.model_id,
    }


@pytest.fixture(scope="module")
def alone(
    tmp_path_factory: pytest.TempPathFactory, prompt: Prompt, examples: list[Pictured]
) -> Callable[[int], dict[str, Any]]:
    """The same work, kind by kind, each with nobody beside it, in this process."""
    service = LocalServiceClient(tmp_path_factory.mktemp("alone"))
    done = [work(service, kind, prompt, examples) for kind in range(8)]
    service.close()
    return done.__getitem__


def test_many_clients_with_20_operations_each(
    tmp_path: Path, alone: Callable[[int], dict[str, Any]], prompt: Prompt, examples: list[Pictured]
) -> None:
    with served(tmp_path) as server:
        clients = [vlm.connect(server.address) for _ in range(CLIENTS)]
        with ThreadPoolExecutor(CLIENTS) as pool:
            found = list(pool.map(lambda n: work(clients[n], n % 8, prompt, examples), range(CLIENTS)))
        state = server.state
        listed = saved_on(server.address)
        for client in clients:
            client.close("success").result()
    assert (state.steps.total(), len(state.futures.sizes), len(state.runs)) == (CLIENTS * STEPS, 0, 0)
    assert len({each["model"] for each in found}) == CLIENTS
    assert listed == sorted(each["path"] for each in found)
    for number, each in enumerate(found):
        wanted = alone(number % 8)
        np.testing.assert_allclose(each["losses"], wanted["losses"], rtol=1e-5)
        np.testing.assert_allclose(each["norms"], wanted["norms"], rtol=1e-4)
        for got, golden in zip(each["forward"], wanted["forward"], strict=True):
            np.testing.assert_allclose(got, golden, atol=1e-4)
        assert each["tokens"] == wanted["tokens"]
        np.testing.assert_allclose(each["log_probs"], wanted["log_probs"], atol=1e-4)
