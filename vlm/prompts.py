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

from kshot.errors import PromptError, UnknownNameError
from vlm import label_trie, templates
from vlm.inputs import ImageRule, closed_datum, datum, image_chunk, model_input
from vlm.templates import IMAGE_TOKEN
from vlm.thinking import ANSWER, Marks, Thought, marks_of, needed, without_thought

QUESTION = "What is the name of the subject in this photo?"
PREFILL = "The subject in this photo is:"
IMAGE, TEXT, LABEL = "{image}", "{text}", "{label}"
BETWEEN = "=>"  # question and answer of a template that is written as one line
SPECIAL = "<|"  # begins most tokens that steer models: for a template, which knows no tokenizer yet
TRAIN_ON = ("answer", "all")  # where a thought stands before the answer: what the loss is on
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

    tokenizer: of transformers. Where it has a chat template, or knows ChatML's tokens, question and answer are turns of
    a chat (see `templates.chosen`); else they are lines of one text. rule: None for a template with {text}.
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

    def thinking(self, subject: bytes | str) -> tinker.ModelInput:
        """The prompt up to the place where a thought begins. Raises as `question`, and PromptError for a chat template
        without a thinking mode."""
        needed(self.marks)
        return model_input(*self._asked(subject, thinking=True))

    def after(self, asked: tinker.ModelInput, thought: Thought) -> tinker.ModelInput:
        """The prompt `asked` of `thinking` with this thought, which is closed by force where it is not finished, up to
        and with the prefill."""
        return model_input(*asked.chunks, [*self._closed(thought), *self._prefill_after_thought])

    def read_thought(self, sampled: Sequence[int]) -> Thought:
        """What was sampled after a prompt of `thinking`."""
        return Thought.read(self.tokenizer, sampled, needed(self.marks), self.stops)

    def thought(self, text: str) -> Thought:
        """A thought in words, for training."""
        tokens = self._encode_after(END, text)
        return Thought(tokens, True, len(tokens))

    def without_image(self) -> tinker.ModelInput:
        """The same question with no image, or text, in it: what the model would answer blindly."""
        return model_input(self._user_turn(self.template.question.replace(self.template.slot, "")), self._prefill)

    def datum(
        self, subject: bytes | str, label: int, thought: Thought | None = None, train_on: str = TRAIN_ON[0]
    ) -> tinker.Datum:
        """The training example: the assistant's whole turn is the target, as in the recipe. thought: what stands before
        the answer; train_on: whether it is a part of the target ("all") or of what is given ("answer")."""
        if train_on not in TRAIN_ON:
            raise UnknownNameError("train_on", train_on, TRAIN_ON)
        if thought is None:
            return datum(model_input(*self._asked(subject)), [*self._prefill, *self._ending[label]])
        asked, before = self.thinking(subject), self._closed(thought)
        answer = [*self._prefill_after_thought, *self._ending[label]]
        if train_on == "all":
            return datum(asked, [*before, *answer])
        return datum(model_input(*asked.chunks, before), answer)

    def closed_datum(
        self, subject: bytes | str, label: int, thought: Thought | None = None, train_on: str = TRAIN_ON[0]
    ) -> tinker.Datum:
        """The training example for the loss "closed_set": the choice among the class names alone, token by token.
        Raises PromptError for another `train_on` than "answer"."""
        if train_on != TRAIN_ON[0]:
            raise PromptError(f"a choice among class names learns no thought; train_on must be {TRAIN_ON[0]}")
        asked = self.question(subject) if thought is None else self.after(self.thinking(subject), thought)
        return closed_datum(asked, self.choices[label], self._branches[label])

    @cached_property
    def choices(self) -> tuple[tuple[int, ...], ...]:
        """label → the token ids that write the class name after the prefill, end of line included."""
        lead, tail, before = self.template.lead, self.template.tail, f"{END}{self.template.prefill}"
        return tuple(tuple(self._encode_after(before, f"{lead}{name}{tail}{END}")) for name in self.classes)

    @cached_property
    def _branches(self) -> tuple[tuple[label_trie.Branch, ...], ...]:
        return label_trie.branches(self.choices)

    @cached_property
    def _ending(self) -> tuple[list[int], ...]:
        """label → the class name and the end of the turn."""
        return tuple([*choice, *self.stops] for choice in self.choices)

    @cached_property
    def stops(self) -> list[int]:
        """The token that ends an answer: that of the turn, or of a text."""
        return self._encode(self.end)

    @cached_property
    def marks(self) -> Marks | None:
        """How the model writes thoughts; None where its chat template has no thinking mode."""
        return marks_of(self.tokenizer, self._chat)

    def text(self, tokens: Sequence[int]) -> str:
        """The answer that these tokens write: what stands before the end of the turn."""
        return str(self.tokenizer.decode(list(tokens))).split(self.end, 1)[0].strip()

    def parse(self, answer: str) -> int:
        """The label whose class name the answer is, or -1 where it is none.

        The recipe's rule: what follows the last colon, in lower case, equals the class name. Besides, an answer may be
        a class name that holds a colon; and names that differ in case alone are told apart by it. A thought before an
        answer is no part of it.
        """
        answer = without_thought(answer, self.marks)
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

    def _asked(self, subject: bytes | str, *, thinking: bool = False) -> list[Any]:
        """The user's turn and the beginning of the assistant's, in parts; the last of them are tokens."""
        if self.template.slot == TEXT:
            if not isinstance(subject, str):
                raise PromptError(f"the question {self.template.question!r} is about a text, and got an image")
            self._check(f"the text {subject!r:.60}", subject)
            return [self._user_turn(self.template.question.replace(TEXT, subject), thinking=thinking)]
        if isinstance(subject, str) or self.rule is None:
            raise PromptError(f"the question {self.template.question!r} is about an image; give {TEXT} for a text")
        before, after = self._around_thinking if thinking else self._around
        return [before, image_chunk(subject, self.rule), after]

    def _user_turn(self, question: str, *, thinking: bool = False) -> list[int]:
        question = question.strip()
        if self._chat is not None:
            return self._encode(self._turns(question, thinking=thinking))
        return list(self.tokenizer.encode(f"{question}{END}"))  # with what it begins texts with

    def _turns(self, content: Any, *, thinking: bool) -> str:
        """The user's turn, and the assistant's up to the thought, or without one up to the answer."""
        marks, message = self.marks, {"role": "user", "content": content}
        variables = None if marks is None else marks.on if thinking else marks.off
        try:
            text = templates.written(self.tokenizer, [message], None, self._chat, variables, begin_answer=True)
        except ValueError as error:
            raise PromptError(f"the model's chat template cannot write the question: {error}") from error
        if marks is None:
            return text
        return marks.thinking(text) if thinking else marks.answering(text)

    def _closed(self, thought: Thought) -> list[int]:
        """The tokens of a thought, and of what stands between it and the answer."""
        marks = needed(self.marks)
        closing = marks.closing if thought.rest is None else f"{thought.rest}{marks.end}{marks.after}"
        return [*thought.tokens, *self._encode_after("a", closing)]  # after a letter as after any word

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
    def _chat(self) -> str | None:
        """The chat template; None where a prompt is one plain text."""
        return templates.chosen(self.tokenizer, takes_images=self.template.slot == IMAGE)

    @cached_property
    def end(self) -> str:
        """What ends the assistant's turn, as the template writes it, if that is one token; else what ends texts."""
        if self._chat is not None:
            turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": ANSWER}]
            end = templates.probed(self.tokenizer, self._chat, turns).rpartition(ANSWER)[2].strip()
            if end and len(self._encode(end)) == 1:
                return end
        if self.tokenizer.eos_token is None:
            raise PromptError("the tokenizer has neither chat turns nor a token that ends a text")
        return str(self.tokenizer.eos_token)

    @cached_property
    def _around(self) -> tuple[list[int], list[int]]:
        return self._around_image(thinking=False)

    @cached_property
    def _around_thinking(self) -> tuple[list[int], list[int]]:
        return self._around_image(thinking=True)

    def _around_image(self, *, thinking: bool) -> tuple[list[int], list[int]]:
        """The tokens before and after the image."""
        if self._chat is None:
            raise PromptError("the model has no chat template that writes images; give a Qwen3-VL")
        before, after = (
            [{"type": "text", "text": text}] if text else [] for text in self.template.question.split(IMAGE)
        )
        text = self._turns([*before, {"type": "image"}, *after], thinking=thinking)
        if text.count(IMAGE_TOKEN) != 1:
            raise PromptError(f"the model's chat template has {text.count(IMAGE_TOKEN)} places for one image")
        first, last = text.split(IMAGE_TOKEN)
        return self._encode(first), self._encode(last)

    @cached_property
    def _prefill(self) -> Sequence[int]:
        before = END if self._chat is None else self._turns("a", thinking=False)[-1:]
        return self._encode_after(before, self.template.prefill)

    @cached_property
    def _prefill_after_thought(self) -> Sequence[int]:
        return self._encode_after(needed(self.marks).closing[-1:], self.template.prefill)
