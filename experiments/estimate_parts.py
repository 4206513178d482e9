"""What there is to do: the cells whose cost is estimated, and what is known of their data sets.

A set that is on this machine is known exactly. Of a benchmark that is not, the published numbers are known: enough to
say what it would take before it is fetched. Knows no times and no bytes.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

from data import catalog, pack
from data.core import Dataset
from data.row import Access, Row
from experiments.config import Settings, Sweep
from experiments.job import Job
from experiments.methods import METHODS, Method
from experiments.run import to_encode
from kshot_errors import InputError
from kshot_files import cache_folder


class Part(NamedTuple):
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
class Known:
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
    def of(cls, source: str, dataset: Dataset, access: Access) -> "Known":
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
class Todo:
    """The cells in the order in which they are run, and their data sets by source. service, device: who computes, and
    on what kind of device: cpu or cuda."""

    parts: Sequence[Part]
    sets: Mapping[str, Known]
    service: str = "local"
    device: str = "cpu"

    @cached_property
    def missing_sets(self) -> list[str]:
        """Sources of the sets that are not on this machine."""
        return [source for source, known in self.sets.items() if known.dataset is None]

    def where(self, chosen: Callable[[Part], bool]) -> list[Part]:
        return [part for part in self.parts if chosen(part)]


def of_jobs(jobs: Sequence[Job], datasets: Mapping[str, Dataset]) -> Todo:
    """What these jobs of a plan do. datasets: by source, as the plan has them."""
    parts = [Part(job.source, job.cell.method, job.cell.shots, job.cell.seed, job.settings) for job in jobs]
    ways = {job.source: job.access for job in jobs}
    sets = {source: Known.of(source, datasets[source], ways[source]) for source in ways}
    return Todo(parts, sets, *((jobs[0].service, jobs[0].device) if jobs else ()))


def of_sweep(sweep: Sweep, *, service: str = "local", device: str = "cpu", access: Access | None = None) -> Todo:
    """What a sweep does, before any of its data is fetched: sets that are here are loaded, of the others the catalog
    says how large they are. Raises as `catalog.load` does; InputError for a set that is not here and of which nothing
    is known."""
    ways = {source: _access(source, sweep, access or Access()) for source in sweep.datasets}
    sets = {source: _known(source, way, sweep.settings.split_seed) for source, way in ways.items()}
    parts = [
        Part(source, method, shots, seed, settings)
        for source in sweep.datasets
        for method in sorted(sweep.methods, key=lambda name: -METHODS[name].cost)
        for settings, shots, seed in sweep.points(source, METHODS[method].settings, learns=METHODS[method].learns)
    ]
    return Todo(parts, sets, service, device.partition(":")[0])


def is_here(source: str, access: Access) -> bool:
    """Whether a data set can be had without fetching anything."""
    row = catalog.find(source)
    if source.startswith(catalog.HUB):
        identity, _, revision = row.location.partition("@")
        return has_pack(identity, revision, ())
    if not row.sources:
        return True
    from data.benchmarks import chosen

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


def _known(source: str, access: Access, split_seed: int) -> Known:
    row = catalog.find(source)
    if is_here(source, access):
        return Known.of(source, catalog.load(source, access=access, split_seed=split_seed), access)
    if not row.sources:
        raise InputError(f"{source} is not on this machine and nothing is known of its size; `kshot data get {source}`")
    return _published(row, access)


def _published(row: Row, access: Access) -> Known:
    from data.benchmarks import chosen

    protocol = chosen(row, access)[1]
    names = tuple(map(row.clean, row.classes)) if row.classes and len(row.classes) == protocol.classes else ()
    train, test = protocol.train or row.train, protocol.test or row.test
    return Known(row.name, protocol.classes, names, train, test, row.hflip, access=access)
