"""What is not on this machine yet: models and data sets of the hub, with their sizes. Downloads none of them.

Sizes are the hub's own where it can be reached; else those that follow from a model's published configuration, or of a
set's original archives, stated as such; else unknown. What is in the hub's cache, in a folder or comes with
kshot takes nothing.

TODO What a sweep writes, where, and whether there is room. Writes nothing.
"""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

from data import catalog
from experiments.sweep.encoding import disk_limit, feature_bytes
from experiments.sweep.shapes import DINOV2, PUBLISHED, vit_of
from experiments.sweep.workload import Workload, backbone_images, images, sides
from kshot.files import cache_folder
from vlm import models

# ---- What is not on this machine yet: models and data sets of the hub, with their sizes. Downloads none of them.

HUB, KNOWN, UNKNOWN = "the hub says", "about", "unknown"
TIMEOUT = 10.0  # seconds that the hub has to answer
WEIGHTS_OF_TIMM = ("model.safetensors", "config.json")
# Bytes of the photographs as their authors publish them, about; the hub's copies hold the same files.
SETS = {"caltech101": 138 << 20, "cars": 1871 << 20, "flowers": 330 << 20, "pets": 757 << 20}


@dataclass(frozen=True)
class Download:
    """Something to fetch. bytes: None where nobody knows. source: who says so. dataset: whether it is a data set."""

    name: str
    bytes: int | None
    source: str
    dataset: bool = False


def downloads(todo: Workload, *, ask: bool = True) -> list[Download]:
    """What running these cells would fetch first, each once. ask: whether the hub is asked for sizes."""
    found = [*_models(todo, ask), *_backbones(todo, ask)]
    found += [_set(source, todo, ask) for source in todo.missing_sets]
    return list({each.name: each for each in found}.values())


def _models(todo: Workload, ask: bool) -> Iterator[Download]:
    """Weights where the model runs here, else its tokenizer alone, which is not worth a line."""
    names = dict.fromkeys(part.settings.model for part in todo.parts if part.looks and todo.service == "local")
    for name in names:
        if not _is_ours(name) and not _has_model(name):
            hub_id, _, revision = name.partition("@")
            known = PUBLISHED[hub_id].weight_bytes if hub_id in PUBLISHED else None
            patterns = (*models.SMALL, *models.WEIGHTS)
            yield _download(name, partial(_model_bytes, hub_id, revision, patterns), known, ask)


def _backbones(todo: Workload, ask: bool) -> Iterator[Download]:
    for name in dict.fromkeys(part.settings.backbone for part in todo.parts if part.encodes):
        hub_id = hub_id_of(name)
        if hub_id and not _has_file(hub_id, "model.safetensors"):
            known = next((vit.weight_bytes for start, vit in DINOV2.items() if name.startswith(f"{start}.")), None)
            yield _download(name, partial(_model_bytes, hub_id, "", WEIGHTS_OF_TIMM), known, ask)


def hub_id_of(backbone: str) -> str | None:
    """Where the hub has the weights of a backbone; None for a local one."""
    from baselines import nano

    if backbone == nano.NAME or backbone.startswith("local-dir:") or Path(backbone).exists():
        return None
    if backbone.startswith("hf-hub:"):
        return backbone.removeprefix("hf-hub:")
    import timm

    found = timm.get_pretrained_cfg(backbone)
    return found.hf_hub_id if found and found.hf_hub_id else None


def _set(source: str, todo: Workload, ask: bool) -> Download:
    row = catalog.find(source)
    title = row.title.partition(":")[0]
    found = _download(title, partial(_set_bytes, row.hub, row.revision), SETS.get(row.name), ask)
    return replace(found, dataset=True)


def _download(name: str, measure: Callable[[], int], known: int | None, ask: bool) -> Download:
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import httpx

    if ask and not constants.HF_HUB_OFFLINE:
        try:
            return Download(name, measure(), HUB)
        except (HfHubHTTPError, httpx.HTTPError, OSError, ValueError):
            pass  # it cannot be reached, or does not know it: loading says why
    return Download(name, known, UNKNOWN if known is None else KNOWN)


def _model_bytes(hub_id: str, revision: str, patterns: Iterable[str]) -> int:
    from huggingface_hub import HfApi

    info = HfApi().model_info(hub_id, revision=revision or None, files_metadata=True, timeout=TIMEOUT)
    return _sum(info.siblings or (), lambda name: "/" not in name and any(fnmatch(name, p) for p in patterns))


