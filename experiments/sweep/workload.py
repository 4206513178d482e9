"""What there is to do: the cells whose cost is estimated, and what is known of their data sets.

A set that is on this machine is known exactly. Of a benchmark that is not, the published numbers are known: enough to
say what it would take before it is fetched. Knows no times and no bytes.

TODO How much there is to do, in cells, images, steps and tokens. Knows no times and no bytes.
TODO How long questions and training examples are, in tokens, from a sample of each data set's images. Knows no cells.

An image's tokens follow from its size after preparation; of a set that is not on this machine every image is taken for
one of SIDES. The text is the prompt's own, from the model's tokenizer.
"""

import io
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from data import catalog, pack
from data.dataset import Access, Dataset, DatasetSpec
from data.preparation import prepare
from experiments.sweep.cells import Job
from experiments.sweep.config import Settings, Sweep
from experiments.sweep.methods import METHODS, Method
from experiments.sweep.run import VALIDATION, to_encode
from kshot.errors import InputError, ModelError
from kshot.files import cache_folder
from kshot.images import open_header

# ---- What there is to do: the cells whose cost is estimated, and what is known of their data sets.


class CellSpec(NamedTuple):
    """A cell as far as its cost goes. source: its data set as it is named here."""

    source: str
    method: str
    shots: int
    seed: int
    settings: Settings

    @property
    def row(self) -> Method:
        return METHODS[self.method]

    @property
    def looks(self) -> bool:
        """Whether a vision-language model sees images in it."""
        return "model" in self.row.settings

    @property
    def encodes(self) -> bool:
        """Whether a backbone does."""
        return "backbone" in self.row.settings

    @property
    def trains(self) -> bool:
        """Whether a model takes optimizer steps in it."""
        return "views_per_class" in self.row.settings

    @property
    def asks(self) -> bool:
        """Whether a model is asked for each test image, to choose and to answer freely."""
        return "answer_tokens" in self.row.settings

    @property
    def variant(self) -> tuple[Any, ...]:
        """What the time of its steps depends on: the method, and the settings it reads but those of the data."""
        return self.method, *(getattr(self.settings, name) for name in self.row.settings)


@dataclass(frozen=True)
class DatasetInfo:
    """A data set. names: its class names, () where they are not known. train, test: numbers of images.

    dataset: the set itself where it is on this machine; its access tells a worker how it is had.
    """

    name: str
    classes: int
    names: tuple[str, ...]
    train: int
    test: int
    hflip: float
    dataset: Dataset | None = None
    access: Access = field(default_factory=Access)

    @classmethod
    def of(cls, source: str, dataset: Dataset, access: Access) -> "DatasetInfo":
        """A set that is here."""
        names, hflip = dataset.classes, catalog.find(source).hflip
        return cls(dataset.name, len(names), names, len(dataset.train), len(dataset.test), hflip, dataset, access)

    def tested(self, settings: Settings) -> int:
        """Test images that are shown."""
        return self.test if settings.limit_test is None else min(settings.limit_test, self.test)

    def drawn(self, seeds: Iterable[int], shots: int, settings: Settings) -> float:
        """Distinct training images of these seeds at these shots; of a set that is not here, as many as are expected
        where each of n images of a class is drawn with probability shots/n."""
        if not shots:
            return 0
        if self.dataset is not None:
            return len(to_encode(self.dataset, seeds, shots, settings))
        each = self.train / self.classes
        return self.train * (1 - (1 - min(shots / each, 1)) ** len(set(seeds)))


@dataclass(frozen=True)
class Workload:
    """The cells in the order in which they are run, and their data sets by source. service, device: who computes, and
    on what kind of device: cpu or cuda."""

    parts: Sequence[CellSpec]
    sets: Mapping[str, DatasetInfo]
    service: str = "local"
    device: str = "cpu"

    @cached_property
    def missing_sets(self) -> list[str]:
        """Sources of the sets that are not on this machine."""
        return [source for source, known in self.sets.items() if known.dataset is None]

    def where(self, chosen: Callable[[CellSpec], bool]) -> list[CellSpec]:
        return [part for part in self.parts if chosen(part)]


