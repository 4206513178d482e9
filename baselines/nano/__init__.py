"""The nano DINOv2: a 0.9 M parameter ViT of DINOv2's architecture, to run the whole comparison on a CPU in seconds.

config.json next to this file is the one source of the architecture (timm's hub layout). Its weights are seeded random
numbers, not trained ones: accuracies with it say that the code works and nothing about DINOv2. `init_values`, DINOv2's
layer scale, is 1 and not 1e-5, since with untrained weights 1e-5 would make the features of all images equal.
"""

import hashlib
import json
import shutil
from importlib.metadata import version
from pathlib import Path

from kshot_errors import ModelError
from kshot_files import cache_folder, write_folder

NAME = "kshot/nano-dinov2"
NOTE = f"{NAME} has seeded random weights: its accuracies show that the machinery runs and say nothing about DINOv2."
CONFIG = Path(__file__).with_name("config.json")
SEED = 0
REVISION = f"random-{SEED}"


def folder() -> Path:
    """The folder with config.json and model.safetensors, for timm's `local-dir:`; written on first use.

    It lies in the cache folder (see `kshot_files`), under a name that changes with the
    architecture and with the versions of torch and timm, so weights of another one are never read.

    Raises:
        ModelError: the cache cannot be written.
    """
    target = cache_folder() / f"nano-dinov2-{_fingerprint()}"
    try:
        return write_folder(target, _fill)
    except OSError as error:
        raise ModelError(
            f"cannot write model {NAME!r} to {target}: {error.strerror}; set KSHOT_CACHE to a writable folder"
        ) from error


def _fingerprint() -> str:
    parts = [CONFIG.read_text(), version("torch"), version("timm"), str(SEED)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _fill(target: Path) -> None:
    shutil.copy(CONFIG, target)
    _write_weights(target / "model.safetensors")


def _write_weights(path: Path) -> None:
    import timm
    import torch
    from safetensors.torch import save_file

    config = json.loads(CONFIG.read_text())
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(SEED)
        vit = timm.create_model(config["architecture"], num_classes=0, **config["model_args"])
    save_file(vit.state_dict(), path)
