"""Classify images of the user's own: with an adapter folder, or with a model as it is and class names.

The arguments of `kshot predict` become images with a name, in order. They are prepared as in training and classified in
batches, so that any number of them takes little memory. For one that cannot be used there is an error instead of a
prediction. A folder is searched recursively, by name; hidden files and folders, and the system's own, are left out.
Nothing else is: what cannot be read is in the list too, and raises when it is read. A pattern is expanded here unless a
file has its very name; folders that it matches are searched as well.
"""

import glob
import os
import stat
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import filterfalse, islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data.dataset import is_system_file
from data.preparation import prepare
from experiments.adapters.folder import CARD, HEAD, Card, read_card
from experiments.sweep.config import Settings
from kshot.errors import ImageError, InputError, ModelError, UnknownNameError, shown
from kshot.files import decoded_text
from kshot.images import begins_like_image

# settings of a training → those of `vlm.thoughts.Thinking`
LEARNT = {"thinking": "tokens", "thinking_temperature": "temperature", "thinking_seed": "seed"}

# The images

STDIN = "-"
NO_MATCH = "no file has such a name; in a pattern, ** is for any folders"
MAX_BYTES = 1 << 30  # of a file; more than any image within the limit of pixels takes
MAX_HEADER = 1 << 10  # bytes in which an image shows that it is one; a PPM may begin with comments


@dataclass(frozen=True)
class Picture:
    """name: as it was given or found. read: its encoded bytes, or ImageError in one line that begins with the name."""

    name: str
    read: Callable[[], bytes]


def pictures(arguments: Iterable[str], stdin: Callable[[], BinaryIO]) -> Iterator[Picture]:
    """The images of all arguments (file, folder, pattern or -), each found when it is asked for. stdin: gives the
    standard input, where one of them is -. Raises InputError, before the first, where it is asked for twice."""
    arguments = list(arguments)
    if arguments.count(STDIN) > 1:
        raise InputError("standard input (-) is given twice, and can be read once; leave one out")
    return (picture for each in arguments for picture in (_from_stdin(stdin()) if each == STDIN else _expand(each)))


def in_line(text: str) -> str:
    """Text that a terminal shows as it is, in one line."""
    return shown(text).replace("\n", "\\n")


def _expand(argument: str) -> Iterator[Picture]:
    if os.path.isdir(argument):
        yield from _or_error(_walk(argument), argument, "no image is in this folder; hidden files are passed over")
    elif os.path.lexists(argument) or not glob.has_magic(argument):
        yield Picture(argument, partial(_read, argument))
    else:
        yield from _or_error(_matching(argument), argument, NO_MATCH)


def _or_error(pictures: Iterator[Picture], name: str, reason: str) -> Iterator[Picture]:
    """The images, or where there is none an error that states the reason."""
    first = next(pictures, None)
    yield _failing(name, reason) if first is None else first
    yield from pictures


def _walk(top: str) -> Iterator[Picture]:
    """The files below a folder, or the file itself. Links are followed; into a folder they stand in they lead no
    further, since its images are there already."""
    pending: list[tuple[str, frozenset[tuple[int, int]]]] = [(top, frozenset())]
    while pending:
        path, above = pending.pop()
        if not os.path.isdir(path):
            yield Picture(path, partial(_read, path))
            continue
        try:
            status, names = os.stat(path), sorted(filterfalse(is_system_file, os.listdir(path)), reverse=True)
        except OSError as error:
            yield _failing(path, f"this folder cannot be read ({error.strerror})")
            continue
        here = status.st_dev, status.st_ino
        if here not in above:
            pending += [(os.path.join(path, name), above | {here}) for name in names]


def _matching(pattern: str) -> Iterator[Picture]:
    """The files that match, and those in folders that do, each once."""
    names: set[str] = set()
    for path in sorted(glob.iglob(os.path.expanduser(pattern), recursive=True)):
        for picture in _walk(path):
            if picture.name not in names:
                names.add(picture.name)
                yield picture


def _from_stdin(stdin: BinaryIO) -> Iterator[Picture]:
    """One image, or where the bytes are text the image of each line."""
    data = stdin.read(MAX_BYTES + 1)
    text = None if begins_like_image(data[:MAX_HEADER]) else decoded_text(data)  # a PPM in ASCII is text too
    if len(data) > MAX_BYTES:
        yield _failing(STDIN, f"standard input is longer than {MAX_BYTES:,} bytes")
    elif text is None:
        yield Picture(STDIN, lambda: data)
    else:
        lines = [line.removesuffix("\r") for line in text.split("\n")]
        listed = (picture for line in lines if line.strip() for picture in _expand(line))
        yield from _or_error(listed, STDIN, "standard input holds neither an image nor a path")


def _failing(name: str, reason: str) -> Picture:
    return Picture(name, partial(_fail, name, reason))


def _read(path: str) -> bytes:
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            return _fail(path, "not a regular file")  # a pipe would be read for ever
        if status.st_size > MAX_BYTES:
            return _fail(path, f"larger than {MAX_BYTES:,} bytes; make it smaller")
        return Path(path).read_bytes()
    except FileNotFoundError:
        return _fail(path, "there is no such file")
    except OSError as error:
        return _fail(path, f"cannot be read ({error.strerror})")


