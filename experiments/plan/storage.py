"""What a sweep downloads and what it stores: how many bytes, on which disks, and whether they have room.

The size of a download is the hub's own where the hub can be reached; else it follows from a model's published
configuration or is that of a data set's original archives, and is stated as such; else it is unknown. What is in the
hub's cache, in a folder, or comes with kshot needs no download.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from baselines import hub as hub_backbones
from data import catalog
from experiments.plan.memory import VitSize, VlmSize, vit_size, vlm_size
from experiments.sweep.workload import Workload, backbone_image_counts, feature_bytes, image_counts, mean_size
from kshot import hub
from kshot.files import cache_folder
from vlm import models

HUB, KNOWN, UNKNOWN = "the hub says", "about", "unknown"
SPLITS = ("*train*", "*test*")  # the files of a data set that are fetched
# Bytes of the photographs as their authors publish them, about; the hub's copies hold the same files.
DATASET_BYTES = {"caltech101": 138 << 20, "cars": 1871 << 20, "flowers": 330 << 20, "pets": 757 << 20}


@dataclass(frozen=True)
class Download:
    """Something to fetch. bytes: None where they are not known. source: who states them."""

    name: str
    bytes: int | None
    source: str
    dataset: bool = False


def downloads(workload: Workload) -> list[Download]:
    """What running these cells would fetch first, each once. Of models that run elsewhere only the tokenizer is
    fetched, which is small."""
    vlms = dict.fromkeys(cell.settings.model for cell in workload.local_vlm_cells)
    backbones = dict.fromkeys(cell.settings.backbone for cell in workload.select(lambda cell: cell.spec.uses_backbone))
    fetched = [_model(n, *n.partition("@")[::2], models.FILES, vlm_size(n)) for n in vlms if not models.is_here(n)]
    hub_ids = {n: hub_id.partition("@") for n in backbones if (hub_id := hub_backbones.hub_id_of(n))}
    fetched += [_model(n, i, revision, hub_backbones.FILES, vit_size(n)) for n, (i, _, revision) in hub_ids.items()]
    return [each for each in (*fetched, *map(_dataset, workload.missing)) if each]


def _model(
    name: str, hub_id: str, revision: str, patterns: tuple[str, ...], size: VlmSize | VitSize | None
) -> Download | None:
    if hub.is_cached(hub_id, revision, patterns):
        return None
    return _download(name, hub.size_of(hub_id, revision, patterns), size.file_bytes if size else None)


def _dataset(source: str) -> Download:
    spec = catalog.find(source)
    size = hub.size_of(spec.hub, spec.revision, SPLITS, dataset=True)
    return _download(spec.title.partition(":")[0], size, DATASET_BYTES.get(spec.name), dataset=True)


def _download(name: str, stated: int | None, known: int | None, *, dataset: bool = False) -> Download:
    """stated: bytes as the hub says; known: those where the hub cannot be reached or does not tell."""
    source = HUB if stated is not None else KNOWN if known is not None else UNKNOWN
    return Download(name, known if stated is None else stated, source, dataset)


PREDICTION = 200  # bytes of a stored prediction, about
REPORT = 20 << 20  # of figures and reports, about
JPEG = 0.25  # bytes a pixel of a prepared image, about


@dataclass(frozen=True)
class Disk:
    """One file system: bytes by what they are for, and what is free. folder: one that lies on it."""

    folder: Path
    needs: Mapping[str, int]
    free: int

    @property
    def needed(self) -> int:
        return sum(self.needs.values())

    @property
    def fits(self) -> bool:
        return self.needed <= self.free


def disks(workload: Workload, out: Path, fetched: Sequence[Download], workers: int) -> list[Disk]:
    """The file systems that a sweep writes to. out: the results folder. fetched: what is downloaded first."""
    from huggingface_hub import constants

    from vlm import service

    downloaded, cache = Path(constants.HF_HUB_CACHE), cache_folder()
    vlm_features = sum(feature_bytes(workload).values())
    if vlm_features:  # of all data sets: cells keep those too that are not encoded ahead, as far as the cache goes
        vlm_features = min(vlm_features, service.feature_disk_bytes())
    features = _growth(vlm_features, cache / "vision") + _growth(_backbone_features(workload), cache / "features")
    predictions = sum(workload.datasets[cell.source].test_count(cell.settings) for cell in workload.cells)
    needs = [
        (downloaded, "downloads", sum(each.bytes or 0 for each in fetched)),
        (cache, "packed data sets", sum(each.bytes or 0 for each in fetched if each.dataset)),
        (cache, "image features", features),
        (cache, "prepared images", _prepared(workload) * workers),
        (out, "results", PREDICTION * predictions + REPORT),
    ]
    by_device: dict[int, tuple[Path, dict[str, int]]] = {}
    for folder, what, size in needs:
        folder = folder.absolute()
        existing = next(each for each in (folder, *folder.parents) if each.exists())
        sizes = by_device.setdefault(os.stat(existing).st_dev, (existing, {}))[1]
        sizes[what] = sizes.get(what, 0) + size
    return [Disk(folder, sizes, shutil.disk_usage(folder).free) for folder, sizes in by_device.values()]


def _growth(needed: int, folder: Path) -> int:
    """What a folder grows by. What is in it is taken for this sweep's; other processes may remove it."""
    kept = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                kept += os.lstat(Path(parent, name)).st_size
    return max(0, needed - kept)


def _backbone_features(workload: Workload) -> int:
    total = 0.0
    for cell, images in backbone_image_counts(workload):
        model = vit_size(cell.settings.backbone)
        total += (images.train + images.test) * 4 * (model.width if model else 0)
    return int(total)


def _prepared(workload: Workload) -> int:
    """Of one worker, which keeps them in files while it is at a data set."""
    sizes = [0.0]
    settings = {cell.source: cell.settings for cell in reversed(workload.cells)}
    for source, images in image_counts(workload.cells, workload).items():
        width, height = mean_size(workload.datasets[source], settings[source].max_side)
        sizes.append((images.train_views + images.test) * width * height * JPEG)
    return int(max(sizes))
