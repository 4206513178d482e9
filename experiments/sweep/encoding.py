"""Which images the vision tower sees once for a whole sweep: those whose features the disk cache can hold until then.

All that are encoded ahead are encoded before the first cell. Where a sweep has more features than the cache keeps (see
`vlm.service`), the least recently used go, which a later data set's would be; so its cells encode its images.
Encodes none.
"""

from dataclasses import dataclass

from experiments.sweep.shapes import vlm_of
from experiments.sweep.workload import CellSpec, DatasetInfo, Workload, images, sides, work

PART = 64  # images that are encoded at a time


@dataclass(frozen=True)
class EncodingSchedule:
    """Sources, in the order of the sweep, by when the tower sees their images.

    once: before the first cell, for all. worker: in the cells of each worker, at first; they fit alone, but not beside
    those before them. cell: again in every cell, as they do not fit alone. room: bytes that the cache keeps.
    """

    once: tuple[str, ...]
    worker: tuple[str, ...]
    cell: tuple[str, ...]
    room: int


def feature_bytes(todo: Workload) -> dict[str, int]:
    """Source → bytes of the features of all its images that the local service's model sees, mirrored twins too; 0 for a
    model whose sizes nobody knows."""
    looking = todo.where(lambda part: part.looks) if todo.service == "local" else []
    shape = vlm_of(looking[0].settings.model) if looking else None  # a sweep has one model
    found = {}
    for source, each in images(looking, todo).items():
        width, height = sides(todo.sets[source], looking[0].settings.max_side)
        tokens = max(1, width * height / (shape.patch * shape.merge) ** 2) if shape else 0
        found[source] = int((each.shown + each.test) * tokens * (shape.image_bytes_per_token if shape else 0))
    return found


def encoding_schedule(todo: Workload) -> EncodingSchedule:
    """A set that does not fit beside those before it ends what is encoded ahead: what its cells keep would push out
    features of later sets before they are used."""
    needed = feature_bytes(todo)
    room, total, once = _room() if needed else 0, 0, list[str]()
    for source, size in needed.items():
        total += size
        if total > room:
            break
        once.append(source)
    later = [source for source in needed if source not in once]
    alone = tuple(source for source in later if needed[source] <= room)
    return EncodingSchedule(tuple(once), alone, tuple(source for source in later if source not in alone), room)


def shared(todo: Workload) -> tuple[str, ...]:
    """The sources whose images are encoded once for all cells, in the order of the sweep."""
    return encoding_schedule(todo).once


def encodings(todo: Workload) -> int:
    """How many jobs encode them, each PART images."""
    drawn = images(todo.where(lambda part: part.looks), todo)
    return sum(int(-(-(drawn[source].train + drawn[source].test) // PART)) for source in shared(todo))


def seen_in_cell(part: CellSpec, known: DatasetInfo) -> int:
    """Images that the tower sees in a cell of which it keeps nothing for the next: each that trains once, also mirrored
    where a model is tuned, and each that is asked about once for the choice and once for the answer."""
    does = work(part, known)
    twins = does.fitted * (2 if known.hflip > 0 else 1)
    return (min(twins, does.views) if part.trains else does.fitted) + does.scored + does.answered


def disk_limit() -> int:
    """Bytes of features that the disk cache has at most."""
    from vlm import service

    return service.feature_disk_bytes()


def _room() -> int:
    """Bytes that it keeps: at its limit it makes room for what comes next."""
    from vlm import service

    return service.feature_disk_room()
