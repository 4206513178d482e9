"""kshot predict: the exact posterior of every image in order, and by name what could not be answered; what it refuses,
in one line each; and how it ends as a program of its own."""

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stored import CLASSES
from trained import status_of

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
def expected(service: LocalServiceClient) -> Callable[..., list[dict[str, float]]]:
    """{class: probability} of each image, by `vlm.classifier.predict` on a service of the test's own."""

    def ask(
        paths: list[Path],
        adapter: Path | None,
        classes: tuple[str, ...] = (),
        method: str = "constrained",
        max_side: int = 40,
        prompt: str = "recipe",
    ) -> list[dict[str, float]]:
        if adapter is None:
            sampler = service.create_sampling_client(base_model=nano.NAME).result()
        else:
            sampler = service.create_sampling_client_from_folder(adapter).result()
            classes = classes or tuple(json.loads((adapter / "classifier.json").read_text())["classes"])
        rule = ImageRule.from_pretrained(nano.NAME)
        wording = Prompt(sampler.get_tokenizer(), rule, classes, template(prompt))
        prepared = [prepare(path.read_bytes(), max_side=max_side) for path in paths]
        scores = classifier.predict(sampler, prepared, wording, method).astype(np.float64)
        shares = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
        return [dict(zip(classes, row, strict=True)) for row in shares.tolist()]

    return ask


