"""Eleven attacks at once beside an honest client: memory stays within its bound, and the honest one is served."""

import base64
import io
import json
import random
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
import zstandard
from PIL import Image
from tinker import types

import vlm
from tests.vlm.raw import FORWARD, JSON, PROMPT, PROTOBUF, SESSION, body_of, run_of, sample_of, talking
from tests.vlm.serving import HEADERS, command
from vlm import nano
from vlm.inputs import datum, model_input

BUDGET = 1 << 30
CLIENTS = 8
LONG = datum(model_input([300] * 4000), [400] * 50)


class Attacker:
    """One client that attacks in turn, with a session and a run of its own, until it is told to stop."""

    def __init__(self, address: str, seed: int) -> None:
        self.address, self.random = address, random.Random(seed)
        self.answers = dict[int, int]()  # how often a status came
        self.sequence = 0
        self.held = list[socket.socket]()

    def run(self, stop: threading.Event) -> None:
        with talking(self.address) as raw:
            self.raw, self.session = raw, raw.session()
            raw.create(self.session)
            attacks = [getattr(self, name) for name in dir(Attacker) if name.startswith("attack_")]
            while not stop.is_set():
                try:
                    self.random.choice(attacks)()
                except (httpx.HTTPError, OSError, KeyError):
                    self.note(0)
            for each in self.held:
                each.close()
            with suppress(httpx.HTTPError):  # else the honest client waits for all that is queued, in turn
                self.post(f"/api/v1/sessions/{self.session}/finish", b'{"reason": {}}')

    def note(self, status: int) -> None:
        self.answers[status] = self.answers.get(status, 0) + 1

    def post(self, path: str, content: bytes, **headers: str) -> httpx.Response:
        response = self.raw.http.post(path, content=content, headers=JSON | headers)
        self.note(response.status_code)
        return response

    def dial(self) -> socket.socket:
        self.held.append(connection := socket.create_connection(("127.0.0.1", urlsplit(self.address).port), timeout=5))
        for each in self.held[:-20]:
            each.close()
        del self.held[:-20]
        return connection

    def attack_01_headers(self) -> None:
        connection = self.dial()
        connection.sendall(b"GET /api/v1/healthz HTTP/1.1\r\nHost: localhost\r\n")
        for _ in range(64):
            connection.sendall(b"X-A: " + b"a" * 60_000 + b"\r\n")

    def attack_02_half_heads(self) -> None:
        for _ in range(20):
            self.dial().sendall(b"POST /api/v1/create_session HTTP/1.1\r\nHost: loc")

    def attack_03_training_queue(self) -> None:
        for _ in range(20):
            body = body_of(run_of(self.session), self.sequence + 1, [LONG] * 4)
            if self.post(FORWARD, body, **PROTOBUF).status_code == 200:
                self.sequence += 1

    def attack_04_waiting_samples(self) -> None:
        chunk = {"type": "image", "format": "png", "data": "A" * (8 << 20)}
        body = sample_of(PROMPT, max_tokens=1) | {"prompt": {"chunks": [chunk]}}
        self.post("/api/v1/asample", json.dumps(body).encode())

    def attack_05_log_probabilities(self) -> None:
        body = sample_of(PROMPT, max_tokens=60) | {"num_samples": 16, "topk_sample_logprobs": 1000}
        self.post("/api/v1/asample", json.dumps(body).encode())

    def attack_06_packed_bodies(self) -> None:
        headers = {**PROTOBUF, "Content-Encoding": "zstd"}
        self.post(FORWARD, zstandard.compress(b"\x1a\x04\x0a\x00\x0a\x00" * (5 << 20)), **headers)

    def attack_07_wrong_values(self) -> None:
        self.post(SESSION, b'{"tags":[' + b"1," * 1_900_000 + b"1]}")

    def attack_08_images(self) -> None:
        buffer = io.BytesIO()
        Image.new("I;16", (4000, 4000)).save(buffer, "PNG")
        chunks = [{"type": "image", "format": "png", "data": base64.b64encode(buffer.getvalue()).decode()}]
        body = sample_of(PROMPT, max_tokens=1)
        body["prompt"]["chunks"] += (chunks + body["prompt"]["chunks"]) * 4
        self.post("/api/v1/asample", json.dumps(body).encode())

    def attack_09_runs_and_snapshots(self) -> None:
        lora = {"rank": self.random.choice([64, 1024])}
        number = self.random.randrange(1, 1 << 20)
        self.note(self.raw.creating(self.session, number, **lora).status_code)

    def attack_10_no_reading(self) -> None:
        connection = self.dial()
        lines = "GET /api/v1/training_runs?limit=1000 HTTP/1.1", "Host: localhost", f"X-API-Key: {HEADERS['X-API-Key']}"
        connection.sendall("\r\n".join([*lines, "", ""]).encode() * 50)

    def attack_11_sessions(self) -> None:
        for _ in range(20):
            body = {"tags": ["t" * 50_000], "sdk_version": "0", "user_metadata": None, "display_name": "n" * 50_000}
            self.post(SESSION, json.dumps(body).encode())


