"""The Responses API in its simple form: its items as messages of a chat, and the chat's answer as items.

Nothing is stored: a conversation is sent as a whole. `requests` checks the fields that both APIs have.
"""

import time
import uuid
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from fastapi.exceptions import RequestValidationError
from pydantic import Field, ValidationError

from vlm.server.openai.completions import Completion
from vlm.server.openai.messages import Message, Model, Neutral
from vlm.server.openai.requests import HARMLESS, ChatRequest, StreamOptions
from vlm.server.openai.responses import Fields

NAMES = {  # chat's → ours
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text",
    "reasoning_effort": "reasoning",
}
UNUSED = {"id", "status", "phase"}  # of the items of answers, as they come back


class TextOptions(Model):
    """How the answer's text looks. format: as in a chat's response_format, but all on one level."""

    NEUTRAL: ClassVar[Neutral] = {"verbosity": ("medium",)}

    format: dict[str, Any] | None = None


class Reasoning(Model):
    """How long may be thought, as a chat's reasoning_effort. What is thought is no part of the output."""

    NEUTRAL: ClassVar[Neutral] = {"summary": ("auto",), "generate_summary": ("auto",)}

    effort: str | None = None


class ResponseRequest(Model):
    """POST responses. What is not checked here is checked as a part of the chat that it becomes."""

    NEUTRAL: ClassVar[Neutral] = {
        **HARMLESS,
        "background": (False,),
        "include": ([], ["reasoning.encrypted_content"]),
        "top_logprobs": (0,),
        "truncation": ("disabled",),
    }

    model: str
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    stream: bool = False
    stream_options: StreamOptions | None = None
    text: TextOptions = TextOptions()
    tools: list[dict[str, Any]] = Field([])
    tool_choice: str | dict[str, Any] = "auto"
    parallel_tool_calls: bool = True
    reasoning: Reasoning = Reasoning()


def chat_request(request: ResponseRequest) -> ChatRequest:
    """The same as a chat, which is streamed. Raises RequestValidationError for what a chat does not take."""
    same = "model", "temperature", "top_p", "parallel_tool_calls"
    fields = {name: getattr(request, name) for name in same}
    fields |= {"max_completion_tokens": request.max_output_tokens, "stream": True}
    fields |= {"stream_options": {"include_usage": True}, "messages": _messages(request.input)}
    fields |= {"tools": [_nested(tool, "function") for tool in request.tools]}
    fields["reasoning_effort"] = request.reasoning.effort
    choice = request.tool_choice
    fields["tool_choice"] = _nested(choice, "function") if isinstance(choice, dict) else choice
    fields["response_format"] = request.text.format and _nested(request.text.format, "json_schema")
    try:
        chat = ChatRequest.model_validate(fields)
    except ValidationError as error:
        raise RequestValidationError([_renamed(each) for each in error.errors()]) from error
    if request.instructions:
        chat.messages.insert(0, Message(role="system", content=request.instructions))  # type: ignore[arg-type]
    return chat


def _nested(value: Fields, kind: str) -> Fields:
    """What stands on one level in this API, under its kind as in a chat."""
    rest = {name: each for name, each in value.items() if name != "type"}
    return {"type": kind, kind: rest} if value.get("type") == kind else value


def _renamed(error: Any) -> Any:
    """A fault of the chat, by this API's names."""
    place = tuple(NAMES.get(each, each) for each in error["loc"])
    message, context = error["msg"].replace("messages[", "input["), error.get("ctx", {})
    if context.get("param") in NAMES:
        context = {**context, "param": NAMES[context["param"]]}
    return {**error, "loc": place, "msg": message, "ctx": context}


def _messages(items: str | list[Fields]) -> list[Fields]:
    """The items as messages. The calls that follow an assistant's message belong to it."""
    if isinstance(items, str):
        return [{"role": "user", "content": items}]
    made = list[Fields]()
    for number, item in enumerate(items):
        kind = item.get("type") or "message"
        if kind == "message":
            rest = {name: value for name, value in item.items() if name not in UNUSED}
            made.append({**rest, "content": _content(item.get("content"))})
        elif kind == "function_call":
            if not made or made[-1].get("role") != "assistant":
                made.append({"role": "assistant"})
            call = {"type": "function", "function": {name: item.get(name) for name in ("name", "arguments")}}
            made[-1].setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            made.append({"role": "tool", "content": _content(item.get("output"))})
        else:
            message = f"input[{number}] is of type {kind!r:.40}; give messages, function_call or function_call_output"
            raise RequestValidationError([{"type": "wrong", "msg": message, "ctx": {"param": "input"}, "loc": ()}])
    return made


def _content(value: Any) -> Any:
    return [_part(each) for each in value] if isinstance(value, list) else value


def _part(part: Any) -> Any:
    match part:
        case {"type": "input_text" | "output_text", "text": text}:
            return {"type": "text", "text": text}
        case {"type": "input_image", "image_url": url}:
            return {"type": "image_url", "image_url": {"url": url, "detail": part.get("detail")}}
    return part


