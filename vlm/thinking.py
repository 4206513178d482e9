"""How a model's chat template writes a thought before an answer, and a text or tokens as thought and answer.

Nothing here knows names of marks or switches: a small conversation is written by the template in several ways, and what
comes out says where a thought stands, what surrounds it, and which variable of the template turns it on and off.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from kshot.errors import PromptError
from vlm import templates

ASKED, THOUGHT, ANSWER = "kshot-question", "kshot-thought", "kshot-answer"  # what is in the probes
MOST_NAMES = 64  # of a template's variables, that are tried as switches
Variables = Mapping[str, bool]


@dataclass(frozen=True)
class Marks:
    """How a template writes a thought. begin, end: the marks around it; begin is "" where the template does not show
    it. opening: what follows the prompt where that has not begun the thought. closing: what stands between the last
    word of a thought and the answer. on, off: the template's variables with and without a thought; empty where it has
    no switch."""

    begin: str
    end: str
    opening: str
    closing: str
    on: Variables = field(default_factory=dict)
    off: Variables = field(default_factory=dict)

    def begun(self, prompt: str) -> bool:
        """Whether the text of a prompt ends within a thought."""
        return bool(self.begin) and prompt.rstrip().endswith(self.begin)

    def ended(self, prompt: str) -> bool:
        """Whether it ends behind one, so that the answer follows."""
        return prompt.rstrip().endswith(self.end)

    def thinking(self, prompt: str) -> str:
        """A prompt that was written with `on`, so far that the thought follows."""
        return prompt if self.begun(prompt) else prompt + self.opening

    def answering(self, prompt: str) -> str:
        """A prompt that was written with `off`, so far that the answer follows: a thought that it begins is closed."""
        return prompt + self.closing if self.begun(prompt) else prompt

    @property
    def after(self) -> str:
        """What stands between the mark at a thought's end and the answer."""
        return self.closing.partition(self.end)[2]


class Split(NamedTuple):
    """A text as thought and answer. thought: None where there is none. closed: whether its end mark was written; the
    answer is empty where it was not."""

    thought: str | None
    answer: str
    closed: bool


class ThoughtReader:
    """A text that grows, as thought and answer. within: whether it begins within a thought; else it has one only where
    it begins with the mark."""

    def __init__(self, marks: Marks, *, within: bool) -> None:
        self._marks = marks
        self.thinks: bool | None = True if within or not marks.begin else None  # None: not known yet
        self.thought = self.closed = False  # whether there is a thought, and whether it has ended
        self._left, self._fresh = "", True  # what was not given out; whether white space at the start is left out

    def add(self, text: str, *, last: bool = False) -> tuple[str, str]:
        """What further text adds to the thought and to the answer. last: whether it is the end."""
        self._left += text
        if self.thinks is None:
            self._decide(last=last)
        thought = self._think(last=last) if self.thinks else ""
        return thought, "" if self.thinks is not False else self._answer()

    def _decide(self, *, last: bool) -> None:
        begun = self._left.lstrip()
        if begun.startswith(self._marks.begin):
            self.thinks, self._left = True, begun[len(self._marks.begin) :]
        elif last or not self._marks.begin.startswith(begun):
            self.thinks, self._fresh = False, False

    def _think(self, *, last: bool) -> str:
        self.thought = True
        text, found, after = self._left.partition(self._marks.end)
        ready = text if found or last else text[: len(text) - held(text, self._marks.end)]
        given = ready.rstrip()
        self._left = self._left[len(given) :]
        if found:
            self.thinks, self.closed, self._left, fresh = False, True, after, self._fresh
            self._fresh = True
            return given.lstrip() if fresh else given
        if self._fresh:
            given = given.lstrip()
        self._fresh = self._fresh and not given
        return given

    def _answer(self) -> str:
        given, self._left = self._left.lstrip() if self._fresh else self._left, ""
        self._fresh = self._fresh and not given
        return given


