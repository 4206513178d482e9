"""What every contestant of `kshot bench score` is given: photographs, lists of names, and an adapter that answers.

An untrained model never ends its answer, so a short tuning comes first, outside all timing: on the photographs and the
names of their folders, until nearly every answer ends. Knows no contestant and no clock.
"""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import tinker
from tinker import types
from tinker.lib.public_interfaces.api_future import AwaitableConcurrentFuture

from data.class_names import CALTECH101, CARS
from data.images import prepare
from data.row import clean_name
from experiments import bench_train_case as training
from experiments.bench_train_case import BETAS, EPS, RANK, Case, prompt_of
from kshot_errors import KshotError
from vlm.classifier import fit
from vlm.local.client import LocalServiceClient

T = TypeVar("T")

UNUSED = ("BACKGROUND_Google", "Faces_easy")  # by CoOp's protocol
HUNDRED, CAR_NAMES = "100 names", "196 car names"
LISTS = {
    HUNDRED: tuple(clean_name(name) for name in CALTECH101 if name not in UNUSED),
    CAR_NAMES: tuple(map(clean_name, CARS)),
}
SEED = 0
ADAM = types.AdamParams(learning_rate=3e-3, beta1=BETAS[0], beta2=BETAS[1], eps=EPS)
STEPS, FIRST, ENDED = 20, 60, 0.95  # between two looks at the answers; before the first; share of them that must end
ANSWER = 128  # tokens an answer may have


@dataclass(frozen=True)
class Plan(training.Plan):
    """How much is measured. few: photographs for what takes many times as long as one pass; the first one alone gets a
    stock program's own forward pass for each label, and that for so many `labels` of a list. epochs: of the tuning, at
    most."""

    few: int
    labels: int


@dataclass(frozen=True)
class Tuned:
    """A case with its adapter. service: the local one, which holds the model. steps: of the tuning."""

    case: Case
    service: "Here"
    steps: int

    @property
    def images(self) -> list[bytes]:
        return [image for image, _ in self.case.photographs]


class Here(LocalServiceClient):
    """The local service on the very thread that asks. With a worker beside the main thread, which stock programs
    compute on, there would be two pools of OpenMP threads, and each would slow the other."""

    def _submit(self, call: Callable[..., T], *args: Any, **kwargs: Any) -> AwaitableConcurrentFuture[T]:
        done: Future[T] = Future()
        done.set_result(call(*args, **kwargs))
        return AwaitableConcurrentFuture(done)


def new_case(model: str, device: str, plan: Plan, root: Path | None, state: Path) -> Case:
    """The photographs as models get them. root: a folder of class folders; None: made here, from a seed.

    Raises DatasetError where root has too few; ImageError.
    """
    rng = np.random.default_rng(SEED)
    classes, shots = training.made(plan, rng) if root is None else training.found(root, plan, rng)
    ready = tuple((prepare(image), label) for image, label in shots)
    return Case(model, device, classes, ready, training.order(plan, rng), state)


def tune(case: Case) -> Tuned:
    """The case with a saved adapter that ends its answers. Raises KshotError where it does not learn to."""
    service = Here(case.state, case.device)
    client = service.create_lora_training_client(case.model, RANK, SEED).result()
    prompt = prompt_of(case, client.get_tokenizer())
    views = [[case.photographs[number] for number in batch] for batch in case.batches]
    asked = [prompt.question(image) for image, _ in case.photographs]
    for step in range(0, len(views), STEPS):
        deque(fit(client, views[step : step + STEPS], prompt, ADAM), maxlen=0)
        steps = min(step + STEPS, len(views))
        if steps >= FIRST and _ended(client, asked, prompt.stops) >= ENDED:
            path = client.save_weights_for_sampler("tuned").result().path
            folder = next(case.state.rglob("adapter_config.json")).parent
            return Tuned(replace(case, start=path, adapter=folder), service, steps)
    raise KshotError(f"after {len(views)} steps fewer than {ENDED:.0%} of the answers end: generating has no length")


def answering(stops: Sequence[int]) -> types.SamplingParams:
    """Greedily, to the end of the turn."""
    return types.SamplingParams(max_tokens=ANSWER, temperature=0.0, stop=list(stops))


def _ended(client: Any, asked: Sequence[tinker.ModelInput], stops: Sequence[int]) -> float:
    """The share of answers that end."""
    sampler = client.save_weights_and_get_sampling_client().result()
    answers = sampler.sample_batch(asked, answering(stops))
    return float(np.mean([answer.sequences[0].stop_reason == "stop" for answer in answers]))
