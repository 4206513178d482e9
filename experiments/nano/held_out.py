"""What the nano pair is worth on classes that it never learnt: few-shot accuracy on the words of VALIDATION.

The same drawings, split and methods as in the demo, on other classes. What is chosen about the recipe is chosen here.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean

from data import icons
from data.catalog import find
from data.core import Images
from data.fewshot import k_shot
from data.images import prepare_all
from experiments.config import Settings
from experiments.methods import METHODS, Task
from experiments.nano.subjects import VALIDATION


def accuracy(
    method: str, settings: Settings, shots: int, seeds: Sequence[int] = (0, 1, 2), root: Path | None = None
) -> float:
    """Share of test images named right, a mean over seeds; settings name the model or backbone, a folder as a rule.

    A class with fewer designs than the shots takes part with what it has ("cup").
    """
    row = replace(find("icons"), classes=VALIDATION)
    dataset = icons.load(row, root=root, split_seed=settings.split_seed)
    test = prepare_all(dataset.test, max_side=settings.max_side, hflip=False)
    found = []
    for seed in seeds:
        chosen = k_shot(dataset.train, dataset.classes, shots, seed, allow_fewer=True) if shots else []
        train = prepare_all([dataset.train[n] for n in chosen], max_side=settings.max_side, hflip=True)
        task = Task(dataset.classes, train, Images(test), seed, settings, row.hflip)
        scores = METHODS[method].run(task).scores
        found.append(float((scores.argmax(1) == [example.label for example in test]).mean()))
    return mean(found)
