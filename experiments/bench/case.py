"""What the implementations of a benchmark are given: photographs, batches, prompts, and checkpoints of random weights.

A case is plain data, so that it can be sent to another process.
"""

import io
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tinker
import torch
from PIL import Image
from tinker import types

from data.dataset import clean_name
from kshot.errors import DatasetError, KshotError, ModelError
from kshot.hub import one_line
from vlm import nano
from vlm.inputs import ImageRule
from vlm.models import source
from vlm.prompts import PREFILL, QUESTION, Prompt
from vlm.templates import END_OF_TURN

RANK = 32
BETAS, EPS = (0.9, 0.95), 1e-8
SEED = 0
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
USER_TURN = f"<|im_start|>user\n{IMAGE}{QUESTION}{END_OF_TURN}\n<|im_start|>assistant\n"
IGNORED = -100  # a label without a loss, in transformers

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
SIZES = ((300, 200), (200, 300), (300, 300), (267, 300))  # of made photographs: Caltech101's usual ones
GRAIN = 5.0  # of made photographs, in levels of 255: at 12 megapixels about 2 MB, a phone in daylight
NAMES = (  # of made classes
    *("accordion", "anchor", "barrel", "butterfly", "camera", "cougar body", "crocodile head", "dalmatian"),
    *("electric guitar", "flamingo", "grand piano", "inline skate", "motorbikes", "sea horse", "wild cat", "yin yang"),
)

Photograph = tuple[bytes, int]  # encoded, and its label


@dataclass(frozen=True)
class Plan:
    """How much is trained and measured. All photographs are shown once an epoch, in `classes * shots / batch` steps.
    few: photographs for what takes many times as long as one pass of `bench score`. labels: of a list, for which a
    stock program gets a forward pass each."""

    classes: int
    shots: int
    batch: int = 1
    epochs: int = 1
    rounds: int = 1
    few: int = 1
    labels: int = 1

    def order(self, rng: np.random.Generator) -> tuple[tuple[int, ...], ...]:
        """The batches of all epochs, each epoch a new permutation of the photographs."""
        count = self.classes * self.shots
        shown = [number for _ in range(self.epochs) for number in rng.permutation(count).tolist()]
        return tuple(tuple(shown[n : n + self.batch]) for n in range(0, len(shown), self.batch))


@dataclass(frozen=True)
class Case:
    """One training task. batches: for each step the numbers of its photographs. model: a name or a folder. state: a
    folder to write in. start: of an adapter in it, the name as a checkpoint of the local service."""

    model: str
    device: str
    classes: tuple[str, ...]
    photographs: tuple[Photograph, ...]
    batches: tuple[tuple[int, ...], ...]
    state: Path
    start: str = ""

    @property
    def images(self) -> list[bytes]:
        return [image for image, _ in self.photographs]

    @property
    def adapter(self) -> Path:
        """The folder of the adapter that a client saved, in PEFT's layout."""
        return next(self.state.rglob("adapter_config.json")).parent

    @property
    def epoch(self) -> int:
        """Steps in an epoch."""
        return len(self.photographs) // len(self.batches[0])

    def answer(self, number: int) -> str:
        """What the model learns to write about a photograph."""
        return f"{PREFILL} {self.classes[self.photographs[number][1]]}\n{END_OF_TURN}"

    def prompt(self) -> Prompt:
        """The question as kshot puts it."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(source(self.model), trust_remote_code=False)
        return Prompt(tokenizer, ImageRule.from_pretrained(self.model), self.classes)


def adam(learning_rate: float) -> types.AdamParams:
    """The reference recipe's Adam."""
    return types.AdamParams(learning_rate=learning_rate, beta1=BETAS[0], beta2=BETAS[1], eps=EPS)


def new_case(model: str, device: str, plan: Plan, root: Path | None, state: Path) -> Case:
    """A case without an adapter; raises as `photographs` does."""
    rng = np.random.default_rng(SEED)
    classes, chosen = photographs(root, plan, rng)
    return Case(model, device, classes, chosen, plan.order(rng), state)


