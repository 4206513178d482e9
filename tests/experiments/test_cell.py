"""The key of a cell: the same everywhere, and another one as soon as anything that its numbers depend on changes; and
what a cell is given, as it is and in the control."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.dataset import Dataset, Example, content_key
from experiments.sweep.cells import Cell, Job
from experiments.sweep.config import THINKING, Settings, load
from experiments.sweep.grid import plan
from experiments.sweep.methods import METHODS
from experiments.sweep.run import run, shown, train_examples

CELL = Cell("digits", "seeded-split-0", "pixel-knn", 2, 1, {"max_side": 480, "limit_test": None})
OTHER: dict[str, Any] = {
    **{"model": "Qwen/other", "backbone": "vit_small_patch14_dinov2.lvd142m"},
    **{"max_side": 99, "limit_test": 7, "split_seed": 7},
    **{"allow_fewer": True, "views_per_class": 7, "batch_size": 7, "rank": 7, "learning_rate": 0.7, "hflip": 0.7},
    **{"beta1": 0.7, "beta2": 0.7, "eps": 0.7, "shuffle_test": True},
    **{"prompt": "{image}What? => {label}", "loss": "closed-set", "calibration": "pmi", "answer_tokens": 7},
    **{"readout": "last4", "image_size": 56, "vlm_features": "hidden", "loss_power": 0.5, "start": 7},
    **{"group_size": 7, "temperature": 0.7, "policy_loss": "ppo", "kl": 0.7},
}


def test_the_key_is_a_hash_of_the_canonical_identity() -> None:
    text = (
        '{"dataset":"digits","method":"pixel-knn","protocol":"seeded-split-0","seed":1,'
        '"settings":{"limit_test":null,"max_side":480},"shots":2}'
    )
    assert json.loads(text) == CELL.identity
    assert CELL.key == hashlib.sha256(text.encode()).hexdigest()[:16] == "7cf386a256555c46"


def test_every_part_is_in_the_key() -> None:
    changes = [{"dataset": "icons"}, {"protocol": "x"}, {"method": "x"}, {"shots": 3}, {"seed": 3}, {"settings": {}}]
    keys = [CELL.key, *(replace(CELL, **change).key for change in changes)]
    assert len(set(keys)) == 7
    assert replace(CELL, settings={"limit_test": None, "max_side": 480}).key == CELL.key


def keys(photos: Path, settings: dict[str, Any], **where: str) -> dict[str, str]:
    """Method → the key of its first cell, of all methods that can be computed there."""
    methods = tuple(name for name, row in METHODS.items() if not (where and row.local))
    demo = load("demo", {}, {}).settings.model_dump()  # all given: another model would bring other training settings
    grid = {"datasets": (f"folder:{photos}",), "methods": methods, "shots": (1,)}
    sweep = load("demo", grid, {**demo, **settings})
    return {job.cell.method: job.cell.key for job in reversed(plan(sweep, **where).jobs)}


@pytest.fixture(scope="module")
def usual(photos: Path) -> dict[str, str]:
    return keys(photos, {})


# Those of thoughts need a model that thinks: see test_thinking_settings.
@pytest.mark.parametrize("setting", [name for name in Settings.model_fields if name not in THINKING])
def test_a_key_depends_on_the_settings_of_its_method(photos: Path, usual: dict[str, str], setting: str) -> None:
    loss = {"loss": "closed-set"} if setting in ("loss_power", "start") else {}  # the loss text reads neither
    usual = keys(photos, loss) if loss else usual
    changed = keys(photos, {**loss, setting: OTHER[setting]})
    differ = {method for method in METHODS if changed[method] != usual[method]}
    # another split seed is another protocol, which is part of every cell
    assert differ == {method for method, row in METHODS.items() if setting in row.settings}
    assert differ


def test_a_data_sets_own_hflip_is_in_no_key_but_recorded(photos: Path, usual: dict[str, str]) -> None:
    """So cells that were stored before there was this setting keep their keys."""
    assert keys(photos, {"hflip": 0.5}) == usual
    grid = {"datasets": ("digits",), "methods": ("dinov2-lora",), "shots": (1,), "seeds": (0,)}
    own, zero, half = (plan(load("demo", grid, s)).jobs[0].cell for s in ({}, {"hflip": 0}, {"hflip": 0.5}))
    assert (own.key, own.settings["hflip"], half.settings["hflip"]) == (zero.key, 0.0, 0.5)
    assert half.key != own.key
    lines = (Path(__file__).parents[2] / "results/demo/cells.jsonl").read_text().splitlines()
    assert {job.cell.key for job in plan(load("demo", {}, {})).jobs} == {json.loads(line)["key"] for line in lines}


def test_a_key_does_not_depend_on_who_computes(
    photos: Path, usual: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINKER_API_KEY", "tml-none")
    elsewhere = keys(photos, {}, service="tinker")
    assert elsewhere == {method: usual[method] for method in elsewhere}
    assert usual.keys() - elsewhere.keys() == {"vlm-vision-linear", "vlm-tuned-linear"}


def test_an_image_that_stands_in_two_classes_keeps_both_labels(photos: Path, make_image) -> None:
    """Whichever of them was prepared first."""
    image = make_image(4321)
    rows = [Example(content_key(image), image, label) for label in (0, 1)]
    grid = {"datasets": [f"folder:{photos}"], "methods": ["pixel-knn"], "shots": [1], "seeds": [0]}
    job = plan(load("demo", grid, {"max_side": 33})).jobs[0]
    for order in (rows, rows[::-1]):
        examples = train_examples(job, Dataset("own", "given", ("cat", "dog"), order, []))
        assert [example.label for example in examples] == [0, 1]


# The control, in which each test image stands in another's place; and the story of the demo, of which it is a part.


def job(method: str, shots: int, **settings: object) -> Job:
    """A cell of the demo on its first hundred test images."""
    sweep = load("demo", {"methods": [method], "shots": [shots], "seeds": [0]}, {"limit_test": 100, **settings})
    return plan(sweep).jobs[0]


@pytest.fixture(scope="module")
def first() -> Job:
    return job("pixel-knn", 1)


@given(count=st.integers(2, 50), seed=st.integers(0, 3))
def test_every_image_is_shown_once_and_never_in_its_own_place(first: Job, count: int, seed: int) -> None:
    shuffled = replace(first, cell=replace(first.cell, seed=seed), settings=Settings(shuffle_test=True))
    test = [Example(str(n), bytes([n]), 0) for n in range(count)]
    images = [example.image for example in test]
    seen = list(shown(test, shuffled))
    assert list(shown(test, first)) == images
    assert sorted(seen) == images
    assert not any(one == other for one, other in zip(seen, images, strict=True))
    assert list(shown(test, shuffled)) == seen


@pytest.mark.parametrize("method", ["vlm-lora", "dinov2-logreg"])
def test_four_images_a_class_teach_the_nano_pair_and_the_control_finds_nothing(method: str) -> None:
    seen, blind = (run(job(method, 4, shuffle_test=x))[0]["metrics"]["accuracy"] for x in (False, True))
    assert seen > 0.25  # chance is 0.05
    assert blind < 0.15
