"""`kshot bench serve` and `kshot bench sweep`: what the server and a sweep add to the computing, and what they share.

The server is the command in a process of its own, on the nano model with one thread. Its overhead is the time from a
request to its response, less the time in which the engine worked, which the server itself counts (/metrics).

Each sweep has a cache of its own that begins empty. Its time is that of its cells and of what they share: reading the
data is not in the plan's either. Images that went through the vision tower are counted by the new files of features.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any
from unittest.mock import patch
from urllib.parse import urlsplit

import numpy as np
import tinker
from tinker import types

import vlm
from experiments.bench.case import GRAIN, NAMES, SIZES, adam, encoded
from experiments.bench.harness import Rows, Timed, quiet, record, row, timed
from experiments.sweep.cells import Job
from experiments.sweep.config import Sweep, load
from experiments.sweep.grid import Observer, Plan, RunOptions, plan, run_sweep
from experiments.sweep.store import Results
from experiments.sweep.workers import Failure
from kshot.errors import KshotError
from vlm import nano
from vlm.prompts import Prompt
from vlm.service import LOOPBACK_KEY

CLIENTS, OPERATIONS = 64, 20
BATCH = 8
ADAM = adam(1e-4)
ONE_TOKEN = types.SamplingParams(max_tokens=1, temperature=0.0)
HEALTHZ = "healthz, by http.client"


def measure_serve(quick: bool) -> dict[str, Any]:
    """The record of `experiments.bench.harness`. quick: fewer requests and clients. Raises KshotError where the server
    does not start."""
    with tempfile.TemporaryDirectory() as folder, server(Path(folder)) as address:
        rows, ratios = one_by_one(address, 30 if quick else 150)
        more_rows, more_ratios = together(address, 16 if quick else CLIENTS)
    packages = ["tinker", "torch", "transformers", "fastapi", "uvicorn"]
    return record(rows + more_rows, ratios | more_ratios, packages)


@contextmanager
def server(state: Path) -> Iterator[str]:
    """The address of a server of the nano model that keeps its checkpoints in `state`."""
    command = [sys.executable, "-m", "kshot", "serve", "--port", "0", "--state", str(state), "--threads", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        address = re.search(r"at (http://\S+)", process.stdout.readline() if process.stdout else "")
        try:
            if address is None:
                raise KshotError("the server did not start; try kshot serve")
            yield address[1]
        finally:
            process.terminate()


def _get(server: HTTPConnection, path: str) -> str:
    server.request("GET", path, headers={"X-API-Key": LOOPBACK_KEY})
    return server.getresponse().read().decode()


def _busy(server: HTTPConnection) -> float:
    """Seconds for which the engine has worked."""
    (seconds,) = re.findall(r"^kshot_engine_busy_seconds_total (\S+)$", _get(server, "/metrics"), re.MULTILINE)
    return float(seconds)


def _metered(server: HTTPConnection, operation: Callable[[], object]) -> Timed[float]:
    """The seconds of an operation, and as its value those of them in which the engine worked."""
    before = _busy(server)
    seconds = timed(operation).seconds
    return Timed(seconds, _busy(server) - before)


def _inputs(client: Any, count: int) -> tuple[list[tinker.Datum], tinker.ModelInput]:
    """Datums of so many images, and the question about the first."""
    prompt = Prompt(client.get_tokenizer(), vlm.ImageRule.from_pretrained(nano.NAME), ("a", "b"))
    images = [encoded(np.random.default_rng(n), (160, 120), GRAIN) for n in range(count)]
    return [prompt.datum(image, 0) for image in images], prompt.question(images[0])


def one_by_one(address: str, rounds: int) -> tuple[Rows, dict[str, float]]:
    """Milliseconds of each kind of operation by the SDK, one after the other, and what of them is not the engine's."""
    client: Any = vlm.connect(address).create_lora_training_client(nano.NAME, rank=8, seed=0).result()
    data, question = _inputs(client, BATCH)
    sampler = client.save_weights_and_get_sampling_client().result()
    meter = HTTPConnection(urlsplit(address).netloc)
    operations: dict[str, Callable[[], object]] = {
        HEALTHZ: lambda: _get(meter, "/api/v1/healthz"),
        f"forward_backward of {BATCH}": lambda: client.forward_backward(data, "cross_entropy").result(),
        "optim_step": lambda: client.optim_step(ADAM).result(),
        "sample of one token": lambda: sampler.sample(question, 1, ONE_TOKEN).result(),
    }
    rounds_of = [{name: _metered(meter, each) for name, each in operations.items()} for _ in range(1 + rounds)]
    rows, overheads = [], []
    for name in operations:
        measured = [each[name] for each in rounds_of[1:]]  # the first round does not count
        requests = 1 if name == HEALTHZ else 2  # the request, and the one that fetches its response
        beyond = [1000 * (each.seconds - each.value) / requests for each in measured]
        engine = 1000 * median(each.value for each in measured)
        rows.append(row(name, [1000 * each.seconds for each in measured], "ms", engine_ms=engine))
        rows.append(row(f"{name}: beyond the engine, a request", beyond, "ms"))
        overheads.append(median(beyond))
    return rows, {"overhead_ms": max(overheads)}


