"""The model cards of the nano pair, in the hub's format, from the records of how the models were made."""

from collections.abc import Mapping
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from data.catalog import find
from experiments.pretrain.students import LOGIT_SCALE
from experiments.pretrain.subjects import VALIDATION
from vlm.prompts import PREFILL, QUESTION

SHOTS = (1, 4, 16)
FLOOR = "pixel-knn"


@dataclass(frozen=True)
class StageRecord:
    """How long one stage trained. machine: in words."""

    steps: int
    batch: int
    seconds: int
    machine: str

    def __str__(self) -> str:
        return f"{self.steps:,} steps of {self.batch} pictures, {self.seconds / 60:.0f} minutes on {self.machine}"


@dataclass(frozen=True)
class CardFacts:
    """drawings: distinct ones, mirror images not counted. accuracies: method → shots → share on VALIDATION."""

    drawings: int
    names: int
    stages: Mapping[str, StageRecord]
    accuracies: Mapping[str, Mapping[int, float]]


def dinov2_card(facts: CardFacts) -> str:
    """README.md of the nano DINOv2."""
    return _render("dinov2.md.jinja", facts, "DINOv2", ("dinov2-logreg", FLOOR))


def qwen_card(facts: CardFacts) -> str:
    """README.md of the nano Qwen3-VL."""
    return _render("qwen3_vl.md.jinja", facts, "Qwen3-VL", ("vlm-zero-shot", "vlm-lora", FLOOR))


def _render(template: str, facts: CardFacts, original: str, methods: tuple[str, ...]) -> str:
    environment = Environment(
        loader=PackageLoader("experiments.pretrain"),
        undefined=StrictUndefined,
        autoescape=select_autoescape(),  # of HTML alone: this is Markdown
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(
        facts=facts,
        original=original,
        methods=methods,
        shots=SHOTS,
        validation=VALIDATION,
        icons_licence=find("icons").licence,
        question=QUESTION,
        prefill=PREFILL,
        logit_scale=LOGIT_SCALE,
    )
