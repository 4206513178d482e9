"""Backbones of the Hugging Face hub: whose weights a name stands for, and at which commit.

A name is one of timm, or hf-hub:OWNER/NAME[@REVISION]; behind either @COMMIT says which weights it had.
"""

import re
from functools import partial
from pathlib import Path

from baselines import nano
from kshot import hub
from kshot.errors import ModelError

FILES = ("model.safetensors", "config.json")  # what timm reads
HUB = "hf-hub:"
COMMIT = re.compile(f"@{hub.COMMIT}$")


def hub_id_of(backbone: str) -> str | None:
    """OWNER/NAME of a backbone of the hub, OWNER/NAME@REVISION where its name has one; None for any other."""
    if backbone == nano.NAME or backbone.startswith("local-dir:") or Path(backbone).exists():
        return None
    if backbone.startswith(HUB):
        return backbone.removeprefix(HUB)
    import timm

    name, at, commit = backbone.partition("@")
    config = timm.get_pretrained_cfg(name)
    return f"{config.hf_hub_id}{at}{commit}" if config and config.hf_hub_id else None


def pinned(backbone: str) -> str:
    """A backbone of the hub at the commit that its name stands for now, NAME@COMMIT; any other, and one with a commit,
    as it is. Raises ModelError where neither the hub nor its cache says which."""
    hub_id = None if COMMIT.search(backbone) else hub_id_of(backbone)
    if hub_id is None:
        return backbone
    from huggingface_hub import snapshot_download

    name, _, revision = hub_id.partition("@")
    with hub.translated(partial(_error, backbone, name, revision)):
        folder = hub.with_retries(snapshot_download, name, revision=revision or None, allow_patterns=["config.json"])
    return f"{backbone.partition('@')[0]}@{Path(folder).name}"


def check_weights(backbone: str) -> None:
    """Raise ModelError where the weights of a backbone are neither here nor on the hub, which is asked for no more
    than their names: offline and a misspelt name are told apart."""
    if missing := _missing(backbone):
        from huggingface_hub import HfApi

        with hub.translated(partial(_error, backbone, *missing)):
            hub.ask(HfApi().model_info, *missing)


def fetch(backbone: str) -> None:
    """Fetch the weights of a backbone of the hub, once for all that load it. Raises ModelError."""
    if missing := _missing(backbone):
        from huggingface_hub import snapshot_download

        (name, revision), files = missing, [*FILES]
        with hub.translated(partial(_error, backbone, name, revision)):
            hub.with_retries(snapshot_download, name, revision=revision or None, allow_patterns=files)


def _missing(backbone: str) -> tuple[str, str] | None:
    """Name and revision of a backbone of the hub whose weights are not in its cache."""
    name, _, revision = (hub_id_of(backbone) or "").partition("@")
    return (name, revision) if name and not hub.is_cached(name, revision, FILES) else None


def _error(backbone: str, hub_id: str, revision: str, error: Exception) -> ModelError:
    """What went wrong with a backbone's weights, and the way out."""
    if problem := hub.access_problem(error, "model", hub_id, f"https://huggingface.co/{hub_id}", revision or None):
        return ModelError(f"backbone {backbone}: {problem}")
    if reason := hub.unreachable_reason(error):
        problem = f"the hub cannot be reached ({reason}) and its cache lacks the weights of backbone {backbone}"
        return ModelError(f"{problem}; go online and try again, or give a folder or a file of weights")
    return ModelError(f"backbone {backbone} is not to be had ({hub.one_line(error)}); give another, or a folder")
