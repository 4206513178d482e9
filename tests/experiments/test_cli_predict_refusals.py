"""kshot predict: what it refuses, in one line each, and how it ends as a program of its own."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


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
        ("--adapter {images} --class a --class b", ["{images} has no kshot.json; only adapters that kshot wrote"]),
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
        ("--adapter {adapter} --device tpu", ["device 'tpu'"]),
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