@dataclass(frozen=True)
class Thought:
    """A thought. tokens: those before its end mark, as far as they hold nothing of that. closed: whether the mark was
    written. length: tokens that were sampled, the mark's included. rest: of one that wrote its mark, its last
    characters, where these share a token with the mark; None where the mark is still to be written."""

    tokens: Sequence[int]
    closed: bool
    length: int
    rest: str | None = None

    @classmethod
    def read(cls, tokenizer: Any, sampled: Sequence[int], marks: Marks, ends: Sequence[int]) -> "Thought":
        """What was sampled after a prompt that has begun the thought. ends: the tokens of the end of a turn, which are
        no part of it."""
        tokens, last = list(sampled), closed_at(tokenizer, sampled, marks.end)
        if last is None:
            length, ending = len(tokens), list(ends)
            return cls(tokens[: -len(ending)] if ending and tokens[-len(ending) :] == ending else tokens, False, length)
        text, count = str(tokenizer.decode(tokens[:last])).partition(marks.end)[0], last
        while not text.startswith(before := str(tokenizer.decode(tokens[:count]))):
            count -= 1
        return cls(tokens[:count], True, len(tokens), text[len(before) :])


def held(text: str, mark: str) -> int:
    """How many characters at the end of a text may be the beginning of a mark."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)


def split(text: str, marks: Marks | None, *, within: bool = False) -> Split:
    """A whole text. marks: None for a model that does not think. within: see `ThoughtReader`."""
    if marks is None:
        return Split(None, text, False)
    reader = ThoughtReader(marks, within=within)
    thought, answer = reader.add(text, last=True)
    return Split(thought if reader.thought else None, answer, reader.closed)


def without_thought(text: str, marks: Marks | None) -> str:
    """What stands behind the last thought of a text; of one that is unfinished nothing."""
    if marks is None:
        return text
    answer = text.rpartition(marks.end)[2]
    return answer.partition(marks.begin)[0] if marks.begin else answer


def split_tokens(tokenizer: Any, tokens: Sequence[int], *, within: bool = True) -> Split:
    """What a model has sampled after a prompt, as thought and answer, by the marks of its tokenizer's own template.
    within: whether the prompt has begun the thought. Tokens that end the answer are no part of it.

    Raises PromptError for a template without a thinking mode.
    """
    special = {n for n, token in tokenizer.added_tokens_decoder.items() if token.special}
    kept = list(tokens)
    while kept and kept[-1] in special:
        kept.pop()
    template = templates.chosen(tokenizer, takes_images=False)
    return split(str(tokenizer.decode(kept)), needed(marks_of(tokenizer, template)), within=within)


def closed_at(tokenizer: Any, tokens: Sequence[int], end: str) -> int | None:
    """How many tokens a thought has, up to and with its end mark; None where that is not there."""
    own = tokenizer.added_tokens_encoder.get(end)
    if own is not None and own in tokens:
        return tokens.index(own) + 1
    if end not in tokenizer.decode(list(tokens)):
        return None
    low, high = 1, len(tokens)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if end in tokenizer.decode(list(tokens[:middle])) else (middle + 1, high)
    return low


def thought_length(tokenizer: Any, tokens: Sequence[int], marks: Marks, *, within: bool) -> int:
    """How many tokens of a sample are of its thought, marks included. within: see `ThoughtReader`."""
    if not within and split(str(tokenizer.decode(list(tokens))), marks).thought is None:
        return 0
    return closed_at(tokenizer, tokens, marks.end) or len(tokens)


# What a template says of thoughts

_MARKS: "WeakKeyDictionary[Any, dict[str, Marks | None]]" = WeakKeyDictionary()


def needed(marks: Marks | None) -> Marks:
    """The marks. Raises PromptError where there are none."""
    if marks is None:
        raise PromptError(
            "the model's chat template has no thinking mode; ask without a thought, or take a model that thinks"
        )
    return marks


def marks_of(tokenizer: Any, template: str | None) -> Marks | None:
    """How a template writes thoughts; None where it writes none. Raises PromptError where it goes beyond a limit."""
    known = _MARKS.setdefault(tokenizer, {})
    if template is not None and template not in known:
        known[template] = next(
            filter(None, (_read(_Probe(tokenizer, template, parts)) for parts in (False, True))), None
        )
    return known.get(template or "")


@dataclass(frozen=True)
class _Probe:
    """A template, asked about small conversations. parts: whether contents are lists of parts."""

    tokenizer: Any
    template: str
    parts: bool

    def prompt(self, variables: Variables) -> str:
        """What the template writes where the assistant's turn begins, and nothing before."""
        text = self._written([self._user], variables, begin_answer=True)
        return self._turn(text, variables)

    def answer(self, variables: Variables, content: str = ANSWER, **fields: str) -> str:
        """The assistant's turn."""
        message = {"role": "assistant", "content": self._content(content), **fields}
        return self._turn(self._written([self._user, message], variables), variables)

    def switches(self) -> Iterator[Variables]:
        """Variables that may turn thoughts on or off; first none."""
        yield {}
        for name in templates.names(self.tokenizer, self.template)[:MOST_NAMES]:
            yield {name: True}
            yield {name: False}

    @property
    def _user(self) -> dict[str, Any]:
        return {"role": "user", "content": self._content(ASKED)}

    def _content(self, text: str) -> Any:
        return [{"type": "text", "text": text}] if self.parts else text

    def _written(self, messages: Sequence[Any], variables: Variables, *, begin_answer: bool = False) -> str:
        return templates.probed(self.tokenizer, self.template, messages, None, variables, begin_answer=begin_answer)

    def _turn(self, text: str, variables: Variables) -> str:
        before = self._written([self._user], variables)
        return text[len(before) :] if before and text.startswith(before) else text.partition(ASKED)[2]


