"""What every contestant of `kshot bench train` is given: photographs, batches, prompts and a first adapter.

A case is plain data, so that it can be sent to another process. Knows no contestant and no clock.

TODO Checkpoints of the shapes of real Qwen3-VL models with random weights: for speed and memory, never for accuracy.

Everything but the sizes is the nano model's: tokenizer, token ids, question. The vocabulary has the real size, so the
output head costs what it costs; ids of 4,096 tokens are used of it. Knows no contestant.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tinker
import torch
from tinker import types

from data.dataset import clean_name
from experiments.bench.data import GRAINS, SUFFIXES, encoded
from kshot.errors import DatasetError, KshotError
from vlm import nano
from vlm.inputs import ImageRule
from vlm.models import source
from vlm.prompts import PREFILL, QUESTION, TURN, Prompt

# ---- What every contestant of `kshot bench train` is given: photographs, batches, prompts and a first adapter.

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


# ---- Checkpoints of the shapes of real Qwen3-VL models with random weights: for speed and memory, never for

VOCABULARY = 151_936
PIXELS = {"shortest_edge": 256 * 256, "longest_edge": 4096 * 4096}  # of the real models' image processor
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Shape:
    """Sizes of a model. text: hidden, layers, heads, key-value heads, head width, mlp. vision: hidden, depth, heads,
    mlp.

    mrope: how half a head's width is shared among time, height and width. tied: input and output embeddings are one.
    """

    text: tuple[int, int, int, int, int, int]
    vision: tuple[int, int, int, int]
    deepstack: tuple[int, ...]
    tied: bool = True
    mrope: tuple[int, int, int] = (24, 20, 20)
    vocabulary: int = VOCABULARY


SHAPES = {
    "2B": Shape((2048, 28, 16, 8, 128, 6144), (1024, 24, 16, 4096), (5, 11, 17)),
    "4B": Shape((2560, 36, 32, 8, 128, 9728), (1024, 24, 16, 4096), (5, 11, 17)),
    "8B": Shape((4096, 36, 32, 8, 128, 12288), (1152, 27, 16, 4304), (8, 16, 24), tied=False),
}


def write(folder: Path, shape: Shape, device: str) -> Path:
    """A checkpoint of this shape in folder, made on the device, in bfloat16 unless that is a CPU."""
    from transformers import AutoConfig, Qwen3VLForConditionalGeneration

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    folder.mkdir(parents=True)
    for name in TOKENIZER:
        shutil.copyfile(nano.folder() / name, folder / name)
    (folder / "config.json").write_text(json.dumps(_config(shape, str(dtype).removeprefix("torch."))))
    (folder / "preprocessor_config.json").write_text(json.dumps(_processor()))
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        model = Qwen3VLForConditionalGeneration._from_config(AutoConfig.from_pretrained(folder), dtype=dtype)
    model.save_pretrained(folder)
    return folder


def _config(shape: Shape, dtype: str) -> dict[str, Any]:
    config = json.loads((nano.folder() / "config.json").read_text(encoding="utf-8"))
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    text = dict(zip((*names, "intermediate_size"), shape.text, strict=True))
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": shape.mrope, "mrope_interleaved": True}
    vision = dict(zip(("hidden_size", "depth", "num_heads", "intermediate_size"), shape.vision, strict=True))
    patches = {"patch_size": 16, "num_position_embeddings": 2304}
    indexes = {"deepstack_visual_indexes": shape.deepstack, "out_hidden_size": shape.text[0]}
    both = {"tie_word_embeddings": shape.tied}
    whole = {"vocab_size": shape.vocabulary, "rope_parameters": rope, "initializer_range": 0.02}
    config["text_config"] |= {**text, **both, **whole}
    config["vision_config"] |= {**vision, **patches, **indexes, "initializer_range": 0.02}
    return {**config, **both, "dtype": dtype}


def _processor() -> dict[str, Any]:
    processor = json.loads((nano.folder() / "preprocessor_config.json").read_text(encoding="utf-8"))
    return {**processor, "patch_size": 16, "size": PIXELS}
