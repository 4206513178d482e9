"""Settings that are compared in one sweep: which cells there are, what results say of them, what is refused.

The methods read the settings of the real ones; what they compute is, in all tests but one, a stand-in that takes no
time.
"""

import json
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from baselines import nano
from experiments.adapters.train import plan_training
from experiments.report.runs import full_grid
from experiments.sweep.cells import Job
from experiments.sweep.config import COMPARED, OWN, Compare, Settings, command, load
from experiments.sweep.grid import plan
from experiments.sweep.methods import METHODS, Outcome, Task
from experiments.sweep.preflight import unread
from experiments.sweep.series import by_series, style
from experiments.sweep.store import Results
from kshot.errors import InputError

YAML = "name: mine\ndatasets: [icons]\nmethods: [dinov2-logreg]\nshots: [1]\nseeds: [0]\n"
BOTH = ("--image-size", "own", "--image-size", "128", "--readout", "cls", "--readout", "last4")
PAIRS = [(size, readout) for size in (None, 128) for readout in ("cls", "last4")]
LORA = ("--method", "vlm-lora")  # which reads a prompt
LOSS = ("loss", "loss_power", "start")  # of what trains
LOGREG = METHODS["dinov2-logreg"]


def drawn(task: Task) -> Outcome:
    """Scores by chance, other ones under other settings."""
    s = task.settings
    seed = [task.seed, len(task.train), s.image_size or 0, *s.readout.encode(), *s.backbone.encode()]
    scores = np.random.default_rng(seed).random((len(task.test), len(task.classes)))
    return Outcome(scores, False, {"fit": 0.0, "predict": 0.0})


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)  # drawing takes most of the time
    read = {"dinov2-logreg": {"backbone", "readout", "image_size"}, "vlm-vision-linear": {"vlm_features"}}
    for method in (*read, "pixel-knn"):
        row = replace(METHODS[method], run=drawn)
        assert set(COMPARED) & set(row.settings) == read.get(method, set())
        monkeypatch.setitem(METHODS, method, row)


@pytest.fixture
def sweep(photos: Path, tmp_path: Path, kshot: Any, ran: list[Job]) -> Callable[..., Any]:
    """A sweep of two shots and one seed; gives how it ended."""

    def run(*options: object, methods: tuple[str, ...] = ("dinov2-logreg", "pixel-knn")) -> Any:
        ran.clear()
        named = [word for method in methods for word in ("--method", method)]
        base = ("sweep", "demo", "--dataset", f"folder:{photos}", *named, "--shots", "1,2", "--seeds", "0")
        return kshot(*base, *options, "--out", tmp_path / "out")

    return run


def test_cells_are_the_product_of_what_a_method_reads(sweep: Any, tmp_path: Path, ran: list[Job]) -> None:
    methods = ("dinov2-logreg", "vlm-vision-linear", "pixel-knn")
    ended = sweep(*BOTH, "--vlm-features", "tower", "--vlm-features", "hidden", methods=methods)
    assert ended.status == 0, ended.err
    jobs = {method: [job for job in ran if job.cell.method == method] for method in methods}
    logreg = [(job.settings.image_size, job.settings.readout, job.cell.shots) for job in jobs["dinov2-logreg"]]
    assert sorted(logreg, key=str) == sorted(((*pair, k) for pair, k in product(PAIRS, (1, 2))), key=str)
    vision = [(job.settings.vlm_features, job.cell.shots) for job in jobs["vlm-vision-linear"]]
    assert sorted(vision) == [("hidden", 1), ("hidden", 2), ("tower", 1), ("tower", 2)]
    assert [job.cell.shots for job in jobs["pixel-knn"]] == [1, 2]
    assert len({job.cell.key for job in ran}) == len(ran) == 8 + 4 + 2
    for job in ran:  # what a cell says is what it was run under
        under = {name: value for name, value in job.settings.model_dump().items() if name in job.cell.settings}
        assert {**job.cell.settings, **under} == job.cell.settings
    records = {record["key"]: record for record in Results(tmp_path / "out").cells()}
    assert {job.cell.key: dict(job.cell.settings) for job in ran} == {k: r["settings"] for k, r in records.items()}


