"""Which GPUs each worker of a sweep gets."""

import pytest
import torch

from experiments.sweep.config import RunOptions
from experiments.sweep.grid import gpu_groups, gpus_of
from kshot.errors import InputError


@pytest.fixture(autouse=True)
def _five_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 5)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_workers_share_the_gpus_out() -> None:
    assert gpu_groups(RunOptions(device="cuda")) == ("0", "1", "2", "3", "4")
    assert gpu_groups(RunOptions(device="cuda", gpus_per_worker=2)) == ("0,1", "2,3")
    assert gpu_groups(RunOptions(device="cuda", gpus_per_worker=5)) == ("0,1,2,3,4",)
    assert gpu_groups(RunOptions(device="cpu")) == ()
    assert gpus_of("cpu:2") == ()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (RunOptions(device="cuda", gpus_per_worker=6), "--gpus-per-worker 6, but GPUs: 5"),
        (RunOptions(device="cpu", gpus_per_worker=2), "GPUs: 0"),
        (RunOptions(device="cpu:2"), "a worker on each core already"),
    ],
)
def test_what_cannot_be_shared_out(options: RunOptions, named: str) -> None:
    with pytest.raises(InputError, match=named):
        gpu_groups(options)