@dataclass
class Response:
    """What a request is answered with: the deltas of a chat's only choice as items."""

    request: ResponseRequest
    chat: Completion
    _output: list[Fields] = field(default_factory=list)
    _grown: list[str] = field(default_factory=list)  # of the last item: its text or arguments, until it is closed
    _count: int = 0  # of events
    _created: float = field(default_factory=lambda: int(time.time()))
    _id: str = field(default_factory=lambda: f"resp_{uuid.uuid4().hex}")

    async def response(self) -> Fields:
        """The whole response."""
        last: Fields = {}
        async for event in self.chunks():
            last = event
        return dict(last["response"])

    async def chunks(self) -> AsyncGenerator[Fields]:
        """The events of a stream; the last one holds the whole response."""
        chunks, reason, usage = self.chat.chunks(), "stop", dict[str, Any]()
        try:
            async for chunk in chunks:
                usage = chunk.get("usage") or usage
                if not self._count:
                    for name in ("created", "in_progress"):
                        yield self._event(f"response.{name}", response=self._body("in_progress"))
                for choice in chunk["choices"]:
                    reason = choice["finish_reason"] or reason
                    for event in self._events(choice["delta"]):
                        yield event
        finally:
            await chunks.aclose()
        status = "incomplete" if reason == "length" else "completed"
        if not self._output:
            for event in self._opened(_text_item()):
                yield event
        for event in self._closed(status):
            yield event
        yield self._event(f"response.{status}", response=self._body(status, usage))

    def _events(self, delta: Fields) -> Iterator[Fields]:
        """The events of a delta of the chat's message."""
        if text := delta.get("content"):
            if not self._output:
                yield from self._opened(_text_item())
            self._grown.append(text)
            yield self._item_event("response.output_text.delta", delta=text, content_index=0, logprobs=[])
        for call in delta.get("tool_calls", ()):
            function = call["function"]
            if "name" in function:
                yield from self._closed("completed")
                yield from self._opened(_call_item(function["name"], call["id"]))
            if function["arguments"]:
                self._grown.append(function["arguments"])
                yield self._item_event("response.function_call_arguments.delta", delta=function["arguments"])

    def _opened(self, item: Fields) -> Iterator[Fields]:
        self._output.append(item)
        place, bare = len(self._output) - 1, {**item, **({"content": []} if "content" in item else {})}
        yield self._event("response.output_item.added", output_index=place, item=bare)
        if "content" in item:
            part = {**item["content"][0]}
            yield self._item_event("response.content_part.added", content_index=0, part=part)

    def _closed(self, status: str) -> Iterator[Fields]:
        """The last item, if there is one, is complete, or cut off."""
        if not self._output:
            return
        item, written = self._output[-1], "".join(self._grown)
        self._grown.clear()
        item["status"] = status
        if item["type"] == "message":
            part = item["content"][0]
            part["text"] = written
            yield self._item_event("response.output_text.done", content_index=0, text=part["text"], logprobs=[])
            yield self._item_event("response.content_part.done", content_index=0, part=part)
        else:
            item["arguments"] = written
            done = {name: item[name] for name in ("name", "arguments")}
            yield self._item_event("response.function_call_arguments.done", **done)
        yield self._event("response.output_item.done", output_index=len(self._output) - 1, item=item)

    def _item_event(self, kind: str, **fields: Any) -> Fields:
        place = len(self._output) - 1
        return self._event(kind, item_id=self._output[place]["id"], output_index=place, **fields)

    def _event(self, kind: str, **fields: Any) -> Fields:
        self._count += 1
        return {"type": kind, "sequence_number": self._count - 1, **fields}

    def _body(self, status: str, usage: Fields | None = None) -> Fields:
        request = self.request
        same = ["model", "instructions", "max_output_tokens", "temperature", "top_p"]
        same += ["tools", "tool_choice", "parallel_tool_calls"]
        body = {"id": self._id, "object": "response", "created_at": self._created, "status": status, "error": None}
        body |= {name: getattr(request, name) for name in same}
        body |= {"output": self._output, "metadata": {}, "previous_response_id": None, "store": False}
        body |= {"text": {"format": request.text.format or {"type": "text"}}, "usage": usage and _usage(usage)}
        return {**body, "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None}


def _text_item() -> Fields:
    part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    status = {"role": "assistant", "status": "in_progress"}
    return {"id": f"msg_{uuid.uuid4().hex}", "type": "message", **status, "content": [part]}


def _call_item(name: str, call: str) -> Fields:
    fields = {"call_id": call, "name": name, "arguments": "", "status": "in_progress"}
    return {"id": f"fc_{uuid.uuid4().hex}", "type": "function_call", **fields}


def _usage(usage: Fields) -> Fields:
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": usage.get("completion_tokens_details", {"reasoning_tokens": 0}),
        "total_tokens": usage["total_tokens"],
    }
