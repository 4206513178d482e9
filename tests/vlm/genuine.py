"""The genuine Qwen3 tokenizer, where it lies beside the checkout, and a tiny random model that has its vocabulary; and
models' own chat templates."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.vlm import checkpoints

FOLDER = Path(__file__).parents[3] / "shared/models/qwen3-tokenizer"
needed = pytest.mark.skipif(not FOLDER.exists(), reason="the genuine Qwen3 tokenizer is not beside this checkout")
IMAGE = 151655  # <|image_pad|>


def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(FOLDER)


def template(name: str) -> str:
    """A model's own chat template, as TRL carries it."""
    place = importlib.util.find_spec("trl")
    return (Path(str(place.origin)).parent / f"chat_templates/{name}.jinja").read_text()


def model(folder: Path) -> Path:
    """Write a random Qwen3-VL with this tokenizer's vocabulary in hub layout."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    torch.manual_seed(0)
    text = {**checkpoints.TEXT, "vocab_size": 151936, "initializer_range": 0.2, "tie_word_embeddings": True}
    tokens = {"image_token_id": IMAGE, "video_token_id": 151656}
    tokens |= {"vision_start_token_id": 151652, "vision_end_token_id": 151653}
    config = Qwen3VLConfig(text_config=text, vision_config=checkpoints.VISION, tie_word_embeddings=True, **tokens)
    Qwen3VLForConditionalGeneration(config).save_pretrained(folder)
    for file in FOLDER.iterdir():
        shutil.copyfile(file, folder / file.name)
    size = {"shortest_edge": 1024, "longest_edge": 16384}
    rule = {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 8, "merge_size": 2, "temporal_patch_size": 2}
    rule |= {"size": size, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(rule))
    return folder
