"""Backbones of the Hugging Face hub: whose weights a name stands for, and at which commit.

A name is one of timm, or hf-hub:OWNER/NAME[@REVISION]; behind either @COMMIT says which weights it had.
"""

import re
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
    with hub.translated(lambda error: ModelError(f"backbone {backbone} is not to be had ({hub.one_line(error)})")):
        folder = hub.with_retries(snapshot_download, name, revision=revision or None, allow_patterns=["config.json"])
    return f"{backbone.partition('@')[0]}@{Path(folder).name}"
