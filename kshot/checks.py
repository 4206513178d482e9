"""Checks that several packages share: checkpoints' names, Adam's ranges, and that Python finds kshot's packages."""

import math
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kshot.errors import InputError, RequestError

PACKAGES = ("data", "vlm", "baselines", "experiments")

KINDS = ("weights", "sampler_weights", "external_weights")
LONGEST = 10 * 366 * 86400  # seconds that a checkpoint may be kept, if not for ever: ten years
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_RUN = re.compile(r"[0-9a-f-]{36}:train:[0-9]{1,9}")


def path_of(run: str, kind: str, name: str) -> str:
    """The tinker:// path. Raises RequestError for a name that could not be a folder's."""
    if not _NAME.fullmatch(name):
        raise RequestError(f"checkpoint name {name!r} must be letters, digits, '.', '_' or '-', at most 128")
    return f"tinker://{run}/{kind}/{name}"


def folder_of(state: Path, path: str) -> Path:
    """The folder below `state` of a tinker:// path. Raises RequestError for anything that is none."""
    parts = path.removeprefix("tinker://").split("/")
    well_formed = path.startswith("tinker://") and len(parts) == 3 and parts[1] in KINDS
    if not (well_formed and _RUN.fullmatch(parts[0]) and _NAME.fullmatch(parts[2])):
        raise RequestError(f"{path!r} is no checkpoint path; it looks like tinker://<uuid>:train:<n>/weights/<name>")
    return state / parts[0].replace(":", "_") / parts[1] / parts[2]


def path_in(state: Path, folder: Path) -> str | None:
    """The tinker:// path of a checkpoint's folder below `state`; None for a folder that is none's."""
    run, kind, name = folder.relative_to(state).parts
    path = f"tinker://{run.replace('_', ':')}/{kind}/{name}"
    try:
        return path if folder_of(state, path) == folder else None
    except RequestError:
        return None


def check_ttl(seconds: int | None) -> None:
    """Raise RequestError for a time to live that is none."""
    if seconds is not None and not 0 < seconds <= LONGEST:
        raise RequestError(f"ttl_seconds = {seconds} is out of range: it must be from 1 to {LONGEST}, or null for ever")


def check_adam(params: Any) -> None:
    """Raise RequestError for `tinker.types.AdamParams` that would make weights NaN or turn a step around."""
    for name in ("learning_rate", "weight_decay", "grad_clip_norm"):
        if not 0 <= getattr(params, name) < math.inf:
            raise RequestError(f"{name} = {getattr(params, name)} must not be negative, nor infinite")
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(params, name) < 1:
            raise RequestError(f"{name} = {getattr(params, name)} must be at least 0 and below 1")
    if not 0 < params.eps < math.inf:  # where a gradient is 0, so is its moment: 0 / 0
        raise RequestError(f"eps = {params.eps} must be above 0; the Tinker API's default is 1e-12")


def check_packages() -> None:
    """Raise InputError where a module of the user's, such as a `data.py` beside their script, hides a package of
    kshot's: Python would import theirs."""
    root = Path(__file__).resolve().parents[1]
    for name in PACKAGES:
        try:
            spec = find_spec(name)
        except ValueError:  # a module that was made by hand has none
            spec = None
        places = [Path(place) for place in (spec and spec.submodule_search_locations) or ()]
        if root / name not in [place.resolve() for place in places]:  # a way there may lead over links
            hiding = (spec and spec.origin) or (places[0] if places else f"another module {name!r}")
            raise InputError(
                f"{hiding} hides kshot's own package {name!r} from Python; rename it, or start Python in another folder"
            )
