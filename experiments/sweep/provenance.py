"""What results say of where they come from: each model by a name without a path and its revision, the notes that a
report must show, and names and texts from outside without absolute paths."""

import re
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

from baselines import nano as nano_dinov2
from data.dataset import Dataset
from experiments.sweep.config import THINKING, Settings
from kshot import hub
from kshot.files import fingerprint
from vlm import nano

FEWER = "Classes with fewer images than the shots took part with those they have (--allow-fewer)."
SHUFFLED = "A control: each test image was shown in another's place (shuffle_test), so accuracy should be at chance."
CLOSED = "LoRA learnt to choose among the class names alone (closed-set): free answers were not trained."
LOCAL = "{} is a local file or folder of weights: rows named DINOv2 are named after the method, whatever it holds."
VALIDATED = "The VLM's calibration was chosen on more labelled training images: as many as shots, at most 4 a class."
FEW = 50  # test images, below which a report says so
# the models that come with kshot, by the setting that names one: each has a NAME, a REVISION that changes with its
# weights, and a NOTE that a report must show
SHIPPED: dict[str, Any] = {"model": nano, "backbone": nano_dinov2}


def recorded(settings: Settings) -> dict[str, Any]:
    """The settings as results state them, with `model_revision` and `backbone_revision`: of a model in a folder or a
    file its name, wherever it lies, and a fingerprint of its content; of a hub's model its commit, or null: the newest
    at the time. Settings of THINKING are stated where they are not the usual ones."""
    usual = {name: Settings.model_fields[name].default for name in THINKING}
    values = {
        name: value for name, value in settings.model_dump().items() if name not in THINKING or value != usual[name]
    }
    for kind, shipped in SHIPPED.items():
        path, revision = local_model(kind, values[kind]), f"{kind}_revision"
        values[revision] = shipped.REVISION if values[kind] == shipped.NAME else None
        if commit := _COMMIT.fullmatch(values[kind]):
            values[kind], values[revision] = commit.groups()
        if path:
            values[kind], values[revision] = path.resolve().name, fingerprint(path)
    return values


def relevant(values: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Of recorded settings those that are named, each model with its revision."""
    wanted = {*names, *(f"{name}_revision" for name in names)}
    return {key: value for key, value in values.items() if key in wanted}


def notes(settings: Settings, used: set[str]) -> list[str]:
    """The sentences a report must show because of the models that the settings in `used` name."""
    chosen = settings.model_dump()
    shipped = [each.NOTE for kind, each in SHIPPED.items() if kind in used and chosen[kind] == each.NAME]
    others = {
        LOCAL.format(Path(settings.backbone).name): "backbone" in used and local_model("backbone", settings.backbone),
        FEWER: settings.allow_fewer,
        SHUFFLED: settings.shuffle_test,
        CLOSED: "loss" in used and settings.loss == "closed-set" and not settings.start,
        VALIDATED: "calibration" in used and settings.calibration == "validated",
    }
    return [*shipped, *(note for note, due in others.items() if due)]


def dataset_notes(dataset: Dataset) -> Iterator[str]:
    """What a report must say of a data set's files."""
    if "-modified-" in dataset.protocol:
        changed = ", ".join(dataset.facts["modified"]) or "what was unpacked"
        yield f"{dataset.name}: {changed} is not the published file (--allow-modified)."
    allowed = " (--allow-shared)" if dataset.facts.get("allow_shared") else ""
    if shared := dataset.facts.get("shared"):
        yield f"{dataset.name}: images that are in both train and test{allowed}: {shared}; shots may show them."
    if in_two := dataset.facts.get("in_two_classes"):
        yield f"{dataset.name}: images that are in two classes{allowed}: {in_two}; no answer is right for both."
    yield from (f"{dataset.name}: {note}." for note in dataset.facts.get("notes", ()))


def few_tests(dataset: Dataset, limit: int | None) -> Iterator[str]:
    """limit: most images that are tested; None: all."""
    count = len(dataset.test) if limit is None else min(limit, len(dataset.test))
    if count < FEW:
        yield f"{dataset.name}: {count} test images are few: one of them is {100 / count:.1f} points of accuracy."


def local_model(kind: str, name: str) -> Path | None:
    """Where a model lies that is a folder or a file of this machine."""
    path = Path(name.removeprefix("local-dir:"))
    return path if name != SHIPPED[kind].NAME and path.exists() else None


_COMMIT = re.compile(f"(.+)@({hub.COMMIT})")  # a model of the hub, at a commit

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
