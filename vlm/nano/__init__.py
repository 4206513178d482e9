"""The nano Qwen3-VL: the architecture of Qwen3-VL, small enough to train on two cores. Knows only its own files.

The configuration, the processor settings and the tokenizer (a prefix of Qwen3's, see `prefix`) are in this folder.
The weights of this version are SEEDED RANDOM numbers, made once into the user's cache: they carry no knowledge.
"""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

NAME = "kshot/nano-qwen3-vl"
SEED = 0
FILES = ("config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json")


def folder() -> Path:
    """The model in hub layout, with its weights; written to the user's cache on first use."""
    import torch

    here = Path(__file__).parent
    identity = hashlib.sha256(f"{SEED} {torch.__version__}".encode())
    for name in FILES:
        identity.update((here / name).read_bytes())
    target = cache() / f"nano-qwen3-vl-{identity.hexdigest()[:16]}"
    if not target.exists():
        _write(here, target)
    return target


def cache() -> Path:
    """kshot's folder in the user's cache: KSHOT_CACHE, or kshot below XDG_CACHE_HOME or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("KSHOT_CACHE") or Path(base) / "kshot")


def _write(here: Path, target: Path) -> None:
    import torch
    from transformers import AutoConfig, Qwen3VLForConditionalGeneration

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".nano-") as temporary:
        for name in FILES:
            shutil.copy(here / name, temporary)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            model = Qwen3VLForConditionalGeneration(AutoConfig.from_pretrained(temporary))
        model.save_pretrained(temporary)
        for name in FILES:  # save_pretrained rewrote the configuration: the committed one stays the source
            shutil.copy(here / name, temporary)
        _publish(Path(temporary), target)


def _publish(written: Path, target: Path) -> None:
    try:
        written.rename(target)
        written.mkdir()  # so that the temporary folder's own clean-up finds it
    except OSError:
        if not target.exists():  # another process was first: the same bytes
            raise