def _read(probe: _Probe) -> Marks | None:
    found = _shown(probe) or _dropped(probe)
    if found is None:
        return None
    begin, end, opening, closing = found
    plain = Marks(begin, end, opening, closing)
    on, off = _switch(probe, plain)
    # what opens a thought is what the prompt with a thought lacks
    return Marks(begin, end, "" if plain.begun(probe.prompt(on)) else opening, closing, on, off)


def _shown(probe: _Probe) -> tuple[str, str, str, str] | None:
    """Marks and what surrounds a thought, where the template writes that of an assistant's last turn."""
    for variables in probe.switches():
        head, thought, rest = probe.answer(variables, reasoning_content=THOUGHT).partition(THOUGHT)
        closing, answer, _ = rest.partition(ANSWER)
        if not (thought and answer and closing.strip()):
            continue
        prompt = probe.prompt(variables)
        opening = head.removeprefix(prompt) if head.startswith(prompt) else ""
        begin = opening.strip() or _last_mark(probe.tokenizer, head)
        return begin, closing.strip(), head[head.rindex(begin) :] if begin else "", closing
    return None


def _dropped(probe: _Probe) -> tuple[str, str, str, str] | None:
    """The same, where the template takes thoughts out of past answers: it cuts these at the mark."""
    spelled = [token for token in probe.tokenizer.added_tokens_encoder if token in probe.template]
    plain = probe.answer({})
    for end in spelled:
        if ANSWER not in plain or probe.answer({}, f"{THOUGHT}{end}{ANSWER}") != plain:
            continue
        head = plain.partition(ANSWER)[0].rstrip().removesuffix(end)
        for variables in probe.switches():
            opening = probe.prompt(variables).removeprefix(head)
            if opening.strip() and end not in opening and head + opening == probe.prompt(variables):
                return opening.strip(), end, opening, end
        return "", end, "", end
    return None


def _last_mark(tokenizer: Any, head: str) -> str:
    """The mark that a text ends with: a token of the tokenizer's, else its last word."""
    text = head.strip()
    ending = [token for token in tokenizer.added_tokens_encoder if text.endswith(token)]
    return max(ending, key=len) if ending else (text.split() or [""])[-1]


def _switch(probe: _Probe, marks: Marks) -> tuple[Variables, Variables]:
    """The variable by which prompts are with and without a thought, if there is one."""

    def rank(variables: Variables) -> int:
        """2: the prompt begins a thought; 1: it leaves that to the model; 0: the answer follows."""
        prompt = probe.prompt(variables)
        return 0 if marks.ended(prompt) else 2 if marks.begun(prompt) else 1

    each = list(probe.switches())[1:]
    for true, false in zip(each[::2], each[1::2], strict=True):
        if probe.prompt(true) and probe.prompt(false) and rank(true) != rank(false):
            return (true, false) if rank(true) > rank(false) else (false, true)
    return {}, {}
