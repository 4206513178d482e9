"""Every exception that kshot raises on purpose, in one tree. The command line prints a KshotError's one line and exits
1, or 2 for an InputError.

A message is one line: it names the thing, the value, and the way out; many problems of one kind are listed below it.
"""

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from unicodedata import category

INTERRUPTED = 130  # the shells' status of a program that Ctrl-C ended
KEPT = "\n\u00ad\u200c\u200d"  # the soft hyphen, and what parts and joins letters and emoji
LISTED = 20  # problems that one message names


def shown(text: str) -> str:
    """Text as a terminal or a page can show it: what steers a terminal, turns the direction of writing or is no UTF-8
    is escaped as in Python; line ends, all kinds of spaces and what words of some scripts need stay."""
    return "".join(c if c in KEPT or c.isprintable() or category(c) == "Zs" else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode()


def listed(what: str, problems: Sequence[str]) -> str:
    """A message about problems: what they are of and the one; of several how many, and the first LISTED in lines."""
    if len(problems) == 1:
        return f"{what}: {problems[0]}"
    more = [f"... and {len(problems) - LISTED:,} more"] if len(problems) > LISTED else []
    return "\n  ".join([f"{what}: {len(problems):,} problems", *problems[:LISTED], *more])


def listed_by_kind(what: str, kinds: Mapping[str, Sequence[str]]) -> str:
    """A message about problems of several kinds, each listed below its kind."""
    count, parts = sum(map(len, kinds.values())), [listed(kind, problems) for kind, problems in kinds.items()]
    if len(parts) == 1:
        return f"{what}: {parts[0]}"
    return "\n".join([f"{what}: {count:,} problems", *parts]).replace("\n", "\n  ")


# What others call things, and what they are called here.
ALIASES = {
    "lr": "learning_rate",
    "learningrate": "learning_rate",
    "bs": "batch_size",
    "batch": "batch_size",
    "r": "rank",
    "lora_rank": "rank",
    "lora_r": "rank",
    "epochs": "views_per_class",
    "views": "views_per_class",
    "steps": "views_per_class",
    "flip": "hflip",
    "augment": "hflip",
    "resolution": "max_side",
    "max_size": "max_side",
    "img_size": "image_size",
    "adam_beta1": "beta1",
    "adam_beta2": "beta2",
    "epsilon": "eps",
    "gpu": "cuda",
    "gpus": "cuda",
    "nvidia": "cuda",
    "seed": "seeds",
    "shot": "shots",
    "k": "shots",
    "data": "dataset",
    "output": "out",
    "output_dir": "out",
    "lora": "vlm-lora",
    "zero-shot": "vlm-zero-shot",
    "zeroshot": "vlm-zero-shot",
    "linear": "dinov2-logreg",
    "logreg": "dinov2-logreg",
    "knn": "dinov2-knn",
    "ridge": "dinov2-ridge",
    "caltech": "caltech101",
    "oxford_flowers102": "flowers",
    "flowers102": "flowers",
    "stanford_cars": "cars",
    "oxford_pets": "pets",
    "oxford_iiit_pet": "pets",
}


def near_name(name: str, choices: Iterable[str]) -> str | None:
    """The choice that was probably meant: written in another case, called otherwise by others, or misspelt."""
    by_lower = {choice.lower(): choice for choice in choices}
    lower = name.lower()
    for other in (lower, ALIASES.get(lower.replace("-", "_"), ""), ALIASES.get(lower, "")):
        if other in by_lower:
            return by_lower[other]
    near = get_close_matches(lower, by_lower, n=1)
    return by_lower[near[0]] if near else None


class KshotError(Exception):
    """Base of everything kshot raises on purpose: a failure that is not the input's fault."""

    exit_status = 1


class BusyError(KshotError):
    """A server has as much to do as it takes; later it may have room."""


class EngineLostError(KshotError):
    """The processes that a model ran in have ended: what was in their memory alone is gone."""


class InputError(KshotError):
    """Something that was given (an argument, a file, a request) is wrong."""

    exit_status = 2


class UnknownNameError(InputError):
    """A name that its table does not have; the message says the choices. hint: what more there is to say of it."""

    def __init__(self, kind: str, name: str, choices: Iterable[str], hint: str = "") -> None:
        choices = list(choices)
        near = near_name(name, choices)
        hint = f" ({hint})" if hint else f" (did you mean {near!r}?)" if near else ""
        super().__init__(f"unknown {kind} {name!r}{hint}; choose from: {', '.join(choices)}")


class DatasetError(InputError):
    """A data set, its folder or its split cannot be used as asked."""


class TooFewImagesError(DatasetError):
    """A class has fewer distinct images than the shots asked for."""


class ImageError(InputError):
    """Bytes that are no image, or a broken, an unsupported or an oversized one."""


class PromptError(InputError):
    """A prompt or a list of labels that cannot be asked."""


class ModelError(InputError):
    """A model folder or name that cannot be loaded."""


class NotFiniteError(ModelError):
    """A model that computes NaN or infinite numbers. adapter: the run or checkpoint whose weights are on it, if any.
    trained: whether its weights may be trained ones, whose name is not known."""

    def __init__(self, model: str, what: str, adapter: str = "", *, trained: bool = False) -> None:
        way_out = "its weights are damaged: download them again"
        if adapter:
            way_out = "a learning rate was too high, or weights are damaged: go on from an earlier checkpoint"
        elif trained:
            way_out = "a learning rate was too high, or weights are damaged: train with a lower one, or restore them"
        where = f" with {adapter}" if adapter else ""
        super().__init__(f"model {model}{where} gives {what} that are not finite (NaN or Inf); {way_out}")


class RequestError(InputError):
    """A training or sampling request that does not fit the model."""


class MissingError(RequestError):
    """A run, a session, a sampler, a checkpoint or a request that a server does not have, or not any more."""


class LostError(MissingError):
    """What a server had before it was started again, and which may be asked for anew."""


class DeniedError(RequestError):
    """A request that a server does not take from this client."""


class UnauthorizedError(DeniedError):
    """A request without a valid key."""


class UnsupportedError(RequestError):
    """Content of a type or an encoding that a server does not read."""


class TooLargeError(RequestError):
    """More content than a server takes at once."""


class ResultsError(InputError):
    """A results folder that cannot be written or that holds another experiment."""
