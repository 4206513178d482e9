"""The question, written once: how an image (or a text) is asked about, what the answer looks like, and how it is read.

A template is two lines of text with a slot each; the preset "recipe" has the words of the official vlm_classifier
recipe, whose way of reading an answer holds for all. Class names come in as they are to be written (their clean-up
belongs to the data set).
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import tinker

from kshot.errors import PromptError
from vlm import label_trie
from vlm.inputs import ImageRule, closed_datum, datum, image_chunk, model_input

QUESTION = "What is the name of the subject in this photo?"
PREFILL = "The subject in this photo is:"
IMAGE, TEXT, LABEL = "{image}", "{text}", "{label}"
BETWEEN = "=>"  # question and answer of a template that is written as one line
END_OF_TURN = "<|im_end|>"
SPECIAL = "<|"  # begins most tokens that steer models: for a template, which knows no tokenizer yet
END = "\n"  # closes the answer: "crocodile" must not be read as the beginning of "crocodile head"


@dataclass(frozen=True)
class Template:
    """The user's turn, with {image} where the image stands, or {text} where the text to classify does, and the
    assistant's line, with {label} for the class name.

    Raises PromptError where a slot is missing, stands twice or on the other side, where there is another one, and for
    tokens that steer the model.
    """

    question: str = f"{IMAGE}{QUESTION}"
    answer: str = f"{PREFILL} {LABEL}"

    def __post_init__(self) -> None:
        for what, text, slot in (("question", self.question, self.slot), ("answer", self.answer, LABEL)):
            slots = re.findall(r"\{[^{}]*\}", text)
            if slots != [slot]:
                has = f"has {', '.join(slots)}" if slots else "has none"
                raise PromptError(f"the {what} {text!r} of a prompt must hold {slot} once and no other slot; it {has}")
            if SPECIAL in text:
                raise PromptError(f"the {what} {text!r} of a prompt writes {SPECIAL!r}, which steers the model")
        if END in self.answer:
            raise PromptError(f"the answer {self.answer!r} of a prompt must be one line")

    @property
    def slot(self) -> str:
        """What stands in the question: IMAGE or TEXT."""
        return TEXT if TEXT in self.question else IMAGE

    @property
    def prefill(self) -> str:
        """What stands before the class name, without the space between: that is part of the name's first token."""
        return self.answer.partition(LABEL)[0].rstrip(" ")

    @property
    def lead(self) -> str:
        """The space between prefill and class name."""
        return self.answer.partition(LABEL)[0][len(self.prefill) :]

    @property
    def tail(self) -> str:
        """What stands after the class name on its line."""
        return self.answer.partition(LABEL)[2]

    def __str__(self) -> str:
        return f"{self.question} {BETWEEN} {self.answer}"


RECIPE = Template()
PRESETS = {"recipe": RECIPE}


def template(text: str) -> Template:
    """The template of a preset's name, or of a line "QUESTION => ANSWER" with {image} in the first and {label} in the
    second part. Raises PromptError for anything else, and as Template does."""
    if text in PRESETS:
        return PRESETS[text]
    question, between, answer = text.partition(BETWEEN)
    if not between:
        form = f"'{IMAGE}What is this? {BETWEEN} It is a {LABEL}'"
        raise PromptError(f"prompt {text!r} is neither a preset ({', '.join(PRESETS)}) nor a template such as {form}")
    made = Template(question.strip(), answer.strip())
    if made.slot != IMAGE:
        raise PromptError(
            f"the question {made.question!r} of a prompt must hold {IMAGE}; {TEXT} is for `vlm.prompts.Template`"
        )
    return made


def special_tokens(tokenizer: Any) -> list[str]:
    """The tokens that steer the model: no text that is given may write one."""
    return [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]


