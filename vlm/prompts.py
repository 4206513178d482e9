"""The question, written once: how an image is asked about, what the answer looks like, and how an answer is read.

The words are those of the official vlm_classifier recipe. Class names come in as they are to be written (their
clean-up belongs to the data set). This module knows no model and no data set.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import tinker

from kshot_errors import PromptError
from vlm.inputs import ImageRule, datum, image_chunk, model_input

QUESTION = "What is the name of the subject in this photo?"
PREFILL = "The subject in this photo is:"
TURN = "<|im_end|>"
SPECIAL = "<|"  # begins the tokens that steer the model: no name may write one
END = "\n"  # closes the answer: "crocodile" must not be read as the beginning of "crocodile head"


@dataclass(frozen=True)
class Prompt:
    """One question about an image with a closed list of answers, bound to a tokenizer and an image rule.

    tokenizer: any with `encode(text) -> ids` that knows Qwen3-VL's chat tokens (<|im_start|>, <|vision_start|>, ...).
    classes: the answers, label → text, each a single line; duplicates raise PromptError.
    """

    tokenizer: Any
    rule: ImageRule
    classes: tuple[str, ...]
    question_text: str = QUESTION
    prefill: str = PREFILL

    def __post_init__(self) -> None:
        if len(set(self.classes)) < len(self.classes):
            twice = next(c for c in self.classes if self.classes.count(c) > 1)
            raise PromptError(f"class name {twice!r} stands twice; give every class its own name")
        for name in self.classes:
            if not name.strip() or END in name or SPECIAL in name:
                raise PromptError(f"class name {name!r} cannot be an answer: one non-empty line without {SPECIAL!r}")

    def question(self, image: bytes) -> tinker.ModelInput:
        """The prompt up to and with the prefill: the next token is the first of the class name."""
        before, after = self._around
        return model_input(before, image_chunk(image, self.rule), [*after, *self._prefill])

    def datum(self, image: bytes, label: int) -> tinker.Datum:
        """The training example: the assistant's whole turn is the target, as in the recipe."""
        before, after = self._around
        return datum(model_input(before, image_chunk(image, self.rule), after), self._answers[label])

    @cached_property
    def choices(self) -> tuple[tuple[int, ...], ...]:
        """label → the token ids that write the class name after the prefill, end of line included."""
        return tuple(tuple(self.tokenizer.encode(f" {name}{END}")) for name in self.classes)

    @cached_property
    def _answers(self) -> tuple[list[int], ...]:
        """label → the assistant's whole turn."""
        turn = self.tokenizer.encode(TURN)
        return tuple([*self._prefill, *choice, *turn] for choice in self.choices)

    @property
    def stops(self) -> list[str]:
        """The texts that end an answer: the end of its line, and of the turn."""
        return [END, TURN]

    def line(self, tokens: Sequence[int]) -> str:
        """The answer that these tokens write: what stands before the first of `stops`, without the prefill."""
        text = self.tokenizer.decode(list(tokens))
        for stop in self.stops:
            text = text.split(stop, 1)[0]
        return text.strip().removeprefix(self.prefill).strip()

    def parse(self, answer: str) -> int:
        """The label whose class name is the answer, to the letter, or -1."""
        return self.classes.index(answer) if answer in self.classes else -1

    @cached_property
    def _around(self) -> tuple[list[int], list[int]]:
        before = self.tokenizer.encode("<|im_start|>user\n<|vision_start|>")
        after = f"<|vision_end|>{self.question_text}{TURN}\n<|im_start|>assistant\n"
        return before, self.tokenizer.encode(after)

    @cached_property
    def _prefill(self) -> Sequence[int]:
        return self.tokenizer.encode(self.prefill)
