"""Decides which images the vision tower encodes once for a whole sweep: those whose features the disk cache can keep.

They are encoded before the first cell. Where a sweep has more features than the cache keeps (see `vlm.service`), the
cache drops the least recently used, which would be those of a later data set: so the cells of that set encode them.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from experiments.sweep.workload import Workload, image_counts, mean_size
from kshot.errors import KshotError
from vlm import models

BATCH = 64  # images that one job encodes
CONFIGS = Path(__file__).with_name("qwen3_vl_configs.json")  # of Qwen3-VL's sizes, as published: what sizes follow from
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}


@dataclass(frozen=True)
class EncodingSchedule:
    """When the vision tower encodes the images of each source, in the order of the sweep.

    ahead: once, before the first cell. per_worker: in the cells, once in each worker; their features fit into the
    cache, but not beside those before them. per_cell: again in every cell; they do not fit. capacity: bytes that the
    cache keeps.
    """

    ahead: tuple[str, ...]
    per_worker: tuple[str, ...]
    per_cell: tuple[str, ...]
    capacity: int


def encoding_schedule(workload: Workload) -> EncodingSchedule:
    """The first set that does not fit beside those before it ends what is encoded ahead: what its cells keep would
    push out features of later sets before they are used."""
    from vlm import service

    needed = feature_bytes(workload)
    capacity, total, ahead = service.feature_disk_room() if needed else 0, 0, list[str]()
    for source, size in needed.items():
        total += size
        if total > capacity:
            break
        ahead.append(source)
    later = [source for source in needed if source not in ahead]
    per_worker = tuple(source for source in later if needed[source] <= capacity)
    return EncodingSchedule(
        tuple(ahead), per_worker, tuple(source for source in later if source not in per_worker), capacity
    )


def encoding_jobs(workload: Workload) -> int:
    """How many jobs encode images ahead, BATCH at a time."""
    counts = image_counts(workload.select(lambda cell: cell.uses_vlm), workload)
    ahead = encoding_schedule(workload).ahead
    return sum(int(-(-(counts[source].train + counts[source].test) // BATCH)) for source in ahead)


def feature_bytes(workload: Workload) -> dict[str, int]:
    """Source → bytes of the features of all its images, mirrored ones too, that the local service's model sees; 0 for
    a model whose configuration is not known."""
    cells = workload.local_vlm_cells
    features = image_features(model_config(cells[0].settings.model)) if cells else None  # a sweep has one model
    sizes = {}
    for source, counts in image_counts(cells, workload).items():
        width, height = mean_size(workload.datasets[source], cells[0].settings.max_side)
        token_bytes = max(1, width * height / features.side**2) * features.token_bytes if features else 0
        sizes[source] = int((counts.train_views + counts.test) * token_bytes)
    return sizes


class ImageFeatures(NamedTuple):
    """side: pixels; a square of so many is one token. token_bytes: of the features of one token in the cache."""

    side: int
    token_bytes: int


def image_features(config: dict[str, Any] | None) -> ImageFeatures | None:
    """Those of a Qwen3-VL by its config.json; None for other models. For each token the cache keeps its embedding and
    one more for every DeepStack layer."""
    try:
        text, vision = (config or {})["text_config"], (config or {})["vision_config"]
        embeddings = 1 + len(vision["deepstack_visual_indexes"])
        side = vision["patch_size"] * vision.get("spatial_merge_size", 2)
        return ImageFeatures(side, embeddings * text["hidden_size"] * item_bytes(config or {}))
    except KeyError:
        return None


def item_bytes(config: dict[str, Any]) -> int:
    """Bytes of a weight. Raises KeyError for a type that is not in the table."""
    declared = (each.get(name) for each in (config, config["text_config"]) for name in ("dtype", "torch_dtype"))
    return ITEM_BYTES[str(next(filter(None, declared), "float32"))]  # some configurations state it of the text alone


def model_config(name: str) -> dict[str, Any] | None:
    """The config.json of a model: as published for Qwen3-VL, else from its folder or the hub; None where it cannot be
    read: loading the model says why."""
    name = models.full_name(name)
    if not is_local(name) and (published := published_configs().get(name.partition("@")[0])):
        return published
    try:
        config: dict[str, Any] = json.loads(Path(models.source(name), "config.json").read_text(encoding="utf-8"))
        return config
    except (OSError, ValueError, KshotError):
        return None


def is_local(name: str) -> bool:
    """Whether a model comes with kshot or is a folder."""
    return name in models.MODELS or (Path(name) / "config.json").is_file()


@cache
def published_configs() -> dict[str, dict[str, Any]]:
    """Hub id → configuration, of every size of Qwen3-VL."""
    configs = json.loads(CONFIGS.read_text(encoding="utf-8"))
    return {hub_id: configs[size] for size, hub_id in models.SIZES.items()}
