"""`kshot bench serve`: what the server adds to the engine's own time, request by request and with many clients at once.

The server is the command in a process of its own, on the nano model with one thread. Its overhead is the time from a
request to its response, less the time in which the engine worked, which the server itself counts (/metrics).
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import tinker
from tinker import types

import vlm
from experiments.bench.case import BETAS, EPS, GRAIN, encoded
from experiments.bench.harness import Rows, Timed, in_turn, record, row, timed
from kshot.errors import KshotError
from vlm import nano
from vlm.prompts import Prompt
from vlm.service import LOOPBACK_KEY

CLIENTS, OPERATIONS = 64, 20
BATCH = 8
ADAM = types.AdamParams(learning_rate=1e-4, beta1=BETAS[0], beta2=BETAS[1], eps=EPS)
ONE_TOKEN = types.SamplingParams(max_tokens=1, temperature=0.0)
HEALTHZ = "healthz, by http.client"


def measure(quick: bool) -> dict[str, Any]:
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
    start = [sys.executable, "-c", "from experiments.cli.main import main; main()", "serve", "--port", "0"]
    arguments = [*start, "--state", str(state), "--threads", "1"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        address = re.search(r"at (http://\S+)", process.stdout.readline() if process.stdout else "")
        try:
            if address is None:
                raise KshotError("the server did not start; try kshot serve")
            yield address[1]
        finally:
            process.terminate()


class _Meter:
    """A connection of its own to what the server counts."""

    def __init__(self, address: str) -> None:
        self._connection = HTTPConnection(urlsplit(address).netloc)

    def get(self, path: str) -> str:
        self._connection.request("GET", path, headers={"X-API-Key": LOOPBACK_KEY})
        return self._connection.getresponse().read().decode()

    def busy(self) -> float:
        """Seconds for which the engine has worked."""
        seconds = re.search(r"^kshot_engine_busy_seconds_total (\S+)$", self.get("/metrics"), re.MULTILINE)
        if seconds is None:
            raise KshotError("the server does not say how long its engine has worked")
        return float(seconds[1])

    def timed(self, operation: Callable[[], object]) -> Timed[float]:
        """The seconds of an operation, and as its value those of them in which the engine worked."""
        before = self.busy()
        seconds = timed(operation).seconds
        return Timed(seconds, self.busy() - before)


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
    meter = _Meter(address)
    operations: dict[str, Callable[[], object]] = {
        HEALTHZ: lambda: meter.get("/api/v1/healthz"),
        f"forward_backward of {BATCH}": lambda: client.forward_backward(data, "cross_entropy").result(),
        "optim_step": lambda: client.optim_step(ADAM).result(),
        "sample of one token": lambda: sampler.sample(question, 1, ONE_TOKEN).result(),
    }
    engine: dict[str, list[float]] = {name: [] for name in operations}

    def task(name: str) -> Timed[None]:
        measured = meter.timed(operations[name])
        engine[name].append(measured.value)
        return Timed(measured.seconds, None)

    seconds, _ = in_turn({name: partial(task, name) for name in operations}, rounds)
    rows, overheads = [], []
    for name, spent in seconds.items():
        busy = engine[name][1:]  # the first round does not count
        requests = 1 if name == HEALTHZ else 2  # the request, and the one that fetches its response
        beyond = [1000 * (s - b) / requests for s, b in zip(spent, busy, strict=True)]
        rows.append(row(name, [1000 * s for s in spent], "ms", engine_ms=1000 * median(busy)))
        rows.append(row(f"{name}: beyond the engine, a request", beyond, "ms"))
        overheads.append(median(beyond))
    return rows, {"overhead_ms": max(overheads)}


def together(address: str, clients: int) -> tuple[Rows, dict[str, float]]:
    """Many clients of the SDK, a run each: seconds from the first request to the last response, and the engine's."""
    services: list[Any] = [vlm.connect(address) for _ in range(clients)]
    make = zip(services, (1, 2, 4, 8) * clients, range(clients), strict=False)
    starting = [service.create_lora_training_client(nano.NAME, rank, seed) for service, rank, seed in make]
    training = [future.result() for future in starting]
    data, _ = _inputs(training[0], 4)

    def work(client: Any) -> None:
        futures = []
        for _ in range(OPERATIONS // 2):
            futures += [client.forward_backward(data, "cross_entropy"), client.optim_step(ADAM)]
        for future in futures:
            future.result()

    with ThreadPoolExecutor(clients) as pool:
        measured = _Meter(address).timed(lambda: list(pool.map(work, training)))
    wall, busy = measured.seconds, measured.value
    rows = [row(f"{clients} clients x {OPERATIONS} operations", [wall], "s", engine_s=busy)]
    overhead = 1000 * (wall - busy) / (2 * clients * OPERATIONS)
    return rows, {"engine_share": busy / wall, "overhead_ms_together": overhead}
