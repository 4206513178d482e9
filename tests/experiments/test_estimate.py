"""What a sweep is said to take: counted by hand, held to real prompts and folders, refused where it does not fit."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError

from baselines import nano as nano_dinov2
from data import pack
from data.benchmarks.sources import hub_pack
from data.dataset import Access, Example, Item, content_key
from data.fewshot import k_shot
from data.hub import HubName
from data.preparation import prepare
from experiments.plan import storage
from experiments.plan.counts import cell_work, count, prompt_lengths
from experiments.plan.estimate import Requirements, check, duration, estimate, requirements, rows
from experiments.plan.memory import PASS, Memory, memory, vit_size
from experiments.plan.storage import Disk, Download, disks, downloads
from experiments.sweep.cells import predictions
from experiments.sweep.config import RunOptions, Sweep, load
from experiments.sweep.grid import plan
from experiments.sweep.methods import METHODS, Outcome, Task, prompt_of
from experiments.sweep.workload import Workload, is_here, of_jobs, of_sweep
from kshot import hub
from kshot.errors import InputError
from vlm import models, nano

FIVE = ("vlm-zero-shot", "vlm-lora", "dinov2-logreg", "dinov2-lora", "pixel-knn")
TINY = {"views_per_class": 4, "batch_size": 5, "rank": 4}


@pytest.fixture
def sweep(photos: Path) -> Callable[..., Sweep]:
    def sweep(methods: tuple[str, ...] = FIVE, **settings: Any) -> Sweep:
        grid = {"datasets": (f"folder:{photos}",), "methods": methods, "shots": (1, 2), "seeds": (0, 1)}
        return load("demo", grid, {**TINY, **settings})

    return sweep


@pytest.fixture
def blog() -> Workload:
    return of_sweep(load("blog", {}, {}))


def test_counts_are_those_by_hand(sweep: Callable[..., Sweep]) -> None:
    """Three classes of eight training and two test images; 2 x 2 cells of each method that learns."""
    workload = of_sweep(sweep())
    dataset = workload.datasets[workload.cells[0].source].dataset
    assert dataset is not None
    train = {dataset.train[n].key for seed in (0, 1) for n in k_shot(dataset.train, dataset.classes, 2, seed)}
    result = count(workload, None)
    assert result.cells == dict.fromkeys(FIVE, 4) | {"vlm-zero-shot": 1}
    assert result.steps == {"vlm-lora": 4 * 3, "dinov2-lora": 4 * 3}  # 12 views in batches of 5
    assert (result.train, result.test) == (len(train), 6)
    assert result.tower == 6 + 2 * len(train)  # mirrored ones too
    assert result.backbone == 6 + len(train)
    assert result.prompts == 5 * 2 * 6  # five cells, twice an image
    assert result.training_tokens is result.prompt_tokens is None


def test_only_what_is_asked_for_is_counted(sweep: Callable[..., Sweep]) -> None:
    result = count(of_sweep(sweep(("dinov2-logreg",), limit_test=4)), None)
    assert (result.test, result.tower, result.prompts, result.steps) == (4, 0, 0, {})
    assert count(of_sweep(sweep(), service="http://somewhere"), None).tower == 0
    both = count(of_sweep(sweep(("dinov2-logreg",), image_size=(16, 32))), None)
    assert both.backbone == 2 * count(of_sweep(sweep(("dinov2-logreg",))), None).backbone


def test_labelled_images_for_a_choice_are_asked_too(sweep: Callable[..., Sweep]) -> None:
    workload = of_sweep(sweep(("vlm-lora",), calibration="validated"))
    by_shots = {cell.shots: cell_work(cell, workload.datasets[cell.source]) for cell in workload.cells}
    assert {shots: (work.scored, work.generated) for shots, work in by_shots.items()} == {1: (6 + 3, 6), 2: (6 + 6, 6)}


def test_tokens_are_those_of_the_real_prompts(sweep: Callable[..., Sweep]) -> None:
    """The sample is the whole set: so the averages are exact."""
    chosen = sweep()
    workload = of_sweep(chosen)
    source, s = chosen.datasets[0], chosen.settings
    dataset = workload.datasets[source].dataset
    assert dataset is not None
    prompt = prompt_of(None, Task(dataset.classes, [], [], 0, s, service="elsewhere"))
    images = [prepare(example.image) for example in (*dataset.train, *dataset.test)]
    questions = [prompt.question(image).length for image in images]
    examples = [prompt.datum(image, label).model_input.length for image in images for label in range(3)]
    table, _ = prompt_lengths(workload)
    assert table is not None
    result = table[source, "recipe"]
    assert result.prompt == pytest.approx(np.mean(questions))
    assert result.training == pytest.approx(np.mean(examples))
    total = count(workload, table)
    assert total.training_tokens == round(4 * 15 * np.mean(examples))  # 3 steps of 5 views
    assert total.prompt_tokens == round(60 * np.mean(questions))


def test_a_plan_and_its_jobs_are_the_same_to_do(sweep: Callable[..., Sweep]) -> None:
    chosen = sweep(image_size=(None, 32))
    planned = plan(chosen)
    by_jobs, by_sweep = of_jobs(planned.jobs, planned.datasets), of_sweep(chosen)
    assert Counter(by_jobs.cells) == Counter(by_sweep.cells)
    costs = ([METHODS[cell.method].cost for cell in workload.cells] for workload in (by_jobs, by_sweep))
    assert next(costs) == next(costs)
    assert count(by_jobs, None) == count(by_sweep, None)


def test_benchmarks_that_are_not_here_are_counted_as_published(blog: Workload) -> None:
    assert blog.missing == ["caltech101", "cars", "flowers", "pets"]
    result = count(blog, None)
    assert result.cells == {"vlm-zero-shot": 4, "vlm-lora": 60, "dinov2-logreg": 60, "dinov2-lora": 60}
    steps = sum(-(-160 * classes // 32) for classes in (102, 196, 102, 37))
    assert result.steps == {"vlm-lora": 15 * steps, "dinov2-lora": 15 * steps}
    assert result.test == 6084 + 8041 + 6149 + 3669
    assert result.train <= 3060 + 8144 + 1020 + 3680
    assert result.train > 0.6 * (3060 + 8144 + 1020 + 3680)
    assert prompt_lengths(blog)[0] is None  # no tokenizer of that model is here


def test_a_packed_set_is_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub_id = "dpdl-benchmark/oxford_flowers102"

    def fill(facts: dict[str, Any]) -> Any:
        facts.update(hub=hub_id, revision="0" * 40)
        for split in ("train", "test"):
            yield Item(f"{split}/0", split, "rose", split.encode(), content_key(split.encode()))

    monkeypatch.setenv("KSHOT_CACHE", str(tmp_path))
    assert not is_here("flowers", Access())
    pack.open_or_make(hub_pack(HubName(hub_id), ("train", "test")), fill)
    assert is_here("flowers", Access())
    assert not is_here("pets", Access())
    with pytest.raises(InputError, match=r"hub:some/set is not on this machine .*kshot data get hub:some/set"):
        of_sweep(load("demo", {"datasets": ("hub:some/set",)}, {}))
    assert not is_here(f"hub:{hub_id}", Access())  # that has all splits
    pack.open_or_make(hub_pack(HubName(hub_id), ()), fill)
    assert is_here(f"hub:{hub_id}", Access())
    others = (f"hub:{hub_id}@abc", ""), (f"hub:{hub_id}#small", ""), (f"hub:{hub_id}", "genus")
    assert not any(is_here(name, Access(label_column=column)) for name, column in others)
    assert is_here("icons", Access())
    assert is_here("caltech101", Access(root=tmp_path))  # its files are the user's


def test_what_comes_with_kshot_is_no_download(sweep: Callable[..., Sweep]) -> None:
    assert downloads(of_sweep(sweep())) == []
    assert downloads(of_sweep(sweep(model=str(nano.folder()), backbone=str(nano_dinov2.HERE)))) == []


def test_downloads_where_the_hub_is_out_of_reach(blog: Workload) -> None:
    result = {each.name: each for each in downloads(blog)}
    assert result[models.SIZES["8B"]] == Download(models.SIZES["8B"], 2 * 8767123696, "about")
    assert {each.source for each in result.values()} == {"about"}
    assert [each.dataset for each in result.values()] == [False, False, True, True, True, True]
    other = of_sweep(load("blog", {}, {"model": "somebody/a-model"}))
    assert downloads(other)[0] == Download("somebody/a-model", None, "unknown")


def test_downloads_as_the_hub_says(blog: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [("model-1.safetensors", 7), ("config.json", 2), ("pytorch_model.bin", 100), ("other/a.safetensors", 100)]
    data = [("data/train-0.parquet", 5), ("data/test-0.parquet", 4), ("data/validation-0.parquet", 100)]

    def info(result: list[tuple[str, int]]) -> Callable[..., Any]:
        named = [SimpleNamespace(rfilename=name, size=size) for name, size in result]
        return lambda self, hub_id, **_: SimpleNamespace(siblings=named)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "is_cached", lambda *_: False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", info(files))
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", info(data))
    result = downloads(blog)
    assert [each.bytes for each in result] == [9, 2, 9, 9, 9, 9]  # timm's has another name for its weights
    assert {each.source for each in result} == {"the hub says"}
    refused = SimpleNamespace(request=None, headers={}, status_code=401)

    def denied(*_: Any, **__: Any) -> Any:
        raise HfHubHTTPError("401", response=refused)  # type: ignore[arg-type]

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", denied)
    assert downloads(blog)[0] == Download(models.SIZES["8B"], 2 * 8767123696, "about")


def test_a_model_in_the_hubs_cache_is_no_download(
    sweep: Callable[..., Sweep], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    commit = "0123456789abcdef" * 2 + "01234567"
    home = tmp_path / "models--somebody--a-model"
    (home / "refs").mkdir(parents=True)
    (home / "refs/main").write_text(commit)
    files = home / "snapshots" / commit
    files.mkdir(parents=True)
    (files / "config.json").write_text("{}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    workload = of_sweep(sweep(("vlm-zero-shot",), model="somebody/a-model"))
    assert [each.name for each in downloads(workload)] == ["somebody/a-model"]  # its weights are missing
    (files / "model.safetensors").write_bytes(b"")
    assert downloads(workload) == []


def test_memory_of_a_worker(sweep: Callable[..., Sweep]) -> None:
    """A tested number of weights: see test_estimate_shapes."""
    frozen, trained = (memory(of_sweep(sweep(m)), 2) for m in (("vlm-zero-shot",), ("vlm-lora",)))
    assert frozen.parts["weights"] == trained.parts["weights"] == 4 * 3018368
    assert "adapter and optimizer" not in frozen.parts
    assert trained.needed == 2 * trained.per_worker > frozen.needed
    assert memory(of_sweep(sweep(("pixel-knn",))), 1).parts["weights"] == 0
    assert replace(memory(of_sweep(sweep()), 2), measured=3 * 10**9).needed == 6 * 10**9
    elsewhere = of_sweep(sweep(("vlm-lora",)), service="http://somewhere")
    assert memory(elsewhere, 1).parts["weights"] == 0
    assert memory(of_sweep(sweep(model="somebody/a-model")), 1).unknown == ("somebody/a-model",)


def test_only_images_of_one_size_share_a_pass(sweep: Callable[..., Sweep]) -> None:
    """Half of the photos are 32 pixels wide, half 48; at a size of their own all are one pass."""
    own, square = (memory(of_sweep(sweep(("dinov2-lora",), **at)), 1) for at in ({}, {"image_size": 40}))
    vit = vit_size(nano_dinov2.NAME)
    assert vit is not None
    assert own.parts[PASS] == vit.training_bytes(3 * (4 * 5 + 1))  # of five images three at most; 40 x 32 on average
    assert square.parts[PASS] == vit.training_bytes(5 * (5 * 5 + 1))


def test_where_nothing_is_left_nothing_is_needed(tmp_path: Path) -> None:
    result = estimate(of_jobs([], {}), tmp_path / "out", RunOptions(workers=2))
    assert result.no_time == "nothing is left to compute"
    assert sum(result.counts.cells.values()) == result.counts.test == 0
    assert {row[0]: row[1] for row in rows(result)}["cells"] == "0"
    check(result.requirements)


def test_a_larger_model_needs_more(blog: Workload) -> None:
    needed = [memory(of_sweep(load("blog", {}, {"model": size})), 1).needed for size in models.SIZES]
    assert needed == sorted(needed)


@pytest.mark.parametrize("method", ["vlm-zero-shot", "pixel-knn"])
def test_a_stored_prediction_takes_no_more_than_is_said(method: str, tmp_path: Path) -> None:
    rng, count = np.random.default_rng(0), 2000
    test = [Example(content_key(str(n).encode()), b"", n % 50) for n in range(count)]
    answers = [(f"the name of class {n % 50}", n % 50) for n in range(count)] if method == "vlm-zero-shot" else None
    pq.write_table(predictions(test, Outcome(rng.normal(size=(count, 50)), True, {}, answers)), tmp_path / "p.parquet")
    assert (tmp_path / "p.parquet").stat().st_size == pytest.approx(storage.PREDICTION * count, rel=0.5)


def test_disk_by_file_system(blog: Workload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KSHOT_CACHE", str(tmp_path / "not/there"))
    fetched = [Download("a", 100, "about"), Download("b", 50, "about", dataset=True), Download("c", None, "unknown")]
    result = disks(blog, tmp_path / "out", fetched, workers=2)
    assert sum(disk.needs.get("downloads", 0) for disk in result) == 150
    assert sum(disk.needs.get("packed data sets", 0) for disk in result) == 50
    assert sum(disk.needs.get("image features", 0) for disk in result) > 32 << 30
    rows = sum(each.test_count(blog.cells[0].settings) for each in blog.datasets.values()) * 46
    assert sum(disk.needs.get("results", 0) for disk in result) == 200 * rows + (20 << 20)
    assert not (tmp_path / "out").exists()


def fitting(**changed: Any) -> Requirements:
    memory = Memory({"libraries": 10**9, "weights": 4 * 10**9, PASS: 10**9}, 30 * 10**9, "the CPU's memory", 4)
    disks = [Disk(Path("/data"), {"downloads": 10**9, "results": 10}, 2 * 10**9)]
    return replace(Requirements(4, [], memory, disks), **changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"memory": Memory({"libraries": 10**9, "weights": 4 * 10**9}, 11 * 10**9, "the CPU's memory", 4)},
            r"^4 workers need 20\.0 GB of the CPU's memory, most of it for weights, and 11\.0 GB are free; use "
            r"--workers 2 or a smaller model$",
        ),
        (
            {"memory": Memory({"weights": 4 * 10**9, PASS: 5 * 10**9}, 10**9, "the memory of cuda", 1)},
            r"^a worker needs 9\.0 GB of the memory of cuda, most of it for a training or scoring pass, and 1\.0 GB "
            r"are free; use a smaller batch \(--set batch_size=8\) or a smaller model$",
        ),
        (
            {"memory": Memory({"libraries": 10**9}, 10**8, "the CPU's memory", 1)},
            r"^a worker needs 1\.0 GB .* and 100 MB are free; use another machine$",
        ),
        (
            {"disks": [Disk(Path("/data"), {"downloads": 3 * 10**9, "results": 1}, 2 * 10**9)]},
            r"^the sweep needs 3\.0 GB of disk at /data, most of it for downloads, and 2\.0 GB are free; make room, or "
            r"name a folder on another disk \(HF_HOME\)$",
        ),
        (
            {"disks": [Disk(Path("/data"), {"results": 3 * 10**9}, 0)]},
            r"most of it for results, and 0 MB are free; .* \(--out\)$",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_the_way_out(changed: dict[str, Any], message: str) -> None:
    check(fitting())
    with pytest.raises(InputError, match=message):
        check(fitting(**changed))


def test_the_workers_are_those_that_a_sweep_would_have(sweep: Callable[..., Sweep], tmp_path: Path) -> None:
    workload = of_sweep(sweep())
    assert requirements(workload, tmp_path / "out", RunOptions(workers=3)).workers == 3
    assert requirements(workload, tmp_path / "out", RunOptions(workers=100)).workers == 17  # one a cell
    assert requirements(workload, tmp_path / "out", RunOptions(threads=10**6)).workers == 1
    assert requirements(of_sweep(sweep(("vlm-zero-shot",))), tmp_path / "out", RunOptions()).workers == 1
    check(requirements(workload, tmp_path / "out", RunOptions(workers=2)))


def test_a_table_of_what_is_not_known(blog: Workload, tmp_path: Path) -> None:
    result = estimate(blog, tmp_path / "out", RunOptions(workers=1))
    assert (result.time, result.measurement) == (None, None)
    table = {row[0]: row[1:] for row in rows(result)}
    assert table["cells"] == ("184", "60 vlm-lora, 60 dinov2-lora, 4 vlm-zero-shot, 60 dinov2-logreg")
    assert table["tokens"][0] == "unknown"
    assert models.SIZES["8B"] in table["tokens"][1]
    assert table["time"][0] == "unknown"
    assert table["time"][1].endswith("must be downloaded before the time can be measured")
    lines = [row for row in rows(result) if row[0] == "download"]
    assert lines[0] == ("download", "17.5 GB", f"{models.SIZES['8B']} (about)")
    assert len(lines) == 6


def test_a_service_elsewhere_is_not_measured(sweep: Callable[..., Sweep], tmp_path: Path) -> None:
    result = estimate(of_sweep(sweep(), service="tinker"), tmp_path / "out", RunOptions(workers=1))
    assert result.no_time.startswith("the time of the service tinker is not measured")
    assert result.counts.prompt_tokens


@pytest.mark.parametrize(
    ("count", "expected"),
    [(0.4, "0 s"), (89, "89 s"), (91, "2 min"), (5399, "90 min"), (7200, "2.0 h"), (10**6, "11.6 days")],
)
def test_times_as_people_say_them(count: float, expected: str) -> None:
    assert duration(count) == expected
