"""kshot train with a method on DINOv2: a folder that kshot predict takes, with the numbers of the sweep's cell."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from stored import files
from trained import TINY

from baselines import nano
from baselines.classifier import load as load_classifier
from data.dataset import Images
from experiments.adapters.folder import FILES, read_card
from experiments.adapters.predict import classifier, pictures
from experiments.adapters.train import TRAINERS, plan_training
from experiments.sweep import run
from kshot.errors import InputError, ModelError

HEADS = [name for name in TRAINERS if name.startswith("dinov2-")]
SIZE = {"max_side": "40"}
LORA = SIZE | dict(pair.split("=") for pair in TINY if "=" in pair)


def settings_of(method: str) -> dict[str, str]:
    return LORA if method == "dinov2-lora" else SIZE


@pytest.fixture(scope="module")
def trained(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a method on two images a class of the photos, made once."""
    from trained import status_of

    home, made = tmp_path_factory.mktemp("heads"), set[str]()

    def folder(method: str) -> Path:
        sets = [word for name, value in settings_of(method).items() for word in ("--set", f"{name}={value}")]
        if method not in made:
            words = ["train", "--dataset", f"folder:{photos}", "--shots", "2", "--method", method, *sets]
            assert status_of(*words, "--out", home / method) == 0
            made.add(method)
        return home / method

    return folder


@pytest.mark.parametrize("method", HEADS)
def test_it_is_the_head_of_the_sweeps_cell(method: str, trained: Callable[[str], Path], photos: Path) -> None:
    """Every log-probability that the cell stores is equal, or the order where it has none; probabilities sum to 1."""
    folder = trained(method)
    assert {path.name for path in folder.iterdir()} == FILES["head"]
    job, dataset = plan_training(f"folder:{photos}", 2, 0, settings_of(method), method)
    _, table = run.run(job)
    card = read_card(folder)
    assert card is not None
    assert (card.classes, card.base_model, card.prompt) == (dataset.classes, nano.NAME, "")
    assert card.trained["method"] == method
    with classifier(folder) as loaded:
        scores, _ = loaded.score(Images(run.examples_to_test(job)))
        shown = [each for window in loaded.predict(pictures([str(photos)], lambda: None)) for each in window]  # type: ignore[arg-type,return-value]
    order = np.array(table["top5"].to_pylist())
    assert (np.argsort(-scores, 1, kind="stable") == order).all()
    if loaded.log_probs:
        expected = np.array(table["top5_log_probs"].to_pylist())
        assert np.allclose(np.take_along_axis(scores, order, 1), expected, atol=1e-5)
    assert scores.argmax(1).tolist() == table["prediction"].to_pylist()
    assert len(shown) == 30
    assert {each.probabilities for each in shown} == {method != "dinov2-ridge"}
    if method != "dinov2-ridge":
        assert np.allclose([each.scores.sum() for each in shown], 1)


def test_predict_prints_scores_that_are_no_probabilities_as_scores(
    trained: Callable[[str], Path], photos: Path, kshot: Callable[..., Any]
) -> None:
    picture = min(photos.rglob("*.png"))
    ridge, logreg = (kshot("predict", picture, "--adapter", trained(f"dinov2-{each}")) for each in ("ridge", "logreg"))
    assert [line.split()[0] for line in ridge.out.splitlines()[1:]] == ["score"] * 3
    assert sum(float(line.split()[0]) for line in logreg.out.splitlines()[1:]) == pytest.approx(1, abs=1e-3)
    line = json.loads(kshot("predict", picture, "--adapter", trained("dinov2-ridge"), "--json").out)
    assert {*line["top5"][0]} == {"label", "score"}
    assert "greedy" not in line


def test_what_does_not_fit_is_one_line(
    trained: Callable[[str], Path], photos: Path, tmp_path: Path, refused: Callable[..., str], kshot: Callable[..., Any]
) -> None:
    head = trained("dinov2-logreg")
    picture, dataset = min(photos.rglob("*.png")), ("--dataset", f"folder:{photos}", "--shots", "2", "--out")
    asked = ("predict", picture, "--adapter", head)
    refused(*asked, "--prompt", "recipe", parts=["--prompt is for vision-language models", "is a head on DINOv2"])
    refused(*asked, "--method", "likelihood", parts=["--method is for vision-language models"])
    for option in ("--thinking", "--thoughts", "--temperature", "--seed"):
        refused(*asked, option, "2", parts=[f"{option} is for vision-language models"])
    refused(*asked, "--class", "a", "--class", "b", parts=["tells 3 classes apart, and 2 names are given"])
    own = json.loads((head / "classifier.json").read_text())["classes"]
    swapped = [word for name in (own[1], own[0], own[2]) for word in ("--class", name)]
    refused(*asked, *swapped, parts=["in their order: " + ", ".join(own)])
    refused("export", head, "--merged", tmp_path / "merged", parts=["is a head on DINOv2"])
    new = tmp_path / "new"
    for options, words in (
        (["--method", "dinov2-knn"], "unknown method that can be trained and kept 'dinov2-knn'"),
        (["--method", "dinov2-logreg", "--model", "2B"], "model is no setting of dinov2-logreg"),
        (["--method", "dinov2-ridge", "--set", "rank=4"], "rank is no setting of dinov2-ridge"),
        (["--backbone", "x"], "backbone is no setting of vlm-lora"),
        (["--method", "dinov2-logreg", "--set", "limit_test=3"], "limit_test is for sweeps, which test"),
    ):
        refused("train", *dataset, new, *options, parts=[words])
    assert not new.exists()
    damaged = Path(shutil.copytree(head, tmp_path / "damaged"))
    (damaged / "head.safetensors").write_bytes(b"x")
    refused("predict", picture, "--adapter", damaged, parts=["holds no trained head, or a damaged one"])


