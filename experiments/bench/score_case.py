"""What every contestant of `kshot bench score` is given: photographs, lists of names, and an adapter that answers.

An untrained model never ends its answer, so a short tuning comes first, outside all timing: on the photographs and the
names of their folders, until nearly every answer ends. Knows no contestant and no clock.

TODO A checkpoint of the nano model's shapes with another tokenizer's vocabulary and random weights: for speed alone.

The nano tokenizer cuts names into many more tokens than the real one, so how much of a pass a list of names costs shows
with the real one only. Knows no contestant.
"""

import json
import shutil
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import tinker
import torch
from tinker import types
from tinker.lib.public_interfaces.api_future import AwaitableConcurrentFuture

from data.benchmarks.layouts import CALTECH101, CARS
from data.dataset import clean_name
from data.preparation import prepare
from experiments.bench import train_case as training
from experiments.bench.train_case import BETAS, EPS, RANK, TOKENIZER, Case, prompt_of
from kshot.errors import KshotError, ModelError
from vlm import nano
from vlm.classifier import fit
from vlm.local.registry import LocalServiceClient
from vlm.models import source
from vlm.prompts import TURN

# ---- What every contestant of `kshot bench score` is given: photographs, lists of names, and an adapter that

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


# ---- A checkpoint of the nano model's shapes with another tokenizer's vocabulary and random weights: for speed

IDS = {  # what the configuration says of the tokenizer
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
PROCESSOR = "preprocessor_config.json"


def write(folder: Path, tokenizer: str) -> Path:
    """The checkpoint, in folder. tokenizer: a folder, or a model's name or hub id. Raises ModelError where there is no
    Qwen3-VL tokenizer, and as `vlm.models.source` does."""
    from transformers import AutoConfig, Qwen3VLForConditionalGeneration

    found = _found(tokenizer)
    folder.mkdir(parents=True)
    for name in TOKENIZER:
        shutil.copyfile(found / name, folder / name)
    shutil.copyfile(nano.folder() / PROCESSOR, folder / PROCESSOR)
    (folder / "config.json").write_text(json.dumps(_config(folder, tokenizer)))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen3VLForConditionalGeneration._from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    model.save_pretrained(folder)
    return folder


def _found(tokenizer: str) -> Path:
    """The folder with the tokenizer's files; a tokenizer's own has no config.json, which a model's must have."""
    own = Path(tokenizer)
    folder = own if (own / TOKENIZER[0]).is_file() else Path(source(tokenizer))
    missing = [name for name in TOKENIZER if not (folder / name).is_file()]
    if missing:
        raise ModelError(f"{tokenizer} has no {' and no '.join(missing)}; give --tokenizer a folder or model with both")
    return folder


def _config(folder: Path, tokenizer: str) -> dict[str, Any]:
    """The nano model's configuration with the tokenizer's size and ids."""
    from transformers import AutoTokenizer

    try:
        loaded: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever the libraries raise for broken files
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ModelError(f"the tokenizer {tokenizer} cannot be loaded ({reason}); give --tokenizer another") from error
    vocabulary = loaded.get_vocab()
    missing = [token for token in (*IDS.values(), TURN) if token not in vocabulary]
    if missing:
        raise ModelError(f"the tokenizer {tokenizer} lacks {', '.join(missing)}; give --tokenizer one of Qwen3-VL")
    config = json.loads((nano.folder() / "config.json").read_text(encoding="utf-8"))
    config["text_config"]["vocab_size"] = len(loaded)
    return {**config, **{name: vocabulary[token] for name, token in IDS.items()}}