def of_jobs(jobs: Sequence[Job], datasets: Mapping[str, Dataset]) -> Workload:
    """What these jobs of a plan do. datasets: by source, as the plan has them."""
    parts = [CellSpec(job.source, job.cell.method, job.cell.shots, job.cell.seed, job.settings) for job in jobs]
    ways = {job.source: job.access for job in jobs}
    sets = {source: DatasetInfo.of(source, datasets[source], ways[source]) for source in ways}
    return Workload(parts, sets, *((jobs[0].service, jobs[0].device) if jobs else ()))


def of_sweep(sweep: Sweep, *, service: str = "local", device: str = "cpu", access: Access | None = None) -> Workload:
    """What a sweep does, before any of its data is fetched: sets that are here are loaded, of the others the catalog
    says how large they are. Raises as `catalog.load` does; InputError for a set that is not here and of which nothing
    is known."""
    ways = {source: _access(source, sweep, access or Access()) for source in sweep.datasets}
    sets = {source: _known(source, way, sweep.settings.split_seed) for source, way in ways.items()}
    parts = [
        CellSpec(source, method, shots, seed, settings)
        for source in sweep.datasets
        for method in sorted(sweep.methods, key=lambda name: -METHODS[name].cost)
        for settings, shots, seed in sweep.points(source, METHODS[method].settings, learns=METHODS[method].learns)
    ]
    return Workload(parts, sets, service, device.partition(":")[0])


def is_here(source: str, access: Access) -> bool:
    """Whether a data set can be had without fetching anything."""
    row = catalog.find(source)
    if source.startswith(catalog.HUB):
        identity, _, revision = row.location.partition("@")
        return has_pack(identity, revision, ())
    if not row.sources:
        return True
    from data.benchmarks.sources import chosen

    kind, protocol = chosen(row, access)
    return kind != "hub" or has_pack(row.hub, row.revision, protocol.splits)


def has_pack(hub_id: str, revision: str, splits: Iterable[str]) -> bool:
    """Whether a set of the hub, with these splits at least, has been packed on this machine."""
    for path in cache_folder().glob(f"hub-*-{pack.VERSION}/{pack.FACTS}"):
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        same = facts.get("hub") == hub_id and str(facts.get("revision", "")).startswith(revision)
        if same and set(splits) <= set(facts.get("splits", ())):
            return True
    return False


def _access(source: str, sweep: Sweep, access: Access) -> Access:
    if not catalog.find(source).sources:
        return Access()
    return replace(access, protocol=sweep.protocol) if sweep.protocol else access


def _known(source: str, access: Access, split_seed: int) -> DatasetInfo:
    row = catalog.find(source)
    if is_here(source, access):
        return DatasetInfo.of(source, catalog.load(source, access=access, split_seed=split_seed), access)
    if not row.sources:
        raise InputError(f"{source} is not on this machine and nothing is known of its size; `kshot data get {source}`")
    return _published(row, access)


def _published(row: DatasetSpec, access: Access) -> DatasetInfo:
    from data.benchmarks.sources import chosen

    protocol = chosen(row, access)[1]
    names = tuple(map(row.clean, row.classes)) if row.classes and len(row.classes) == protocol.classes else ()
    train, test = protocol.train or row.train, protocol.test or row.test
    return DatasetInfo(row.name, protocol.classes, names, train, test, row.hflip, access=access)


# ---- How long questions and training examples are, in tokens, from a sample of each data set's images. Knows no

SAMPLE = 32  # images of a data set, at most
SIDES = 480, 360  # width and height of a photograph after preparation, where none can be looked at
NAME = "the name of some class"  # where none is known


