"""Which models a sweep of a user's own images takes where it names none: the nano pair is for the demo, and says
nothing about photographs. With a GPU Qwen3-VL-2B beside DINOv2-base; on a CPU DINOv2-small with heads on frozen
features, and the VLM only where one is named; the nano pair where nothing else can be had. What is named explicitly
always holds.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from baselines import hub as hub_backbones
from data import catalog
from experiments.sweep.methods import METHODS
from kshot import hub
from vlm import models

GPU_MODEL, GPU_BACKBONE, CPU_BACKBONE = "2B", "vit_base_patch14_dinov2.lvd142m", "vit_small_patch14_dinov2.lvd142m"
TITLES = {GPU_MODEL: f"Qwen3-VL-{GPU_MODEL}", GPU_BACKBONE: "DINOv2-base", CPU_BACKBONE: "DINOv2-small"}
TUNED = ("vlm-zero-shot", "vlm-lora", "dinov2-logreg", "dinov2-lora", "pixel-knn")
NANO_SIDE = 64  # pixels
FROZEN = ("dinov2-logreg", "dinov2-ridge", "dinov2-knn", "dinov2-mean", "pixel-knn")
AUTO = "auto"  # the device that is found once the model is known
WITH_VLM = ("vlm-zero-shot", "vlm-lora", *FROZEN)


@dataclass(frozen=True)
class Choice:
    """device: as it was named, else cpu or cuda. methods: of the sweep; none: the preset's. settings: the models, and
    what they need where nothing else is said. lines: what was chosen and why, a sentence each."""

    device: str
    methods: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    lines: tuple[str, ...] = ()


def choose(
    datasets: Sequence[str],
    methods: Sequence[str] = (),
    model: Any = None,
    backbone: Any = None,
    device: str = "",
    *,
    service: str = "local",
    elsewhere: bool = False,
) -> Choice:
    """For data sets that are all the user's own (folder:, hub:); for others nothing is chosen but the device. methods,
    model, backbone, device: what is named already. service: where the VLM computes; that of another service is not
    looked for here. elsewhere: whether it is planned for another machine, where all can be had. Asks the hub for the
    size of what must be fetched."""
    model = model or (None if service == "local" else service)
    full = [catalog.full_name(name) for name in datasets]
    if not full or not all(name.startswith(tuple(catalog.USERS)) for name in full):
        return Choice(device or "cpu")
    where, device = device, "" if device == AUTO else device
    gpu = device.startswith("cuda") or (not device and _has_gpu())
    where = where or ("cuda" if gpu else "cpu")
    chosen = tuple(methods) or (TUNED if gpu else WITH_VLM if model else FROZEN)
    used = {setting for name in chosen if name in METHODS for setting in METHODS[name].settings}
    named = {"model": model, "backbone": backbone}
    best = {"model": GPU_MODEL, "backbone": GPU_BACKBONE} if gpu else {"backbone": CPU_BACKBONE}
    settings = {kind: name for kind, name in best.items() if kind in used and named[kind] is None}
    lines = [] if where == AUTO or device or not gpu else ["device: cuda, since there is a GPU and --device names none"]
    nano_vlm = not gpu and model is None and "model" in used
    sizes = {name: _download(kind, name) for kind, name in settings.items()}
    if not elsewhere and (absent := [TITLES[name] for name, size in sizes.items() if size is None]):
        nothing_named = not methods and model is None and backbone is None
        kinds = {"model", "backbone"} if nothing_named else {*settings, *(["model"] if nano_vlm else [])}
        if not nothing_named:
            return Choice(where, chosen, {}, (_nothing(absent, kinds), *lines))
        seen = f"images: at {NANO_SIDE} pixels, as the nano pair learnt (--set max_side=N for more, which takes longer)"
        return Choice(where, (), {"max_side": NANO_SIDE}, (_nothing(absent, kinds), seen, *lines))
    if settings:
        size = sum(each or 0 for each in sizes.values())
        fetched = f"{size / 1e6:,.0f} MB to download" if size else "nothing to download"
        why = f"--device {device}" if device else f"there is {'a' if gpu else 'no'} GPU"
        line = f"models: {' and '.join(TITLES[name] for name in sizes)}, since {why} and none is named ({fetched})"
        if not gpu and model is None and not methods:
            line += "; --model 2B lets a vision-language model take part: with --plan it says first how long it takes"
        lines.insert(0, line)
    if nano_vlm:
        nano_line = "the vision-language model is the nano one, which says nothing about photographs"
        lines.append(f"models: {nano_line}; name one with --model")
    return Choice(where, chosen, settings, tuple(lines))


def _nothing(absent: Sequence[str], kinds: Collection[str]) -> str:
    """absent: what cannot be had. kinds: the settings whose models are the nano ones instead."""
    title = "the nano pair" if len(kinds) > 1 else "the nano VLM" if "model" in kinds else "the nano DINOv2"
    options = " and ".join(f"--{kind}" for kind in ("backbone", "model") if kind in kinds)
    return (
        f"models: {title}, since {' and '.join(absent)} cannot be had here (no network, and not in the hub's "
        "cache). It has learnt from drawings and says nothing about photographs: for real numbers run the same command "
        f"where there is a network, or name {'folders' if len(kinds) > 1 else 'a folder'} with {options}"
    )


def _download(kind: str, name: str) -> int | None:
    """Bytes to fetch; 0 where it is here; None where it cannot be had."""
    patterns: tuple[str, ...] = models.FILES if kind == "model" else hub_backbones.FILES
    hub_id = models.full_name(name) if kind == "model" else hub_backbones.hub_id_of(name) or ""
    return 0 if hub.is_cached(hub_id, "", patterns) else hub.size_of(hub_id, "", patterns)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
