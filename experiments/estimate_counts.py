"""How much there is to do, in cells, images, steps and tokens. Knows no times and no bytes."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from experiments.estimate_parts import Known, Part, Todo
from experiments.estimate_tokens import Lengths
from experiments.run import VALIDATION


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


def work(part: Part, known: Known) -> Work:
    """What a cell does: constant compute for what trains, whatever the shots."""
    s, learns = part.settings, part.row.learns
    steps = -(-s.views_per_class * known.classes // s.batch_size) if part.trains else 0
    fitted = min(part.shots * known.classes, known.train) if learns else 0
    validated = _validated(part, known)
    return Work(steps, steps * s.batch_size, fitted, known.tested(s) + validated, known.tested(s) if part.asks else 0)


def counts(todo: Todo, lengths: Mapping[tuple[str, str], Lengths] | None) -> Counts:
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


def images(parts: Sequence[Part], todo: Todo) -> dict[str, Images]:
    """Source → the distinct images that these cells see."""
    by_source: dict[str, list[Part]] = defaultdict(list)
    for part in parts:
        by_source[part.source].append(part)
    return {source: _images(of, todo.sets[source]) for source, of in by_source.items()}


def tower_images(todo: Todo) -> int:
    """Distinct ones that the local service's vision tower encodes: mirrored ones too, where any trains."""
    if todo.service != "local":
        return 0
    drawn = images(todo.where(lambda part: part.looks), todo)
    return round(sum(each.shown + each.test for each in drawn.values()))


def backbone_images(todo: Todo) -> Iterator[tuple[Part, Images]]:
    """A cell of each frozen encoder (backbone, readout, image size) and data set, and the images it encodes once."""
    alike: dict[tuple[object, ...], list[Part]] = defaultdict(list)
    for part in todo.where(lambda part: part.encodes and not part.trains):
        s = part.settings
        alike[part.source, s.backbone, s.readout, s.image_size].append(part)
    for same in alike.values():
        yield same[0], _images(same, todo.sets[same[0].source])


def _images(parts: list[Part], known: Known) -> Images:
    settings = parts[0].settings
    learning = [part for part in parts if part.row.learns]
    shots = max((part.shots for part in learning), default=0)
    train = known.drawn({part.seed for part in learning}, shots, settings)
    mirrored = known.hflip > 0 and bool(learning)
    return Images(train, train * (2 if mirrored else 1), known.tested(settings))


def _validated(part: Part, known: Known) -> int:
    """Labelled images on which the calibration is chosen."""
    if not (part.asks and part.row.learns and part.settings.calibration == "validated"):
        return 0
    return min(part.shots, VALIDATION) * known.classes
