"""Requests of the OpenAI API, field by field: types, ranges, and what is refused by name. null means left out.

No field is ignored that would change the answer: a field has an effect, or it is on the list of those that have none
anywhere (HARMLESS), or it is an error that names it.
"""

import reprlib
from abc import ABC, abstractmethod
from itertools import takewhile
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from kshot.errors import RequestError
from vlm.local.clients import check_stops
from vlm.server.openai.messages import (
    SYSTEM,
    AnyFormat,
    Message,
    Model,
    NamedTool,
    Neutral,
    ObjectFormat,
    SchemaFormat,
    Tool,
    wrong,
)

MAX_PROMPTS = 128
NonEmptyText = Annotated[str, Field(min_length=1)]


def stops(value: Any) -> list[str]:
    """A text or a list of them, as a list."""
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(each, str) and each for each in values):
        raise wrong("stop", f"stop must be a text or a list of texts, none of them empty; got {reprlib.repr(value)}")
    try:
        check_stops(values)
    except RequestError as error:
        raise wrong("stop", str(error)) from error
    return values


def prompts(value: Any) -> list[str | list[int]]:
    """The four forms of a prompt as a list of texts or of token lists."""
    if isinstance(value, str) or (isinstance(value, list) and value and all(map(_is_token, value))):
        return [value]
    if isinstance(value, list) and 0 < len(value) <= MAX_PROMPTS and all(map(_is_prompt, value)):
        return value
    forms = f"a text, a list of token ids, or a list of at most {MAX_PROMPTS} of either, none of them empty"
    raise wrong("prompt", f"prompt must be {forms}; got {reprlib.repr(value)}")


def _is_prompt(value: Any) -> bool:
    return (isinstance(value, str) and value != "") or (
        isinstance(value, list) and value != [] and all(map(_is_token, value))
    )


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


MAX_SAMPLES, MAX_STOPS, MAX_TOP = 16, 16, 20

HARMLESS: Neutral = {  # the values taken; None: any
    "user": None,
    "safety_identifier": None,
    "metadata": None,
    "prompt_cache_key": None,
    "store": (False,),
    "service_tier": ("auto", "default"),
}
_PENALTIES: Neutral = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
}
_OTHER_CHAT: Neutral = {
    "functions": ([],),
    "function_call": ("none",),
    "audio": (),
    "modalities": (["text"],),
}


class StreamOptions(Model):
    """Whether a last chunk says how many tokens there were."""

    NEUTRAL: ClassVar[Neutral] = {"include_obfuscation": (True, False)}  # whether padding hides the sizes of chunks

    include_usage: bool = False


class Choices(Model):
    """vLLM's structured outputs, of which a closed list of answers is built."""

    choice: list[NonEmptyText]


class GenerationRequest(Model, ABC):
    """What both endpoints take. The ranges of numbers are those of the OpenAI API, but for temperature's upper end."""

    model: str
    max_tokens: int | None = Field(None, ge=0)
    n: int = Field(1, ge=1, le=MAX_SAMPLES)
    temperature: float = Field(1.0, ge=0, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(-1, ge=-1)
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63), AfterValidator(lambda seed: seed % 2**63)] | None = None
    stop: Annotated[list[str], BeforeValidator(stops), Field(max_length=MAX_STOPS)] = Field([])
    stop_token_ids: list[Annotated[int, Field(ge=0)]] = Field([], max_length=MAX_STOPS)
    stream: bool = False
    stream_options: StreamOptions | None = None
    structured_outputs: Choices | None = None
    guided_choice: list[NonEmptyText] | None = None

    @property
    def choice(self) -> list[str] | None:
        """The closed list of answers, if there is one."""
        return self.structured_outputs.choice if self.structured_outputs else self.guided_choice

    default_limit: ClassVar[int]  # tokens of an answer, beyond a limited thought, where the client says nothing

    @property
    def thought_limit(self) -> int | None:
        """The most tokens of a thought, where the client says so."""
        return None

    @property
    def limit(self) -> int | None:
        """The most tokens of an answer, where the client says so."""
        return self.max_tokens

    @property
    @abstractmethod
    def top(self) -> int | None:
        """How many of the likeliest tokens come with each token; None: no log-probabilities at all."""

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @model_validator(mode="after")
    def _check_fields(self) -> Self:
        if self.stream_options and not self.stream:
            raise wrong("stream_options", "stream_options is for streams; set stream to true or leave it out")
        if self.structured_outputs and self.guided_choice:
            raise wrong("guided_choice", "guided_choice and structured_outputs.choice are the same; give one")
        if self.choice is not None:
            self._check_choice()
        return self

    def _check_choice(self) -> None:
        """Refuse fields without an effect on a choice."""
        off = "top_p", "top_k", "stop", "stop_token_ids", "logprobs", "top_logprobs", "echo"
        fields = type(self).model_fields
        refused = next((n for n in off if n in fields and getattr(self, n) != fields[n].default), None)
        if refused:
            raise wrong(
                refused, f"{refused} does not go with a closed list of choices, which come with choice_log_probs"
            )