def test_a_head_of_another_backbone_is_refused(trained: Callable[[str], Path], tmp_path: Path) -> None:
    from baselines.classifier import load

    folder = Path(shutil.copytree(trained("dinov2-logreg"), tmp_path / "head"))
    record = json.loads((folder / "kshot.json").read_text())
    (folder / "kshot.json").write_text(json.dumps(record | {"readout": "cls+mean"}))
    with pytest.raises(ModelError, match=r"features, and the head is of \d+"):
        load(folder)
    (folder / "kshot.json").write_text("[]")
    with pytest.raises(InputError, match="holds no trained head"):
        load(folder)


@pytest.fixture
def logreg(trained: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of the folder of a head on frozen features."""
    return Path(shutil.copytree(trained("dinov2-logreg"), tmp_path / "head"))


def with_record(folder: Path, **changes: object) -> Path:
    record = json.loads((folder / "kshot.json").read_text())
    (folder / "kshot.json").write_text(json.dumps(record | changes))
    return folder


def with_arrays(folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> Path:
    arrays = {name: each.copy() for name, each in load_file(folder / "head.safetensors").items()}
    change(arrays)
    save_file(arrays, folder / "head.safetensors")
    return folder


def fill(name: str, value: float) -> Callable[[dict[str, np.ndarray]], object]:
    return lambda arrays: arrays[name][..., 0].fill(value) if arrays[name].ndim > 1 else arrays[name][:1].fill(value)


DAMAGE: dict[str, Callable[[Path], object]] = {
    r"\(model in kshot.json is 5\)": lambda folder: with_record(folder, model=5),
    r"\(size in kshot.json is '40'\)": lambda folder: with_record(folder, size="40"),
    r"\(log_probs in kshot.json is 1\)": lambda folder: with_record(folder, log_probs=1),
    r"\(kshot.json has other fields\)": lambda folder: with_record(folder, more=1),
    "weights has numbers that are not finite": lambda folder: with_arrays(folder, fill("weights", np.nan)),
    "bias has numbers that are not finite": lambda folder: with_arrays(folder, fill("bias", np.inf)),
    "bias has numbers that are not finite ": lambda folder: with_arrays(folder, lambda a: a["bias"].fill(-np.inf)),
    "numbers that are not positive": lambda folder: with_arrays(folder, fill("deviation", 0.0)),
    "mean has no floating": lambda folder: with_arrays(folder, lambda a: a.update(mean=a["mean"].astype(np.int64))),
    "shapes of its arrays": lambda folder: with_arrays(folder, lambda a: a.update(bias=a["bias"][None])),
    "shapes of its arrays ": lambda folder: with_arrays(folder, lambda a: a.update(mean=np.array(1.0))),
}


@pytest.mark.parametrize("says", DAMAGE)
def test_a_damaged_head_is_named(says: str, logreg: Path) -> None:
    DAMAGE[says](logreg)
    with pytest.raises(ModelError, match=rf"holds no trained head, or a damaged one .*{says.strip()}") as caught:
        load_classifier(logreg)
    assert "\n" not in str(caught.value)


def test_weights_that_are_a_pipe_are_not_waited_for(logreg: Path) -> None:
    (logreg / "head.safetensors").unlink()
    os.mkfifo(logreg / "head.safetensors")
    with pytest.raises(ModelError, match=r"damaged one .*not a regular file"):
        load_classifier(logreg)


def test_a_class_without_an_image_may_have_a_bias_of_minus_infinity(logreg: Path) -> None:
    assert load_classifier(with_arrays(logreg, fill("bias", -np.inf))).n_classes == 3


def test_a_head_of_other_classes_than_its_card_names(logreg: Path) -> None:
    card = json.loads((logreg / "classifier.json").read_text())
    (logreg / "classifier.json").write_text(json.dumps(card | {"classes": ["a", "b"]}))
    wrong = "head tells 3 classes apart, and its classifier.json names 2"
    with pytest.raises(ModelError, match=wrong), classifier(logreg):
        pass


def test_a_backbone_of_the_hub_is_not_fetched_unasked(logreg: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []
    monkeypatch.setattr("kshot.hub.is_cached", lambda name, revision, patterns: asked.append((name, revision)))
    with_record(logreg, model="hf-hub:o/n@v1")
    with pytest.raises(ModelError, match="not fetched unasked; to fetch it, give --model hf-hub:o/n@v1"):
        classifier(logreg).__enter__()
    with_record(logreg, model="vit_small_patch14_dinov2.lvd142m")
    with pytest.raises(ModelError, match=r"a head on vit_small_patch14_dinov2\.lvd142m, which is not on this machine"):
        classifier(logreg).__enter__()
    assert asked == [("o/n", "v1"), ("timm/vit_small_patch14_dinov2.lvd142m", "")]
    with classifier(logreg, model=nano.NAME) as loaded:  # one that is named
        assert len(loaded.classes) == 3


def test_the_card_goes_to_the_hub(trained: Callable[[str], Path], kshot: Callable[..., Any]) -> None:
    from huggingface_hub import ModelCard

    folder = trained("dinov2-logreg")
    card = ModelCard.load(folder / "README.md")
    assert (card.data.base_model, card.data.pipeline_tag) == (nano.NAME, "image-classification")
    assert "classifier on `kshot/nano-dinov2`" in card.text
    before = files(folder)
    ended = kshot("push", folder, "o/new")
    assert ended.status == 0
    assert "head.safetensors" in ended.out
    assert files(folder) == before
