"""A checkpoint of the nano model's shapes with another tokenizer's vocabulary and random weights: for speed alone.

The nano tokenizer cuts names into many more tokens than the real one, so how much of a pass a list of names costs shows
with the real one only. Knows no contestant.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from experiments.bench_train_shapes import TOKENIZER
from kshot_errors import ModelError
from vlm import nano
from vlm.models import source
from vlm.prompts import TURN

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