def test_cells_are_those_of_a_sweep_of_one_value(photos: Path) -> None:
    """Comparing changes no key: what was run with one value is the same cell."""
    grid = {"datasets": [f"folder:{photos}"], "methods": ["dinov2-logreg", "pixel-knn"], "shots": [1], "seeds": [0, 1]}
    both = plan(load("demo", grid, {"image_size": ("own", "128"), "readout": ("cls", "last4")}))
    alone = [plan(load("demo", grid, {"image_size": size, "readout": readout})) for size, readout in PAIRS]
    assert {job.cell.key for job in both.jobs} == {job.cell.key for each in alone for job in each.jobs}
    assert len(both.jobs) == 4 * 2 + 2


def test_the_numbers_are_those_of_a_sweep_of_one_value(
    sweep: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the method itself: other features under each combination."""
    monkeypatch.setitem(METHODS, "dinov2-logreg", LOGREG)
    assert sweep(*BOTH, methods=("dinov2-logreg",)).status == 0
    compared = {record["key"]: record["metrics"] for record in Results(tmp_path / "out").cells()}
    nll = {metrics["nll"] for metrics in compared.values()}
    assert len(compared) == len(nll) == 2 * 4
    (tmp_path / "out").rename(tmp_path / "both")
    assert sweep("--image-size", "128", "--readout", "last4", methods=("dinov2-logreg",)).status == 0
    alone = {record["key"]: record["metrics"] for record in Results(tmp_path / "out").cells()}
    assert len(alone) == 2
    assert alone.items() <= compared.items()


def test_the_results_say_what_was_compared_and_the_command_that_runs_the_same(
    sweep: Any, photos: Path, tmp_path: Path, kshot: Any, ran: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sweep(*BOTH).status == 0
    content = Results(tmp_path / "out").sweep()
    assert content["compare"] == {"image_size": [None, 128], "readout": ["cls", "last4"]}
    assert (content["settings"]["image_size"], content["settings"]["readout"]) == ([None, 128], ["cls", "last4"])
    assert content["settings"]["vlm_features"] == "tower"
    text = (tmp_path / "out" / "report.md").read_text()
    under = [f"{size}, {readout}" for size in ("own size", "128 px") for readout in ("cls", "last4")]
    titles = [line.split(" | ")[0].removeprefix("| ") for line in text.splitlines()]
    rows = [title for title in titles if title.startswith(("DINOv2", "pixel kNN"))]
    table = [*(f"DINOv2 + logistic regression ({each})" for each in under), "pixel kNN"]
    assert rows[:5] == rows[5:10] == table  # accuracy, all metrics
    assert "2 methods were compared on folder:my &lt;b&gt;photos\\|é with 1 to 2 labelled examples" in text
    assert "per class (1 seed, 2 image sizes, 2 readouts)" in text
    assert "| image_size | null, 128 |" in text
    assert "Missing cells" not in text
    assert "paired bootstrap over test images" in text
    line = next(line for line in text.splitlines() if line.startswith("kshot sweep"))
    assert " --image-size own --image-size 128 --readout cls --readout last4" in line
    monkeypatch.chdir(photos.parent)
    ran.clear()
    words = [word.replace("PATH/TO/", "") for word in shlex.split(line)]
    assert kshot(*words[1:], "--out", tmp_path / "out").status == 0
    assert ran == []
    assert (tmp_path / "out" / "report.md").read_text() == text


def test_a_command_names_the_values_of_any_sweep(photos: Path) -> None:
    models = {
        "backbone": ("vit_small_patch14_dinov2.lvd142m", "kshot/nano-dinov2"),
        "model": "Qwen/Qwen3-VL-2B-Instruct",
    }
    grid = {"datasets": (f"folder:{photos}",), "methods": ("dinov2-logreg",), "shots": (1,)}
    planned = plan(load("demo", grid, models | {"rank": 5, "readout": "last4"}))
    text = command(planned.describe())
    assert "--backbone vit_small_patch14_dinov2.lvd142m --backbone kshot/nano-dinov2" in text
    assert planned.describe()["settings"]["backbone_revision"] == [None, nano.REVISION]
    assert "--set readout=last4" in text
    assert "--set rank=5" in text
    assert "learning_rate" not in text  # another model brings the reference protocol's


def test_losses_powers_and_starts_are_compared_where_they_mean_something(photos: Path) -> None:
    """The loss text has neither; it is one cell whatever they are, with the key it has alone."""
    grid = {"datasets": [f"folder:{photos}"], "methods": ["vlm-lora", "pixel-knn"], "shots": [1], "seeds": [0]}
    settings = {"loss": ("text", "closed-set"), "loss_power": ("0.5", "0", "1"), "start": ("0", "0.1")}
    planned = plan(load("demo", grid, settings))
    jobs = [job for job in planned.jobs if job.cell.method == "vlm-lora"]
    seen = [tuple(job.cell.settings[name] for name in LOSS) for job in jobs]
    assert seen == [("text", 0, 0), *product(["closed-set"], [0.5, 0, 1], [0, 0.1])]
    assert len({job.cell.key for job in planned.jobs}) == len(planned.jobs) == 7 + 1
    text, plain = (plan(load("demo", grid, {"loss": loss})).jobs[0].cell.key for loss in ("text", "closed-set"))
    assert [job.cell.key for job in jobs if job.settings.loss_power == job.settings.start == 0] == [text, plain]
    content = planned.describe()
    assert content["compare"] == {"loss": ["text", "closed-set"], "loss_power": [0.5, 0, 1], "start": [0, 0.1]}
    words = "--loss text --loss closed-set --loss-power 0.5 --loss-power 0.0 --loss-power 1.0 --start 0.0 --start 0.1"
    assert words in command(content)
    sweep, cells = by_series(content, [{**job.cell.identity, "key": job.cell.key} for job in planned.jobs])
    assert sweep["methods"] == [cell["method"] for cell in cells]
    titles = [style(series).title for series in sweep["methods"]]
    closed = [f"VLM + LoRA (closed-set, q {q}, start {start})" for q in ("0.5", "0", "1") for start in ("0", "0.1")]
    assert titles == ["VLM + LoRA (text)", *closed, "pixel kNN"]
    assert len({style(series) for series in sweep["methods"]}) == 8
    assert sorted({s for _, s, _, _ in full_grid(content, [])}) == sorted(sweep["methods"])


@pytest.mark.parametrize(("start", "steps"), [(0, 0), (0.1, 1), (0.11, 2), (0.99, 10), (1, 1), (3, 3), (40, 10)])
def test_a_start_is_a_share_or_a_number_of_steps(start: float, steps: int) -> None:
    assert Settings(start=start).start_steps(10) == steps


def test_a_share_of_the_steps_does_not_grow_by_rounding() -> None:
    assert [Settings(start=start).start_steps(steps) for start, steps in ((0.07, 100), (0.14, 50))] == [7, 7]


@pytest.mark.parametrize(
    ("methods", "named", "values", "lone"),
    [
        (["pixel-knn"], ["rank", "limit_test", "kl"], {}, "kl, rank: of no effect"),
        (["pixel-knn", "vlm-lora"], ["rank", "limit_test", "prompt"], {}, ""),
        (["vlm-lora"], ["start"], {"start": 0.1}, "start: of no effect"),
        (["vlm-lora", "vlm-rl"], ["start"], {"start": 0.1}, ""),
        (["vlm-lora"], ["start"], {"start": 0.1, "loss": "closed-set"}, ""),
    ],
)
def test_settings_that_nothing_reads_are_named(
    methods: list[str], named: list[str], values: dict[str, Any], lone: str
) -> None:
    (said,) = unread(named, methods, [Settings(**values)]) or [""]
    assert said.startswith(lone)
    assert bool(said) == bool(lone)


def test_settings_that_nothing_reads_are_said_first(sweep: Any) -> None:
    said = sweep("--method", "pixel-knn", "--prompt", "recipe", "--set", "rank=4", "--plan", "--quick").err
    assert " ".join(said.split()).startswith("prompt, rank: of no effect, as nothing here reads it (dinov2-logreg, ")


def test_a_comparing_sweep_grows_in_shots_and_refuses_other_values(sweep: Any, tmp_path: Path, ran: list[Job]) -> None:
    assert sweep(*BOTH).status == 0
    assert sweep(*BOTH).err == "all 10 cells are there: nothing to compute\n"
    before = (tmp_path / "out" / "sweep.json").read_bytes()
    for options, difference in (
        (BOTH[:4], "readout ['cls', 'last4'] → 'cls'"),
        ((*BOTH, "--readout", "cls+mean"), "readout ['cls', 'last4'] → ['cls', 'last4', 'cls+mean']"),
        (("--image-size", "64", *BOTH), "image_size [None, 128] → [64, None, 128]"),
    ):
        refused = sweep(*options)
        assert (refused.status, refused.err.count("\n"), ran) == (2, 1, [])
        assert f"holds results of another configuration ({difference})" in refused.err
        assert (tmp_path / "out" / "sweep.json").read_bytes() == before
    assert sweep(*BOTH, "--shots", "4", methods=("dinov2-logreg",)).status == 0
    assert sorted((job.settings.readout, job.cell.shots) for job in ran) == [*[("cls", 4)] * 2, *[("last4", 4)] * 2]
    assert Results(tmp_path / "out").sweep()["compare"] == {"image_size": [None, 128], "readout": ["cls", "last4"]}


@pytest.mark.parametrize(
    ("name", "value", "times"),
    [("readout", "last4", 1), ("readout", "last4", 2), ("prompt", "{image}Who? => {label}.", 1)],
)
def test_one_value_is_a_setting(sweep: Any, tmp_path: Path, name: str, value: str, times: int) -> None:
    assert sweep(*[f"--{name}", value] * times).status == 0
    content = Results(tmp_path / "out").sweep()
    assert not {"compare", "prompts"} & content.keys()
    assert content["settings"][name] == value
    report = (tmp_path / "out" / "report.md").read_text().partition("How it was run")[0]
    assert value not in "".join(report.split("```")[::2])  # but in the command


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--readout", "last5"), "settings.readout = 'last5': Input should be 'cls', 'cls+mean', 'last4'"),
        (("--readout", "cls", "--readout", "last5"), "compare.readout.1 = 'last5': Input should be 'cls'"),
        (("--image-size", "own", "--image-size", "big"), "compare.image_size.1 = 'big': Input should be a valid int"),
        (("--image-size", "0"), "settings.image_size = '0': Input should be greater than 0"),
        (("--image-size", "own", "--image-size", "30"), "image size 30 is no multiple of 8"),
        (("--vlm-features", "head", "--vlm-features", "tower"), "compare.vlm_features.0 = 'head'"),
        (("--backbone", "kshot/nano-dinov2", "--backbone", "resnet_dino"), "'resnet_dino'"),
        (("--backbone", "vit_small_patch14_dino"), "did you mean"),
        (("--backbone", "beit_base_patch16_224", "--readout", "pooled", "--image-size", "518"), "224x224 pixels alone"),
        (("--backbone", "resnet18"), "no CLS token"),
        (("--backbone", "weights.pth"), "weights.pth"),
        ((*BOTH, "--set", "readout=cls"), "readout is given twice: as an option and with --set; leave one out"),
        (("--image-size", "own", "--set", "image_size=64"), "image_size is given twice: as an option and with --set"),
        ((*LORA, "--prompt", "What? => {label}"), "must hold {image} once"),
        ((*LORA, "--prompt", "recipes"), "neither a preset (recipe)"),
        ((*LORA, "--set", "prompt={image}What?"), "neither a preset"),
        (("--prompt", "recipe", "--set", "prompt=recipe"), "prompt is given twice"),
        (("--loss", "closed"), "loss = 'closed'"),
        (("--calibration", "auto"), "calibration = 'auto'"),
        (("--loss", "closed-set", "--set", "loss=text"), "loss is given twice"),
        ((*LORA, "--loss-power", "1.5", "--loss", "closed-set"), "settings.loss_power = '1.5': Input should be less"),
        ((*LORA, "--loss-power", "0.5", "--loss-power", "0"), "loss_power 0.5 is of the loss closed-set"),
        ((*LORA, "--start", "1.5"), "settings.start = '1.5': Value error, it must be a share below 1, or a whole"),
        ((*LORA, "--start", "-1"), "settings.start = '-1': Input should be greater than or equal to 0"),
        ((*LORA, "--method", "vlm-rl", "--set", "kl=0.1", "--set", "temperature=2"), "kl is measured at temperature 1"),
        (("--calibration", "validated", "--method", "vlm-zero-shot"), "zero-shot has none; give contextual, pmi"),
    ],
)
def test_what_cannot_be_run_or_compared_is_refused_at_the_start(
    sweep: Any, tmp_path: Path, ran: list[Job], options: tuple[str, ...], says: str
) -> None:
    ended = sweep(*options)
    assert (ended.status, ended.out, ended.err.count("\n"), ran, [*tmp_path.iterdir()]) == (2, "", 1, [], [])
    assert ended.err.startswith("kshot: ")
    assert says in ended.err


def test_backbones_go_by_their_recorded_names(sweep: Any, tmp_path: Path, ran: list[Job]) -> None:
    """Folders by their last part, wherever they lie; two of one name cannot be told apart."""
    for name in ("a/small", "b/large", "b/small"):
        (tmp_path / name).mkdir(parents=True)
        for part in ("config.json", "model.safetensors"):
            shutil.copy(nano.HERE / part, tmp_path / name / part)
    folders = [word for name in ("a/small", "b/large") for word in ("--backbone", tmp_path / name)]
    assert sweep(*folders).status == 0
    content = Results(tmp_path / "out").sweep()
    assert content["compare"] == {"backbone": ["small", "large"]}
    assert [job.settings.backbone for job in ran if job.cell.method == "dinov2-logreg" and job.cell.shots == 1] == [
        *(str(tmp_path / "a/small"), str(tmp_path / "b/large"))
    ]
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| DINOv2 + logistic regression (small) | " in text
    assert "| DINOv2 + logistic regression (large) | " in text
    assert "(1 seed, 2 backbones)" in text
    assert "Missing cells" not in text
    assert str(tmp_path) not in text
    ended = sweep(*folders, "--backbone", tmp_path / "b/small")
    twins = f"backbone {tmp_path}/a/small and {tmp_path}/b/small would both be called small; rename one or leave it out"
    assert (ended.status, ended.err) == (2, f"kshot: {twins}\n")


def test_a_file_compares_and_options_go_over_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"{YAML}settings: {{rank: 8}}\ncompare: {{image_size: [null, 518, own], readout: [cls, last4]}}\n")
    both = load(str(path), {}, {})
    assert both.compare == Compare(image_size=(None, 518), readout=("cls", "last4"))
    assert [(s.image_size, s.readout, s.rank) for s in both.variants] == [
        *[(None, "cls", 8), (None, "last4", 8), (518, "cls", 8), (518, "last4", 8)]
    ]
    one = load(str(path), {}, {"readout": "last4"})
    assert [(s.image_size, s.readout) for s in one.variants] == [(None, "last4"), (518, "last4")]
    other = load(str(path), {}, {"readout": ("last4+mean", "cls"), "image_size": OWN})
    assert [(s.image_size, s.readout) for s in other.variants] == [(None, "last4+mean"), (None, "cls")]
    path.write_text(f"{YAML}settings: {{readout: cls}}\n")
    assert [s.readout for s in load(str(path), {}, {"readout": ("last4", "cls")}).variants] == ["last4", "cls"]


def test_a_setting_is_of_one_type_alone_and_among_others() -> None:
    assert set(COMPARED) == {"backbone", "readout", "image_size", "vlm_features", *LOSS}
    for name in COMPARED:
        alone = Settings.model_json_schema()["properties"][name]
        among = Compare.model_json_schema()["properties"][name]["items"]
        facts = ("type", "enum", "anyOf")
        assert {key: alone[key] for key in facts if key in alone} == {key: among[key] for key in facts if key in among}


@pytest.mark.parametrize("name", sorted({*COMPARED} - {*LOSS}))
def test_training_an_adapter_takes_none_of_them(name: str) -> None:
    with pytest.raises(InputError, match=f"^{name} is no setting of vlm-lora"):
        plan_training("icons", 1, 0, {name: "x"})


def test_results_of_an_earlier_version_are_reported(tmp_path: Path, kshot: Any) -> None:
    """Their settings have no readout; nothing is said of one."""
    old = Path(__file__).parents[2] / "results" / "control"
    folder = shutil.copytree(old, tmp_path / "out", ignore=shutil.ignore_patterns("report.*", "*.png", "*.svg"))
    for path in (folder / "sweep.json", folder / "cells.jsonl"):
        lines = [path.read_text()] if path.suffix == ".json" else path.read_text().splitlines()
        contents = [json.loads(line) for line in lines]
        for content in contents:
            assert "compare" not in content
            for name in ("readout", "image_size", "vlm_features"):
                content["settings"].pop(name, None)
        path.write_text("".join(f"{json.dumps(content)}\n" for content in contents))
    ended = kshot("report", folder)
    assert ended.status == 0, ended.err
    cells = Results(folder).cells()
    text = (folder / "report.md").read_text()
    for method, title in (("vlm-lora", "VLM + LoRA"), ("pixel-knn", "pixel kNN")):
        mean = np.mean([100 * c["metrics"]["accuracy"] for c in cells if c["method"] == method])
        assert f"| {title} | {mean:.1f} \\[" in text.replace("*", "")
    assert "readout" not in text
    assert "Published" not in text
