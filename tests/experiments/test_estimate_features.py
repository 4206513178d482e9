"""Which images are encoded once, where the features of all do not fit into the cache; and what of them is there."""

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from baselines import nano as nano_dinov2
from experiments.cli.sweep import check_room
from experiments.plan.counts import count, encoded_in_cell, prompt_lengths
from experiments.plan.estimate import check, estimate, requirements, rows
from experiments.plan.memory import memory, vit_size
from experiments.plan.storage import disks
from experiments.plan.time import Measurement, ProbeResult, Rates, measure, probe_folder, sweep_time
from experiments.sweep import workers as executors
from experiments.sweep.config import RunOptions, Sweep, load
from experiments.sweep.grid import plan
from experiments.sweep.store import Results
from experiments.sweep.workload import (
    BATCH,
    Workload,
    encoding_jobs,
    encoding_schedule,
    feature_bytes,
    of_jobs,
    of_sweep,
)
from kshot.errors import InputError
from kshot.files import STALE
from vlm import nano
from vlm.local import features

TINY = {"views_per_class": 4, "batch_size": 5, "rank": 4}
COUNTS = {"a": 10, "b": 20, "c": 10}  # images a class


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory, make_image: Callable[..., bytes]) -> tuple[str, ...]:
    """Three sets of two classes of images of 32 x 32 pixels: of the second there are twice as many."""
    home = tmp_path_factory.mktemp("sets")
    for s, (name, images) in enumerate(COUNTS.items()):
        for label in ("cat", "dog"):
            (home / name / label).mkdir(parents=True)
            for n in range(images):
                image = make_image(1000 * s + 100 * (label == "dog") + n, 32, 32)
                (home / name / label / f"{n}.png").write_bytes(image)
    return tuple(f"folder:{home / name}" for name in COUNTS)


@pytest.fixture
def sweep(sets: tuple[str, ...]) -> Callable[..., Sweep]:
    def sweep(methods: tuple[str, ...] = ("vlm-lora",), order: tuple[int, ...] = (0, 1, 2), **settings: Any) -> Sweep:
        grid = {"datasets": tuple(sets[n] for n in order), "methods": methods, "shots": (8,), "seeds": (0,)}
        return load("demo", {**grid, "most_shots": {}}, {**TINY, **settings})

    return sweep