@dataclass(frozen=True)
class Prompt:
    """One question about an image or a text with a closed list of answers, bound to a tokenizer and an image rule.

    tokenizer: of transformers. Where it knows ChatML's tokens, as those of Qwen and SmolLM2 do, question and answer are
    turns of a chat; else they are lines of one text. rule: None for a template with {text}.
    classes: the answers, label → text, each a single line; duplicates raise PromptError.
    """

    tokenizer: Any
    rule: ImageRule | None
    classes: tuple[str, ...]
    template: Template = RECIPE

    def __post_init__(self) -> None:
        composed = [unicodedata.normalize("NFC", name) for name in self.classes]  # as Qwen's tokenizer reads them
        if len(set(composed)) < len(composed):
            twice = next(name for name in composed if composed.count(name) > 1)
            raise PromptError(f"class name {twice!r} stands twice; give every class its own name")
        for name in self.classes:
            if not name.strip() or END in name:
                raise PromptError(f"class name {name!r} cannot be an answer: give one non-empty line")
            self._check(f"class name {name!r}", name)
        self._check("the question of a prompt", self.template.question)
        self._check("the answer of a prompt", self.template.answer)

    def question(self, subject: bytes | str) -> tinker.ModelInput:
        """The prompt about an image's bytes, or a text, up to and with the prefill: the next token is the first of the
        class name. Raises PromptError for a subject of the other kind, and a text that writes what steers the model."""
        *before, last = self._asked(subject)
        return model_input(*before, [*last, *self._prefill])

    def without_image(self) -> tinker.ModelInput:
        """The same question with no image, or text, in it: what the model would answer blindly."""
        return model_input(self._user_turn(self.template.question.replace(self.template.slot, "")), self._prefill)

    def datum(self, subject: bytes | str, label: int) -> tinker.Datum:
        """The training example: the assistant's whole turn is the target, as in the recipe."""
        return datum(model_input(*self._asked(subject)), self._answers[label])

    def closed_datum(self, subject: bytes | str, label: int) -> tinker.Datum:
        """The training example for the loss "closed_set": the choice among the class names alone, token by token."""
        return closed_datum(self.question(subject), self.choices[label], self._branches[label])

    @cached_property
    def choices(self) -> tuple[tuple[int, ...], ...]:
        """label → the token ids that write the class name after the prefill, end of line included."""
        lead, tail, before = self.template.lead, self.template.tail, f"{END}{self.template.prefill}"
        return tuple(tuple(self._encode_after(before, f"{lead}{name}{tail}{END}")) for name in self.classes)

    @cached_property
    def _branches(self) -> tuple[tuple[label_trie.Branch, ...], ...]:
        return label_trie.branches(self.choices)

    @cached_property
    def _answers(self) -> tuple[list[int], ...]:
        """label → the assistant's whole turn."""
        return tuple([*self._prefill, *choice, *self.stops] for choice in self.choices)

    @cached_property
    def stops(self) -> list[int]:
        """The token that ends an answer: that of the turn, or of a text."""
        return self._encode(self._end)

    def text(self, tokens: Sequence[int]) -> str:
        """The answer that these tokens write: what stands before the end of the turn."""
        return str(self.tokenizer.decode(list(tokens))).split(self._end, 1)[0].strip()

    def parse(self, answer: str) -> int:
        """The label whose class name the answer is, or -1 where it is none.

        The recipe's rule: what follows the last colon, in lower case, equals the class name. Besides, an answer may be
        a class name that holds a colon; and names that differ in case alone are told apart by it.
        """
        whole = answer.strip().removeprefix(self.template.prefill).strip()
        for read in (whole, answer.rpartition(":")[2].strip()):
            name = read.removesuffix(self.template.tail).strip()
            for labels, key in ((self._labels, name), (self._lower, name.lower())):
                if key in labels:
                    return labels[key]
        return -1

    @cached_property
    def _labels(self) -> dict[str, int]:
        return {name: label for label, name in enumerate(self.classes)}

    @cached_property
    def _lower(self) -> dict[str, int]:
        """In lower case, as far as that tells names apart."""
        lower = [name.lower() for name in self.classes]
        return {name: label for label, name in enumerate(lower) if lower.count(name) == 1}

    def _check(self, what: str, text: str) -> None:
        if token := next((token for token in self._special if token in text), None):
            raise PromptError(f"{what} writes {token}, which steers the model; leave it out")

    @cached_property
    def _special(self) -> list[str]:
        return special_tokens(self.tokenizer)

    def _asked(self, subject: bytes | str) -> list[Any]:
        """The user's turn, in parts; the last of them are tokens."""
        if self.template.slot == TEXT:
            if not isinstance(subject, str):
                raise PromptError(f"the question {self.template.question!r} is about a text, and got an image")
            self._check(f"the text {subject!r:.60}", subject)
            return [self._user_turn(self.template.question.replace(TEXT, subject))]
        if isinstance(subject, str) or self.rule is None:
            raise PromptError(f"the question {self.template.question!r} is about an image; give {TEXT} for a text")
        before, after = self._around
        return [before, image_chunk(subject, self.rule), after]

    def _user_turn(self, question: str) -> list[int]:
        question = question.strip()
        if self._chats:
            return self._encode(f"{_USER}{question}{_ASSISTANT}")
        return list(self.tokenizer.encode(f"{question}{END}"))  # with what it begins texts with

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _encode_after(self, before: str, text: str) -> list[int]:
        """The tokens of a text where another stands before it: tokenizers such as SentencePiece's begin a text with a
        space. Raises PromptError where no tokens of its own would write it there."""
        first, both = self._encode(before), self._encode(before + text)
        if both[: len(first)] == first:
            return both[len(first) :]
        apart = self._encode(text)  # a token would reach over the border
        if self.tokenizer.decode([*first, *apart]) != self.tokenizer.decode(both):
            raise PromptError(f"the tokenizer cannot write {text!r} right after {before!r}; give another template")
        return apart

    @cached_property
    def _chats(self) -> bool:
        """Whether the tokenizer knows ChatML's turns."""
        return len(self._encode(END_OF_TURN)) == 1

    @property
    def _end(self) -> str:
        if not self._chats and self.tokenizer.eos_token is None:
            raise PromptError("the tokenizer has neither chat turns nor a token that ends a text")
        return END_OF_TURN if self._chats else str(self.tokenizer.eos_token)

    @cached_property
    def _around(self) -> tuple[list[int], list[int]]:
        before, after = self.template.question.split(IMAGE)
        return self._encode(f"{_USER}{before}<|vision_start|>"), self._encode(f"<|vision_end|>{after}{_ASSISTANT}")

    @cached_property
    def _prefill(self) -> Sequence[int]:
        return self._encode_after(END, self.template.prefill)


_USER, _ASSISTANT = "<|im_start|>user\n", f"{END_OF_TURN}\n<|im_start|>assistant\n"
