"""`kshot bench serve`: what the server adds to the engine's own time, request by request and with many clients at once.

The server is the command in a process of its own, on the nano model with one thread. Its overhead is the time from a
request to its answer, fetched, less the time in which the engine worked, which the server itself counts (/metrics).
"""

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from tinker import types

import vlm
from experiments.bench.data import encoded
from experiments.bench.harness import FOLDER, finish, result, row
from kshot.errors import KshotError
from vlm import nano
from vlm.prompts import Prompt

CLIENTS, OPERATIONS = 64, 20
BATCH = 8
ADAM = types.AdamParams(learning_rate=1e-4, eps=1e-8)
ONE_TOKEN = types.SamplingParams(max_tokens=1, temperature=0.0)
KEY = {"X-API-Key": "tml-local"}


def bench(quick: bool, json_path: Path | None) -> None:
    """Measure, print the table and write the JSON file (default results/bench/serve.json)."""
    finish(run(quick), json_path or FOLDER / "serve.json")


def run(quick: bool) -> dict[str, Any]:
    """The record of `experiments.bench.harness`. quick: fewer requests and clients. Raises KshotError where the server does
    not start."""
    with tempfile.TemporaryDirectory() as folder, _server(Path(folder)) as address:
        watch = _Watch(address)
        rows, ratios = _one_by_one(address, watch, 30 if quick else 150)
        more, most = _together(address, watch, 16 if quick else CLIENTS)
    return result(rows + more, ratios | most, ["tinker", "torch", "transformers", "fastapi", "uvicorn"])


@contextmanager
def _server(state: Path) -> Iterator[str]:
    start = [sys.executable, "-c", "from experiments.cli.main import main; main()", "serve", "--port", "0"]
    given = [*start, "--state", str(state), "--threads", "1"]
    with subprocess.Popen(given, stdout=subprocess.PIPE, text=True) as process:
        found = re.search(r"at (http://\S+)", process.stdout.readline() if process.stdout else "")
        try:
            if found is None:
                raise KshotError("the server did not start; try kshot serve")
            yield found[1]
        finally:
            process.terminate()


@dataclass
class _Watch:
    """A connection of its own to what the server counts."""

    address: str

    def __post_init__(self) -> None:
        self.connection = HTTPConnection(urlsplit(self.address).netloc)

    def busy(self) -> float:
        """Seconds for which the engine has worked."""
        text = self.get("/metrics")
        found = re.search(r"^kshot_engine_busy_seconds_total (\S+)$", text, re.MULTILINE)
        if found is None:
            raise KshotError("the server does not say how long its engine has worked")
        return float(found[1])

    def get(self, path: str) -> str:
        self.connection.request("GET", path, headers=KEY)
        return self.connection.getresponse().read().decode()


def _one_by_one(address: str, watch: _Watch, rounds: int) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Milliseconds of each kind of operation by the SDK, one after the other, and what of them is not the engine's."""
    client = vlm.connect(address).create_lora_training_client(nano.NAME, rank=8, seed=0).result()
    prompt = Prompt(client.get_tokenizer(), vlm.ImageRule.from_pretrained(nano.NAME), ("a", "b"))
    images = [encoded(np.random.default_rng(n), (160, 120), 5.0) for n in range(BATCH)]
    data, question = [prompt.datum(image, 0) for image in images], prompt.question(images[0])
    sampler = client.save_weights_and_get_sampling_client().result()
    operations: dict[str, Callable[[], object]] = {
        "healthz, by http.client": lambda: watch.get("/api/v1/healthz"),
        f"forward_backward of {BATCH}": lambda: client.forward_backward(data, "cross_entropy").result(),
        "optim_step": lambda: client.optim_step(ADAM).result(),
        "sample of one token": lambda: sampler.sample(question, 1, ONE_TOKEN).result(),
    }
    rows, overheads = [], {}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in operations}
    for n in range(rounds + 2):
        for name, operation in operations.items():
            busy, begun = watch.busy(), time.perf_counter()
            operation()
            spent = time.perf_counter() - begun
            if n >= 2:
                times[name].append((1000 * spent, 1000 * (watch.busy() - busy)))
    for name, pairs in times.items():
        over = [spent - busy for spent, busy in pairs]
        requests = 1 if name.startswith("healthz") else 2  # the request, and the one that fetches its answer
        rows.append(row(name, [spent for spent, _ in pairs], "ms", engine_ms=median(busy for _, busy in pairs)))
        rows.append(row(f"{name}: beyond the engine, a request", [each / requests for each in over], "ms"))
        overheads[name] = median(over) / requests
    return rows, {"overhead_ms": max(overheads.values())}


def _together(address: str, watch: _Watch, clients: int) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Many clients of the SDK, a run each: seconds from the first request to the last answer, and the engine's."""
    services = [vlm.connect(address) for _ in range(clients)]
    makers = [
        each.create_lora_training_client(nano.NAME, rank=(1, 2, 4, 8)[n % 4], seed=n) for n, each in enumerate(services)
    ]
    trained = [maker.result() for maker in makers]
    prompt = Prompt(trained[0].get_tokenizer(), vlm.ImageRule.from_pretrained(nano.NAME), ("a", "b"))
    images = [encoded(np.random.default_rng(n), (160, 120), 5.0) for n in range(4)]
    data = [prompt.datum(image, 0) for image in images]

    def work(client: Any) -> None:
        futures = []
        for _ in range(OPERATIONS // 2):
            futures += [client.forward_backward(data, "cross_entropy"), client.optim_step(ADAM)]
        for future in futures:
            future.result()

    busy, begun = watch.busy(), time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(work, trained))
    wall, busy = time.perf_counter() - begun, watch.busy() - busy
    rows = [row(f"{clients} clients x {OPERATIONS} operations", [wall], "s", engine_s=busy)]
    return rows, {
        "engine_share": busy / wall,
        "overhead_ms_together": 1000 * (wall - busy) / (2 * clients * OPERATIONS),
    }
