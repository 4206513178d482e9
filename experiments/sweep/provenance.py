"""What results say of where they come from: each model by a name without a path and its revision, the notes that a
report must show, and names and texts from outside without absolute paths."""

import re
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from baselines import nano as nano_dinov2
from experiments.sweep.config import Settings
from kshot.files import fingerprint
from vlm import nano


class Shipped(NamedTuple):
    """A model that comes with kshot. revision: changes with its weights. note: what a report must say of it."""

    revision: str
    note: str


FEWER = "Classes with fewer images than the shots took part with those they have (--allow-fewer)."
SHUFFLED = "A control: each test image was shown in another's place (shuffle_test), so accuracy should be at chance."
CLOSED = "LoRA learnt to choose among the class names alone (closed-set): free answers were not trained."
LOCAL = "{} is a local file or folder of weights: rows named DINOv2 are named after the method, whatever it holds."
VALIDATED = "The VLM's calibration was chosen on more labelled training images: as many as shots, at most 4 a class."
SHIPPED = {  # by the setting that names a model
    "model": {nano.NAME: Shipped(nano.REVISION, nano.NOTE)},
    "backbone": {nano_dinov2.NAME: Shipped(nano_dinov2.REVISION, nano_dinov2.NOTE)},
}


def recorded(settings: Settings) -> dict[str, Any]:
    """The settings as results state them, with `model_revision` and `backbone_revision`.

    A model in a folder or a file goes by its name and a fingerprint of its content, wherever it lies; the revision of
    a hub's model is null: the hub's newest at the time.
    """
    values = settings.model_dump()
    for kind in SHIPPED:
        values[kind], values[f"{kind}_revision"] = _named(kind, values[kind])
    return values


def relevant(values: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Of recorded settings those that are named, each model with its revision."""
    wanted = {*names, *(f"{name}_revision" for name in names)}
    return {key: value for key, value in values.items() if key in wanted}


def notes(settings: Settings, used: set[str]) -> list[str]:
    """The sentences a report must show because of the models that the settings in `used` name."""
    chosen = settings.model_dump()
    shipped = [SHIPPED[kind][chosen[kind]].note for kind in SHIPPED if kind in used and chosen[kind] in SHIPPED[kind]]
    others = {
        LOCAL.format(Path(settings.backbone).name): "backbone" in used and _is_local("backbone", settings.backbone),
        FEWER: settings.allow_fewer,
        SHUFFLED: settings.shuffle_test,
        CLOSED: "loss" in used and settings.loss == "closed-set",
        VALIDATED: "calibration" in used and settings.calibration == "validated",
    }
    return [*shipped, *(note for note, due in others.items() if due)]


def _named(kind: str, name: str) -> tuple[str, str | None]:
    if name in SHIPPED[kind]:
        return name, SHIPPED[kind][name].revision
    path = Path(name.removeprefix("local-dir:"))
    return (path.resolve().name, fingerprint(path)) if _is_local(kind, name) else (name, None)


def _is_local(kind: str, name: str) -> bool:
    return name not in SHIPPED[kind] and Path(name.removeprefix("local-dir:")).exists()


# A slash that begins a path: not after a word (Qwen/Qwen3), a dot (./runs), a tilde, a closing bracket or a scheme's ://
_PATH = re.compile(r"""(?:(?<![\w./~…)}\]])|(?<=file://))/(?:[^\s/'"]+/)*([^\s/'"]+)/?""")
_DRIVE = re.compile(r"""\b[A-Za-z]:\\(?:[^\s\\'"]+\\)*([^\s\\'"]+)""")
_WHOLE = re.compile(r"(\w*:)?/(?!/).*?([^/]+)/*", re.DOTALL)
_PLAIN = re.compile(r"[a-z0-9][a-z0-9_-]{0,59}")
TOGETHER = "together"  # the stem of the figure of all data sets together


def without_paths(text: str) -> str:
    """Text with every absolute path in it cut to its last part: `--root /home/ada/photos` → `--root …/photos`."""
    return _DRIVE.sub(r"…/\1", _PATH.sub(r"…/\1", text))


def name(value: str) -> str:
    """A name or a setting without absolute paths, a path with spaces included: `folder:/a b/c` → `folder:…/c`."""
    whole = _WHOLE.fullmatch(value)
    return f"{whole[1] or ''}…/{whole[2]}" if whole else without_paths(value)


def file_stem(dataset: str) -> str:
    """A data set's file name without suffix, never TOGETHER; a hash keeps apart what the safe alphabet would merge."""
    if _PLAIN.fullmatch(dataset) and dataset != TOGETHER:
        return dataset
    safe = re.sub(r"[^a-z0-9_]+", "-", name(dataset).lower()).strip("-_")[:40]
    return f"{safe or 'dataset'}-{sha256(dataset.encode()).hexdigest()[:8]}"
