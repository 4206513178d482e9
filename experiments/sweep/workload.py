"""What a sweep has to do: its cells, their data sets, how many different images these cells see, and which of them the
vision tower encodes once for all cells.

A data set that is here is counted exactly; of a benchmark that is not, the catalog has the published numbers. Images
whose features the disk cache can keep (see `vlm.service`) are encoded before the first cell. Beyond that the cache
drops the least recently used, which would be those of a later data set: so the cells of that set encode them.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data import catalog, pack
from data.benchmarks.sources import choose_source, hub_pack
from data.dataset import Access, Dataset, clean_name
from data.fewshot import images_per_class
from data.hub import HubName
from experiments.sweep.cells import Job
from experiments.sweep.config import Settings, Sweep
from experiments.sweep.methods import METHODS, Method
from experiments.sweep.run import to_encode
from kshot.errors import InputError, KshotError
from kshot.images import open_header
from kshot.untrusted import parse_json, read_file
from vlm import models
from vlm.places import first_device

SAMPLE = 32  # images of a data set that are measured, at most
PHOTOGRAPH = 480, 360  # pixels, width and height, of every image of a data set that is not here
BATCH = 64  # images that one job encodes
CONFIGS = ("qwen3_vl_configs.json", "qwen3_5_configs.json")  # by short name, as published: what sizes follow from
KINDS = ("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")  # whose images become tokens alike
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}


class CellSpec(NamedTuple):
    """A cell, as far as its cost depends on it. source: its data set as the sweep names it."""

    source: str
    method: str
    shots: int
    seed: int
    settings: Settings

    @property
    def spec(self) -> Method:
        return METHODS[self.method]

    @property
    def variant(self) -> tuple[Any, ...]:
        """What the time of its steps depends on: the method, and the settings it reads but those of the data."""
        return self.method, *(getattr(self.settings, name) for name in self.spec.settings if name != "hflip")


@dataclass(frozen=True)
class DatasetInfo:
    """The size of a data set. train, test: numbers of images. class_names: () where they are not known.
    dataset: the set itself, where it is here. access: how workers get it."""

    classes: int
    class_names: tuple[str, ...]
    train: int
    test: int
    dataset: Dataset | None = None
    access: Access = field(default_factory=Access)

    def test_count(self, settings: Settings) -> int:
        """Test images that are used."""
        return self.test if settings.limit_test is None else min(settings.limit_test, self.test)

    def train_count(self, seeds: Iterable[int], shots: int, settings: Settings) -> float:
        """Different training images of these seeds at these shots; of a set that is not here those to be expected,
        where each of n images of a class is drawn with probability shots/n."""
        if not shots:
            return 0
        if self.dataset is not None:
            return len(to_encode(self.dataset, seeds, shots, settings))
        return self.train * (1 - (1 - min(shots / (self.train / self.classes), 1)) ** len(set(seeds)))


@dataclass(frozen=True)
class Workload:
    """Cells in the order in which they run, and their data sets by source. service: what computes them ("local",
    "tinker" or an address). device: its kind, cpu or cuda."""

    cells: Sequence[CellSpec]
    datasets: Mapping[str, DatasetInfo]
    service: str = "local"
    device: str = "cpu"

    @cached_property
    def missing(self) -> list[str]:
        """Sources of the data sets that are not on this machine."""
        return [source for source, info in self.datasets.items() if info.dataset is None]

    def select(self, wanted: Callable[[CellSpec], bool]) -> list[CellSpec]:
        return [cell for cell in self.cells if wanted(cell)]

    @cached_property
    def local_vlm_cells(self) -> list[CellSpec]:
        """Cells in which the local service runs a vision-language model."""
        return self.select(lambda cell: cell.spec.uses_vlm) if self.service == "local" else []


def of_jobs(jobs: Sequence[Job], datasets: Mapping[str, Dataset]) -> Workload:
    """The workload of some jobs of a plan. datasets: by source, as the plan has them."""
    cells = [CellSpec(job.source, job.cell.method, job.cell.shots, job.cell.seed, job.settings) for job in jobs]
    accesses = {job.source: job.access for job in jobs}
    infos = {source: _loaded(datasets[source], access) for source, access in accesses.items()}
    return Workload(cells, infos, *((jobs[0].service, _kind(jobs[0].device)) if jobs else ()))


def _kind(device: str) -> str:
    """Of a place."""
    return first_device(device).partition(":")[0]


def of_sweep(sweep: Sweep, *, service: str = "local", device: str = "cpu", access: Access | None = None) -> Workload:
    """The workload of a sweep before its data is fetched: sets that are here are loaded. Raises what `catalog.load`
    raises; InputError for a set that is not here and whose size is not known."""
    accesses = catalog.accesses(sweep.datasets, access or Access(), sweep.protocol)
    infos = {source: _info(source, each, sweep.settings.split_seed) for source, each in accesses.items()}
    sweep, _ = adapt(sweep, access or Access(), {source: info.dataset for source, info in infos.items()})
    cells = [
        CellSpec(source, method, shots, seed, settings)
        for source in sweep.datasets
        for here in [sweep.on(infos[source].classes, catalog.find(source).hflip)]
        for method in sorted(sweep.methods, key=lambda name: -METHODS[name].cost)
        for settings, shots, seed in here.points(source, METHODS[method].settings, learns=METHODS[method].learns)
    ]
    return Workload(cells, infos, service, _kind(device))


def adapt(sweep: Sweep, access: Access, datasets: Mapping[str, Dataset | None]) -> tuple[Sweep, list[str]]:
    """The sweep with shots that its data sets have, where it caps them; and a line on each that is capped, has more
    views for its few classes, or lacks an option of the command line or preset. datasets: None for one not here."""
    asked = replace(access, protocol=access.protocol or sweep.protocol)
    caps, lines = dict(sweep.most_shots), list[str]()
    taken = catalog.accesses(sweep.datasets, access, sweep.protocol)
    may = sweep.cap_shots and not sweep.settings.allow_fewer and any(METHODS[name].learns for name in sweep.methods)
    trains = any(METHODS[name].trains for name in sweep.methods)
    for source, dataset in datasets.items():
        name, own = (dataset.name, dataset.protocol) if dataset else (source, catalog.find(source).protocol)
        for option in catalog.unused(asked, taken[source]):
            if option == "protocol":
                lines.append(f"protocol {asked.protocol} is not one of {name}; its own, {own}, is used")
            else:
                lines.append(f"--{option.replace('_', '-')} is not for {name} and is not used there")
        counts = images_per_class(dataset.train, dataset.classes) if dataset and may else {"": 0}
        smallest = min(counts, key=lambda name: counts[name])
        if 0 < (most := counts[smallest]) < max(sweep.shots_of(source)):
            caps[source] = most
            lines.append(f"{name}: shots stop at {most}: class {smallest!r} has no more train images")
        classes, usual = len(dataset.classes) if dataset else 0, sweep.settings
        if classes and trains and (views := sweep.on(classes, 0).settings.views_per_class) > usual.views_per_class:
            why = f"{classes} classes would have {usual.steps(classes)} steps of training"
            keep = f"--set views_per_class={usual.views_per_class} keeps that"
            lines.append(f"{name}: {views} views of each class, not {usual.views_per_class}: {why} ({keep})")
    return sweep.model_copy(update={"most_shots": caps}), lines


def is_here(source: str, access: Access) -> bool:
    """Whether a data set can be loaded without fetching anything."""
    spec = catalog.find(source)
    if source.startswith(catalog.HUB):
        return pack.is_here(hub_pack(HubName.parse(spec.location), (), access.label_column))
    if not spec.sources:
        return True
    kind, protocol = choose_source(spec, access)
    return kind != "hub" or pack.is_here(hub_pack(HubName(spec.hub, spec.revision), protocol.splits))


def _info(source: str, access: Access, split_seed: int) -> DatasetInfo:
    spec = catalog.find(source)
    if is_here(source, access):
        return _loaded(catalog.load(source, access=access, split_seed=split_seed), access)
    if not spec.sources:
        get = f"kshot data get {source}" + (f" --label-column {access.label_column}" if access.label_column else "")
        raise InputError(f"{source} is not on this machine and nothing is known of its size; `{get}`")
    protocol = choose_source(spec, access)[1]
    names = tuple(map(clean_name, spec.classes)) if spec.classes and len(spec.classes) == protocol.classes else ()
    train, test = protocol.train or spec.train, protocol.test or spec.test
    return DatasetInfo(protocol.classes, names, train, test, access=access)


def _loaded(dataset: Dataset, access: Access) -> DatasetInfo:
    names = dataset.classes
    return DatasetInfo(len(names), names, len(dataset.train), len(dataset.test), dataset, access)


@dataclass(frozen=True)
class ImageCounts:
    """Different images of one data set. train: without mirrored ones; train_views: with them."""

    train: float
    train_views: float
    test: int


def image_counts(cells: Sequence[CellSpec], workload: Workload) -> dict[str, ImageCounts]:
    """Source → the images that these cells see."""
    by_source: dict[str, list[CellSpec]] = defaultdict(list)
    for cell in cells:
        by_source[cell.source].append(cell)
    return {source: _image_counts(of, workload.datasets[source]) for source, of in by_source.items()}


def backbone_image_counts(workload: Workload) -> Iterator[tuple[CellSpec, ImageCounts]]:
    """For each frozen encoder (backbone, readout, image size) and data set one of its cells, and the images that it
    encodes, each once."""
    alike: dict[tuple[object, ...], list[CellSpec]] = defaultdict(list)
    for cell in workload.select(lambda cell: cell.spec.uses_backbone and not cell.spec.trains):
        s = cell.settings
        alike[cell.source, s.backbone, s.readout, s.image_size].append(cell)
    for same in alike.values():
        yield same[0], _image_counts(same, workload.datasets[same[0].source])


def _image_counts(cells: list[CellSpec], info: DatasetInfo) -> ImageCounts:
    settings, learning = cells[0].settings, [cell for cell in cells if cell.spec.learns]
    shots = max((cell.shots for cell in learning), default=0)
    train = info.train_count({cell.seed for cell in learning}, shots, settings)
    return ImageCounts(train, train * (2 if settings.hflip and learning else 1), info.test_count(settings))


def sample(info: DatasetInfo) -> list[bytes]:
    """At most SAMPLE images of a data set, always the same; none of a set that is not here."""
    images = [*info.dataset.train, *info.dataset.test] if info.dataset else []
    return [images[n].image for n in np.random.default_rng(0).permutation(len(images))[:SAMPLE]]


def image_sizes(info: DatasetInfo) -> list[tuple[int, int]]:
    """Width and height in pixels of the images of the sample, from their headers."""
    return [open_header(image).size for image in sample(info)] or [PHOTOGRAPH]


def mean_size(info: DatasetInfo, max_side: int) -> tuple[float, float]:
    """Width and height in pixels of prepared images, on average over the sample."""
    fitted = [(w * min(1, max_side / max(w, h)), h * min(1, max_side / max(w, h))) for w, h in image_sizes(info)]
    return float(np.mean([w for w, _ in fitted])), float(np.mean([h for _, h in fitted]))


@dataclass(frozen=True)
class EncodingSchedule:
    """When the vision tower encodes the images of each source: ahead; in each worker once, where features fit into the
    cache but not beside those before them; in every cell, where they do not fit. capacity: bytes that the cache keeps.
    mirrored: whether mirrored twins are encoded too."""

    ahead: tuple[str, ...]
    per_worker: tuple[str, ...]
    per_cell: tuple[str, ...]
    capacity: int
    mirrored: bool


def encoding_schedule(workload: Workload) -> EncodingSchedule:
    """The first set that does not fit beside those before it ends what is encoded ahead: what its cells keep would
    push out features of later sets before they are used."""
    from vlm import service

    needed = feature_bytes(workload)
    capacity, total, ahead = service.feature_disk_bytes(kept=True) if needed else 0, 0, list[str]()
    for source, size in needed.items():
        total += size
        if total > capacity:
            break
        ahead.append(source)
    later = [source for source in needed if source not in ahead]
    per_worker = tuple(source for source in later if needed[source] <= capacity)
    per_cell = tuple(source for source in later if needed[source] > capacity)
    mirrored = any(cell.settings.hflip and cell.spec.learns for cell in workload.local_vlm_cells)
    return EncodingSchedule(tuple(ahead), per_worker, per_cell, capacity, mirrored)


def encoding_parts(train: float, test: int) -> int:
    """How many jobs encode so many images of a data set, BATCH at a time."""
    return int(-(-(train + test) // BATCH))


def encoding_jobs(workload: Workload) -> int:
    """How many jobs encode images ahead."""
    counts = image_counts(workload.select(lambda cell: cell.spec.uses_vlm), workload)
    return sum(
        encoding_parts(counts[source].train, counts[source].test) for source in encoding_schedule(workload).ahead
    )


def feature_bytes(workload: Workload) -> dict[str, int]:
    """Source → bytes of the features of all its images, mirrored ones too, that the local service's model sees; 0 for
    a model whose configuration is not known."""
    cells = workload.local_vlm_cells
    config = model_config(cells[0].settings.model) if cells else None  # a sweep has one model
    features = image_features(config, on_cpu=workload.device == "cpu")
    sizes = {}
    for source, counts in image_counts(cells, workload).items():
        width, height = mean_size(workload.datasets[source], cells[0].settings.max_side)
        token_bytes = features.tokens(width, height) * features.token_bytes if features else 0
        sizes[source] = int((counts.train_views + counts.test) * token_bytes)
    return sizes


class ImageFeatures(NamedTuple):
    """side: pixels; a square of so many is one token. token_bytes: of the features of one token in the cache."""

    side: int
    token_bytes: int

    def tokens(self, width: float, height: float) -> float:
        """Of an image of so many pixels, about: without the processor's rounding."""
        return max(1, width * height / self.side**2)