def _fail(name: str, reason: str) -> bytes:
    raise ImageError(f"{in_line(name)}: {reason}")


# The classifier

BATCH = 64  # images that are classified together
CACHE_BYTES = 1 << 30  # of image features: a batch's, which are needed twice; later batches have other images
METHODS = ("constrained", "likelihood")
Prepared = tuple[Picture, "Future[bytes]"]


@dataclass(frozen=True)
class Prediction:
    """Of one image. scores: (classes,) float64, higher is better. probabilities: whether they are, and sum to 1.
    greedy: the label that constrained decoding generates, token by token, where that was requested; not always the
    likeliest."""

    name: str
    scores: np.ndarray
    probabilities: bool = True
    greedy: int | None = None

    def top(self, count: int) -> list[tuple[int, float]]:
        """(label, score) of the likeliest, ties to the lower label."""
        order = np.argsort(-self.scores, kind="stable")[:count]
        return [(int(label), float(self.scores[label])) for label in order]


Window = Sequence[Prediction | ImageError]
Scores = tuple[np.ndarray, Sequence[int | None]]  # (images, classes) float64, and greedy labels


@dataclass(frozen=True)
class Classifier:
    """A loaded model. score: of prepared images. check: raises ImageError for one that this model alone refuses.
    log_probs: whether scores are log-probabilities."""

    classes: tuple[str, ...]
    max_side: int
    score: Callable[[Sequence[bytes]], Scores]
    check: Callable[[bytes], Any]
    log_probs: bool = True

    def predict(self, pictures: Iterator[Picture]) -> Generator[Window, None, None]:
        """The prediction for each image, or what is wrong with it, in order, a batch at a time."""
        for batch in prefetched(self.prepared, pictures):
            errors = [each.exception() for _, each in batch]
            for error in errors:
                if error is not None and not isinstance(error, ImageError):
                    raise error
            usable = [each for each, error in zip(batch, errors, strict=True) if error is None]
            predictions = iter(self._predict(usable))
            yield [error if isinstance(error, ImageError) else next(predictions) for error in errors]

    def prepared(self, picture: Picture) -> bytes:
        """The image as the model gets it. Raises ImageError where it cannot be classified."""
        name = in_line(picture.name)
        image = prepare(picture.read(), max_side=self.max_side, name=name)
        try:
            self.check(image)
        except ImageError as error:  # what the processor of this model alone refuses
            raise ImageError(f"{name}: {error}") from error
        return image

    def _predict(self, prepared: Sequence[Prepared]) -> list[Prediction]:
        if not prepared:
            return []
        scores, greedy = self.score([each.result() for _, each in prepared])
        if self.log_probs:
            scores = np.exp(scores - np.logaddexp.reduce(scores, 1, keepdims=True))
        names = [picture.name for picture, _ in prepared]
        return [
            Prediction(name, row, self.log_probs, label) for name, row, label in zip(names, scores, greedy, strict=True)
        ]


@contextmanager
def classifier(
    adapter: Path | None = None,
    model: str | None = None,
    classes: tuple[str, ...] | None = None,
    prompt: str | None = None,
    max_side: int | None = None,
    device: str = "cpu",
    method: str | None = None,
    *,
    greedy: bool = False,
    thinking: Mapping[str, Any] | None = None,
) -> Iterator[Classifier]:
    """A classifier, loaded once. adapter: a folder of an adapter or of a head on DINOv2, or None for a model as it is,
    with classes. model, classes, prompt (a preset or a template) and max_side (pixels of an image's longest side) are
    None for what the folder records. method: a row of METHODS, of the VLM's scores; None: the first. greedy: whether
    predictions have theirs; a head has none, nor has a model that thinks. thinking: of `vlm.thoughts.Thinking` what is
    given; None where nothing is; an adapter that learnt with thoughts thinks as it did, unless told otherwise.

    Raises UnknownNameError, InputError, ModelError or PromptError for what does not fit together or cannot be loaded,
    before a weight is read where that can be known.
    """
    if method is not None and method not in METHODS:
        raise UnknownNameError("method", method, METHODS)
    given = thinking or {}
    if adapter is None and model is None:
        raise InputError("no model is given; give --adapter DIR, or --model NAME with class names (--class, --classes)")
    card = read_card(adapter) if adapter else None
    names = classes or (card.classes if card else ())
    if not names:
        what = f"{adapter} has no {CARD}" if adapter else "a model has no class names of its own"
        raise InputError(f"{what}; give them with --class NAME, twice or more, or --classes FILE")
    if len(names) < 2:
        raise InputError(f"there is one class, {names[0]!r}; a choice needs two or more")
    side = max_side or (card.max_side if card else Settings().max_side)
    if adapter and card and card.kind == HEAD:
        of_thoughts = {f"--{'thinking' if name == 'tokens' else name}": value for name, value in given.items()}
        yield _head(adapter, card, model, names, side, device, {"--prompt": prompt, "--method": method, **of_thoughts})
        return
    learnt = card.trained.get("settings", {}) if card else {}
    thought = {"tokens": 0, **{name: learnt[key] for key, name in LEARNT.items() if key in learnt}, **given}
    if not thought["tokens"] and given.keys() - {"tokens"}:
        raise InputError("thoughts need --thinking N, the tokens that one may have at most; give it too")
    with _vlm(adapter, card, model, names, prompt, side, device, method or METHODS[0], greedy, thought) as loaded:
        yield loaded


