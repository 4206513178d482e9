"""The nano Qwen3-VL: the architecture of Qwen3-VL, small enough to train on two cores. Knows only its own files.

The configuration, the processor settings and the tokenizer (a prefix of Qwen3's, see `prefix`) are in this folder.
The weights of this version are SEEDED RANDOM numbers, made once into the user's cache: they carry no knowledge.
"""

import hashlib
import shutil
from importlib.metadata import version
from pathlib import Path

from kshot_errors import ModelError
from kshot_files import cache_folder, write_folder

NAME = "kshot/nano-qwen3-vl"
NOTE = f"{NAME} has seeded random weights: its accuracies show that the machinery runs and say nothing about Qwen3-VL."
SEED = 0
REVISION = f"random-{SEED}"
HERE = Path(__file__).parent
FILES = ("config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json")


def folder() -> Path:
    """The model in hub layout, with its weights; written to the user's cache on first use.

    Its name changes with the files and with what draws the weights, so stale ones are never read. Raises ModelError
    where the cache cannot be written.
    """
    identity = hashlib.sha256(f"{SEED} {version('torch')} {version('transformers')}".encode())
    for name in FILES:
        identity.update((HERE / name).read_bytes())
    target = cache_folder() / f"nano-qwen3-vl-{identity.hexdigest()[:16]}"
    try:
        return write_folder(target, _fill)
    except OSError as error:
        raise ModelError(f"cannot write {target}: {error.strerror}; set KSHOT_CACHE to a writable folder") from error


def _fill(target: Path) -> None:
    import torch
    from transformers import AutoConfig, Qwen3VLForConditionalGeneration

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(SEED)
        model = Qwen3VLForConditionalGeneration(AutoConfig.from_pretrained(HERE))
    model.save_pretrained(target)
    for name in FILES:  # save_pretrained wrote a configuration of its own: the committed one stays the source
        shutil.copy(HERE / name, target)