class CompletionRequest(GenerationRequest):
    """POST completions. prompt: as a list, whatever form it came in."""

    NEUTRAL: ClassVar[Neutral] = {**HARMLESS, **_PENALTIES, "best_of": (1,), "suffix": ("",)}
    default_limit = 16

    prompt: Annotated[list[str | list[int]], BeforeValidator(prompts)]
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP)
    echo: bool = False

    @property
    def top(self) -> int | None:
        return self.logprobs

    @model_validator(mode="after")
    def _check_echo(self) -> Self:
        if self.max_tokens == 0 and not (self.echo and not self.stream):
            raise wrong("max_tokens", "max_tokens = 0 needs echo, without stream: there would be no answer")
        if self.echo and self.stream and self.logprobs is not None:
            raise wrong("logprobs", "logprobs of an echoed prompt cannot be streamed; set stream or echo to false")
        return self


EFFORTS = {"none": 0, "low": 512, "medium": 2048, "high": 8192}  # the most tokens of a thought
OF_TEMPLATES = {"messages", "tools", "documents", "add_generation_prompt"}  # variables that other fields give
MAX_TOOLS = 128


class ChatRequest(GenerationRequest):
    """POST chat/completions."""

    NEUTRAL: ClassVar[Neutral] = {**HARMLESS, **_PENALTIES, **_OTHER_CHAT}
    default_limit = 1024

    messages: list[Message] = Field(min_length=1)
    tools: list[Tool] = Field([], max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedTool = "auto"
    parallel_tool_calls: bool = True
    response_format: AnyFormat | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP)
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = Field({})
    reasoning_effort: Literal["none", "low", "medium", "high"] | None = None

    @property
    def thinks(self) -> bool | None:
        """Whether the answer is to begin with a thought; None: as the template does where nothing is said."""
        if self.choice is not None:  # scored without one
            return False
        return None if self.reasoning_effort is None else self.reasoning_effort != "none"

    @property
    def thought_limit(self) -> int | None:
        return EFFORTS[self.reasoning_effort] if self.reasoning_effort and self.thinks else None

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def top(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def schema_of_answer(self) -> dict[str, Any] | None:
        """The JSON schema that the answer's text follows, if any."""
        match self.response_format:
            case SchemaFormat(json_schema=named) if named.content is not None:
                return named.content
            case ObjectFormat() | SchemaFormat():
                return {"type": "object"}
        return None

    @property
    def callable_tools(self) -> list[Tool]:
        """The tools that the answer may call."""
        if isinstance(self.tool_choice, NamedTool):
            return [tool for tool in self.tools if tool.function.name == self.tool_choice.function.name]
        return [] if self.tool_choice == "none" else self.tools

    @property
    def instructions(self) -> int:
        """How many of the first messages are the system's."""
        return sum(1 for _ in takewhile(lambda message: message.role in SYSTEM, self.messages))

    @property
    def begins_answer(self) -> bool:
        """Whether the prompt ends with the beginning of the assistant's turn."""
        return not self.continue_final_message if self.add_generation_prompt is None else self.add_generation_prompt

    @model_validator(mode="after")
    def _check_messages(self) -> Self:
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise wrong("max_tokens", "max_tokens and max_completion_tokens are the same; give one")
        if self.top_logprobs is not None and not self.logprobs:
            raise wrong("top_logprobs", "top_logprobs needs logprobs; set it to true")
        if self.continue_final_message and self.add_generation_prompt:
            raise wrong("add_generation_prompt", "add_generation_prompt and continue_final_message exclude each other")
        if self.continue_final_message and self.messages[-1].role != "assistant":
            raise wrong("continue_final_message", "continue_final_message needs a last message of the assistant")
        if taken := sorted(OF_TEMPLATES & self.chat_template_kwargs.keys()):
            raise wrong("chat_template_kwargs", f"chat_template_kwargs sets {taken[0]}, which a request has as a field")
        if self.choice is not None and self.reasoning_effort not in (None, "none"):
            raise wrong("reasoning_effort", "reasoning_effort does not go with choices, scored without a thought")
        for number, message in enumerate(self.messages):
            _check_message(f"messages[{number}]", message, begun=number >= self.instructions)
        return self

    @model_validator(mode="after")
    def _check_tools(self) -> Self:
        names = [tool.function.name for tool in self.tools]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise wrong("tools", f"function {twice!r} stands twice in tools; give every function its own name")
        if self.tool_choice not in ("none", "auto") and not self.callable_tools:
            raise wrong("tool_choice", f"tool_choice wants a call, and tools has no such function; it has {names}")
        if self.choice is not None and (self.callable_tools or self.schema_of_answer is not None):
            raise wrong("tools", "tools and response_format do not go with a closed list of choices; give one of them")
        return self


def _check_message(name: str, message: Message, *, begun: bool) -> None:
    """begun: whether others than the system have spoken."""
    if begun and message.role in SYSTEM:
        raise wrong("messages", f"{name} is of the system; only the first ones may be")
    if not message.content and not message.tool_calls:
        raise wrong("messages", f"{name}.content is missing")
    if message.tool_calls and message.role != "assistant":
        raise wrong("messages", f"{name} has tool_calls; only messages of the assistant may")
