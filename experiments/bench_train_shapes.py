"""Checkpoints of the shapes of real Qwen3-VL models with random weights: for speed and memory, never for accuracy.

Everything but the sizes is the nano model's: tokenizer, token ids, question. The vocabulary has the real size, so the
output head costs what it costs; ids of 4,096 tokens are used of it. Knows no contestant.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vlm import nano

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
