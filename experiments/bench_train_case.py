"""What every contestant of `kshot bench train` is given: photographs, batches, prompts and a first adapter.

A case is plain data, so that it can be sent to another process. Knows no contestant and no clock.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tinker
from tinker import types

from data.row import clean_name
from experiments.bench_data import GRAINS, SUFFIXES, encoded
from kshot_errors import DatasetError, KshotError
from vlm.inputs import ImageRule
from vlm.models import source
from vlm.prompts import PREFILL, QUESTION, TURN, Prompt

RANK = 32
LEARNING_RATE = 1e-3  # large enough that losses which agree after 20 steps mean something
BETAS, EPS = (0.9, 0.95), 1e-8
SIZES = ((300, 200), (200, 300), (300, 300), (267, 300))  # of made photographs: Caltech101's usual ones
NAMES = (  # of made classes
    *("accordion", "anchor", "barrel", "butterfly", "camera", "cougar body", "crocodile head", "dalmatian"),
    *("electric guitar", "flamingo", "grand piano", "inline skate", "motorbikes", "sea horse", "wild cat", "yin yang"),
)
ASKED = f"<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{QUESTION}{TURN}\n<|im_start|>assistant\n"
IGNORED = -100  # a label without a loss, in transformers

Shot = tuple[bytes, int]  # an encoded photograph and its label


@dataclass(frozen=True)
class Plan:
    """How much is trained. All photographs are shown once an epoch, in `classes * shots / batch` steps."""

    classes: int
    shots: int
    batch: int
    epochs: int
    rounds: int


@dataclass(frozen=True)
class Case:
    """One training task. batches: for each step the numbers of its photographs.

    model: a name or a folder. state: a folder to write in, which holds the first adapter: `adapter` is its folder, in
    PEFT's layout, and `start` its name as a checkpoint of the local service.
    """

    model: str
    device: str
    classes: tuple[str, ...]
    photographs: tuple[Shot, ...]
    batches: tuple[tuple[int, ...], ...]
    state: Path
    start: str = ""
    adapter: Path = Path()

    @property
    def views(self) -> int:
        return sum(map(len, self.batches))

    @property
    def epoch(self) -> int:
        """Steps in an epoch."""
        return len(self.photographs) // len(self.batches[0])

    def answer(self, number: int) -> str:
        """What the model learns to write about a photograph."""
        return f"{PREFILL} {self.classes[self.photographs[number][1]]}\n{TURN}"


@dataclass(frozen=True)
class Outcome:
    """What a training gave. losses: the mean over the answers' tokens at each step.

    tower: images that had gone through the vision tower after each step, where that is counted.
    """

    losses: list[float]
    tower: list[int] | None = None


Contestant = Callable[[Case], AbstractContextManager[Callable[[], Outcome]]]  # loads; what it gives then trains


def order(plan: Plan, rng: np.random.Generator) -> tuple[tuple[int, ...], ...]:
    """The batches of all epochs, each a new permutation of the photographs."""
    count = plan.classes * plan.shots
    shown = [number for _ in range(plan.epochs) for number in rng.permutation(count).tolist()]
    return tuple(tuple(shown[n : n + plan.batch]) for n in range(0, len(shown), plan.batch))


def made(plan: Plan, rng: np.random.Generator) -> tuple[tuple[str, ...], tuple[Shot, ...]]:
    """Classes and photographs made here."""
    count = plan.classes * plan.shots
    shots = [(encoded(rng, SIZES[n % len(SIZES)], GRAINS[""]), n // plan.shots) for n in range(count)]
    return NAMES[: plan.classes], tuple(shots)


def found(root: Path, plan: Plan, rng: np.random.Generator) -> tuple[tuple[str, ...], tuple[Shot, ...]]:
    """Classes and photographs below root, chosen by rng. Raises DatasetError where root has too few."""
    folders = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    files = {folder.name: sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES) for folder in folders}
    full = [name for name, paths in files.items() if len(paths) >= plan.shots]
    if len(full) < plan.classes:
        need = f"{plan.classes} folders of at least {plan.shots} photographs"
        raise DatasetError(f"{root} has {len(full)} of the {need} that are trained on; name a folder of class folders")
    chosen = sorted(full[n] for n in rng.permutation(len(full))[: plan.classes])
    picks = [(name, rng.permutation(len(files[name]))[: plan.shots]) for name in chosen]
    shots = [(files[name][n].read_bytes(), label) for label, (name, taken) in enumerate(picks) for n in taken]
    return tuple(map(clean_name, chosen)), tuple(shots)


def prompt_of(case: Case, tokenizer: Any = None) -> Prompt:
    """The question as kshot asks it. tokenizer: the client's, or (None) the model's stock one."""
    if tokenizer is None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(source(case.model))
    return Prompt(tokenizer, ImageRule.from_pretrained(case.model), case.classes)


def check_inputs(case: Case, numbers: Sequence[int], inputs: Mapping[str, Any], image_token: int) -> None:
    """Raise KshotError unless `inputs` (stock names, padded on the right) are the tokens and labels that kshot trains.

    image_token: the id that stands at image positions.
    """
    prompt = prompt_of(case)
    for row, number in enumerate(numbers):
        ids, labels = _stock_row(prompt.datum(*case.photographs[number]), image_token)
        rest = inputs["input_ids"].shape[1] - len(ids)
        mask = [1] * len(ids) + [0] * rest
        same_ids = inputs["input_ids"][row].tolist()[: len(ids)] == ids
        same_labels = inputs["labels"][row].tolist() == labels + [IGNORED] * rest
        if not (same_ids and same_labels and inputs["attention_mask"][row].tolist() == mask):
            raise KshotError(f"photograph {number} is not the same training example for everybody: nothing to compare")


def _stock_row(datum: tinker.Datum, image_token: int) -> tuple[list[int], list[int]]:
    """Token ids and labels of the whole sequence, as the stock model takes them (it shifts by itself)."""
    ids: list[int] = []
    for chunk in datum.model_input.chunks:
        ids += chunk.tokens if isinstance(chunk, types.EncodedTextChunk) else [image_token] * chunk.length
    targets = datum.loss_fn_inputs["target_tokens"].to_numpy().tolist()
    weights = datum.loss_fn_inputs["weights"].to_numpy().tolist()
    labels = [target if weight else IGNORED for target, weight in zip(targets, weights, strict=True)]
    return [*ids, targets[-1]], [IGNORED, *labels]