def parsed(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


def test_one_image_in_words(adapter: Path, images: Path, kshot, expected) -> None:
    ended = kshot("predict", images / "a.png", "--adapter", adapter)
    assert (ended.status, ended.err) == (0, "")
    name, *lines = ended.out.splitlines()
    assert name == f"{images}/a.png"
    (shares,) = expected([images / "a.png"], adapter)
    ranked = sorted(shares, key=lambda label: -shares[label])
    assert lines == [f"  {shares[label]:.4f}  {label}" for label in ranked]
    assert set(ranked) == set(CLASSES)


def test_a_folder_as_json(adapter: Path, images: Path, kshot, expected) -> None:
    """In order; the exact posterior; a JSON object a line."""
    ended = kshot("predict", images, "--adapter", adapter, "--json")
    assert (ended.status, ended.err) == (0, "")
    paths = [images / name for name in ("a.png", "b.jpg", "sub/c.webp", "sub/d.png")]
    answers = parsed(ended.out)
    assert [answer["image"] for answer in answers] == [str(path) for path in paths]
    for answer, exact in zip(answers, expected(paths, adapter), strict=True):
        assert list(answer) == ["image", "top5", "greedy"]
        assert answer["greedy"] in CLASSES
        shares = [each["probability"] for each in answer["top5"]]
        assert shares == sorted(shares, reverse=True)
        assert sum(shares) == pytest.approx(1, abs=1e-9)
        assert {each["label"]: each["probability"] for each in answer["top5"]} == pytest.approx(exact, abs=1e-5)


def classes(*names: str) -> list[str]:
    return [word for name in names for word in ("--class", name)]


@pytest.mark.parametrize("method", ["constrained", "likelihood"])
def test_a_model_as_it_is(
    images: Path, kshot, expected, service: LocalServiceClient, tmp_path: Path, method: str
) -> None:
    """With probabilities, and what token-by-token decoding writes."""
    encoding = "utf-8-sig" if method == "constrained" else "utf-16"  # of Windows' editor, of PowerShell
    (tmp_path / "names.txt").write_text("\r\n".join([FOUR[0], "", *FOUR[1:]]), encoding=encoding)
    options = ("--model", nano.NAME, "--method", method, "--json", "--top", "3")
    ended = kshot("predict", images / "a.png", *options, *classes(*FOUR))
    assert ended == kshot("predict", images / "a.png", *options, "--classes", tmp_path / "names.txt")
    (answer,) = parsed(ended.out)
    assert list(answer) == ["image", "top3", "greedy"]
    (exact,) = expected([images / "a.png"], None, FOUR, method, 480)
    likeliest = sorted(exact, key=lambda label: -exact[label])[:3]
    assert [each["label"] for each in answer["top3"]] == likeliest
    shares = [each["probability"] for each in answer["top3"]]
    assert shares == pytest.approx([exact[label] for label in likeliest], abs=1e-5)
    sampler = service.create_sampling_client(base_model=nano.NAME).result()
    prompt = Prompt(sampler.get_tokenizer(), ImageRule.from_pretrained(nano.NAME), FOUR)
    _, (label,) = classifier.predict_and_decode(sampler, [prepare((images / "a.png").read_bytes())], prompt)
    assert answer["greedy"] == FOUR[label]


def test_other_classes_sizes_and_words_than_the_adapters(adapter: Path, images: Path, kshot, expected) -> None:
    wording = "{image}Which one? => It is {label}"
    options = ("--adapter", adapter, *classes(*FOUR), "--max-side", "32", "--prompt", wording, "--json")
    (answer,) = parsed(kshot("predict", images / "b.jpg", *options).out)
    (exact,) = expected([images / "b.jpg"], adapter, FOUR, "constrained", 32, wording)
    assert {each["label"]: each["probability"] for each in answer["top5"]} == pytest.approx(exact, abs=1e-5)


def test_what_is_no_image_is_named_and_the_rest_is_done(adapter: Path, folder: Path, kshot) -> None:
    ended = kshot("predict", folder, folder / "gone.png", f"{folder}/*.gif", "--adapter", adapter, "--json")
    assert ended.status == 1
    assert [Path(each["image"]).name for each in parsed(ended.out)] == ["a.png", "b.jpg", "c.webp", "d.png"]
    lines = ended.err.splitlines()
    assert [line.split(": ")[:2] for line in lines] == [
        ["kshot", f"{folder}/{name}"] for name in ("photo.txt", "sub/cut.png", "gone.png", "*.gif")
    ]
    reasons = ("not an image in a known format", "broken image", "there is no such file", "no file has such a name")
    assert all(reason in line for reason, line in zip(reasons, lines, strict=True))


def test_an_image_that_the_model_cannot_take_is_named(adapter: Path, images: Path, kshot, make_image) -> None:
    (images / "line.png").write_bytes(make_image(1, 3000, 4))
    options = ("--adapter", adapter, "--max-side", "3000", "--json")
    ended = kshot("predict", images / "line.png", images / "a.png", *options)
    assert (ended.status, len(parsed(ended.out)), ended.err.count("\n")) == (1, 1, 1)
    assert ended.err.startswith(f"kshot: {images}/line.png: 3000x4 pixels is too narrow: ")


def test_standard_input_and_a_pattern(adapter: Path, images: Path, kshot, stdin) -> None:
    ask = ("--adapter", adapter, "--json")
    (alone,) = parsed(kshot("predict", images / "a.png", *ask).out)
    stdin((images / "a.png").read_bytes())
    assert parsed(kshot("predict", "-", *ask).out) == [alone | {"image": "-"}]
    pattern = parsed(kshot("predict", f"{images}/**/*.png", *ask).out)
    assert [each["image"] for each in pattern] == [f"{images}/a.png", f"{images}/sub/d.png"]
    stdin(f"{images}/a.png\n{images}/sub/d.png\n".encode())
    assert parsed(kshot("predict", "-", *ask).out) == pattern
    stdin(b"")
    assert kshot("predict", "-", *ask) == (1, "", "kshot: -: standard input holds neither an image nor a path\n")


def test_what_the_encoding_of_the_output_lacks_is_escaped(
    adapter: Path, images: Path, stdin, monkeypatch: pytest.MonkeyPatch
) -> None:
    stdin((images / "a.png").read_bytes())
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, "ascii"))
    assert status_of("predict", "-", "--adapter", adapter) == 0
    assert printed.getvalue().startswith(b"-\n  0.")
    assert b"caf\\xe9 d\\xe9j\\xe0 vu" in printed.getvalue()


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
    ended = kshot("predict", images, "--adapter", adapter)
    assert "\x1b" not in ended.out + ended.err
    assert f"{images}/x\\x1b[2J\\nkshot.png" in ended.out.splitlines()
    assert ended.err.startswith(f"kshot: {images}/y\\x1b.txt: ")
    (answer,) = parsed(kshot("predict", images / name, "--adapter", adapter, "--json").out)
    assert answer["image"] == f"{images}/{name}"


