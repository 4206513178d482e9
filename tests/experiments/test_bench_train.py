"""The benchmark of training on a case small enough for a test: what it counts, what it refuses, and what it writes."""

import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec
from multiprocessing import get_start_method
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from experiments.bench import harness
from experiments.bench import train as bench_train
from experiments.bench import train_implementations as programs
from experiments.bench.case import Case, Plan, check_inputs, new_case, photographs, write_shape
from experiments.bench.harness import check_device, finish, processes
from experiments.bench.train import operations, text_operations
from experiments.bench.train_implementations import OURS, PLAIN, Outcome, ours, plain, stock_inputs, stock_program
from kshot.errors import DatasetError, InputError, KshotError
from vlm import nano

TINY = Plan(classes=2, shots=1, batch=2, epochs=3, rounds=1)
TEXT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
TEXT |= {"intermediate_size": 96, "vocab_size": 4096}
ROPE = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
TOWER = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "out_hidden_size": 64}
TOWER |= {"patch_size": 16, "num_position_embeddings": 2304, "deepstack_visual_indexes": [0]}
TOY = {"tie_word_embeddings": False, "text_config": TEXT | {"rope_parameters": ROPE}, "vision_config": TOWER}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Two photographs, three epochs of one step, and a first adapter."""
    return programs.with_adapter(new_case(nano.NAME, "cpu", TINY, None, tmp_path_factory.mktemp("case")))


def losses(implementation: Any, case: Case) -> list[float]:
    with implementation(case) as run:
        return run().losses


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan of seconds, in this process, a peak that is known, and no TRL (it has a test of its own)."""
    one_at_a_time = Lock()

    def here(function: Callable[..., Any], *args: object) -> Any:
        with one_at_a_time:
            return function(*args)

    monkeypatch.setattr(harness, "processes", lambda names: nullcontext(dict.fromkeys(names, here)))
    monkeypatch.setattr(bench_train, "QUICK", TINY)
    monkeypatch.setattr(bench_train, "PAIRS", 5)
    monkeypatch.setattr(programs, "implementations", lambda _: {OURS: ours, PLAIN: plain})
    monkeypatch.setattr(bench_train, "matrix_product_rate", lambda *_: [1e12, 2e12])


@pytest.mark.usefixtures("small")
def test_the_record_and_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finish(bench_train.measure(None, True), tmp_path / "train.json")
    record = json.loads((tmp_path / "train.json").read_text())
    assert record["ratios"].keys() == {"vs_plain", "step_over_model", "gemm_share"}
    rows = {row["name"]: row for row in record["rows"]}
    assert rows[OURS]["unit"] == rows[PLAIN]["unit"] == "examples/s"
    assert record["ratios"]["vs_plain"] == pytest.approx(rows[OURS]["median"] / rows[PLAIN]["median"])
    needed = rows["needed operations"]
    flops = sum(needed["flops"].values())
    assert needed["median"] * 1e9 == pytest.approx(flops * rows[OURS]["median"] / (2 * 3))
    assert record["ratios"]["gemm_share"] == pytest.approx(needed["median"] * 1e9 / 2e12)
    assert rows["images through our tower, first epoch"]["median"] == 2
    assert rows["images through our tower, all epochs"]["median"] == 2
    assert rows[f"loss apart from {PLAIN}"]["median"] < 1e-4
    assert all(rows[f"peak memory, {name}"]["median"] > 100 for name in (OURS, PLAIN))
    steps, alone = rows["step"]["values"], rows["model alone"]["values"]
    assert len(steps) == len(alone) == 5
    times = [step / model for step, model in zip(steps, alone, strict=True)]
    assert all(1 < time < 10 for time in times)
    assert record["ratios"]["step_over_model"] == pytest.approx(sorted(times)[2])
    printed = capsys.readouterr().out
    assert all(name in printed for name in [*rows, "gemm_share", "TRL is not installed, so vs_trl is left out"])


@pytest.mark.skipif(not find_spec("trl"), reason="trl is not installed (pip install trl==1.16.0)")
def test_everybody_trains_the_same(case: Case) -> None:
    """Equal losses at every step, though they move: so do the weights. TRL checks its tokens and labels by itself."""
    got = {name: losses(implementation, case) for name, implementation in programs.implementations(quick=True).items()}
    assert len(got) == 3
    for theirs in got.values():
        assert theirs == pytest.approx(got[OURS], abs=1e-5)
    assert got[OURS][0] - got[OURS][-1] > 0.01


