"""What an answer must look like, as a grammar: JSON by a schema, calls of tools; and calls as they are read from text.

Calls are written as Qwen's templates write them. A schema's answers are compact, with one space after each comma and
colon, as Python's `json` writes them and Qwen's templates do: free white space would let a model write it for ever.
"""

import json
import uuid
from collections.abc import Iterator, Sequence
from decimal import Decimal
from typing import Any

from kshot.errors import PromptError, RequestError
from vlm.server.openai.messages import Tool
from vlm.server.openai.requests import ChatRequest

OPEN, CLOSE = "<tool_call>", "</tool_call>"
BEGIN, MIDDLE, END = f'{OPEN}\n{{"name": "', '", "arguments": ', f"}}\n{CLOSE}"
MAX_CALLS = 16  # of one answer
MAX_SCHEMA = 1 << 17  # characters of all schemas of a request; they are compiled in a second or less
MAX_MULTIPLE = 10_000  # states of the automata that count multiples; a state takes 1 KB
MAPS, DATA = ("properties", "patternProperties", "$defs", "definitions"), ("const", "enum", "default", "examples")
OPEN_KEYS = frozenset({"additionalProperties", "patternProperties", "unevaluatedProperties"})
COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def grammar(request: ChatRequest, tokenizer: Any) -> str | None:
    """The grammar of an answer, in llguidance's form of Lark; None where anything may be answered.

    Raises PromptError for a tokenizer that cannot write calls, RequestError for schemas that are too large.
    """
    tools, schema = request.callable_tools, request.schema_of_answer
    _check(*(tool.function.parameters for tool in tools), schema)
    if not tools:
        return None if schema is None else f"%llguidance {{}}\nstart: {_json(schema)}\n"
    known = tokenizer.added_tokens_encoder
    if OPEN not in known or CLOSE not in known:
        raise PromptError(f"this model's tokenizer has no token {OPEN}, so that it calls no tools; leave tools out")
    free = request.tool_choice == "auto"
    many = request.parallel_tool_calls and request.tool_choice in ("auto", "required")
    return "\n".join(
        [
            "%llguidance {}",
            f"start: calls{' | answer' if free else ''}{' | text calls' if free and schema is None else ''}",
            f"answer: {'text' if schema is None else _json(schema)}",
            "calls: call" + (f' ("\\n" call){{0,{MAX_CALLS - 1}}}' if many else ""),
            f"call: {' | '.join(f'call_{n}' for n in range(len(tools)))}",
            *(f"call_{n}: {_call(tool)}" for n, tool in enumerate(tools)),
            f"text: {_text(tokenizer)}",
            f"TEXT: /(.|\\n)+/ & ~/(.|\\n)*{OPEN}(.|\\n)*/",
            "",
        ]
    )


def _check(*schemas: dict[str, Any] | None) -> None:
    try:
        size = len(json.dumps(schemas))
    except ValueError as error:  # an integer of thousands of digits
        raise RequestError(f"the schema cannot be followed: {error}") from error
    if size > MAX_SCHEMA:
        raise RequestError(f"the schemas have {size:,} characters, at most {MAX_SCHEMA:,} are read; give simpler ones")
    left, numbers = list[Any](schemas), set[float]()
    while left:
        value = left.pop()
        number = value.get("multipleOf") if isinstance(value, dict) else None
        if isinstance(number, int | float) and not isinstance(number, bool):
            numbers.add(number)
        left += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if sum(map(_states, numbers)) > MAX_MULTIPLE:
        given = ", ".join(map(str, sorted(numbers)[-3:]))
        raise RequestError(f"multipleOf {given} takes too much work; give at most {MAX_MULTIPLE:,} in all")


def _states(number: float) -> int:
    """The states of an automaton that counts multiples of a number: it reads digits, so 0.25 is as 25."""
    digits = Decimal(str(number)).as_tuple()
    return int("".join(map(str, digits.digits))) * 10 ** max(0, int(digits.exponent))


def _json(schema: dict[str, Any]) -> str:
    closed = schema if _mixed(schema) else _closed(schema)
    return "%json " + json.dumps({**closed, "x-guidance": COMPACT})