def test_a_checkpoint_without_class_names(adapter: Path, images: Path, kshot, refused, tmp_path: Path) -> None:
    bare = Path(shutil.copytree(adapter, tmp_path / "bare", ignore=shutil.ignore_patterns("classifier.json")))
    missing = "has no classifier.json; give them with --class NAME"
    refused("predict", images / "a.png", "--adapter", bare, parts=[missing])
    assert kshot("predict", images / "a.png", "--adapter", bare, "--class", "a star", "--class", "a cat").status == 0


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ("", ["no model is given; give --adapter DIR, or --model NAME with class names"]),
        ("--adapter {here}/none", ["adapter {here}/none is no folder", "kshot train"]),
        ("--adapter {images}", ["{images} has no classifier.json", "--class NAME"]),
        ("--adapter {images} --class a --class b", ["{images} has neither kshot.json nor adapter_config.json"]),
        ("--adapter", ["--adapter"]),
        ("--adapter {damaged}", ["classifier.json is damaged (classes: "]),
        ("--adapter {adapter} --model nope", ["unknown model 'nope'"]),
        ("--adapter {adapter} --prompt what", ["prompt 'what' is neither a preset (recipe"]),
        ("--adapter {adapter} --prompt {{image}}a=>b", ["must hold {{label}} once"]),
        ("--adapter {adapter} --method best", ["unknown method 'best'", "constrained, likelihood"]),
        ("--adapter {adapter} --class a --class a", ["class name 'a' stands twice"]),
        ("--adapter {adapter} --class a", ["there is one class, 'a'; a choice needs two or more"]),
        ("--adapter {adapter} --class= --class a", ["class name '' cannot be an answer"]),
        ("--adapter {adapter} --class a --classes {here}/names", ["given twice, with --class and with --classes"]),
        ("--adapter {adapter} --classes {here}/none", ["--classes {here}/none cannot be read (No such file"]),
        ("--adapter {adapter} --classes {images}/a.png", ["a.png is no text in UTF-8"]),
        ("--adapter {adapter} --classes {here}/empty", ["empty holds no class name; write one a line"]),
        ("--adapter {adapter} --top 0", ["--top"]),
        ("--adapter {adapter} --max-side 0", ["--max-side"]),
        ("--adapter {adapter} --device tpu", ["place 'tpu'"]),
        ("--model kshot/nano-qwen3-vl", ["a model has no class names of its own", "--classes FILE"]),
        ("--model nope --class a --class b", ["unknown model 'nope'"]),
        ("--adapter {adapter} - -", ["standard input (-) is given twice"]),
    ],
)
def test_bad_input_is_one_line(
    adapter: Path, images: Path, tmp_path: Path, refused, options: str, parts: list[str]
) -> None:
    (tmp_path / "names").write_text("a\nb\n")
    (tmp_path / "empty").write_text("\n")
    shutil.copytree(adapter, tmp_path / "damaged")
    (tmp_path / "damaged/classifier.json").write_text('{"prompt": "recipe", "max_side": 1, "base_model": "x"}')
    places = {"here": tmp_path, "images": images, "adapter": adapter, "damaged": tmp_path / "damaged"}
    words = [word.format(**places) for word in options.split(" ") if word]
    refused("predict", images / "a.png", *words, parts=[part.format(**places) for part in parts])


def test_no_image_is_named(adapter: Path, refused) -> None:
    refused("predict", "--adapter", adapter)


def test_as_a_program_a_reader_that_goes_away_is_no_error(adapter: Path, images: Path) -> None:
    words = ["predict", str(images), "--adapter", str(adapter)]
    command = [sys.executable, "-c", "from experiments.cli.main import main; main()", *words]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout
        assert running.stderr
        running.stdout.close()
        assert running.stderr.read() == b""
    assert running.returncode == 141
