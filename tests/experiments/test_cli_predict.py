"""kshot predict: the exact posterior of every image in order, and by name what could not be answered."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stored import CLASSES

from data.preparation import prepare
from experiments.adapters import predict as predicting
from vlm import classifier, nano
from vlm.inputs import ImageRule
from vlm.local.registry import LocalServiceClient
from vlm.prompts import Prompt, template

ROOT = Path(__file__).parents[2]
FOUR = ("a star", "a cat", "a house", "a cat in a house", "été")


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    return lambda data: monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


@pytest.fixture
def expected(tmp_path: Path) -> Callable[..., list[dict[str, float]]]:
    """{class: probability} of each image, by `vlm.classifier.predict` on a service of the test's own."""

    def ask(
        paths: list[Path],
        adapter: Path | None,
        classes: tuple[str, ...] = (),
        method: str = "constrained",
        max_side: int = 40,
        prompt: str = "recipe",
    ) -> list[dict[str, float]]:
        service = LocalServiceClient(tmp_path / "state")
        if adapter is None:
            sampler = service.create_sampling_client(base_model=nano.NAME).result()
        else:
            sampler = service.create_sampling_client_from_folder(adapter).result()
            classes = classes or tuple(json.loads((adapter / "classifier.json").read_text())["classes"])
        rule = ImageRule.from_pretrained(nano.NAME)
        asked = Prompt(sampler.get_tokenizer(), rule, classes, template(prompt))
        prepared = [prepare(path.read_bytes(), max_side=max_side) for path in paths]
        scores = classifier.predict(sampler, prepared, asked, method).astype(np.float64)
        service.close()
        shares = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
        return [dict(zip(classes, row, strict=True)) for row in shares.tolist()]

    return ask


