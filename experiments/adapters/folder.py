"""A folder of `kshot train`: weights (LoRA as a checkpoint has it, or a head on DINOv2), classifier.json, which records
what they answer, and the model card, README.md: what it is, how to use it, where it came from. The card states no
accuracy, which training does not measure, and no path of this machine; the same record gives the same bytes."""

import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from experiments.sweep.provenance import SHIPPED
from kshot.errors import InputError, ModelError
from kshot.files import replace_folder, write_file
from kshot.images import MAX_RATIO
from kshot.untrusted import read_file

CARD, RECORD, README = "classifier.json", "kshot.json", "README.md"
ADAPTER: Literal["adapter"] = "adapter"
HEAD: Literal["head"] = "head"
FILES = {
    ADAPTER: {"adapter_model.safetensors", "adapter_config.json", RECORD, CARD, README},
    HEAD: {"head.safetensors", RECORD, CARD, README},
}
ALL_FILES = set().union(*FILES.values())


class Card(BaseModel):
    """classifier.json: what a classifier needs besides the weights. kind: an adapter of the VLM, or a head on DINOv2.
    prompt: the template in full; "" for a head. trained: where it came from (data set, protocol, method, shots, seed,
    settings, versions)."""

    model_config = ConfigDict(frozen=True)

    kind: Literal["adapter", "head"] = ADAPTER
    classes: tuple[str, ...] = Field(min_length=2)
    prompt: str
    max_side: PositiveInt
    base_model: str
    trained: dict[str, Any] = {}

    @property
    def setting(self) -> str:
        """The setting that names the base model."""
        return "model" if self.kind == ADAPTER else "backbone"

    @property
    def base_folder(self) -> Path | None:
        """The base model's folder or file, where it is one of this machine: kshot train records its full path."""
        return Path(self.base_model) if Path(self.base_model).is_absolute() else None


def read_card(folder: Path) -> Card | None:
    """The card of an adapter folder; None where it has none, as a checkpoint does. Raises ModelError for a damaged
    one, and where there is no folder."""
    path = folder / CARD
    if not folder.is_dir():
        raise ModelError(f"adapter {folder} is no folder; give one that kshot train or PEFT wrote")
    if not path.exists():
        return None
    try:
        return Card.model_validate_json(read_file(path))
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror})") from error
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise ModelError(f"{path} is damaged ({field}{': ' if field else ''}{first['msg']}); train it again") from error


def check_target(folder: Path, *, force: bool) -> None:
    """Raise InputError unless a trained model may be written there: a new or empty folder, or with `force` one that
    holds nothing else."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {folder} is a file; give another folder")
    try:
        names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    except OSError as error:
        raise InputError(f"--out {folder} cannot be read ({error.strerror}); give another folder") from error
    if not names:
        return
    if names - ALL_FILES or not names & {RECORD, CARD}:
        other = min(names - ALL_FILES, default=min(names))
        raise InputError(f"--out {folder} holds other things ({other}); give a new or empty folder")
    if not force:
        raise InputError(f"--out {folder} holds a trained model; give another folder, or --force to replace it")


def write(folder: Path, weights: Path, card: Card, readme: str) -> Path:
    """Make the adapter folder from a folder of weights, the card and the text of the model card, in place of one that
    is there. It is complete or not there."""

    def fill(new: Path) -> None:
        for path in weights.iterdir():
            shutil.copyfile(path, new / path.name)
        write_file(new / CARD, f"{card.model_dump_json(indent=2)}\n".encode())
        write_file(new / README, readme.encode())

    return replace_folder(folder, fill)


# The model card

TEMPLATES = {ADAPTER: "model_card.md.jinja", HEAD: "head_card.md.jinja"}
CLASSES_SHOWN = 5
NANO_LICENCE = "apache-2.0"  # of the models that come with kshot, as of kshot itself


def readme(card: Card, notes: Sequence[str] = (), asked: str = "") -> str:
    """The text of the model card. notes: sentences about the models and the shots that it has to state. asked: of an
    adapter, the whole prompt as one text. The front matter leaves out a base model that is a folder of this machine, an
    unknown licence, a data set without a hub id."""
    from huggingface_hub import ModelCard, ModelCardData

    from baselines.hub import hub_id_of
    from vlm.prompts import template

    hub_id, _, revision = card.base_model.partition("@")
    shipped = card.base_model == SHIPPED[card.setting].NAME
    base = hub_id if card.kind == ADAPTER or shipped else hub_id_of(hub_id)
    data = ModelCardData(
        base_model=None if card.base_folder else base,
        library_name="peft" if card.kind == ADAPTER else None,
        pipeline_tag="image-text-to-text" if card.kind == ADAPTER else "image-classification",
        license=NANO_LICENCE if shipped else None,
        tags=["kshot", *(["lora"] if card.kind == ADAPTER else []), "few-shot", "image-classification"],
        datasets=[hub] if (hub := card.trained.get("data", {}).get("hub")) else None,
        metrics=["accuracy"],
    )
    settings = card.trained["settings"].items()
    content = ModelCard.from_template(
        data,
        str(Path(__file__).with_name(TEMPLATES[card.kind])),
        card=card,
        notes=notes,
        base=card.base_folder.name if card.base_folder else card.base_model,
        facts=_facts(card),
        settings=[(name, "none" if value is None else _code(value)) for name, value in settings],
        template=template(card.prompt) if card.kind == ADAPTER else None,
        prompt=asked,
        shipped=shipped,
        hub_id=hub_id,
        revision=revision,
        code=_code,
        least=-(-card.max_side // MAX_RATIO),  # of the short side, as in `data.preparation`
        table=_table,
        python=repr,
    )
    return str(content)


def _facts(card: Card) -> list[tuple[str, str]]:
    trained, known = card.trained, card.trained["settings"].get(f"{card.setting}_revision")
    revision = _code(known)
    names = ", ".join(map(_code, card.classes[:CLASSES_SHOWN]))
    more = f", and {len(card.classes) - CLASSES_SHOWN} more" if len(card.classes) > CLASSES_SHOWN else ""
    if card.base_folder:
        base = f"{_code(card.base_folder.name)}, a folder whose content has the fingerprint {revision}"
    elif card.base_model == SHIPPED[card.setting].NAME:
        base = f"{_code(card.base_model)}, revision {revision}; it comes with kshot and is on no hub"
    else:
        of_hub = f"revision {revision}" if known else "the hub's newest revision at the time"
        base = f"{_code(card.base_model)}, {of_hub}"
    return [
        ("base model", base),
        ("data set", f"{_code(trained['dataset'])}, protocol {_code(trained['protocol'])}"),
        *((f"data set: {k}", _code(v)) for k, v in trained.get("data", {}).items() if type(v) in (str, int)),
        ("method", _code(trained["method"])),
        ("classes", f"{len(card.classes)}: {names}{more} (all are in `classifier.json`)"),
        ("shots", f"{trained['shots']} per class"),
        ("seed", str(trained["seed"])),
    ]


def _table(rows: Iterable[tuple[str, str]]) -> str:
    lines = ("| " + " | ".join(text.replace("|", "\\|") for text in row) + " |" for row in rows)
    return "\n".join(["| | |\n| --- | --- |", *lines])


def _code(value: Any) -> str:
    """Anything as code in a line of Markdown, whatever is in it."""
    text = " ".join(str(value).split())
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence, space = "`" * (longest + 1), " " if longest else ""
    return f"{fence}{space}{text}{space}{fence}"
