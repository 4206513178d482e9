"""What a sweep writes, where, and whether there is room. Writes nothing."""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.estimate_counts import backbone_images, images, tower_images
from experiments.estimate_downloads import Download
from experiments.estimate_memory import vit_of, vlm_of
from experiments.estimate_parts import Todo
from experiments.estimate_tokens import sides
from kshot_files import cache_folder

FEATURES = 32 << 30  # bytes of vision features that are kept, at most, see vlm.local.feature_files
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
        (cache, "image features", _vision(todo) + _frozen(todo)),
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


def _vision(todo: Todo) -> int:
    looking = todo.where(lambda part: part.looks)
    shape = vlm_of(looking[0].settings.model) if looking and tower_images(todo) else None
    if shape is None:
        return 0
    total = 0.0
    for source, each in images(looking, todo).items():
        width, height = sides(todo.sets[source], looking[0].settings.max_side)
        tokens = max(1, width * height / (shape.patch * shape.merge) ** 2)
        total += (each.shown + each.test) * tokens * shape.image_bytes_per_token
    return min(int(total), FEATURES)


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
