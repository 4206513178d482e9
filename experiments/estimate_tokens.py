"""How long questions and training examples are, in tokens, from a sample of each data set's images. Knows no cells.

An image's tokens follow from its size after preparation; of a set that is not on this machine every image is taken for
one of SIDES. The text is the prompt's own, from the model's tokenizer.
"""

import io
from collections import Counter
from dataclasses import dataclass

import numpy as np
from PIL import Image

from data.images import prepare
from experiments.config import Settings
from experiments.estimate_parts import Known, Todo
from kshot_errors import ModelError
from kshot_images import open_header

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


def lengths(todo: Todo, seed: int = 0) -> dict[tuple[str, str], Lengths]:
    """(source, prompt) → lengths, for the cells in which a vision-language model is asked or trained.

    Raises ModelError where the model's tokenizer is neither here nor can be fetched.
    """
    asked = {(part.source, part.settings.prompt): part for part in todo.where(lambda part: part.looks)}
    return {key: _lengths(todo.sets[key[0]], part.settings, seed) for key, part in asked.items()}


def reachable(todo: Todo) -> tuple[dict[tuple[str, str], Lengths] | None, str]:
    """The lengths, or None and why they are not known."""
    try:
        return lengths(todo), ""
    except ModelError as error:
        return None, str(error)


def sides(known: Known, max_side: int) -> tuple[float, float]:
    """Width and height in pixels of the images that models are shown, on average over the sample; reads headers."""
    found = [open_header(image).size for image in sample(known)] or [SIDES]
    fitted = [(w * min(1, max_side / max(w, h)), h * min(1, max_side / max(w, h))) for w, h in found]
    return float(np.mean([w for w, _ in fitted])), float(np.mean([h for _, h in fitted]))


def alike(known: Known) -> float:
    """The share of the commonest size among the images of the sample: only images of one size share a pass."""
    found = Counter(open_header(image).size for image in sample(known)) or Counter([SIDES])
    return found.most_common(1)[0][1] / found.total()


def sample(known: Known, seed: int = 0, count: int = SAMPLE) -> list[bytes]:
    """At most `count` of the images that models are shown, drawn by the seed."""
    if known.dataset is None:
        return []
    every = [*known.dataset.train, *known.dataset.test]
    chosen = np.random.default_rng(seed).permutation(len(every))[:count]
    return [every[n].image for n in chosen]


def _lengths(known: Known, settings: Settings, seed: int) -> Lengths:
    from tinker import types

    from vlm.inputs import ImageRule
    from vlm.local.loading import load_tokenizer
    from vlm.prompts import Prompt, template

    rule, tokenizer = ImageRule.from_pretrained(settings.model), load_tokenizer(settings.model)
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