def image_features(config: dict[str, Any] | None, *, on_cpu: bool = False) -> ImageFeatures | None:
    """Those of a Qwen3-VL or Qwen3.5 by its config.json; None for other models. For each token the cache keeps its
    embedding and one more for every DeepStack layer. on_cpu: see `item_bytes`."""
    if (config or {}).get("model_type") not in KINDS:
        return None
    try:
        text, vision = (config or {})["text_config"], (config or {})["vision_config"]
        embeddings = 1 + len(vision.get("deepstack_visual_indexes", ()))
        side = vision["patch_size"] * vision.get("spatial_merge_size", 2)
        return ImageFeatures(side, embeddings * text["hidden_size"] * item_bytes(config or {}, on_cpu=on_cpu))
    except KeyError:
        return None


def item_bytes(config: dict[str, Any], *, on_cpu: bool = False) -> int:
    """Bytes of a weight: as stored and on a GPU, or in a CPU's memory. Raises KeyError for a type that is not in the
    table."""
    declared = (each.get(name) for each in (config, config["text_config"]) for name in ("dtype", "torch_dtype"))
    dtype = str(next(filter(None, declared), "float32"))  # some configurations state it of the text alone
    return ITEM_BYTES["float32" if on_cpu and dtype == "float16" else dtype]  # as the engine reads it there


def model_config(name: str) -> dict[str, Any] | None:
    """The config.json of a model: as published for one with a short name, else from its folder or the hub; None where
    it cannot be read: loading the model says why."""
    name = models.full_name(name)
    if not models.is_here(name) and (published := published_configs().get(name.partition("@")[0])):
        return published
    try:
        return dict(parse_json(read_file(Path(models.source(name), "config.json"))))
    except (OSError, ValueError, KshotError):
        return None


@cache
def published_configs() -> dict[str, dict[str, Any]]:
    """Hub id → configuration, of every model with a short name."""
    texts = (Path(__file__).with_name(name).read_text(encoding="utf-8") for name in CONFIGS)
    return {models.SHORT[name]: config for text in texts for name, config in json.loads(text).items()}
