"""How much a sweep computes: cells, optimizer steps, images and tokens.

Tokens are means over a sample of each data set's images: the prompt is the real one, from the model's tokenizer, and
the tokens of an image follow from its prepared size.
"""

import io
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image

from data.preparation import prepare
from experiments.sweep.config import Settings
from experiments.sweep.run import VALIDATION
from experiments.sweep.workload import (
    PHOTOGRAPH,
    CellSpec,
    DatasetInfo,
    Workload,
    backbone_image_counts,
    image_counts,
    sample,
)
from kshot.errors import ModelError

CLASS_NAME = "the name of some class"  # where none is known


@dataclass(frozen=True)
class Lengths:
    """Mean numbers of tokens. prompt: up to where the class name begins. training: of a whole example. answer: of the
    class name and the end of the turn. assumed: whether no image of the data set could be measured."""

    prompt: float
    training: float
    answer: float
    assumed: bool = False


LengthTable = Mapping[tuple[str, str], Lengths]  # by (source, prompt template)


def prompt_lengths(workload: Workload) -> tuple[LengthTable | None, str]:
    """Those of the cells with a vision-language model; None, and why, where its tokenizer cannot be loaded."""
    cells = {(c.source, c.settings.prompt): c for c in workload.select(lambda cell: cell.spec.uses_vlm)}
    try:
        return {key: _lengths(workload.datasets[key[0]], cell.settings) for key, cell in cells.items()}, ""
    except ModelError as error:
        return None, str(error)


def _lengths(info: DatasetInfo, settings: Settings) -> Lengths:
    from vlm import service
    from vlm.inputs import ImageRule
    from vlm.prompts import Prompt, template

    rule, names = ImageRule.from_pretrained(settings.model), info.class_names or (CLASS_NAME,)
    prompt = Prompt(service.tokenizer(settings.model), rule, names, template(settings.prompt))
    images = sample(info)
    prepared = [prepare(image, max_side=settings.max_side) for image in images or [_photograph()]]
    prompts = [prompt.question(image) for image in prepared]
    length = float(np.mean([each.length for each in prompts]))
    name, end = float(np.mean([len(choice) for choice in prompt.choices])), len(prompt.stops)
    return Lengths(length, length + name + end - 1, name + end, assumed=not images)


def _photograph() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", PHOTOGRAPH).save(buffer, "JPEG")
    return buffer.getvalue()


@dataclass(frozen=True)
class CellWork:
    """What one cell computes. views: training images shown, with repetitions. fitted: training images of a head.
    scored, generated: images whose classes are scored, for which an answer is generated."""

    steps: int
    views: int
    fitted: int
    scored: int
    generated: int


def cell_work(cell: CellSpec, info: DatasetInfo) -> CellWork:
    """Constant compute for what trains, whatever the shots."""
    s, spec, tested = cell.settings, cell.spec, info.test_count(cell.settings)
    steps = s.steps(info.classes) if spec.trains else 0
    fitted = min(cell.shots * info.classes, info.train) if spec.learns else 0
    validated = spec.generates and spec.learns and s.calibration == "validated"  # labelled images are scored too
    scored = tested + (min(cell.shots, VALIDATION) * info.classes if validated else 0)
    return CellWork(steps, steps * s.batch_size, fitted, scored, tested if spec.generates else 0)


def encoded_in_cell(cell: CellSpec, info: DatasetInfo) -> int:
    """Images that the vision tower encodes in a cell whose features are not kept: each that trains once, also mirrored
    where a model is trained, and each test image once to score it and once to generate its answer."""
    work = cell_work(cell, info)
    with_mirrored = work.fitted * (2 if cell.settings.hflip else 1)
    return (min(with_mirrored, work.views) if cell.spec.trains else work.fitted) + work.scored + work.generated


@dataclass(frozen=True)
class Counts:
    """Of a whole sweep. cells, steps: by method. train, test: different images.

    tower, backbone: different images that the vision tower and frozen backbones encode. prompts: each image once to
    score and once to generate. training_tokens, prompt_tokens: None where a tokenizer is missing.
    """

    cells: Mapping[str, int]
    steps: Mapping[str, int]
    train: int
    test: int
    tower: int
    backbone: int
    prompts: int
    training_tokens: int | None
    prompt_tokens: int | None


def count(workload: Workload, lengths: LengthTable | None) -> Counts:
    """The counts of a sweep. lengths: None where a tokenizer is missing."""
    steps: Counter[str] = Counter()
    training = prompted = prompts = 0.0
    for cell in workload.cells:
        work = cell_work(cell, workload.datasets[cell.source])
        if cell.spec.trains:
            steps[cell.method] += work.steps
        if cell.spec.uses_vlm:
            here = work.scored + work.generated if cell.spec.generates else 0
            prompts += here
            if lengths is not None:
                length = lengths[cell.source, cell.settings.prompt]
                training += work.views * length.training
                prompted += here * length.prompt
    images = image_counts(workload.cells, workload).values()
    tower = image_counts(workload.local_vlm_cells, workload).values()
    return Counts(
        cells=Counter(cell.method for cell in workload.cells),
        steps=steps,
        train=round(sum(each.train for each in images)),
        test=sum(each.test for each in images),
        tower=round(sum(each.train_views + each.test for each in tower)),
        backbone=round(sum(each.train + each.test for _, each in backbone_image_counts(workload))),
        prompts=round(prompts),
        training_tokens=None if lengths is None else round(training),
        prompt_tokens=None if lengths is None else round(prompted),
    )