def parsed(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


def test_one_image_in_words(adapter: Path, images: Path, kshot, expected) -> None:
    said = kshot("predict", images / "a.png", "--adapter", adapter)
    assert (said.status, said.err) == (0, "")
    name, *lines = said.out.splitlines()
    assert name == f"{images}/a.png"
    ((found),) = expected([images / "a.png"], adapter)
    ranked = sorted(found, key=lambda label: -found[label])
    assert lines == [f"  {found[label]:.4f}  {label}" for label in ranked]
    assert set(ranked) == set(CLASSES)


def test_a_folder_as_json(adapter: Path, images: Path, kshot, expected) -> None:
    """In order; the exact posterior; what is said fits into a JSON object a line."""
    said = kshot("predict", images, "--adapter", adapter, "--json")
    assert (said.status, said.err) == (0, "")
    paths = [images / name for name in ("a.png", "b.jpg", "sub/c.webp", "sub/d.png")]
    answers = parsed(said.out)
    assert [answer["image"] for answer in answers] == [str(path) for path in paths]
    for answer, found in zip(answers, expected(paths, adapter), strict=True):
        assert list(answer) == ["image", "top5", "greedy"]
        assert answer["greedy"] in CLASSES
        shares = [each["probability"] for each in answer["top5"]]
        assert shares == sorted(shares, reverse=True)
        assert sum(shares) == pytest.approx(1, abs=1e-9)
        assert {each["label"]: each["probability"] for each in answer["top5"]} == pytest.approx(found, abs=1e-5)


def test_greedy_is_what_token_by_token_decoding_writes(images: Path, kshot, tmp_path: Path) -> None:
    said = kshot("predict", images / "a.png", "--model", nano.NAME, *classes(*FOUR), "--json")
    (answer,) = parsed(said.out)
    service = LocalServiceClient(tmp_path / "state")
    sampler = service.create_sampling_client(base_model=nano.NAME).result()
    prompt = Prompt(sampler.get_tokenizer(), ImageRule.from_pretrained(nano.NAME), FOUR)
    _, (label,) = classifier.predict_and_decode(sampler, [prepare((images / "a.png").read_bytes())], prompt)
    service.close()
    assert answer["greedy"] == FOUR[label]


def classes(*names: str) -> list[str]:
    return [word for name in names for word in ("--class", name)]


@pytest.mark.parametrize("method", ["constrained", "likelihood"])
def test_a_model_as_it_is(images: Path, kshot, expected, tmp_path: Path, method: str) -> None:
    (tmp_path / "names.txt").write_text("\n".join(["\ufeff" + FOUR[0], "", *FOUR[1:]]), encoding="utf-8")
    options = ("--model", nano.NAME, "--method", method, "--json", "--top", "3")
    said = kshot("predict", images / "a.png", *options, *classes(*FOUR))
    assert said == kshot("predict", images / "a.png", *options, "--classes", tmp_path / "names.txt")
    (answer,) = parsed(said.out)
    assert list(answer) == ["image", "top3", "greedy"]
    (found,) = expected([images / "a.png"], None, FOUR, method, 480)
    likeliest = sorted(found, key=lambda label: -found[label])[:3]
    assert [each["label"] for each in answer["top3"]] == likeliest
    shares = [each["probability"] for each in answer["top3"]]
    assert shares == pytest.approx([found[label] for label in likeliest], abs=1e-5)


def test_other_classes_sizes_and_words_than_the_adapters(adapter: Path, images: Path, kshot, expected) -> None:
    asked = "{image}Which one? => It is {label}"
    options = ("--adapter", adapter, *classes(*FOUR), "--max-side", "32", "--prompt", asked, "--json")
    (answer,) = parsed(kshot("predict", images / "b.jpg", *options).out)
    (found,) = expected([images / "b.jpg"], adapter, FOUR, "constrained", 32, asked)
    assert {each["label"]: each["probability"] for each in answer["top5"]} == pytest.approx(found, abs=1e-5)


def test_what_is_no_image_is_named_and_the_rest_is_done(adapter: Path, folder: Path, kshot) -> None:
    said = kshot("predict", folder, folder / "gone.png", f"{folder}/*.gif", "--adapter", adapter, "--json")
    assert said.status == 1
    assert [Path(each["image"]).name for each in parsed(said.out)] == ["a.png", "b.jpg", "c.webp", "d.png"]
    lines = said.err.splitlines()
    assert [line.split(": ")[:2] for line in lines] == [
        ["kshot", f"{folder}/{name}"] for name in ("photo.txt", "sub/cut.png", "gone.png", "*.gif")
    ]
    reasons = ("not an image in a known format", "broken image", "there is no such file", "no file has such a name")
    assert all(reason in line for reason, line in zip(reasons, lines, strict=True))


def test_an_image_that_the_model_cannot_take_is_named(adapter: Path, images: Path, kshot, make_image) -> None:
    (images / "line.png").write_bytes(make_image(1, 3000, 4))
    said = kshot("predict", images / "line.png", images / "a.png", "--adapter", adapter, "--max-side", "3000", "--json")
    assert (said.status, len(parsed(said.out)), said.err.count("\n")) == (1, 1, 1)
    assert said.err.startswith(f"kshot: {images}/line.png: image of 3000x4 pixels: ")


def test_standard_input(adapter: Path, images: Path, kshot, stdin) -> None:
    ask = ("--adapter", adapter, "--json")
    (alone,) = parsed(kshot("predict", images / "a.png", *ask).out)
    stdin((images / "a.png").read_bytes())
    assert parsed(kshot("predict", "-", *ask).out) == [alone | {"image": "-"}]
    direct = parsed(kshot("predict", images / "a.png", images / "b.jpg", *ask).out)
    stdin(f"{images}/a.png\n{images}/b.jpg\n".encode())
    assert parsed(kshot("predict", "-", *ask).out) == direct
    stdin(b"")
    said = kshot("predict", "-", *ask)
    assert (said.status, said.out) == (1, "")
    assert said.err == "kshot: -: standard input holds neither an image nor a path\n"


def test_a_pattern(adapter: Path, images: Path, kshot) -> None:
    said = kshot("predict", f"{images}/**/*.png", "--adapter", adapter, "--json")
    assert [each["image"] for each in parsed(said.out)] == [f"{images}/a.png", f"{images}/sub/d.png"]


def test_windows_keep_the_order_and_change_nothing(
    adapter: Path, folder: Path, kshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flushed by windows: what stands on stderr comes between the right lines."""
    ask = ("predict", *[folder] * 3, "--adapter", adapter, "--json")
    whole = kshot(*ask)
    sizes: list[int] = []
    real = classifier.predict_and_decode
    watched = lambda s, images, p: (sizes.append(len(images)), real(s, images, p))[1]  # noqa: E731
    monkeypatch.setattr(classifier, "predict_and_decode", watched)
    monkeypatch.setattr(predicting, "BATCH", 4)
    parts = kshot(*ask)
    assert (parts.status, parts.err) == (whole.status, whole.err)
    assert sum(sizes) == 12
    assert max(sizes) <= 4
    for one, other in zip(parsed(parts.out), parsed(whole.out), strict=True):
        assert (one["image"], one["greedy"]) == (other["image"], other["greedy"])
        near = [pytest.approx(each["probability"], abs=1e-5) for each in other["top5"]]
        assert [each["probability"] for each in one["top5"]] == near


def test_the_model_is_loaded_once(adapter: Path, images: Path, kshot, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlm.local import registry

    loaded: list[str] = []
    real = registry.Model
    monkeypatch.setattr(registry, "Model", lambda name, *more: (loaded.append(name), real(name, *more))[1])
    monkeypatch.setattr(predicting, "BATCH", 1)
    assert kshot("predict", images, "--adapter", adapter, "--json").status == 0
    assert loaded == [nano.NAME]


def test_ctrl_c(adapter: Path, images: Path, kshot, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(classifier, "predict", stopped)
    assert kshot("predict", images, "--adapter", adapter) == (130, "", "kshot: stopped\n")


def test_many_images_take_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never more than two batches are prepared and not yet classified."""
    from experiments.adapters.predict import Picture

    alive, most = 0, 0

    def read(n: int) -> bytes:
        nonlocal alive, most
        alive += 1
        most = max(most, alive)
        return b"x"

    many = (Picture(str(n), lambda n=n: read(n)) for n in range(2000))
    for batch in predicting.prefetched(lambda picture: picture.read(), many):
        assert [each.result() for _, each in batch]
        alive -= len(batch)
    assert (alive, most <= 2 * predicting.BATCH) == (0, True)


def test_names_that_would_steer_a_terminal(adapter: Path, images: Path, kshot) -> None:
    name = "x\x1b[2J\nkshot.png"
    (images / "a.png").rename(images / name)
    (images / "y\x1b.txt").write_text("no image")
    said = kshot("predict", images, "--adapter", adapter)
    assert "\x1b" not in said.out + said.err
    assert f"{images}/x\\x1b[2J\\nkshot.png" in said.out.splitlines()
    assert said.err.startswith(f"kshot: {images}/y\\x1b.txt: ")
    (answer,) = parsed(kshot("predict", images / name, "--adapter", adapter, "--json").out)
    assert answer["image"] == f"{images}/{name}"