def sampled(sampler: Any) -> float:
    """Seconds of an honest sample, of a sentence."""
    start = time.monotonic()
    answer = sampler.sample(PROMPT, 1, types.SamplingParams(max_tokens=32, temperature=0.0, stop=[])).result(300)
    assert answer.sequences[0].tokens
    return time.monotonic() - start


def attacked(folder: Path, seconds: float, clients: int, report: Callable[[str], None]) -> tuple[float, float]:
    """Bytes beyond what the server had at the beginning, and how many times as long an honest sample takes."""
    with command(folder, "--model", nano.NAME, "--memory", str(BUDGET)) as server:
        service, process = vlm.connect(server.address), psutil.Process(server.process.pid)
        training = service.create_lora_training_client(nano.NAME, rank=4, seed=1).result(300)
        sampler = service.create_sampling_client(base_model=nano.NAME).result(300)
        alone = median([sampled(sampler) for _ in range(20)][5:])
        base, peak, stop = process.memory_info().rss, 0, threading.Event()
        attackers = [Attacker(server.address, seed) for seed in range(clients)]
        threads = [threading.Thread(target=each.run, args=(stop,), daemon=True) for each in attackers]
        for each in threads:
            each.start()
        beside, passes, end = list[float](), [], time.monotonic() + seconds
        while time.monotonic() < end:
            beside.append(sampled(sampler))
            if len(passes) < 5:
                passes.append(training.forward_backward([datum(PROMPT, [400, 401])], "cross_entropy"))
            peak = max(peak, process.memory_info().rss - base)
        stop.set()
        for each in threads:
            each.join(120)
        report(f"{peak / 2**20:.0f} MB more; sample {alone:.3f} s alone, {median(beside):.3f} s beside")
        losses = {each.result(300).metrics["loss:sum"] for each in passes}  # nothing that was accepted is lost
        assert len(losses) == 1
        answers = sum((list(each.answers.items()) for each in attackers), list[tuple[int, int]]())
        total = {status: sum(count for own, count in answers if own == status) for status, _ in answers}
        report(f"answers by status: {total}")
        assert {200, 400, 413, 429} <= {*total}  # each kind of attack has been answered
        assert process.is_running()
        service.close("success").result(60)
        return peak, median(beside) / alone


@pytest.mark.slow
def test_a_few_seconds_of_all_attacks(tmp_path: Path) -> None:
    more, _ = attacked(tmp_path, 4, 3, print)
    assert more < 1.25 * BUDGET


@pytest.mark.slow
def test_a_minute_of_all_attacks_from_eight_clients(tmp_path: Path) -> None:
    more, times = attacked(tmp_path, 60, CLIENTS, print)
    assert more < 1.25 * BUDGET
    assert times <= 3