def _mixed(schema: Any) -> bool:
    """Whether an object may be described in several places, so that none of them has all of its properties."""
    if isinstance(schema, list):
        return any(map(_mixed, schema))
    if not isinstance(schema, dict):
        return False
    several = {"anyOf", "oneOf", "$ref"} if "properties" in schema else set()
    return not schema.keys().isdisjoint(several | {"allOf"}) or any(map(_mixed, schema.values()))


def _closed(schema: Any) -> Any:
    """The schema with `additionalProperties: false` where it says nothing of them, as OpenAI's strict schemas must: a
    model that may invent properties may do so without an end. What follows it follows the schema too."""
    if isinstance(schema, list):
        return [_closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = dict[str, Any]()
    for key, value in schema.items():
        if key in MAPS and isinstance(value, dict):
            made[key] = {name: _closed(each) for name, each in value.items()}
        else:
            made[key] = value if key in DATA else _closed(value)
    known = made.get("properties")
    if isinstance(known, dict) and OPEN_KEYS.isdisjoint(made) and set(made.get("required") or ()) <= known.keys():
        made["additionalProperties"] = False
    return made


def _call(tool: Tool) -> str:
    """Without a schema of its parameters, a function has none; they are an object also where the schema forgets it."""
    parameters = tool.function.parameters or {"properties": {}}
    if "$ref" not in parameters:
        parameters = {"type": "object", **parameters}
    head = json.dumps(f"{BEGIN.removeprefix(OPEN)}{tool.function.name}{MIDDLE}")
    return f"{OPEN} {head} {_json(parameters)} {json.dumps(END.removesuffix(CLOSE))} {CLOSE}"


def _text(tokenizer: Any) -> str:
    """Any text, and the tokens that the grammar counts as special and the tokenizer does not, as those of a thought."""
    tokens = tokenizer.added_tokens_decoder.items()
    plain = [str(n) for n, token in tokens if not token.special and token.content not in (OPEN, CLOSE)]
    return f"TEXT? (<[{','.join(plain)}]> TEXT?)*" if plain else "TEXT"


class CallReader:
    """An answer as parts of a message, as it grows: its text, and its calls. count: calls that have begun."""

    def __init__(self) -> None:
        self.count = 0
        self._left, self._mark = "", 0  # what is not given out, and which mark comes next

    def add(self, text: str, *, last: bool = False) -> Iterator[dict[str, Any]]:
        """The deltas of further text. last: whether it is the end."""
        self._left += text
        while True:
            mark = (BEGIN, MIDDLE, END)[self._mark]
            before, found, after = self._left.partition(mark)
            if not found:
                break
            yield from self._part(before)
            if self._mark == 1:
                self.count += 1
                function = {"name": before, "arguments": ""}
                call = {"index": self.count - 1, "id": f"call_{uuid.uuid4().hex}", "type": "function"}
                yield {"tool_calls": [{**call, "function": function}]}
            self._left, self._mark = after, (self._mark + 1) % 3
        held = 0 if last else next((n for n in range(len(mark), 0, -1) if before.endswith(mark[:n])), 0)
        if self._mark != 1:
            yield from self._part(before[: len(before) - held])
            self._left = before[len(before) - held :]

    def _part(self, text: str) -> Iterator[dict[str, Any]]:
        if text and self._mark == 2:
            yield {"tool_calls": [{"index": self.count - 1, "function": {"arguments": text}}]}
        elif text and self._mark == 0 and not self.count:  # between calls there is a line's end alone
            yield {"content": text}

    def reason(self, reason: str | None) -> str | None:
        """Why the answer has ended, in the API's words."""
        return "tool_calls" if reason == "stop" and self.count else reason


def message(text: str, reason: str | None) -> tuple[dict[str, Any], str | None]:
    """A whole answer's content and tool_calls, and why it has ended."""
    reader, content, calls = CallReader(), "", list[dict[str, Any]]()
    for delta in reader.add(text, last=True):
        content += delta.get("content", "")
        for part in delta.get("tool_calls", ()):
            if part["index"] == len(calls):
                calls.append({key: value for key, value in part.items() if key != "index"})
            else:
                calls[-1]["function"]["arguments"] += part["function"]["arguments"]
    fields = {"content": content or None, "tool_calls": calls} if calls else {"content": content}
    return fields, reader.reason(reason)


def for_template(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Tools as chat templates take them."""
    return [{"type": tool.type, "function": tool.function.model_dump(exclude_none=True)} for tool in tools]
