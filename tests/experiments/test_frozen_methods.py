"""Heads on frozen features as methods of a sweep: what they record, what they cannot be asked, no look at tests."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from baselines.heads import HEADS
from data.dataset import Images
from experiments.sweep.config import load
from experiments.sweep.grid import plan
from experiments.sweep.methods import METHODS, Task
from experiments.sweep.run import dataset_of, examples_to_test, run, task_of
from kshot.errors import InputError, TooFewImagesError
from vlm import ImageRule, Prompt, connect, nano
from vlm.embedding import embed_images

FROZEN = {name: name.removeprefix("dinov2-") for name in METHODS if name.removeprefix("dinov2-") in HEADS}


def cell_task(photos: Path, method: str, shots: int = 4, **settings: Any) -> Task:
    """What a cell of a sweep on the small folder gives its method."""
    grid = {"datasets": [f"folder:{photos}"], "methods": [method], "shots": [shots], "seeds": [0]}
    job = plan(load("demo", grid, settings)).jobs[0]
    return task_of(job, dataset_of(job), examples_to_test(job))


def test_the_table_says_of_heads_what_they_say_themselves() -> None:
    assert FROZEN.keys() == {"dinov2-logreg", "dinov2-ridge", "dinov2-knn", "dinov2-mean"}
    for name, head in FROZEN.items():
        assert METHODS[name].leaves_out == HEADS[head].chooses
    assert not any(row.leaves_out for name, row in METHODS.items() if name not in FROZEN)


@pytest.mark.parametrize("method", [*FROZEN, "vlm-vision-linear", "pixel-knn"])
def test_what_is_learnt_does_not_depend_on_test_images(method: str, photos: Path) -> None:
    """With half of them gone, the scores of the others and what was chosen are the same."""
    task = cell_task(photos, method)
    whole = METHODS[method].run(task)
    fewer = METHODS[method].run(replace(task, test=task.test[:3]))
    assert fewer.chosen == whole.chosen
    np.testing.assert_allclose(fewer.scores, whole.scores[:3], rtol=1e-4, atol=1e-4)
    assert whole.scores.shape == (6, 3)


@pytest.mark.parametrize("features", ["tower", "hidden", "tower+hidden"])
def test_the_vlms_own_features_have_a_linear_head(features: str, photos: Path) -> None:
    """Against the features asked for by hand and scikit-learn's logistic regression on them."""
    task = cell_task(photos, "vlm-vision-linear", vlm_features=features)
    outcome = METHODS["vlm-vision-linear"].run(task)
    sampler = connect("local").create_sampling_client(base_model=nano.NAME).result()
    prompt = Prompt(sampler.get_tokenizer(), ImageRule.from_pretrained(nano.NAME), task.classes)
    train, test = (embed_images(sampler, images, prompt, features) for images in (Images(task.train), task.test))
    scaler = StandardScaler().fit(train.astype(np.float64))
    head = LogisticRegression(tol=1e-9).fit(scaler.transform(train.astype(np.float64)), [e.label for e in task.train])
    expected = head.predict_log_proba(scaler.transform(test.astype(np.float64)))
    np.testing.assert_allclose(outcome.scores, expected, atol=0.03)
    assert outcome.probabilities


def test_what_was_chosen_is_in_the_record(photos: Path) -> None:
    grid = {"datasets": [f"folder:{photos}"], "methods": [*FROZEN], "shots": [1, 3], "seeds": [0]}
    records = [run(job)[0] for job in plan(load("demo", grid, {})).jobs]
    chosen = {(record["method"], record["shots"]): record.get("chosen", {}) for record in records}
    json.dumps(chosen[("dinov2-ridge", 3)])
    assert chosen["dinov2-logreg", 1] == chosen["dinov2-logreg", 3] == {}
    assert chosen["dinov2-knn", 1] == {"neighbours": 1}
    assert {name: set(chosen[name, 3]) for name in FROZEN} == {
        "dinov2-logreg": set(),
        "dinov2-ridge": {"penalty"},
        "dinov2-knn": {"neighbours"},
        "dinov2-mean": {"space"},
    }


@pytest.fixture
def uneven(photos: Path, tmp_path: Path) -> Path:
    """A folder in which one class has a single training image."""
    for number, folder in enumerate(sorted(photos.iterdir())):
        images = sorted(folder.iterdir())
        for split, some in (("train", images[: 5 if number else 1]), ("test", images[-2:])):
            target = tmp_path / "uneven" / split / folder.name
            target.mkdir(parents=True)
            for image in some:
                shutil.copy(image, target)
    return tmp_path / "uneven"


def test_a_class_with_one_image_is_named_before_a_start(uneven: Path, photos: Path) -> None:
    name = sorted(photos.iterdir())[0].name.replace("_", " ").replace("-", " ").lower()
    grid = {"datasets": [f"folder:{uneven}"], "shots": [2], "seeds": [0]}
    message = r"has one training image and others have 2: .* leave them out"
    with pytest.raises(TooFewImagesError, match=message) as caught:
        plan(load("demo", {**grid, "methods": ["dinov2-knn"]}, {"allow_fewer": True}))
    assert repr(name)[1:-1] in str(caught.value)
    plan(load("demo", {**grid, "methods": ["dinov2-logreg"]}, {"allow_fewer": True}))
    plan(load("demo", {**grid, "methods": ["dinov2-knn"], "shots": [1]}, {"allow_fewer": True}))


def test_features_of_the_vlm_are_not_to_be_had_elsewhere(photos: Path) -> None:
    sweep = load("demo", {"datasets": [f"folder:{photos}"], "methods": ["vlm-vision-linear"]}, {})
    with pytest.raises(InputError, match=r"vlm-vision-linear needs features, .* use --service local"):
        plan(sweep, service="http://127.0.0.1:9")
