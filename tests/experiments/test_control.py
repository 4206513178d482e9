"""The control, in which each test image stands in another's place; and the story of the demo, of which it is a part."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.dataset import Example
from experiments.sweep.cells import Job
from experiments.sweep.config import Settings, load
from experiments.sweep.grid import plan
from experiments.sweep.run import run, shown


def job(method: str, shots: int, **settings: object) -> Job:
    """A cell of the demo on its first hundred test images."""
    sweep = load("demo", {"methods": [method], "shots": [shots], "seeds": [0]}, {"limit_test": 100, **settings})
    return plan(sweep).jobs[0]


@pytest.fixture(scope="module")
def usual() -> Job:
    return job("pixel-knn", 1)


@given(count=st.integers(2, 50), seed=st.integers(0, 3))
def test_every_image_is_shown_once_and_never_in_its_own_place(usual: Job, count: int, seed: int) -> None:
    shuffled = replace(usual, cell=replace(usual.cell, seed=seed), settings=Settings(shuffle_test=True))
    test = [Example(str(n), bytes([n]), 0) for n in range(count)]
    images = [example.image for example in test]
    seen = list(shown(test, shuffled))
    assert list(shown(test, usual)) == images
    assert sorted(seen) == images
    assert not any(one == other for one, other in zip(seen, images, strict=True))
    assert list(shown(test, shuffled)) == seen


@pytest.mark.parametrize("method", ["vlm-lora", "dinov2-logreg"])
def test_four_images_a_class_teach_the_nano_pair_and_the_control_finds_nothing(method: str) -> None:
    seen, blind = (run(job(method, 4, shuffle_test=x))[0]["metrics"]["accuracy"] for x in (False, True))
    assert seen > 0.25  # chance is 0.05
    assert blind < 0.15