def together(address: str, clients: int) -> tuple[Rows, dict[str, float]]:
    """Many clients of the SDK, a run each: seconds from the first request to the last response, and the engine's."""
    services: list[Any] = [vlm.connect(address) for _ in range(clients)]
    starting = [s.create_lora_training_client(nano.NAME, 2 ** (n % 4), n) for n, s in enumerate(services)]
    training = [future.result() for future in starting]
    data, _ = _inputs(training[0], 4)

    def work(client: Any) -> None:
        futures = []
        for _ in range(OPERATIONS // 2):
            futures += [client.forward_backward(data, "cross_entropy"), client.optim_step(ADAM)]
        for future in futures:
            future.result()

    with ThreadPoolExecutor(clients) as pool:
        meter = HTTPConnection(urlsplit(address).netloc)
        measured = _metered(meter, lambda: list(pool.map(work, training)))
    wall, busy = measured.seconds, measured.value
    rows = [row(f"{clients} clients x {OPERATIONS} operations", [wall], "s", engine_s=busy)]
    overhead = 1000 * (wall - busy) / (2 * clients * OPERATIONS)
    return rows, {"engine_share": busy / wall, "overhead_ms_together": overhead}


# Sweeps

QUICK = {"shots": (1, 2), "seeds": (0,)}, {"views_per_class": 16, "limit_test": 60}  # of the demo
WORKERS = 2
CLASSES, SHOTS = 8, 4  # of the set whose seeds all draw the same images

PlanSeconds = Callable[[Plan, Path, int], float]  # the plan, the sweep's folder, workers → the time that is planned


class Clock(Observer):
    """Of a sweep in seconds: all of it, and after its first job, when every worker has started. Raises KshotError for a
    job that fails."""

    _first = total = after_first = 0.0

    @contextmanager
    def running(self, planned: Plan, results: Results, jobs: Sequence[Job]) -> Iterator[None]:
        start = perf_counter()
        yield
        end = perf_counter()
        self.total, self.after_first = end - start, end - self._first

    def finished(self, job: Any, failure: Failure | None, *_: Any) -> None:
        self._first = self._first or perf_counter()
        if failure is not None:
            raise KshotError(f"{job} failed: {failure.message}")


def measure_sweep(quick: bool, planned_seconds: PlanSeconds) -> dict[str, Any]:
    """The record of `experiments.bench.harness`. Raises KshotError where a cell fails."""
    quiet()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        first, second = _images_encoded(folder / "seeds")
        sweep = load("demo", *(QUICK if quick else ({}, {})))
        with patch.dict(os.environ, KSHOT_CACHE=str(folder / "plan")):
            planned = plan(sweep)
            expected = planned_seconds(planned, folder / "out", WORKERS)
        whole = _run(sweep, folder / "whole", WORKERS)
        one_seed = sweep.model_copy(update={"seeds": (0,)})
        clocks = {n: _run(one_seed, folder / f"{n}", n) for n in ([] if quick else (1, WORKERS))}
    texts = {1: "one worker", WORKERS: f"{WORKERS} workers"}
    rows = [
        row("images through the tower, first seed", [first], "images", classes=CLASSES, shots=SHOTS),
        row("images through the tower, second seed on the same images", [second], "images"),
        row("the plan's time", [expected], "s", cells=len(planned.jobs)),
        row(f"the sweep's time, {WORKERS} workers", [whole.total], "s"),
        *(row(f"one seed, {texts[n]}", [clock.total], "s") for n, clock in clocks.items()),
        *(row(f"of it after the first job, {texts[n]}", [clock.after_first], "s") for n, clock in clocks.items()),
    ]
    ratios = {"second_seed_vision_forwards": float(second), "plan_over_measured": expected / whole.total}
    if not quick:
        ratios["one_worker_over_two"] = clocks[1].after_first / clocks[WORKERS].after_first
        ratios["one_worker_over_two_with_start"] = clocks[1].total / clocks[WORKERS].total
    return record(rows, ratios, ("numpy", "peft", "scikit-learn", "timm", "torch", "transformers"))


def _run(sweep: Sweep, folder: Path, workers: int) -> Clock:
    clock = Clock()
    with patch.dict(os.environ, KSHOT_CACHE=str(folder / "cache")):
        run_sweep(sweep, folder / "out", RunOptions(workers=workers), clock)
    return clock


def _images_encoded(folder: Path) -> tuple[int, int]:
    """Images that two seeds sent through the tower, one after the other. As many images a class as shots: they draw the
    same ones."""
    rng = np.random.default_rng(0)
    for split, count in (("train", SHOTS), ("test", 2)):
        for name in NAMES[:CLASSES]:
            images = folder / "photographs" / split / name
            images.mkdir(parents=True)
            for n in range(count):
                (images / f"{n}.jpg").write_bytes(encoded(rng, SIZES[n % len(SIZES)], GRAIN))
    changes = {"datasets": (f"folder:{folder / 'photographs'}",), "methods": ("vlm-lora",), "shots": (SHOTS,)}
    small = {"views_per_class": 8, "batch_size": 8, "answer_tokens": 16}
    counts = [0]
    for seeds in ((0,), (0, 1)):
        _run(load("demo", {**changes, "seeds": seeds}, small), folder, 2)
        counts.append(len([*(folder / "cache" / "vision").rglob("*.safetensors")]))
    return counts[1] - counts[0], counts[2] - counts[1]
