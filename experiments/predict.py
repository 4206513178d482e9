"""Ask a model about images: an adapter folder, or a model as it is with class names. Knows no terminal.

Images are prepared as in training and answered in windows, so that any number of them takes little memory; the next
window is read and prepared while the model works on this one. An image that cannot be used is an answer too: its error.
"""

import os
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data.images import prepare
from experiments.adapters import CARD, read_card
from experiments.config import Settings
from experiments.pictures import Picture, shown
from kshot_errors import ImageError, InputError

if TYPE_CHECKING:
    from vlm.local.client import LocalServiceClient
    from vlm.local.sampling_client import LocalSamplingClient
    from vlm.prompts import Prompt

WINDOW = 64  # images that are asked about together
CACHE_BYTES = 1 << 30  # of image features: a window's, which are needed twice; later an image is not seen again
METHODS = ("constrained", "likelihood")
Prepared = tuple[Picture, "Future[bytes]"]


@dataclass(frozen=True)
class Source:
    """Where the answers come from. adapter: a folder, or None for a model as it is, with classes.

    The rest is None for what the adapter's folder says: the model, the class names, the prompt (a preset or a
    template), the longest side of an image.
    """

    adapter: Path | None = None
    model: str | None = None
    classes: tuple[str, ...] | None = None
    prompt: str | None = None
    max_side: int | None = None
    device: str = "cpu"


@dataclass(frozen=True)
class Answer:
    """probabilities: (classes,) float64 that sum to 1. greedy: the label that constrained decoding writes, token by
    token, where it was asked for; not always the likeliest."""

    name: str
    probabilities: np.ndarray
    greedy: int | None = None

    def top(self, count: int) -> list[tuple[int, float]]:
        """(label, probability) of the likeliest, ties to the lower label."""
        order = np.argsort(-self.probabilities, kind="stable")[:count]
        return [(int(label), float(self.probabilities[label])) for label in order]


@dataclass(frozen=True)
class Classifier:
    """A model with its question, loaded. method: "constrained", or "likelihood": that of each whole class name,
    normalised over the classes by softmax. greedy: whether answers have theirs."""

    sampler: "LocalSamplingClient"
    prompt: "Prompt"
    max_side: int
    method: str = METHODS[0]
    greedy: bool = False

    def answers(self, pictures: Iterator[Picture]) -> Generator[list[Answer | ImageError], None, None]:
        """What is answered to each image, or what is wrong with it, in order, a window at a time."""
        for window in _ahead(self, pictures):
            errors = {n: each.exception() for n, (_, each) in enumerate(window)}
            good = [n for n, error in errors.items() if error is None]
            found = dict(zip(good, self._ask([window[n] for n in good]), strict=True))
            yield [found[n] if n in found else _only_of_images(errors[n]) for n in range(len(window))]

    def prepared(self, picture: Picture) -> bytes:
        """The image as the model gets it. Raises ImageError where it cannot be asked about."""
        name = shown(picture.name)
        image = prepare(picture.read(), max_side=self.max_side, name=name)
        try:
            self.prompt.question(image)
        except ImageError as error:  # such as an extreme aspect ratio
            raise ImageError(f"{name}: {error}") from error
        return image

    def _ask(self, prepared: Sequence[Prepared]) -> list[Answer]:
        from vlm.classifier import predict, predict_and_decode

        images, greedy = [each.result() for _, each in prepared], [None] * len(prepared)
        if self.greedy:
            scores, written = predict_and_decode(self.sampler, images, self.prompt)
            greedy = written.tolist()
        if not self.greedy or self.method != METHODS[0]:
            scores = predict(self.sampler, images, self.prompt, self.method)
        exact = scores.astype(np.float64)
        exact -= np.logaddexp.reduce(exact, 1, keepdims=True)
        return [Answer(p.name, np.exp(row), label) for (p, _), row, label in zip(prepared, exact, greedy, strict=True)]


@contextmanager
def classifier(source: Source, method: str = METHODS[0], *, greedy: bool = False) -> Iterator[Classifier]:
    """The classifier of a source, loaded once. Raises InputError, ModelError or PromptError for what does not fit
    together or cannot be loaded, before a weight is read where that can be known."""
    from vlm.inputs import ImageRule
    from vlm.labels import check
    from vlm.local.client import LocalServiceClient
    from vlm.prompts import Prompt, template

    card = read_card(source.adapter) if source.adapter else None
    classes = source.classes or (card.classes if card else ())
    _check(source, classes)
    form = template(source.prompt or (card.prompt if card else Settings().prompt))
    max_side = source.max_side or (card.max_side if card else Settings().max_side)
    service = LocalServiceClient(device=source.device, cache_bytes=CACHE_BYTES)
    try:
        sampler = _sampler(service, source)
        prompt = Prompt(sampler.get_tokenizer(), ImageRule.from_pretrained(sampler.get_base_model()), classes, form)
        check(prompt.choices)
        yield Classifier(sampler, prompt, max_side, method, greedy)
    finally:
        service.close()


def _check(source: Source, classes: Sequence[str]) -> None:
    if source.adapter is None and source.model is None:
        raise InputError("no model is given; give --adapter DIR, or --model NAME with class names (--class, --classes)")
    if not classes:
        what = f"{source.adapter} has no {CARD}" if source.adapter else "a model has no class names of its own"
        raise InputError(f"{what}; give them with --class NAME, twice or more, or --classes FILE")
    if len(classes) < 2:
        raise InputError(f"there is one class, {classes[0]!r}; a choice needs two or more")


def _sampler(service: "LocalServiceClient", source: Source) -> "LocalSamplingClient":
    if source.adapter is None:
        return service.create_sampling_client(base_model=source.model).result()
    return service.create_sampling_client_from_folder(source.adapter, source.model).result()


def _ahead(asked: Classifier, pictures: Iterator[Picture]) -> Iterator[list[Prepared]]:
    """Windows of images that are being prepared, one window ahead of the one that is asked for."""
    waiting: deque[list[Prepared]] = deque()
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        while taken := list(islice(pictures, WINDOW)):
            waiting.append([(picture, pool.submit(asked.prepared, picture)) for picture in taken])
            if len(waiting) > 1:
                yield waiting.popleft()
        yield from waiting
    finally:
        pool.shutdown(cancel_futures=True)


def _only_of_images(error: BaseException | None) -> ImageError:
    if not isinstance(error, ImageError):
        raise error or AssertionError("neither an answer nor an error")
    return error
