"""Follows three ways through the project and prints, as JSON, which of its files each enters; see CONTRIBUTING.

Run in a process of its own: what another test has left in a cache would not be entered again.
"""

import inspect
import io
import json
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
import numpy as np
import tinker
import torch
from PIL import Image
from tinker import types

from experiments.sweep.config import load
from experiments.sweep.grid import plan
from experiments.sweep.run import run
from tests.vlm.raw import Raw
from tests.vlm.serving import HEADERS, served
from vlm import nano
from vlm.inputs import image_chunk
from vlm.local.engine import Engine
from vlm.local.model.load import Model
from vlm.local.vision import Vision

ROOT = Path(__file__).parents[1]
PACKAGES = ("kshot", "data", "vlm", "baselines", "experiments")


class Way:
    """The project's files of which a function is called, in any thread, until `stop` is called or `leave`."""

    def __init__(self, stop: Any = None) -> None:
        self.files, self.over, self._stop = set[str](), False, stop and stop.__code__

    def enter(self) -> None:
        threading.setprofile(self._note)
        sys.setprofile(self._note)

    def leave(self) -> list[str]:
        sys.setprofile(None)
        threading.setprofile(None)
        self.over = True
        return sorted(self.files)

    def _note(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event != "call" or self.over or not code.co_flags & inspect.CO_OPTIMIZED:  # a module's or a class's body
            return
        if frame.f_back and frame.f_back.f_code.co_name == "<module>":  # what an import computes
            return
        path = Path(code.co_filename)
        if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in PACKAGES:
            self.files.add(path.relative_to(ROOT).as_posix())
        if code is self._stop:  # and never back: other threads are here at the same time
            self.over = True


def png() -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, "PNG")
    return file.getvalue()


def cell() -> Callable[[], Any]:
    """A data set's row → the record of one cell."""
    grid = {"datasets": ["digits"], "methods": ["dinov2-logreg"], "shots": [1], "seeds": [0]}
    job = plan(load("demo", grid, {"limit_test": 20})).jobs[0]
    return lambda: run(job)


def image() -> Callable[[], Any]:
    """An image's bytes → its features."""
    model = Model(nano.NAME)
    vision = Vision(model)
    return lambda: vision.features([image_chunk(png(), model.rule)])


def followed(way: Way, call: Callable[[], Any]) -> list[str]:
    way.enter()
    try:
        call()
    finally:
        files = way.leave()
    return files


def request() -> list[str]:
    """POST forward_backward → the engine's own method."""
    tokens = types.TensorData.from_numpy(np.array([6, 7, 8, 9]))
    weights = types.TensorData.from_numpy(np.ones(4, np.float32))
    inputs = {"target_tokens": tokens, "weights": weights}
    datum = tinker.Datum(model_input=tinker.ModelInput.from_ints([5, 6, 7, 8]), loss_fn_inputs=inputs)
    way = Way(Engine.forward_backward)
    way.over = True  # until the request is made
    way.enter()  # now, since threads are followed from their start on
    with (
        served(Path(tempfile.mkdtemp())) as server,
        httpx.Client(base_url=server.address, headers=HEADERS, timeout=60) as http,
    ):
        raw = Raw(http)
        model = raw.run(raw.session())
        way.over = False
        response = raw.pass_of(model, 1, [datum])
        raw.output(response.json()["request_id"])
    return way.leave()


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({"cell": followed(Way(), cell()), "image": followed(Way(), image()), "request": request()}))
