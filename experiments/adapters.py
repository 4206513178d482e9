"""An adapter folder: LoRA weights in the layout of a checkpoint, classifier.json, which says what they answer, and the
model card.

Complete or not there. Knows no training and no model; the weights' files belong to `vlm.local.checkpoint`.
"""

import shutil
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from kshot_errors import InputError, ModelError
from kshot_files import replace_folder, write_file

CARD, RECORD, README = "classifier.json", "kshot.json", "README.md"
FILES = {"adapter_model.safetensors", "adapter_config.json", RECORD, CARD, README}


class Card(BaseModel):
    """classifier.json: what a classifier needs besides the weights.

    prompt: the template in full. trained: where it came from (data set, protocol, shots, seed, settings, versions).
    """

    model_config = ConfigDict(frozen=True)

    classes: tuple[str, ...] = Field(min_length=2)
    prompt: str
    max_side: PositiveInt
    base_model: str
    trained: dict[str, Any] = {}


def read_card(folder: Path) -> Card | None:
    """The card of an adapter folder; None where it has none, as a checkpoint does. Raises ModelError for a damaged
    one, and where there is no folder."""
    path = folder / CARD
    if not folder.is_dir():
        raise ModelError(f"adapter {folder} is no folder; give one that kshot train wrote")
    if not path.exists():
        return None
    try:
        return Card.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror})") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ModelError(f"{path} is damaged ({where}{': ' if where else ''}{first['msg']}); train it again") from error


def check_target(folder: Path, *, force: bool) -> None:
    """Raise InputError unless an adapter may be written there: a new or empty folder, or with `force` one that holds
    nothing but an adapter."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {folder} is a file; give another folder")
    names = _names(folder) if folder.exists() else set()
    if not names:
        return
    if names - FILES or not names & {RECORD, CARD}:
        other = min(names - FILES, default=min(names))
        raise InputError(f"--out {folder} holds other things ({other}); give a new or empty folder")
    if not force:
        raise InputError(f"--out {folder} holds an adapter; give another folder, or --force to replace it")


def write(folder: Path, weights: Path, card: Card, readme: str) -> Path:
    """Make the adapter folder from a folder of weights, the card and the text of the model card, in place of one that
    is there."""

    def fill(new: Path) -> None:
        for path in weights.iterdir():
            shutil.copyfile(path, new / path.name)
        write_file(new / CARD, f"{card.model_dump_json(indent=2)}\n".encode())
        write_file(new / README, readme.encode())

    return replace_folder(folder, fill)


def _names(folder: Path) -> set[str]:
    try:
        return {path.name for path in folder.iterdir()}
    except OSError as error:
        raise InputError(f"--out {folder} cannot be read ({error.strerror}); give another folder") from error