def _head(
    folder: Path,
    card: Card,
    model: str | None,
    names: tuple[str, ...],
    max_side: int,
    device: str,
    unused: Mapping[str, Any],
) -> Classifier:
    """The classifier of a head on DINOv2. names: other words for its classes, in their order. Raises InputError,
    among others, for its own in another order."""
    for option, value in unused.items():
        if value is not None:
            raise InputError(f"{option} is for vision-language models; {folder} is a head on DINOv2: leave it out")
    if len(names) != len(card.classes):
        raise InputError(f"{folder} tells {len(card.classes)} classes apart, and {len(names)} names are given")
    if any(name in card.classes and name != own for name, own in zip(names, card.classes, strict=True)):
        order = ", ".join(card.classes)
        raise InputError(f"names stand for the classes of {folder} in their order: {order}; give them in that one")
    from baselines.classifier import load

    if model is None:
        _check_here(folder)
    loaded = load(folder, model, device)
    if loaded.n_classes != len(card.classes):
        problem = f"its head tells {loaded.n_classes} classes apart, and its {CARD} names {len(card.classes)}"
        raise ModelError(f"{folder} is damaged ({problem}); train it again")

    def score(images: Sequence[bytes]) -> Scores:
        return loaded.scores(images), [None] * len(images)

    return Classifier(names, max_side, score, lambda _: None, loaded.log_probs)


def _check_here(folder: Path) -> None:
    """Raise ModelError for a head whose backbone would have to be fetched: a folder of others may name any."""
    from baselines.classifier import recorded_backbone
    from baselines.hub import FILES, hub_id_of
    from kshot.hub import is_cached

    name = recorded_backbone(folder)
    hub_id, _, revision = (hub_id_of(name) or "").partition("@")
    if hub_id and not is_cached(hub_id, revision, FILES):
        what = f"{folder} is a head on {name}, which is not on this machine"
        raise ModelError(f"{what} and is not fetched unasked; to fetch it, give --model {name}")


@contextmanager
def _vlm(
    adapter: Path | None,
    card: Card | None,
    model: str | None,
    names: tuple[str, ...],
    prompt: str | None,
    max_side: int,
    device: str,
    method: str,
    greedy: bool,
    thought: Mapping[str, Any],
) -> Iterator[Classifier]:
    from vlm.classifier import predict, predict_and_decode
    from vlm.inputs import ImageRule
    from vlm.label_trie import check
    from vlm.prompts import Prompt, template
    from vlm.service import connect
    from vlm.thinking import needed
    from vlm.thoughts import Thinking, consider, posteriors

    wording = template(prompt or (card.prompt if card else Settings().prompt))
    service: Any = connect("local", device=device, cache_bytes=CACHE_BYTES)
    try:
        if adapter is None:
            sampler = service.create_sampling_client(base_model=model).result()
        else:
            sampler = service.create_sampling_client_from_folder(adapter, model).result()
        rule = ImageRule.from_pretrained(sampler.get_base_model())
        loaded = Prompt(sampler.get_tokenizer(), rule, names, wording)
        check(loaded.choices)
        seen = 0

        def think(images: Sequence[bytes]) -> Scores:
            nonlocal seen
            windows = consider(sampler, images, loaded, Thinking(**thought), seen)
            scores = [posteriors(sampler, window, loaded, method) for window in windows]
            seen += len(images)
            return np.concatenate(scores).astype(np.float64), [None] * len(images)

        def score(images: Sequence[bytes]) -> Scores:
            labels: Sequence[int | None] = [None] * len(images)
            if greedy:
                scores, decoded = predict_and_decode(sampler, images, loaded)
                labels = decoded.tolist()
            if not greedy or method != METHODS[0]:
                scores = predict(sampler, images, loaded, method)
            return scores.astype(np.float64), labels

        if thought["tokens"]:
            needed(loaded.marks)  # before an image is read
        yield Classifier(loaded.classes, max_side, think if thought["tokens"] else score, loaded.question)
    finally:
        service.close()


def prefetched(prepare: Callable[[Picture], bytes], pictures: Iterator[Picture]) -> Iterator[list[Prepared]]:
    """Batches of images that are being prepared, one batch ahead of the one that is taken."""
    pending: deque[list[Prepared]] = deque()
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        while batch := list(islice(pictures, BATCH)):
            pending.append([(picture, pool.submit(prepare, picture)) for picture in batch])
            if len(pending) > 1:
                yield pending.popleft()
        yield from pending
    finally:
        pool.shutdown(cancel_futures=True)