@dataclass(frozen=True)
class Lengths:
    """Tokens on average. image: of one image. question: up to where the class name begins. training: of an example.
    answer: of the class name and the end of the turn. assumed: whether no image could be looked at."""

    image: float
    question: float
    training: float
    answer: float
    assumed: bool = False


def lengths(todo: Workload, seed: int = 0) -> dict[tuple[str, str], Lengths]:
    """(source, prompt) → lengths, for the cells in which a vision-language model is asked or trained.

    Raises ModelError where the model's tokenizer is neither here nor can be fetched.
    """
    asked = {(part.source, part.settings.prompt): part for part in todo.where(lambda part: part.looks)}
    return {key: _lengths(todo.sets[key[0]], part.settings, seed) for key, part in asked.items()}


def reachable(todo: Workload) -> tuple[dict[tuple[str, str], Lengths] | None, str]:
    """The lengths, or None and why they are not known."""
    try:
        return lengths(todo), ""
    except ModelError as error:
        return None, str(error)


def sides(known: DatasetInfo, max_side: int) -> tuple[float, float]:
    """Width and height in pixels of the images that models are shown, on average over the sample; reads headers."""
    found = [open_header(image).size for image in sample(known)] or [SIDES]
    fitted = [(w * min(1, max_side / max(w, h)), h * min(1, max_side / max(w, h))) for w, h in found]
    return float(np.mean([w for w, _ in fitted])), float(np.mean([h for _, h in fitted]))


def alike(known: DatasetInfo) -> float:
    """The share of the commonest size among the images of the sample: only images of one size share a pass."""
    found = Counter(open_header(image).size for image in sample(known)) or Counter([SIDES])
    return found.most_common(1)[0][1] / found.total()


def sample(known: DatasetInfo, seed: int = 0, count: int = SAMPLE) -> list[bytes]:
    """At most `count` of the images that models are shown, drawn by the seed."""
    if known.dataset is None:
        return []
    every = [*known.dataset.train, *known.dataset.test]
    chosen = np.random.default_rng(seed).permutation(len(every))[:count]
    return [every[n].image for n in chosen]


def _lengths(known: DatasetInfo, settings: Settings, seed: int) -> Lengths:
    from tinker import types

    from vlm.inputs import ImageRule
    from vlm.prompts import Prompt, template
    from vlm.service import tokenizer as tokenizer_of

    rule, tokenizer = ImageRule.from_pretrained(settings.model), tokenizer_of(settings.model)
    prompt = Prompt(tokenizer, rule, known.names or (NAME,), template(settings.prompt))
    found = sample(known, seed)
    shown = [prepare(image, max_side=settings.max_side) for image in found or [_photograph()]]
    asked = [prompt.question(image) for image in shown]
    question = float(np.mean([each.length for each in asked]))
    image = [chunk.length for each in asked for chunk in each.chunks if isinstance(chunk, types.ImageChunk)]
    name, end = float(np.mean([len(choice) for choice in prompt.choices])), len(prompt.stops)
    return Lengths(float(np.mean(image)), question, question + name + end - 1, name + end, assumed=not found)


def _photograph() -> bytes:
    """An image of the usual size."""
    buffer = io.BytesIO()
    Image.new("RGB", SIDES).save(buffer, "JPEG")
    return buffer.getvalue()


# ---- How much there is to do, in cells, images, steps and tokens. Knows no times and no bytes.


@dataclass(frozen=True)
class Work:
    """What one cell does. fitted: training images of a head. scored, answered: images. views: that training shows."""

    steps: int
    views: int
    fitted: int
    scored: int
    answered: int


@dataclass(frozen=True)
class Counts:
    """Of all cells. cells, steps: by method. train, test: distinct images. flips: training images that are shown
    mirrored too, by the vision-language model.

    tower, backbone: distinct images that the vision tower and frozen backbones encode. asked: questions, each image
    once to choose and once to answer. training_tokens, question_tokens: None where a tokenizer is missing.
    """

    cells: Mapping[str, int]
    steps: Mapping[str, int]
    train: int
    test: int
    tower: int
    backbone: int
    asked: int
    training_tokens: int | None
    question_tokens: int | None


