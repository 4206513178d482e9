"""An adapter folder: LoRA weights in the layout of a checkpoint, classifier.json, which says what they answer, and the
model card.

Complete or not there. Knows no training and no model; the weights' files belong to `vlm.local.checkpoint`.

TODO The model card of an adapter: README.md with the front matter that model hubs read. Card in, text out.

It says what the adapter is, how to ask it and where it came from; the same card gives the same bytes. It reads no
weights, states no accuracy (training measures none), and shows no path of this machine.
"""

import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from experiments.sweep.provenance import SHIPPED
from kshot.errors import InputError, ModelError
from kshot.files import replace_folder, write_file

# ---- An adapter folder: LoRA weights in the layout of a checkpoint, classifier.json, which says what they answer, and the

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


# ---- The model card of an adapter: README.md with the front matter that model hubs read. Card in, text out.

FEW = 5  # class names that are shown
NANO_LICENCE = "apache-2.0"  # of the models that come with kshot, as of kshot itself
USER, ASSISTANT = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"


def readme(card: Card, notes: Sequence[str] = ()) -> str:
    """The whole file. notes: sentences that must be said of the models and the shots."""
    return "\n".join([f"---\n{front_matter(card)}\n---\n", *_text(card, notes)])


def front_matter(card: Card) -> str:
    """The YAML. A base model that is a folder of this machine is none that a hub could link to, and is left out; so is
    the licence where the base's is not known, and a data set that has no hub id."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        base_model=None if _is_folder(card) else card.base_model.partition("@")[0],
        library_name="peft",
        pipeline_tag="image-text-to-text",
        license=NANO_LICENCE if card.base_model in SHIPPED["model"] else None,
        tags=["kshot", "lora", "few-shot", "image-classification"],
        datasets=[hub] if (hub := card.trained.get("data", {}).get("hub")) else None,
        metrics=["accuracy"],
    )
    return str(data.to_yaml()).strip()


def _text(card: Card, notes: Sequence[str]) -> Iterator[str]:
    trained, base = card.trained, _base(card)
    shots = trained["shots"]
    examples = f"{shots} labelled {'image' if shots == 1 else 'images'} of each class"
    yield f"# {_code(trained['dataset'])}, {shots} per class: a LoRA adapter of {_code(base)}\n"
    yield f"With it {_code(base)} writes the name of what a picture shows, one of {len(card.classes)} classes."
    yield f"It was trained by kshot on {examples}.\n"
    yield from (f"**Note.** {note}\n" for note in notes)
    yield from _rows(_facts(card))
    yield "\nAccuracy is not stated: training measures none. `kshot sweep` with the method vlm-lora and these settings"
    yield "trains the same adapter and tests it.\n"
    yield from _use(card)
    yield "## Settings\n"
    yield from _rows((name, _value(value)) for name, value in trained["settings"].items())
    yield "\n## Versions\n"
    yield from _rows(trained["versions"].items())
    yield "\nThe terms of the base model and of the data set hold for the adapter too.\n"


def _facts(card: Card) -> list[tuple[str, str]]:
    trained = card.trained
    facts = {name: fact for name, fact in trained.get("data", {}).items() if type(fact) in (str, int)}
    names = ", ".join(map(_code, card.classes[:FEW]))
    more = f", and {len(card.classes) - FEW} more" if len(card.classes) > FEW else ""
    return [
        ("base model", f"{_code(_base(card))}, {_revision(card)}"),
        ("data set", f"{_code(trained['dataset'])}, protocol {_code(trained['protocol'])}"),
        *((f"data set: {name}", _code(fact)) for name, fact in facts.items()),
        ("classes", f"{len(card.classes)}: {names}{more} (all are in `classifier.json`)"),
        ("shots", f"{trained['shots']} per class"),
        ("seed", str(trained["seed"])),
    ]


def _use(card: Card) -> Iterator[str]:
    from vlm.prompts import template

    asked = template(card.prompt)
    yield "## How to ask it\n"
    yield f"The longest side of an image is at most {card.max_side} pixels (LANCZOS; never enlarged). The user says"
    yield f"{_code(asked.question)}, the answer {_code(asked.answer)}, with image and class name in their places.\n"
    yield "```console\n$ kshot predict IMAGE --adapter DIR\n```\n"
    yield "prints the likeliest classes with their exact probabilities; DIR is this folder."
    yield "With transformers and PEFT:\n"
    yield f"```python\n{code(card)}```\n"


def code(card: Card) -> str:
    """Python that asks the adapter in the folder DIR about the image IMAGE with transformers and PEFT alone."""
    from vlm.prompts import IMAGE, template

    asked = template(card.prompt)
    prompt = f"{USER}{asked.question.replace(IMAGE, PICTURE)}{ASSISTANT}{asked.prefill}"
    if card.base_model in SHIPPED["model"]:
        base = "from vlm import nano\n\nbase = nano.folder()  # it comes with kshot"
    elif _is_folder(card):
        base = f"\nbase = {f'PATH/TO/{_base(card)}'!r}"
    else:
        hub_id, _, revision = card.base_model.partition("@")
        base = f"\nbase = {hub_id!r}" + (f"  # revision {revision}" if revision else "")
    return CODE.format(base=base, side=card.max_side, prompt=prompt)


CODE = """from peft import PeftModel
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
{base}
processor = AutoProcessor.from_pretrained(base)
model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), "DIR")
image = Image.open("IMAGE").convert("RGB")
image.thumbnail(({side}, {side}), Image.Resampling.LANCZOS)
asked = processor(text=[{prompt!r}], images=[image], return_tensors="pt")
written = model.generate(**asked, max_new_tokens=32, do_sample=False)[0, asked["input_ids"].shape[1] :]
print(processor.decode(written, skip_special_tokens=True).partition("\\n")[0].strip())
"""


def _is_folder(card: Card) -> bool:
    return Path(card.base_model).is_absolute()  # as kshot train records one


def _base(card: Card) -> str:
    """The base model's name, without a place."""
    return Path(card.base_model).name if _is_folder(card) else card.base_model


def _revision(card: Card) -> str:
    revision = card.trained["settings"].get("model_revision")
    if _is_folder(card):
        return f"a folder whose content has the fingerprint {_code(revision)}"
    if card.base_model in SHIPPED["model"]:
        return f"revision {_code(revision)}; it comes with kshot and is on no hub"
    return f"revision {_code(revision)}" if revision else "the hub's newest revision at the time"


def _rows(pairs: Iterable[tuple[str, str]]) -> Iterator[str]:
    yield "| | |\n| --- | --- |"
    for name, value in pairs:
        yield "| " + " | ".join(text.replace("|", "\\|") for text in (name, value)) + " |"


def _value(value: Any) -> str:
    return "none" if value is None else _code(value)


def _code(value: Any) -> str:
    """Anything as code in a line of Markdown, whatever is in it."""
    text = " ".join(str(value).split())
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence, space = "`" * (longest + 1), " " if longest else ""
    return f"{fence}{space}{text}{space}{fence}"