def photographs(
    root: Path | None, plan: Plan, rng: np.random.Generator
) -> tuple[tuple[str, ...], tuple[Photograph, ...]]:
    """Classes and photographs, of class folders below root chosen by rng, or (None) made here. Raises DatasetError
    where root has too few."""
    if root is None:
        count = plan.classes * plan.shots
        made = [(encoded(rng, SIZES[n % len(SIZES)], GRAIN), n // plan.shots) for n in range(count)]
        return NAMES[: plan.classes], tuple(made)
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


def encoded(rng: np.random.Generator, size: tuple[int, int], grain: float) -> bytes:
    """A JPEG of smooth noise: octaves that halve in strength, as in nature, under a sensor's grain. size: width and
    height in pixels. grain: standard deviation in levels of 255."""
    buffer = io.BytesIO()
    pixels = np.stack([_channel(rng, size) for _ in range(3)], axis=-1)
    pixels += grain * rng.standard_normal(pixels.shape, dtype=np.float32)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _channel(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    octaves = max(size).bit_length() - 1
    channel = Image.new("F", (1, 1), 128.0)
    for n in range(octaves):
        width, height = (max(1, side >> (octaves - 1 - n)) for side in size)
        smooth = np.asarray(channel.resize((width, height), Image.Resampling.BICUBIC))
        channel = Image.fromarray(smooth + 64 * 0.5**n * rng.standard_normal(smooth.shape, dtype=np.float32))
    return np.asarray(channel)


# The same tokens for every implementation


def check_inputs(case: Case, inputs: Mapping[str, Any], image_token: int) -> None:
    """Raise KshotError unless `inputs`, padded on the right, are the tokens and labels of the first batch in kshot."""
    prompt = case.prompt()
    for row, number in enumerate(case.batches[0]):
        datum = prompt.datum(*case.photographs[number])
        targets, weights = (datum.loss_fn_inputs[name].to_numpy() for name in ("target_tokens", "weights"))
        ids = [*stock_ids(datum.model_input, image_token), targets[-1]]  # the stock model shifts by itself
        labels = [IGNORED, *np.where(weights > 0, targets, IGNORED).tolist()]
        expected = {"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)}
        length = int(inputs["attention_mask"][row].sum())
        given = {name: inputs[name][row, :length].tolist() for name in expected}
        if given != expected or (inputs["labels"][row, length:] != IGNORED).any():
            raise KshotError(f"photograph {number} is not the same training example for everybody: nothing to compare")


def stock_ids(inputs: tinker.ModelInput, image_token: int) -> list[int]:
    """Token ids as the stock model takes them. image_token: stands at image positions."""
    chunks = ((c.tokens if isinstance(c, types.EncodedTextChunk) else [image_token] * c.length) for c in inputs.chunks)
    return [token for tokens in chunks for token in tokens]


# Checkpoints of random weights: for speed and memory, never for accuracy

TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
PROCESSOR, CONFIG = "preprocessor_config.json", "config.json"
PIXELS = {"shortest_edge": 256 * 256, "longest_edge": 4096 * 4096}  # of the real models' image processor
TOKEN_IDS = {  # names in the configuration → tokens
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}


def write_shape(folder: Path, published: Mapping[str, Any], device: str) -> Path:
    """A checkpoint of the sizes of a published configuration with the nano model's tokenizer, made on the device, in
    bfloat16 unless on a CPU. The vocabulary has the real size, so the output head costs what it costs; 4,096 of its
    tokens are used."""
    config, tied = _nano(CONFIG), {"tie_word_embeddings": published["tie_word_embeddings"]}
    for part in ("text_config", "vision_config"):
        config[part] |= {**published[part], "initializer_range": 0.02}
    config["text_config"] |= tied
    config |= {**tied, "dtype": "float32" if device == "cpu" else "bfloat16"}
    processor = _nano(PROCESSOR) | {"patch_size": config["vision_config"]["patch_size"], "size": PIXELS}
    return _write(folder, nano.folder(), config, processor, device)


def write_vocabulary(folder: Path, tokenizer: str) -> Path:
    """A checkpoint of the nano model's sizes with another tokenizer's vocabulary, as the nano's cuts names into many
    more tokens than a real one. tokenizer: a folder, or a model's name or hub id. Raises ModelError where there is no
    Qwen3-VL tokenizer, and as `vlm.models.source` does."""
    from transformers import AutoTokenizer

    path = Path(tokenizer)  # a tokenizer's own folder has no config.json, which that of a model must have
    path = path if (path / TOKENIZER[0]).is_file() else Path(source(tokenizer))
    missing = [name for name in TOKENIZER if not (path / name).is_file()]
    if missing:
        raise ModelError(f"{tokenizer} has no {' and no '.join(missing)}; give --tokenizer a folder or model with both")
    try:
        loaded: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # whatever the libraries raise for broken files
        reason = one_line(error)[:200]
        raise ModelError(f"the tokenizer {tokenizer} cannot be loaded ({reason}); give --tokenizer another") from error
    vocabulary = loaded.get_vocab()
    missing = [token for token in (*TOKEN_IDS.values(), END_OF_TURN) if token not in vocabulary]
    if missing:
        raise ModelError(f"the tokenizer {tokenizer} lacks {', '.join(missing)}; give --tokenizer one of Qwen3-VL")
    config = _nano(CONFIG) | {name: vocabulary[token] for name, token in TOKEN_IDS.items()}
    config["text_config"]["vocab_size"] = len(loaded)
    return _write(folder, path, config, _nano(PROCESSOR))


def _nano(name: str) -> dict[str, Any]:
    return json.loads((nano.folder() / name).read_text(encoding="utf-8"))


def _write(folder: Path, tokenizer: Path, config: object, processor: object, device: str = "cpu") -> Path:
    from transformers import AutoConfig, Qwen3VLForConditionalGeneration

    folder.mkdir(parents=True)
    for name in TOKENIZER:
        shutil.copyfile(tokenizer / name, folder / name)
    (folder / CONFIG).write_text(json.dumps(config))
    (folder / PROCESSOR).write_text(json.dumps(processor))
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(SEED)
        settings = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        model = Qwen3VLForConditionalGeneration._from_config(settings, dtype=settings.dtype, attn_implementation="sdpa")
    model.save_pretrained(folder)
    return folder