@dataclass(frozen=True)
class Images:
    """Of one data set, for those that encode them alike. train: distinct ones; shown: with their mirrored twins."""

    train: float
    shown: float
    test: int


def work(part: CellSpec, known: DatasetInfo) -> Work:
    """What a cell does: constant compute for what trains, whatever the shots."""
    s, learns = part.settings, part.row.learns
    steps = -(-s.views_per_class * known.classes // s.batch_size) if part.trains else 0
    fitted = min(part.shots * known.classes, known.train) if learns else 0
    validated = _validated(part, known)
    return Work(steps, steps * s.batch_size, fitted, known.tested(s) + validated, known.tested(s) if part.asks else 0)


def counts(todo: Workload, lengths: Mapping[tuple[str, str], Lengths] | None) -> Counts:
    """The counts of a sweep. lengths: (source, prompt) → tokens; None where a tokenizer is missing."""
    steps: Counter[str] = Counter()
    training = questions = asked = 0.0
    for part in todo.parts:
        each = work(part, todo.sets[part.source])
        if part.trains:
            steps[part.method] += each.steps
        if part.looks:
            asks = each.scored + each.answered if part.asks else 0
            asked += asks
            if lengths is not None:
                length = lengths[part.source, part.settings.prompt]
                training += each.views * length.training
                questions += asks * length.question
    drawn = images(todo.parts, todo)
    return Counts(
        cells=Counter(part.method for part in todo.parts),
        steps=steps,
        train=round(sum(each.train for each in drawn.values())),
        test=sum(each.test for each in drawn.values()),
        tower=tower_images(todo),
        backbone=round(sum(each.train + each.test for _, each in backbone_images(todo))),
        asked=round(asked),
        training_tokens=None if lengths is None else round(training),
        question_tokens=None if lengths is None else round(questions),
    )


def images(parts: Sequence[CellSpec], todo: Workload) -> dict[str, Images]:
    """Source → the distinct images that these cells see."""
    by_source: dict[str, list[CellSpec]] = defaultdict(list)
    for part in parts:
        by_source[part.source].append(part)
    return {source: _images(of, todo.sets[source]) for source, of in by_source.items()}


def tower_images(todo: Workload) -> int:
    """Distinct ones that the local service's vision tower encodes: mirrored ones too, where any trains."""
    if todo.service != "local":
        return 0
    drawn = images(todo.where(lambda part: part.looks), todo)
    return round(sum(each.shown + each.test for each in drawn.values()))


def backbone_images(todo: Workload) -> Iterator[tuple[CellSpec, Images]]:
    """A cell of each frozen encoder (backbone, readout, image size) and data set, and the images it encodes once."""
    alike: dict[tuple[object, ...], list[CellSpec]] = defaultdict(list)
    for part in todo.where(lambda part: part.encodes and not part.trains):
        s = part.settings
        alike[part.source, s.backbone, s.readout, s.image_size].append(part)
    for same in alike.values():
        yield same[0], _images(same, todo.sets[same[0].source])


def _images(parts: list[CellSpec], known: DatasetInfo) -> Images:
    settings = parts[0].settings
    learning = [part for part in parts if part.row.learns]
    shots = max((part.shots for part in learning), default=0)
    train = known.drawn({part.seed for part in learning}, shots, settings)
    mirrored = known.hflip > 0 and bool(learning)
    return Images(train, train * (2 if mirrored else 1), known.tested(settings))


def _validated(part: CellSpec, known: DatasetInfo) -> int:
    """Labelled images on which the calibration is chosen."""
    if not (part.asks and part.row.learns and part.settings.calibration == "validated"):
        return 0
    return min(part.shots, VALIDATION) * known.classes