def _set_bytes(hub_id: str, revision: str) -> int:
    """Of its train and test, by the names of its files."""
    from huggingface_hub import HfApi

    info = HfApi().dataset_info(hub_id, revision=revision or None, files_metadata=True, timeout=TIMEOUT)
    return _sum(info.siblings or (), lambda name: any(split in name.rpartition("/")[2] for split in ("train", "test")))


def _sum(files: Iterable[Any], wanted: Callable[[str], bool]) -> int:
    return sum(file.size or 0 for file in files if wanted(file.rfilename))


def _is_ours(name: str) -> bool:
    return name in models.MODELS or (Path(name) / "config.json").is_file()


def _has_model(name: str) -> bool:
    """Whether the hub's cache has all of a model's files."""
    from huggingface_hub import snapshot_download

    hub_id, _, revision = name.partition("@")
    try:
        folder = snapshot_download(
            hub_id,
            revision=revision or None,
            allow_patterns=[*models.SMALL, *models.WEIGHTS],
            ignore_patterns=["*/*"],
            local_files_only=True,
        )
    except (OSError, ValueError):  # nothing of it, or not all
        return False
    return any(Path(folder).glob(models.WEIGHTS[0]))


def _has_file(hub_id: str, file: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(hub_id, file), str)


# ---- What a sweep writes, where, and whether there is room. Writes nothing.

ROW = 200  # bytes of a stored prediction, about
REPORT = 20 << 20  # of figures and reports, about
JPEG = 0.25  # bytes a pixel of a prepared image, about


@dataclass(frozen=True)
class Disk:
    """Of one file system: bytes by what they are for, and what is free. folder: one that lies on it."""

    folder: Path
    needs: Mapping[str, int]
    free: int

    @property
    def needed(self) -> int:
        return sum(self.needs.values())

    @property
    def fits(self) -> bool:
        return self.needed <= self.free


def disks(todo: Workload, out: Path, fetched: Sequence[Download], workers: int) -> list[Disk]:
    """The file systems that a sweep writes to. out: the results folder. fetched: what is downloaded first."""
    from huggingface_hub import constants

    hub, cache = Path(constants.HF_HUB_CACHE), cache_folder()
    packs = sum(each.bytes or 0 for each in fetched if each.dataset)
    needs = [
        (hub, "downloads", sum(each.bytes or 0 for each in fetched)),
        (cache, "packed data sets", packs),
        (cache, "image features", _new(_vision(todo), cache / "vision") + _new(_frozen(todo), cache / "features")),
        (cache, "prepared images", _prepared(todo) * workers),
        (out, "results", sum(ROW * todo.sets[part.source].tested(part.settings) for part in todo.parts) + REPORT),
    ]
    found: dict[int, tuple[Path, dict[str, int]]] = {}
    for folder, what, size in needs:
        place = _existing(folder)
        of = found.setdefault(os.stat(place).st_dev, (place, {}))[1]
        of[what] = of.get(what, 0) + size
    return [Disk(folder, each, shutil.disk_usage(folder).free) for folder, each in found.values()]


def _existing(folder: Path) -> Path:
    """The folder, or the first above it that is there."""
    here = folder.absolute()
    return next(each for each in (here, *here.parents) if each.exists())


def _new(needed: int, folder: Path) -> int:
    """What a folder of features grows by. What is in it is taken for this sweep's; other processes may remove it."""
    kept = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                kept += os.lstat(Path(place, name)).st_size
    return max(0, needed - kept)


def _vision(todo: Workload) -> int:
    """Of all data sets, as cells keep those too that are not encoded ahead, as far as the cache goes."""
    total = sum(feature_bytes(todo).values())
    return min(total, disk_limit()) if total else 0


def _frozen(todo: Workload) -> int:
    total = 0.0
    for part, each in backbone_images(todo):
        vit = vit_of(part.settings.backbone)
        total += (each.train + each.test) * 4 * (vit.width if vit else 0)
    return int(total)


def _prepared(todo: Workload) -> int:
    """Of one worker, which puts them aside while it is at a data set."""
    sizes = [0.0]
    for source, each in images(todo.parts, todo).items():
        part = next(part for part in todo.parts if part.source == source)
        width, height = sides(todo.sets[source], part.settings.max_side)
        sizes.append((each.shown + each.test) * width * height * JPEG)
    return int(max(sizes))
