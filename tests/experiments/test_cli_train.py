"""kshot train: the cell's own adapter, in a folder that is complete or not there; kshot zero-shot."""

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tinker
from stored import CLASSES, files
from trained import TRAINING, train

from data.dataset import Images
from experiments.adapters import train as training
from experiments.adapters.train import Step, plan_training
from experiments.cli import adapters
from experiments.sweep import run
from experiments.sweep.cells import Job
from experiments.sweep.config import load
from experiments.sweep.grid import plan
from experiments.sweep.run import run as run_cell
from experiments.sweep.store import Results
from kshot.errors import InputError
from vlm import nano, service
from vlm.classifier import predict
from vlm.inputs import ImageRule
from vlm.local.registry import LocalServiceClient
from vlm.prompts import Prompt, template

PARTS = ["README.md", "adapter_config.json", "adapter_model.safetensors", "classifier.json", "kshot.json"]
SETTINGS = dict(pair.split("=") for pair in TRAINING if "=" in pair)


@pytest.fixture
def words(photos: Path) -> list[str]:
    return ["train", "--dataset", f"folder:{photos}", *TRAINING]


def test_the_folder_says_what_it_answers_and_where_it_came_from(adapter: Path, photos: Path) -> None:
    assert sorted(path.name for path in adapter.iterdir()) == PARTS
    assert [path.name for path in adapter.parent.iterdir()] == ["adapter"]
    card = json.loads((adapter / "classifier.json").read_text(encoding="utf-8"))
    question, answer = "What is the name of the subject in this photo?", "The subject in this photo is: {label}"
    assert card["prompt"] == f"{{image}}{question} => {answer}"
    assert (set(card["classes"]), card["max_side"], card["base_model"]) == (set(CLASSES), 40, nano.NAME)
    trained = card["trained"]
    assert (trained["dataset"], trained["shots"], trained["seed"]) == (f"folder:{photos.name}", 2, 0)
    assert trained["settings"]["learning_rate"] == 0.003  # the demo's
    assert trained["settings"]["hflip"] == 0.5  # a folder's
    assert (trained["settings"]["rank"], trained["settings"]["model_revision"]) == (4, nano.REVISION)
    assert trained["versions"]["kshot"]
    assert str(photos.parent) not in (adapter / "classifier.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("more", [{}, {"loss": "closed-set", "prompt": "{image}Which? => A {label}."}])
def test_it_is_the_adapter_of_the_sweeps_cell(
    adapter: Path, photos: Path, tmp_path: Path, service: LocalServiceClient, more: dict[str, str]
) -> None:
    """The same key, images, batches and numbers: every log-probability is equal."""
    options = [word for name, value in more.items() for word in (f"--{name}", value)]
    seed, folder = (1, train(photos, tmp_path / "adapter", "--seed", "1", *options)) if more else (0, adapter)
    grid = {"datasets": [f"folder:{photos}"], "methods": ["vlm-lora"], "shots": [2], "seeds": [seed]}
    (job,) = plan(load("demo", grid, SETTINGS | more)).jobs
    job_here, _ = plan_training(f"folder:{photos}", 2, seed, SETTINGS | more)
    assert job_here.cell == job.cell
    _, table = run_cell(job)
    card = json.loads((folder / "classifier.json").read_text(encoding="utf-8"))
    sampler = service.create_sampling_client_from_folder(folder).result()
    rule = ImageRule.from_pretrained(nano.NAME)
    prompt = Prompt(sampler.get_tokenizer(), rule, tuple(card["classes"]), template(card["prompt"]))
    scores = predict(sampler, Images(run.examples_to_test(job)), prompt)
    expected = np.array(table["top5_log_probs"].to_pylist(), np.float32)
    assert (np.take_along_axis(scores, np.array(table["top5"].to_pylist()), 1) == expected).all()
    assert scores.argmax(1).tolist() == table["prediction"].to_pylist()


def test_it_loads_in_stock_peft(adapter: Path, service: LocalServiceClient) -> None:
    import torch
    from peft import PeftModel
    from transformers import Qwen3VLForConditionalGeneration

    sampler = service.create_sampling_client_from_folder(adapter).result()
    tokens = sampler.get_tokenizer().encode("The subject is a")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        plain = PeftModel.from_pretrained(Qwen3VLForConditionalGeneration.from_pretrained(nano.folder()), adapter)
        logits = plain(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
    expected = [float(logits[n, token]) for n, token in enumerate(tokens[1:])]
    ours = sampler.compute_logprobs(tinker.ModelInput.from_ints(tokens)).result()
    assert ours[1:] == pytest.approx(expected, abs=1e-4)


def test_an_empty_folder_is_filled_and_progress_goes_to_stderr(words: list[str], tmp_path: Path, kshot) -> None:
    ended = kshot(*words, "--out", tmp_path)
    assert ended.status == 0
    assert ended.out.splitlines()[0].startswith(nano.NAME)
    assert ended.out.splitlines()[1:] == [f"wrote {tmp_path}"]
    announced, *lines = ended.err.splitlines()
    assert announced.startswith("models: the vision-language model is the nano one")
    assert lines[0].startswith("training vlm-lora on folder:")
    assert lines[1] == "3 steps of 4 images"
    assert [line.split(" loss ")[0] for line in lines[2:-1]] == ["step 1/3", "step 3/3"]
    assert all(float(line.split(" loss ")[1].removesuffix(" an image")) > 0 for line in lines[2:-1])
    assert lines[-1] == f"next: kshot predict IMAGES --adapter {tmp_path}"


def test_what_it_takes_is_said_and_nothing_trained(photos: Path, tmp_path: Path, kshot) -> None:
    """A plain path is a folder of images; offline the nano DINOv2 is taken, and that is said first."""
    words = ["train", "--dataset", photos, "--shots", "2", "--method", "dinov2-ridge"]
    ended = kshot(*words, "--out", tmp_path / "out", "--plan")
    assert ended.status == 0, ended.err
    assert ended.err.startswith("models: the nano DINOv2, since DINOv2-small cannot be had here")
    rows = {line.split("  ")[0].strip(): line for line in ended.out.splitlines()}
    assert "1 dinov2-ridge" in rows["cells"]
    assert "measured here in" in ended.out
    assert {"memory", "time", "downloads"} <= {*rows}
    assert not (tmp_path / "out").exists()


def test_how_long_the_steps_take_is_said_after_the_first(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Of seconds counted here: the first step, which loads the model, is left out."""
    now = [0.0]

    def steps() -> Iterator[Step]:
        for number in range(1, 103):
            now[0] += 1000 if number == 1 else 40
            yield Step(number, 102, 1.0)

    monkeypatch.setattr(adapters, "time", SimpleNamespace(monotonic=lambda: now[0]))
    adapters._show_steps(steps(), 8)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("about")]
    assert lines == ["about 66 min for the other 99 steps, measured on the first"]


def test_a_model_that_has_no_room_is_refused_before_it_is_read(
    photos: Path, tmp_path: Path, kshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is none of ours; the message says what it needs."""
    model = tmp_path / "model"
    shutil.copytree(nano.folder(), model)
    monkeypatch.setattr(service, "free_bytes", lambda *_: 1 << 20)
    ended = kshot("train", "--dataset", photos, "--shots", "2", "--model", model, "--out", tmp_path / "out")
    assert ended.status == 2
    assert "a worker needs" in ended.err
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_replaced_only_by_force(adapter: Path, words: list[str], tmp_path: Path, kshot, refused) -> None:
    target = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    before = files(target)
    refused(*words, "--out", target, parts=["holds a trained model; give another folder, or --force to replace it"])
    assert files(target) == before
    assert kshot(*words, "--seed", "2", "--out", target, "--force").status == 0
    assert json.loads((target / "classifier.json").read_text(encoding="utf-8"))["trained"]["seed"] == 2
    (target / "notes.txt").write_text("mine")
    other = "holds other things (notes.txt); give a new or empty folder"
    refused(*words, "--out", target, "--force", parts=[other])
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize(
    ("at", "error", "status", "line"),
    [
        ("fit_lora", OSError(28, "No space left on device"), 1, "[Errno 28] No space left on device"),
        ("readme", OSError(28, "No space left on device"), 1, "[Errno 28] No space left on device"),
        ("fit_lora", KeyboardInterrupt(), 130, "stopped; nothing was written"),
    ],
    ids=["step", "write", "Ctrl-C"],
)
def test_what_fails_leaves_the_old_adapter_and_nothing_else(
    adapter: Path,
    tmp_path: Path,
    words: list[str],
    kshot,
    monkeypatch: pytest.MonkeyPatch,
    at: str,
    error: BaseException,
    status: int,
    line: str,
) -> None:
    target = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    before = files(target)

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(training, at, fail)
    ended = kshot(*words, "--out", target, "--force")
    assert (ended.status, ended.out, ended.err.splitlines()[-1]) == (status, "", f"kshot: {line}")
    assert files(target) == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_folder_that_was_filled_meanwhile_is_kept(photos: Path, tmp_path: Path) -> None:
    job, dataset = plan_training(f"folder:{photos}", 2, 0, SETTINGS)
    steps = training.train(job, dataset, tmp_path / "adapter")
    next(steps)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/mine").write_text("mine")
    with pytest.raises(InputError, match="holds other things"):
        list(steps)
    assert (tmp_path / "adapter/mine").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ("--dataset digitz --shots 1", ["unknown data set 'digitz' (did you mean 'digits'?)"]),
        ("--dataset digits", ["--shots"]),
        ("--dataset digits --shots 0", ["--shots"]),
        ("--shots 1", ["--dataset"]),
        ("--dataset {photos} --shots 9", ["9 shots asked for", "--allow-fewer"]),
        ("--dataset {photos} --shots 1 --model nope", ["unknown model 'nope'", nano.NAME]),
        ("--dataset {photos} --shots 1 --prompt what", ["prompt 'what' is neither a preset (recipe"]),
        ("--dataset {photos} --shots 1 --loss nll", ["loss = 'nll'", "closed-set"]),
        ("--dataset {photos} --shots 1 --set rnak=4", ["unknown setting 'rnak' (did you mean 'rank'?)"]),
        ("--dataset {photos} --shots 1 --set rank", ["--set 'rank' has no value"]),
        ("--dataset {photos} --shots 1 --loss text --set loss=text", ["loss is given twice"]),
        ("--dataset {photos} --shots 1 --set calibration=pmi", ["calibration is for sweeps, which test"]),
        ("--dataset {photos} --shots 1 --set limit_test=3", ["limit_test is for sweeps, which test"]),
        ("--dataset {photos} --shots 1 --device tpu", ["device 'tpu' is not available here"]),
        ("--dataset digits --shots 1 --protocol coop", ["digits has no choice of it"]),
        ("--dataset {photos} --shots 1 --out {here}/file", ["--out {here}/file is a file; give another folder"]),
        ("--dataset {photos} --shots 1 --out {here}/file/x", ["cannot write to {here}/file/x", "--out"]),
        ("--dataset {photos} --shots 1 --out /proc/x", ["cannot write to /proc/x", "--out"]),
        ("--dataset {photos} --shots 1 --out {here}", ["--out {here} holds other things (file)"]),
    ],
)
def test_bad_input_is_one_line(
    photos: Path, tmp_path: Path, refused: Callable[..., str], options: str, parts: list[str]
) -> None:
    (tmp_path / "file").write_text("text")
    places = {"photos": f"folder:{photos}", "here": str(tmp_path)}
    words = [word.format(**places) for word in options.split(" ")]
    out = [] if "--out" in words else ["--out", tmp_path / "adapter"]
    refused("train", *words, *out, parts=[part.format(**places) for part in parts])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_zero_shot_is_a_sweep_of_one_method(
    photos: Path, tmp_path: Path, kshot, ran: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = kshot("zero-shot", "--dataset", f"folder:{photos}")
    assert ended.status == 0, ended.err
    assert [job.cell.method for job in ran] == ["vlm-zero-shot"]
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name == "zero-shot-my--b-photos-é"
    (record,) = Results(folder).cells()
    accuracy = f"{100 * record['metrics']['accuracy']:.1f}"
    assert ["vlm-zero-shot", accuracy] in [line.split() for line in ended.out.splitlines()]
    assert f"wrote runs/{folder.name}" in ended.out
    assert kshot("zero-shot", "--dataset", "digitz").status == 2


def test_training_uses_one_thread_on_a_cpu_and_gives_the_others_back() -> None:
    import torch

    torch.set_num_threads(2)
    try:
        with training.one_thread_on_a_cpu("cpu"):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
