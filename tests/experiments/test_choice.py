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
from experiments.sweep.config import load
from experiments.sweep.grid import plan
from experiments.sweep.intervals import Score
from experiments.sweep.store import Results
from kshot import hub
from vlm import nano

OWN = ["folder:photos"]
BY_GPU = "device: cuda, since there is a GPU and --device names none"
NANO_VLM = (
    "models: the vision-language model is the nano one, which says nothing about photographs; name one with --model"
)


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
    assert found.lines[1:] == (BY_GPU,)
    assert choose(OWN, device="cpu").settings == {"backbone": CPU_BACKBONE}  # explicit
    assert "DINOv2-small, since --device cpu and none is named" in choose(OWN, device="cpu").lines[0]


def test_a_gpu_that_is_taken_is_announced_whatever_is_named(machine: Callable[..., None]) -> None:
    machine(gpu=True)
    assert choose(OWN, ["pixel-knn"]) == choice.Choice("cuda", ("pixel-knn",), {}, (BY_GPU,))
    assert choose(OWN, ["vlm-lora"], "8B").lines == (BY_GPU,)
    assert choose(OWN, ["vlm-lora"], "8B", device="cuda").lines == ()


def test_what_is_named_holds(machine: Callable[..., None]) -> None:
    machine()
    assert choose(OWN, model="8B").methods == WITH_VLM
    assert choose(OWN, model="8B").settings == {"backbone": CPU_BACKBONE}
    both = choose(OWN, ["vlm-lora", "dinov2-ridge"], "8B", "vit_x")
    assert (both.methods, both.settings, both.lines) == (("vlm-lora", "dinov2-ridge"), {}, ())
    assert choose(OWN, ["pixel-knn"]).settings == {}


def test_the_nano_vlm_of_a_cpu_is_announced(machine: Callable[..., None]) -> None:
    machine()
    assert choose(OWN, ["vlm-lora"]) == choice.Choice("cpu", ("vlm-lora",), {}, (NANO_VLM,))
    both = choose(OWN, ["vlm-lora", "dinov2-logreg"])
    assert both.settings == {"backbone": CPU_BACKBONE}
    assert (both.lines[0].split(",")[0], both.lines[1:]) == ("models: DINOv2-small", (NANO_VLM,))


def test_where_nothing_can_be_had_the_nano_pair_is_announced(machine: Callable[..., None]) -> None:
    machine(size=None)
    found = choose(OWN)
    assert (found.methods, found.settings) == ((), {"max_side": 64})  # at 480 pixels it would take an hour
    assert found.lines[0].startswith("models: the nano pair, since DINOv2-small cannot be had here")
    assert found.lines[1].startswith("images: at 64 pixels, as the nano pair learnt")
    assert "says nothing about photographs" in found.lines[0]
    assert found.lines[0].endswith("or name folders with --backbone and --model")
    elsewhere = choose(OWN, device="cuda", elsewhere=True)  # a plan for another machine, made on a laptop
    assert elsewhere.settings == {"model": "2B", "backbone": "vit_base_patch14_dinov2.lvd142m"}
    assert elsewhere.methods == TUNED


@pytest.mark.parametrize(
    ("gpu", "named", "chosen", "said"),
    [
        (False, {"model": "8B"}, WITH_VLM, "the nano DINOv2, since DINOv2-small"),
        (True, {"model": "8B"}, TUNED, "the nano DINOv2, since DINOv2-base"),
        (True, {"backbone": "vit_x"}, TUNED, "the nano VLM, since Qwen3-VL-2B"),
        (False, {"methods": ["dinov2-knn"]}, ("dinov2-knn",), "the nano DINOv2, since DINOv2-small"),
        (False, {"methods": ["vlm-lora", "dinov2-knn"]}, ("vlm-lora", "dinov2-knn"), "the nano pair, since DINOv2"),
    ],
)
def test_where_nothing_can_be_had_what_is_named_holds(
    machine: Callable[..., None], gpu: bool, named: dict[str, Any], chosen: tuple[str, ...], said: str
) -> None:
    machine(gpu=gpu, size=None)
    found = choose(OWN, **named)
    assert (found.methods, found.settings, found.lines[1:]) == (chosen, {}, (BY_GPU,) if gpu else ())
    assert said in found.lines[0]
    assert ("--backbone" in found.lines[0], "--model" in found.lines[0]) == ("VLM" not in said, "DINOv2, " not in said)


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


@pytest.mark.parametrize(("limit", "said"), [(4, "4 test images"), (9, "6 test images"), (None, "6 test images")])
def test_few_tests_are_those_that_the_limit_leaves(photos: Path, limit: int | None, said: str) -> None:
    grid = {"datasets": (f"folder:{photos}",), "methods": ("pixel-knn",), "shots": (1,), "seeds": (0,)}
    planned = plan(load("demo", grid, {"limit_test": limit}))
    for lines in (planned.about_data(), planned.describe()["notes"]):
        assert [line.split(": ")[1] for line in lines if "are few" in line] == [f"{said} are few"]


@pytest.mark.usefixtures("ran")
def test_a_sweep_of_a_plain_folder(photos: Path, tmp_path: Path, kshot: Callable[..., Any]) -> None:
    """Offline: the line stands before the run, and the report says that there are few test images."""
    asked = ("--method", "dinov2-logreg", "--seeds", "0", "--out", tmp_path / "out")
    ended = kshot("sweep", "--dataset", photos, *asked)
    assert ended.status == 0, ended.err
    lines = ended.err.splitlines()
    assert lines[0].startswith("models: the nano DINOv2, since DINOv2-small cannot be had here")
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
