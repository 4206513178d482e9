"""Which models a sweep of a user's own images takes: by purpose and machine, said before it starts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from baselines import nano as nano_dinov2
from data import catalog
from experiments.report.figures import value_range
from experiments.sweep import choice
from experiments.sweep.choice import CPU_BACKBONE, FROZEN, GPU_BACKBONE, TUNED, WITH_VLM, choose
from experiments.sweep.intervals import Score
from experiments.sweep.store import Results
from kshot import hub
from vlm import nano

OWN = ["folder:photos"]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets what the machine has: a GPU, and files of the hub in its cache or to be fetched."""

    def have(*, gpu: bool = False, cached: bool = False, size: int | None = 88_000_000) -> None:
        monkeypatch.setattr(choice, "_has_gpu", lambda: gpu)
        monkeypatch.setattr(hub, "is_cached", lambda *_: cached)
        monkeypatch.setattr(hub, "size_of", lambda *_: size)

    return have


def test_on_a_cpu_dinov2_small_with_frozen_heads(machine: Callable[..., None]) -> None:
    machine()
    found = choose(OWN)
    assert (found.device, found.methods, found.settings) == ("cpu", FROZEN, {"backbone": CPU_BACKBONE})
    assert found.lines == (
        "models: DINOv2-small, since there is no GPU and none is named (88 MB to download); --model 2B lets a "
        "vision-language model take part: with --plan it says first how long it takes",
    )
    machine(cached=True)
    assert "(nothing to download)" in choose(OWN).lines[0]
    assert choose(["hub:me/birds"]).settings == {"backbone": CPU_BACKBONE}


def test_with_a_gpu_the_blogs_methods(machine: Callable[..., None]) -> None:
    machine(gpu=True, size=2_000_000_000)
    found = choose(OWN)
    assert (found.device, found.methods) == ("cuda", TUNED)
    assert found.settings == {"model": "2B", "backbone": GPU_BACKBONE}
    assert "Qwen3-VL-2B and DINOv2-base, since there is a GPU and none is named (4,000 MB" in found.lines[0]
    assert choose(OWN, device="cpu").settings == {"backbone": CPU_BACKBONE}  # explicit


def test_what_is_named_holds(machine: Callable[..., None]) -> None:
    machine()
    assert choose(OWN, model="8B").methods == WITH_VLM
    assert choose(OWN, model="8B").settings == {"backbone": CPU_BACKBONE}
    both = choose(OWN, ["vlm-lora", "dinov2-ridge"], "8B", "vit_x")
    assert (both.methods, both.settings, both.lines) == (("vlm-lora", "dinov2-ridge"), {}, ())
    assert choose(OWN, ["pixel-knn"]).settings == {}


def test_where_nothing_can_be_had_the_nano_pair_is_announced(machine: Callable[..., None]) -> None:
    machine(size=None)
    found = choose(OWN)
    assert (found.methods, found.settings) == ((), {})
    assert found.lines[0].startswith("models: the nano pair, since DINOv2-small cannot be had here")
    assert "says nothing about photographs" in found.lines[0]
    assert "--backbone and --model" in found.lines[0]


@pytest.mark.parametrize("datasets", [[], ["icons"], ["icons", "folder:x"], ["flowers"]])
def test_other_sets_have_the_demos_models(datasets: list[str], machine: Callable[..., None]) -> None:
    machine()
    assert choose(datasets) == choice.Choice("cpu")


def test_a_path_is_a_folder_of_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "icons").mkdir()
    given = ("photos", "./there/not", "~/x", "/a", "folder:b", "hub:c/d", "icons", "flowers", "nothing")
    assert [catalog.full_name(name) for name in given] == [
        *("folder:photos", "folder:./there/not", "folder:~/x", "folder:/a"),
        *("folder:b", "hub:c/d", "icons", "flowers", "nothing"),
    ]


def test_a_sweep_of_a_plain_folder(
    photos: Path, tmp_path: Path, kshot: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline: the line stands before the run, and the report says that there are few test images."""
    monkeypatch.setattr(choice, "_has_gpu", lambda: False)
    asked = [
        "--method",
        "dinov2-logreg",
        "--seeds",
        "0",
        "--workers",
        "1",
        "--out",
        tmp_path / "out",
    ]
    ended = kshot("sweep", "--dataset", photos, *asked)
    assert ended.status == 0, ended.err
    lines = ended.err.splitlines()
    assert lines[0].startswith("models: the nano pair, since DINOv2-small cannot be had here")
    few = f"folder:{photos.name}: 6 test images are few: one of them is 16.7 points of accuracy."
    assert few in lines
    results = Results(tmp_path / "out")
    assert few in results.sweep()["notes"]
    assert few.partition(": ")[2] in (tmp_path / "out/report.md").read_text(encoding="utf-8")
    assert results.sweep()["settings"]["backbone"] == nano_dinov2.NAME
    assert results.sweep()["settings"]["model"] == nano.NAME
    assert {cell["shots"] for cell in results.cells()} == {1, 2, 4, 8}  # 16 is capped, and said
    assert any("shots stop at 8" in line for line in lines)


def test_intervals_are_drawn_within_0_and_100() -> None:
    assert value_range({"a": {1: Score(0.9, 0.3, 2), 2: Score(0.1, 0.2, 2)}}, 4) == (0, 100)
