"""What a sweep writes, where, and whether there is room. Writes nothing."""

import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from experiments.estimate_counts import backbone_images, images
from experiments.estimate_downloads import Download
from experiments.estimate_features import disk_limit, feature_bytes
from experiments.estimate_memory import vit_of
from experiments.estimate_parts import Todo
from experiments.estimate_tokens import sides
from kshot_files import cache_folder

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


def disks(todo: Todo, out: Path, fetched: Sequence[Download], workers: int) -> list[Disk]:
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


def _vision(todo: Todo) -> int:
    """Of all data sets, as cells keep those too that are not encoded ahead, as far as the cache goes."""
    total = sum(feature_bytes(todo).values())
    return min(total, disk_limit()) if total else 0


def _frozen(todo: Todo) -> int:
    total = 0.0
    for part, each in backbone_images(todo):
        vit = vit_of(part.settings.backbone)
        total += (each.train + each.test) * 4 * (vit.width if vit else 0)
    return int(total)


def _prepared(todo: Todo) -> int:
    """Of one worker, which puts them aside while it is at a data set."""
    sizes = [0.0]
    for source, each in images(todo.parts, todo).items():
        part = next(part for part in todo.parts if part.source == source)
        width, height = sides(todo.sets[source], part.settings.max_side)
        sizes.append((each.shown + each.test) * width * height * JPEG)
    return int(max(sizes))
