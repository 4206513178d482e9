"""Which GPUs and processes each worker of a sweep gets, as it is said or by `--device auto`."""

from typing import Any

import pytest
import torch

from experiments.sweep import workers
from experiments.sweep.config import RunOptions
from experiments.sweep.grid import gpu_groups, gpus_of
from kshot.errors import InputError

FREE = 20 * 10**9  # bytes of each GPU


@pytest.fixture(autouse=True)
def _five_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 5)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (FREE + device.index, 10**11))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_workers_share_the_gpus_out() -> None:
    assert gpu_groups(RunOptions(device="cuda")) == ("0", "1", "2", "3", "4")
    assert gpu_groups(RunOptions(device="cuda", gpus_per_worker=2)) == ("0,1", "2,3")
    assert gpu_groups(RunOptions(device="cuda", gpus_per_worker=5)) == ("0,1,2,3,4",)
    assert gpu_groups(RunOptions(device="cpu")) == ()
    assert gpus_of("cpu:2") == gpu_groups(RunOptions(device="cpu:2")) == ()


def test_the_gpus_of_a_cluster_need_not_be_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert gpu_groups(RunOptions(device="cuda", executor="ray", gpus_per_worker=2)) == ("0,1",)
    with pytest.raises(InputError, match="torch sees no GPU"):
        gpu_groups(RunOptions(device="cuda", gpus_per_worker=2))


def test_a_worker_has_a_core_for_each_of_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "cores", lambda: 9)
    ranks = [RunOptions(device=device).ranks for device in ("cpu", "cpu:2", "cpu:20", "cuda")]
    assert ranks == [1, 2, 20, 1]
    assert [workers.room(1, each) for each in ranks] == [9, 4, 1, 9]
    assert workers.room(3, 2) == 3
    assert RunOptions(device="cuda", gpus_per_worker=3).ranks == 3


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (RunOptions(device="cuda", gpus_per_worker=6), "--gpus-per-worker 6, but GPUs: 5"),
        (RunOptions(device="cpu", gpus_per_worker=2), "GPUs: 0"),
        (RunOptions(device="cpu:2", gpus_per_worker=2), "GPUs: 0"),
        (RunOptions(device="cpu:0"), "device 'cpu:0' is not available here"),
    ],
)
def test_what_cannot_be_shared_out(options: RunOptions, named: str) -> None:
    with pytest.raises(InputError, match=named):
        gpu_groups(options)


@pytest.fixture
def automatic(kshot: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The device and the GPUs of each worker that `--device auto` means for a sweep, and what is said of it."""

    def run(*words: str) -> tuple[str, int, str]:
        seen = list[RunOptions]()

        def run_sweep(_: Any, __: Any, options: RunOptions, observer: Any) -> None:
            seen.append(options)
            observer.planned(None)

        monkeypatch.setattr("experiments.sweep.grid.run_sweep", run_sweep)
        ended = kshot("sweep", "demo", "--device", "auto", *words)
        assert ended.status == 0, ended.err
        return seen[0].device, seen[0].gpus_per_worker, " ".join(ended.err.split())

    return run


def test_auto_is_a_worker_a_gpu_where_the_model_fits_one(automatic: Any) -> None:
    """By hand: Qwen3-VL-2B has 2.13e9 weights of two bytes."""
    device, each, said = automatic("--model", "2B")
    assert (device, each) == ("cuda", 1)
    assert "device: cuda, a worker on each of 5 GPUs: Qwen/Qwen3-VL-2B-Instruct takes" in said
    assert "(4.3 GB of weights, " in said
    assert "of an adapter of rank 32 in training" in said
    assert "and a GPU has 20.0 GB free" in said
    assert automatic("--model", "2B", "--method", "pixel-knn")[1:] == (
        1,
        "device: cuda, a worker on each of 5 GPUs: no vision-language model computes here",
    )


def test_auto_is_one_worker_on_all_gpus_where_the_model_does_not_fit_one(automatic: Any) -> None:
    device, each, said = automatic("--model", "8B")
    assert (device, each) == ("cuda", 5)
    assert "device: cuda, all 5 GPUs for one worker: Qwen/Qwen3-VL-8B-Instruct takes" in said
    assert "(17.5 GB of weights, " in said
    assert "and a GPU has 20.0 GB free; divided it takes" in said


def test_auto_says_what_it_does_not_know(automatic: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    device, each, said = automatic("--model", "somebody/a-model")
    assert (device, each) == ("cuda", 1)
    assert "a worker on each of 5 GPUs: the size of somebody/a-model is not known before it is loaded" in said
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert automatic("--model", "8B") == ("cpu", 1, "device: cpu, since torch sees no GPU")


@pytest.mark.parametrize("more", [("--gpus-per-worker", "2"), ("--executor", "ray")])
def test_auto_stands_alone(more: tuple[str, str], kshot: Any) -> None:
    refused = kshot("sweep", "demo", "--device", "auto", *more)
    assert (refused.status, refused.err.count("\n")) == (2, 1)
    assert "--device auto" in refused.err
