"""Two and four ranks, whole and divided, on models of several layouts, against one process; and their memory."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tinker
import torch

from tests.vlm import checkpoints, ranked
from tests.vlm.ranked import ADAM, SPEC, Engines, check_answers, check_trained, trained
from vlm.inputs import datum, model_input
from vlm.local import packs
from vlm.local.ranks.inference import ModelOptions, RanksEngine

pytestmark = [pytest.mark.ranks, pytest.mark.slow]

KINDS = ("dense", "sparse", "llama")  # as Llama and SmolLM2 are laid out
GRID = [
    (kind, count, divided, dtype)
    for kind in KINDS
    for count in (2, 4)
    for divided in (False, True)
    for dtype in (torch.float64, torch.float32)
]


def named(case: Any) -> str:
    kind, count, divided, dtype = case
    return f"{kind}-{count}-{'divided' if divided else 'whole'}-{str(dtype).removeprefix('torch.')}"


@pytest.fixture(scope="module", params=GRID, ids=named)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Engines]]:
    kind, count, divided, dtype = request.param
    folder = tmp_path_factory.mktemp(kind)
    made = (
        checkpoints.text_model(folder, kind) if kind == "llama" else checkpoints.random_model(folder, kind, tied=True)
    )
    with ranked.engines(made, count, dtype, divided=divided) as both:
        yield kind, both


@pytest.fixture
def data(case: tuple[str, Engines], mixed: list[tinker.Datum]) -> list[tinker.Datum]:
    """Of mixed lengths; with images where the model takes them; one datum is longer than a pack."""
    texts = [datum(model_input(list(range(10 + n, 22 + 9 * n))), [5, 6]) for n in range(6)]
    return texts if case[0] == "llama" else [*mixed, *texts]


@pytest.fixture(autouse=True)
def _short_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packs, "PACK", 48)


def test_ranks_train_what_one_does(case: tuple[str, Engines], data: list[tinker.Datum]) -> None:
    check_trained(case[1], trained(case[1].one, data), trained(case[1].many, data))


def test_fewer_data_than_ranks(case: tuple[str, Engines], data: list[tinker.Datum]) -> None:
    check_trained(case[1], trained(case[1].one, data[:1], steps=3), trained(case[1].many, data[:1], steps=3))


def test_runs_take_turns(case: tuple[str, Engines], data: list[tinker.Datum]) -> None:
    found = list[Any]()
    for engine in case[1][:2]:
        runs = [engine.start(SPEC, seed) for seed in (1, 2)]
        for step in range(3):
            for n, run in enumerate(runs):
                engine.forward_backward(run, data[n:], "cross_entropy", None)
            for run in runs[:: 1 if step % 2 else -1]:
                engine.optim_step(run, ADAM)
        found.append([run.weights() for run in runs])
    for one, many in zip(*found, strict=True):
        assert ranked.errors(one, many) < case[1].tolerance


def test_custom_and_closed_losses(case: tuple[str, Engines], data: list[tinker.Datum]) -> None:
    def squared(_: Any, log_probs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        return torch.stack([each.mean().square() for each in log_probs]).sum(), {"count": float(len(log_probs))}

    found = list[Any]()
    for engine in case[1][:2]:
        run = engine.start(SPEC, 1)
        out = engine.forward_backward_custom(run, data, squared)
        engine.optim_step(run, ADAM)
        found.append((out.metrics, run.optimizer_tensors()))
    (metrics, state), (others, other_state) = found
    assert others == pytest.approx(metrics, rel=1e-5)
    assert ranked.errors(state, other_state) < (2e-6 if case[1].tolerance < 1e-6 else 1e-4)  # log-probs are float32


def test_ranks_answer_what_one_does(
    case: tuple[str, Engines], data: list[tinker.Datum], prompts: list[tinker.ModelInput]
) -> None:
    texts = [model_input(list(range(10, 14 + 5 * n))) for n in range(1, 4)]
    check_answers(case[1], texts if case[0] == "llama" else [*prompts, *texts], data)


class Anonymous:
    """The largest anonymous memory of processes while the context is open, in bytes, sampled every millisecond."""

    def __init__(self, pids: list[int]) -> None:
        self.peak, self._pids, self._over = dict.fromkeys(pids, 0), pids, threading.Event()
        self._thread = threading.Thread(target=self._sample)

    def __enter__(self) -> "Anonymous":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._over.is_set():
            for pid in self._pids:
                self.peak[pid] = max(self.peak[pid], anonymous(pid))
            time.sleep(0.001)


def anonymous(pid: int) -> int:
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("RssAnon")]
    return 1024 * int(line.split()[1])


@pytest.mark.parametrize("count", [2, 4])
def test_a_rank_holds_its_share_and_one_layer(count: int, tmp_path: Path) -> None:
    """By its own count of weights, also while they are read; and by the system, which sees what gathers them too: a
    second copy of a layer, as FSDP2 receives it."""
    import transformers

    sizes = {**checkpoints.SIZES, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
    sizes |= {"num_attention_heads": 12, "num_key_value_heads": 12, "vocab_size": 8192}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    total = sum(p.numel() * 4 for p in model.parameters())
    layer = sum(p.numel() * 4 for p in model.model.layers[0].parameters())
    checkpoints.saved(model, tmp_path)
    del model
    engine = RanksEngine(ModelOptions(str(tmp_path), str(tmp_path), torch.float32, "divided"), ["cpu"] * count, 1)
    try:
        facts = engine.command("facts")
        assert all(each["peak"] <= 1.05 * (total / count + layer) for each in facts), facts
        data = [datum(model_input(list(range(10, 20))), [5, 6])] * count
        run = engine.start(SPEC, 1)
        before = {pid: anonymous(pid) for pid in engine.processes}
        with Anonymous(engine.processes) as memory:
            engine.forward_backward(run, data, "cross_entropy", None)
        assert all(each["peak"] <= 1.05 * (total / count + layer) for each in engine.command("facts"))
        growth = max(memory.peak[pid] - before[pid] for pid in before)
        assert growth <= 2 * layer + (64 << 20), (growth, layer)  # no more than one layer, received and in place
    finally:
        engine.end()
