"""Where a model computes, by a name such as cpu, cuda:0, cuda:1,2 or cpu:2, which may stand with an @ behind a model's.

A place of several devices means a process on each of them ("ranks"). This module imports no torch.
"""

import re
from dataclasses import dataclass

from kshot.errors import InputError

PLACES = (
    "cpu, cpu:N (N processes), cuda:N, cuda:N,N (a process on each), all (every GPU) or ray:N (N GPUs of a cluster)"
)
_PLACE = re.compile(r"all|cpu(?::[1-9]\d*)?|cuda(?::\d+(?:,\d+)*)?|mps|ray:[1-9]\d*")
_AT = re.compile(r"(?P<model>.+)@(?P<place>[a-z]+(?::[\d,]*)?)")
HEADS = ("all", "cpu", "cuda", "mps", "ray")


@dataclass(frozen=True)
class Place:
    """kind: one of HEADS. devices: names of torch, one a process; none where they are not known here. count: how many
    processes, 0 for `all`."""

    kind: str
    devices: tuple[str, ...]
    count: int


def parted(name: str) -> tuple[str, str]:
    """A model's own name, and the place behind it, or "". Raises InputError for an @ with a place that is none."""
    found = _AT.fullmatch(name)
    if found is None or found["place"].partition(":")[0] not in HEADS:
        return name, ""
    place_of(found["place"])
    return found["model"], found["place"]


def first_device(place: str) -> str:
    """Where in a place a model computes that is in one process alone."""
    head = place.partition(",")[0]
    return {"all": "cuda"}.get(head, "cpu" if head.startswith("cpu") else head)


def place_of(text: str) -> Place:
    """The place of a name. Raises InputError."""
    kind, _, numbers = text.partition(":")
    if not _PLACE.fullmatch(text):
        raise InputError(f"place {text!r} is none; write {PLACES}")
    chosen = numbers.split(",") if numbers else []
    if len({*chosen}) < len(chosen):
        raise InputError(f"place {text!r} names a device twice; name each once")
    if kind in ("all", "ray"):
        return Place(kind, (), int(numbers or 0))
    if kind == "cpu":
        return Place(kind, ("cpu",) * int(numbers or 1), int(numbers or 1))
    return Place(kind, tuple(f"{kind}:{int(n)}" for n in chosen) or (kind,), len(chosen) or 1)