def each(test: int, train: int) -> int:
    """Bytes of so many images of 32 x 32 pixels, the training images mirrored too."""
    config = json.loads((nano.folder() / "config.json").read_text())
    vision = config["vision_config"]
    tokens = (32 // (vision["patch_size"] * vision["spatial_merge_size"])) ** 2
    embeddings = 1 + len(vision["deepstack_visual_indexes"])
    return (test + 2 * train) * tokens * embeddings * config["text_config"]["hidden_size"] * 4  # float32


SMALL, LARGE = (4, 16), (8, 16)  # a fifth of a folder is tested on; 2 x 8 shots


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let the cache keep so many bytes: 15/16 of its limit."""
    return lambda kept: monkeypatch.setattr(features, "DISK_BYTES", -(-kept * 16 // 15))


def times(workload: Workload) -> tuple[tuple[str, ...], ...]:
    schedule = encoding_schedule(workload)
    return schedule.ahead, schedule.per_worker, schedule.per_cell


def test_bytes_by_hand(sweep: Callable[..., Sweep], sets: tuple[str, ...]) -> None:
    workload = of_sweep(sweep())
    assert feature_bytes(workload) == dict(zip(sets, (each(*SMALL), each(*LARGE), each(*SMALL)), strict=True))
    assert feature_bytes(of_sweep(sweep(), service="http://somewhere")) == {}
    assert feature_bytes(of_sweep(sweep(("pixel-knn",)))) == {}
    assert [*feature_bytes(of_sweep(sweep(model="somebody/a-model"))).values()] == [0, 0, 0]


def test_a_float16_model_is_counted_as_what_computes(sweep: Callable[..., Sweep], tmp_path: Path) -> None:
    """In float32 on a CPU, in two bytes a number on a GPU."""
    config = json.loads((nano.folder() / "config.json").read_text())
    config["text_config"].pop("dtype", None)
    (tmp_path / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    half, full = of_sweep(sweep(model=str(tmp_path))), of_sweep(sweep())
    on_gpu = replace(half, device="cuda")
    assert feature_bytes(half) == feature_bytes(full)
    assert feature_bytes(on_gpu) == {source: size // 2 for source, size in feature_bytes(full).items()}
    weights = memory(full, 1).parts["weights"]
    assert memory(half, 1).parts["weights"] == weights
    assert memory(on_gpu, 1, "cuda").parts["weights"] == weights // 2


def test_the_first_that_fit_together_are_shared(
    sweep: Callable[..., Sweep], sets: tuple[str, ...], limit: Callable[[int], None]
) -> None:
    a, b, c = sets
    workload, turned = of_sweep(sweep()), of_sweep(sweep(order=(2, 1, 0)))
    limit(2 * each(*SMALL) + each(*LARGE))
    assert encoding_schedule(workload).ahead == (a, b, c)
    limit(2 * each(*SMALL) + each(*LARGE) - 16)
    assert times(workload) == ((a, b), (c,), ())
    limit(each(*LARGE) - 16)
    assert times(workload) == ((a,), (c,), (b,))
    assert encoding_schedule(turned).ahead == (c,)
    limit(each(*SMALL) - 16)
    assert times(workload) == ((), (), (a, b, c))
    assert encoding_schedule(of_sweep(sweep(model="somebody/a-model"))).ahead == (a, b, c)


def test_only_those_are_encoded_ahead(
    sweep: Callable[..., Sweep], sets: tuple[str, ...], limit: Callable[[int], None]
) -> None:
    planned = plan(sweep(("vlm-lora", "pixel-knn")))
    assert [each.cell_job.source for each in planned.encodings(planned.jobs)] == [*sets]
    limit(each(*SMALL) + each(*LARGE))
    assert [each.cell_job.source for each in planned.encodings(planned.jobs)] == [*sets[:2]]
    limit(0)
    assert planned.encodings(planned.jobs) == []
    assert planned.encodings([]) == []


def test_encoding_takes_workers_too(
    sweep: Callable[..., Sweep], limit: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As many as are started: one cell, but 20 images in parts of 4."""
    monkeypatch.setattr("experiments.sweep.workload.BATCH", 4)
    planned = plan(sweep(order=(0,)))
    workload = of_jobs(planned.jobs, planned.datasets)
    assert (BATCH, len(workload.cells)) == (64, 1)
    assert encoding_jobs(workload) == len(planned.encodings(planned.jobs)) == 5
    assert [requirements(workload, tmp_path, RunOptions(workers=workers)).workers for workers in (1, 4, 9)] == [1, 4, 5]
    limit(0)
    assert requirements(workload, tmp_path, RunOptions(workers=9)).workers == 1


def rates_of(workload: Workload, rates: Rates) -> Measurement:
    result = ProbeResult(0, 0, 0, 0, {cell.variant: rates for cell in workload.cells}, 0)
    return Measurement(0, dict.fromkeys(workload.datasets, result), 0)


def test_the_time_of_what_is_encoded_again(sweep: Callable[..., Sweep], limit: Callable[[int], None]) -> None:
    """Two seeds of two methods; of the second set every image again in every cell, of the third in every worker."""
    workload = of_sweep(sweep(("vlm-lora", "vlm-vision-linear", "vlm-zero-shot"), views_per_class=100))
    measured = rates_of(workload, Rates(encoded=0.5))
    assert sweep_time(workload, measured, 1).cells == 0
    assert sweep_time(workload, measured, 1).encode == 0.5 * (2 * (4 + 32) + (8 + 32))
    limit(each(*LARGE) - 16)
    found = sweep_time(workload, measured, 2)
    assert found.encode == 0.5 * ((4 + 32) + 2 * (4 + 32)) / 2
    images = {"vlm-lora": 32 + 8 + 8, "vlm-vision-linear": 16 + 8, "vlm-zero-shot": 8 + 8}  # a head: no twin, no answer
    assert found.methods == {method: 0.5 * count for method, count in images.items()}
    few = of_sweep(sweep())  # 8 views in batches of 5
    assert encoded_in_cell(few.cells[0], few.datasets[few.cells[0].source]) == 10 + 4 + 4


def test_the_table_says_when(
    sweep: Callable[..., Sweep], sets: tuple[str, ...], limit: Callable[[int], None], tmp_path: Path
) -> None:
    a, b, c = sets
    elsewhere = of_sweep(sweep(), service="tinker")  # which is not measured
    estimated, workload = estimate(elsewhere, tmp_path, RunOptions(workers=1)), of_sweep(sweep())
    counts = replace(estimated.counts, tower=112)

    def line() -> tuple[str, ...]:
        table = rows(replace(estimated, counts=counts, encoding_schedule=encoding_schedule(workload)))
        return next(row for row in table if row[0] == "vision tower")[1:]

    assert line() == ("112 images", "each once for all cells, mirrored twins too")
    limit(each(*LARGE) - 16)
    assert line() == (
        "112 images",
        f"each once for all cells, mirrored twins too: {a}; once in every worker: {c} (their features do not fit "
        f"beside those of the sets before); again in every cell: {b} (their features do not fit into 0 MB)",
    )


def test_what_is_there_already_needs_no_disk(
    sweep: Callable[..., Sweep], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: Callable[[int], None]
) -> None:
    monkeypatch.setenv("KSHOT_CACHE", str(tmp_path))
    workload, frozen, vit = of_sweep(sweep()), of_sweep(sweep(("dinov2-logreg",))), vit_size(nano_dinov2.NAME)
    total = 2 * each(*SMALL) + each(*LARGE)
    assert vit is not None

    def needed(workload: Workload = workload) -> int:
        return sum(disk.needs["image features"] for disk in disks(workload, tmp_path / "out", [], 1))

    place = tmp_path / "vision/0123/ab"
    place.mkdir(parents=True)
    assert (needed(), needed(frozen)) == (total, 4 * vit.width * 64)
    (place / "some.safetensors").write_bytes(bytes(1000))
    assert (needed(), needed(frozen)) == (total - 1000, 4 * vit.width * 64)
    (tmp_path / "features").mkdir()
    (tmp_path / "features/00.safetensors").write_bytes(bytes(100))
    assert (needed(), needed(frozen)) == (total - 1000, 4 * vit.width * 64 - 100)
    limit(1500)  # cells keep features too that are not encoded ahead, but no more than that
    assert needed() == 1600 - 1000
    (place / "more.safetensors").write_bytes(bytes(1000))
    assert needed() == 0


def test_files_may_vanish(sweep: Callable[..., Sweep], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KSHOT_CACHE", str(tmp_path))
    (tmp_path / "vision").mkdir()
    (tmp_path / "vision/one").write_bytes(bytes(1000))

    def gone(path: Any) -> Any:
        raise FileNotFoundError(path)

    monkeypatch.setattr(os, "lstat", gone)
    found = disks(of_sweep(sweep()), tmp_path, [], 1)
    assert sum(disk.needs["image features"] for disk in found) == 2 * each(*SMALL) + each(*LARGE)


class Properties:
    total_memory = 160


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three GPUs with 7, 5 and 9 GB free."""
    free = {0: 7 * 10**9, 1: 5 * 10**9, 2: 9 * 10**9}
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (free[device.index], 10**10))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda device: 0)
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda device: 0)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: Properties)


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(
    ("device", "workers", "free", "name"),
    [("cuda", 3, 5, "cuda:1"), ("cuda", 1, 7, "cuda:0"), ("cuda:2", 1, 9, "cuda:2"), ("cuda:1", 1, 5, "cuda:1")],
)
def test_the_memory_is_that_of_the_gpus_in_use(
    device: str, workers: int, free: int, name: str, sweep: Callable[..., Sweep], tmp_path: Path
) -> None:
    workload = of_sweep(sweep(), device=device)
    assert workload.device == "cuda"  # what a worker calls the one it sees
    found = memory(workload, workers, device=device)
    assert (found.free, found.location, found.workers) == (free * 10**9, f"the memory of {name}", 1)
    assert found.parts["image features"] == 160 // 16
    assert requirements(workload, tmp_path, RunOptions(device=device, workers=workers)).memory == found


@pytest.mark.usefixtures("gpus")
def test_a_sweep_is_held_to_its_own_gpu(
    sweep: Callable[..., Sweep], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second is full; jobs say cuda, which is what a worker sees."""
    free = (7 * 10**9, 10**6, 9 * 10**9)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (free[device.index], 10**10))
    planned, results = plan(sweep()), Results(tmp_path)
    jobs = [replace(job, device="cuda") for job in planned.jobs]
    for device in ("cuda:0", "cuda:2"):
        check_room(planned, results, jobs, RunOptions(device=device))
    for device in ("cuda:1", "cuda"):
        with pytest.raises(InputError, match=r"of the memory of cuda:1, .* and 1 MB are free"):
            check_room(planned, results, jobs, RunOptions(device=device))


@pytest.mark.parametrize("device", ["cuda", "cuda:3"])
def test_a_plan_for_a_device_that_is_not_here(
    device: str, photos: Path, tmp_path: Path, kshot: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted as here, with the memory that it needs but for the features, whose share is of what it has."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    chosen = load("demo", {"datasets": (f"folder:{photos}",), "shots": (1,), "seeds": (0,)}, {})
    there, here = of_sweep(chosen, device=device), of_sweep(chosen)
    result, needed = estimate(there, tmp_path, RunOptions(device=device)), memory(here, 1).parts
    assert result.counts == count(here, prompt_lengths(here)[0])
    assert result.requirements.memory.parts == {n: size for n, size in needed.items() if n != "image features"}
    table = {row[0]: row[1:] for row in rows(result)}
    assert table["memory"][1] == f"1 worker; the memory of {device} is not known here"
    assert table["time"] == ("unknown", f"not known for {device} here: --plan measures it on a machine that has it")
    check(result.requirements)
    command = ("sweep", "demo", "--dataset", f"folder:{photos}", "--shots", "1", "--seeds", "0", "--device", device)
    planned = kshot(*command, "--plan", "--out", tmp_path / "out")
    assert (planned.status, f"not known for {device} here" in " ".join(planned.out.split())) == (0, True)
    refused = kshot(*command, "--out", tmp_path / "out")
    assert refused.status == 2
    assert f"device '{device}' is not available here: torch sees no GPU; use --device cpu" in refused.err


def test_a_plan_for_a_service_that_does_not_answer(photos: Path, tmp_path: Path, kshot: Callable[..., Any]) -> None:
    nobody = "http://127.0.0.1:9"
    grid = ("--dataset", f"folder:{photos}", "--method", "vlm-lora", "--shots", "1", "--seeds", "0")
    ended = kshot("sweep", "--plan", *grid, "--service", nobody, "--out", tmp_path / "out")
    said = " ".join(ended.out.split())
    assert (ended.status, said.split()[:4]) == (0, ["cells", "1", "1", "vlm-lora"])
    assert f"service no answer no server answers at {nobody} (Connection refused); start it first" in said
    assert kshot("sweep", "--plan", *grid, "--service", "there").status == 2


@pytest.mark.usefixtures("ran")
def test_a_plan_on_the_command_line(
    photos: Path, tmp_path: Path, kshot: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KSHOT_CACHE", str(tmp_path / "cache"))  # which a measurement sets, in the worker that it has
    grid = ("--dataset", f"folder:{photos}", "--method", "pixel-knn", "--shots", "1", "--seeds", "0")
    ended = kshot("sweep", "demo", "--plan", *grid, "--workers", "1", "--out", tmp_path / "out")
    assert (ended.status, ended.out.split()[:4]) == (0, ["cells", "1", "1", "pixel-knn"])
    assert "measured here" in ended.out
    assert not (tmp_path / "out").exists()


def test_a_measurement_leaves_nothing_behind(
    sweep: Callable[..., Sweep], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted in the parent, while workers, which end without a word, have files in its folder."""
    monkeypatch.setenv("KSHOT_CACHE", str(tmp_path / "cache"))
    seen = []

    def local(run: Any, *_: Any, **__: Any) -> Iterator[Any]:
        folder, _ = run.args
        (folder / "of a worker").mkdir()
        (folder / "of a worker/some").write_bytes(b"1")
        seen.append(folder)
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(executors, "local", local)
    with pytest.raises(KeyboardInterrupt):
        measure(of_sweep(sweep()), 1)
    assert seen[0].parent == tmp_path / "cache"
    assert [*(tmp_path / "cache").iterdir()] == []


@pytest.mark.slow
def test_a_small_sweep_is_measured(
    sweep: Callable[..., Sweep], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every method is tried on two sets, as many workers as there will be; nothing is left, though the model that the
    first set has loaded keeps features of the second too."""
    monkeypatch.setenv("KSHOT_CACHE", str(tmp_path / "cache"))
    methods = ("vlm-zero-shot", "dinov2-logreg", "dinov2-lora", "pixel-knn")
    workload = of_sweep(sweep(methods, order=(1, 2), answer_tokens=2))
    estimated = estimate(workload, tmp_path / "out", RunOptions(workers=1))
    assert estimated.measurement is not None
    assert estimated.time is not None
    assert len(estimated.measurement.results) == 2
    for result in estimated.measurement.results.values():
        assert {variant[0] for variant in result.rates} == set(methods)
    measured = [r for result in estimated.measurement.results.values() for r in result.rates.items()]
    assert any(rates.encoded > 0 for variant, rates in measured if variant[0] == "dinov2-logreg")  # of the larger set
    assert estimated.requirements.memory.measured == estimated.measurement.peak > 100 << 20
    assert 0 < estimated.time.total < 600
    assert [*(tmp_path / "cache").iterdir()] == []
    assert not (tmp_path / "out").exists()
    assert next(row for row in rows(estimated) if row[0] == "time")[2].endswith("1 worker")


def test_what_killed_measurements_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KSHOT_CACHE", str(tmp_path))
    with probe_folder() as name:
        pass
    old, new = (name.with_name(name.name.replace(name.name.split(".")[2], word)) for word in ("old", "new"))
    for folder in (old, new):
        folder.mkdir()
    os.utime(old, (time.time() - STALE - 10,) * 2)
    with probe_folder() as folder:
        assert sorted(tmp_path.iterdir()) == sorted((new, folder))
    assert [*tmp_path.iterdir()] == [new]