def test_a_made_up_shape_trains_like_the_stock_model(tmp_path: Path) -> None:
    model = str(write_shape(tmp_path / "model", TOY, "cpu"))
    case = programs.with_adapter(new_case(model, "cpu", TINY, None, tmp_path / "state"))
    assert losses(ours, case) == pytest.approx(losses(plain, case), abs=1e-5)


def test_other_labels_are_noticed(case: Case) -> None:
    _, processor = stock_program(case)
    inputs = stock_inputs(case, processor, case.batches[0])
    check_inputs(case, inputs, processor.image_token_id)
    inputs["labels"][0, -1] = 7
    with pytest.raises(KshotError, match="is not the same training example for everybody"):
        check_inputs(case, inputs, processor.image_token_id)


@pytest.mark.usefixtures("small")
def test_other_losses_are_noticed(case: Case) -> None:
    seconds = {OURS: [1.0], PLAIN: [1.0]}
    trained = {OURS: Outcome([1.0, 1.0, 1.1], [2, 2, 2]), PLAIN: Outcome([1.0, 1.0, 1.0])}
    with pytest.raises(KshotError, match=r"at step 3 our loss and that of 'plain .*' are 0.1 apart, more than 0.0001"):
        bench_train.summary(case, seconds, trained, [(1.0, 1.0)])
    again = {name: Outcome([1.0] * 3, [2, 2, 3]) for name in seconds}
    with pytest.raises(KshotError, match="encoded 1 images again after the first epoch"):
        bench_train.summary(case, seconds, again, [(1.0, 1.0)])


def test_processes_report_and_end() -> None:
    """What they raise comes in one line, a death as well, and none is left, busy or not."""
    with processes(["one", "two"]) as started:
        one, two = started["one"], started["two"]
        running = [psutil.Process(process(os.getpid)) for process in (one, two)]
        assert len({os.getpid(), *(process.pid for process in running)}) == 3
        assert one(torch.get_num_threads) == torch.get_num_threads()
        assert one(get_start_method) == get_start_method()
        with pytest.raises(InputError, match="unknown device 'tpu'"):
            one(check_device, "tpu")
        with pytest.raises(KshotError, match=r"^'one' failed: ValueError: invalid literal for int.*: 'a\\nb'$"):
            one(int, "a\nb")
        ThreadPoolExecutor(1).submit(two, time.sleep, 600)
        for _ in range(2):
            with pytest.raises(KshotError, match="the process of 'one' died"):
                one(os._exit, 1)
    assert not any(process.is_running() for process in running)


def test_the_operations_are_those_that_torch_counts(case: Case) -> None:
    """Against torch's own counter on stock modules, which multiply out the whole attention matrix and all logits."""
    from torch.utils.flop_counter import FlopCounterMode

    one = replace(case, batches=(case.batches[0][:1],))
    model, processor = stock_program(one)
    model.set_attn_implementation("eager")
    inputs = stock_inputs(one, processor, one.batches[0])
    with FlopCounterMode(display=False) as counter:
        model(**inputs).loss.backward()
    length = inputs["input_ids"].shape[1]  # the stock program also goes through the last token
    counted = text_operations(model.config.text_config, [length], answers=length)
    counted["attention"] *= 2 * length / (length + 1)
    total = sum(counted.values()) + operations(one)["tower"]
    assert counter.get_total_flops() == pytest.approx(total, rel=1e-3)


def test_a_folder_is_chosen_from_by_seed(photos: Path) -> None:
    plan = Plan(classes=3, shots=4, batch=4, epochs=1, rounds=1)
    classes, shots = photographs(photos, plan, np.random.default_rng(0))
    others = [photographs(photos, plan, np.random.default_rng(seed))[1] for seed in (0, 1)]
    assert shots == others[0] != others[1]
    assert len(set(shots)) == 12
    assert [label for _, label in shots] == [n // 4 for n in range(12)]
    assert len(classes) == 3
    with pytest.raises(DatasetError, match="has 3 of the 4 folders of at least 4 photographs"):
        photographs(photos, replace(plan, classes=4), np.random.default_rng(0))


def test_an_epoch_shows_everything_once() -> None:
    plan = Plan(classes=4, shots=2, batch=4, epochs=3, rounds=1)
    batches = plan.order(np.random.default_rng(0))
    epochs = [sum(batches[n : n + 2], ()) for n in range(0, len(batches), 2)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(8))] * 3
    assert len(set(epochs)) == 3
