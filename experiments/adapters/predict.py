"""Ask a model about images: an adapter folder, or a model as it is with class names. Knows no terminal.

Images are prepared as in training and answered in windows, so that any number of them takes little memory; the next
window is read and prepared while the model works on this one. An image that cannot be used is an answer too: its error.

TODO What `kshot predict` is asked about: its arguments become images with a name, in order. Decodes none, knows no model.

A folder is searched recursively, by name; hidden files and folders, and the system's own, are passed over. Nothing else
is: what is missing or cannot be read is in the list too, and says so when it is read. A pattern is expanded here
unless a file has its very name; folders that it matches are searched as well.
"""

import glob
import os
import stat
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from data.folder import SYSTEM_FILES
from data.preparation import prepare
from experiments.adapters.folder import CARD, read_card
from experiments.sweep.config import Settings
from kshot.errors import ImageError, InputError

if TYPE_CHECKING:
    from vlm.prompts import Prompt
    from vlm.service import SamplingClient

# ---- What `kshot predict` is asked about: its arguments become images with a name, in order. Decodes none, knows

STDIN = "-"
MAX_BYTES = 1 << 30  # of a file; more than any image within the limit of pixels takes


@dataclass(frozen=True)
class Picture:
    """name: as it was given or found. read: its encoded bytes, or ImageError in one line that begins with the name."""

    name: str
    read: Callable[[], bytes]


def pictures(arguments: Iterable[str], stdin: Callable[[], BinaryIO]) -> Iterator[Picture]:
    """The images of all arguments (file, folder, pattern or -), each found when it is asked for.

    stdin: gives the standard input, where one of them is -.
    Raises InputError, before the first, where standard input is asked for twice.
    """
    given = list(arguments)
    if given.count(STDIN) > 1:
        raise InputError("standard input (-) is given twice, and can be read once; leave one out")
    return (picture for one in given for picture in (_from_stdin(stdin()) if one == STDIN else _expand(one)))


def shown(text: str) -> str:
    """Text that a terminal shows as it is, in one line: what steers one, and broken UTF-8, is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def _expand(argument: str) -> Iterator[Picture]:
    if os.path.isdir(argument):
        yield from _or(_walk(argument), argument, "no image is in this folder; hidden files are passed over")
    elif os.path.lexists(argument) or not glob.has_magic(argument):
        yield _of_file(argument)
    else:
        yield from _or(_matching(argument), argument, "no file has such a name; in a pattern, ** is for any folders")


def _or(found: Iterator[Picture], name: str, reason: str) -> Iterator[Picture]:
    """What was found, or where that is nothing the reason."""
    first = next(found, None)
    yield _failing(name, reason) if first is None else first
    yield from found


def _walk(top: str) -> Iterator[Picture]:
    """The files below a folder, or the file itself. Links are followed; into a folder they stand in they lead no
    further, since its images are there already."""
    waiting: list[tuple[str, frozenset[tuple[int, int]]]] = [(top, frozenset())]
    while waiting:
        path, above = waiting.pop()
        if not os.path.isdir(path):
            yield _of_file(path)
            continue
        try:
            status, names = os.stat(path), sorted(filter(_is_visible, os.listdir(path)), reverse=True)
        except OSError as error:
            yield _failing(path, f"this folder cannot be read ({error.strerror})")
            continue
        here = status.st_dev, status.st_ino
        if here not in above:
            waiting += [(os.path.join(path, name), above | {here}) for name in names]


def _is_visible(name: str) -> bool:
    return not name.startswith(".") and name.lower() not in SYSTEM_FILES


def _matching(pattern: str) -> Iterator[Picture]:
    """The files that match, and those in folders that do, each once."""
    done: set[str] = set()
    for path in sorted(glob.iglob(os.path.expanduser(pattern), recursive=True)):
        for picture in _walk(path):
            if picture.name not in done:
                done.add(picture.name)
                yield picture


def _from_stdin(stdin: BinaryIO) -> Iterator[Picture]:
    """One image, or where the bytes are text the image of each line."""
    data = stdin.read(MAX_BYTES + 1)
    text = _text(data)
    if len(data) > MAX_BYTES:
        yield _failing(STDIN, f"standard input is longer than {MAX_BYTES:,} bytes")
    elif text is None:
        yield Picture(STDIN, lambda: data)
    else:
        lines = [line.removesuffix("\r") for line in text.split("\n")]
        found = (picture for line in lines if line.strip() for picture in _expand(line))
        yield from _or(found, STDIN, "standard input holds neither an image nor a path")


def _text(data: bytes) -> str | None:
    """Bytes as text; None for an image: no format in use is UTF-8 without a zero byte."""
    try:
        return None if b"\0" in data else data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None


def _of_file(path: str) -> Picture:
    return Picture(path, partial(_read, path))


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
    raise ImageError(f"{shown(name)}: {reason}")


# ---- Ask a model about images: an adapter folder, or a model as it is with class names. Knows no terminal.

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

    sampler: "SamplingClient"
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
    from vlm.label_trie import check
    from vlm.prompts import Prompt, template
    from vlm.service import connect

    card = read_card(source.adapter) if source.adapter else None
    classes = source.classes or (card.classes if card else ())
    _check(source, classes)
    form = template(source.prompt or (card.prompt if card else Settings().prompt))
    max_side = source.max_side or (card.max_side if card else Settings().max_side)
    service: Any = connect("local", device=source.device, cache_bytes=CACHE_BYTES)
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


def _sampler(service: Any, source: Source) -> Any:
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
