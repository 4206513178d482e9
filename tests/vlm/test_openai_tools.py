"""Tools and JSON by a schema through the official client; turns as Qwen3-VL's own template writes them."""

import json
from copy import copy
from typing import Any

import openai
import pytest
from jsonschema import validate
from openai import NOT_GIVEN
from openai.lib.streaming.chat import ChatCompletionStreamState

from tests.vlm import genuine
from tests.vlm.openai_served import HELLO, Models, checked, image_part, refusal
from vlm import nano, templates
from vlm.server.openai import chat, tools
from vlm.server.openai.requests import ChatRequest

UNIT = {"type": "string", "enum": ["celsius", "kelvin"]}
PLACE = {"type": "string", "enum": ["Paris", "Oslo"]}
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Says how warm it is, é.",
        "parameters": {"type": "object", "properties": {"city": PLACE, "unit": UNIT}, "required": ["city"]},
    },
}
WEATHER["function"]["parameters"]["additionalProperties"] = False
CLOCK = {"type": "function", "function": {"name": "clock"}}
FORCED = {"type": "function", "function": {"name": "weather"}}
PAST: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [image_part(b""), {"type": "text", "text": "Where is it warm?"}]},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Paris","n":[1.5]}'}},
            {"id": "2", "type": "function", "function": {"name": "clock", "arguments": "{}"}},
        ],
    },
    {"role": "tool", "tool_call_id": "1", "content": "20"},
    {"role": "tool", "tool_call_id": "2", "name": "clock", "content": [{"type": "text", "text": "noon"}]},
    {"role": "assistant", "content": "In Paris."},
    {"role": "user", "name": "me", "content": "And now?"},
]


def rendered(tokenizer: Any, messages: Any, **options: Any) -> str:
    return chat.conversation(ChatRequest(model="any", messages=messages, **options), tokenizer).text


def genuinely(tokenizer: Any, messages: Any, offered: Any, **options: Any) -> str:
    """The conversation by transformers and Qwen3-VL's own template."""
    plain = json.loads(json.dumps(messages))
    for message in plain:
        message["content"] = message["content"] or ""
        for call in message.get("tool_calls", ()):
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        if isinstance(message["content"], list):
            parts = [p if p["type"] == "text" else {"type": "image"} for p in message["content"]]
            message["content"] = parts
    fields = {"tokenize": False, "add_generation_prompt": True, **options}
    return str(
        tokenizer.apply_chat_template(plain, tools=offered, chat_template=genuine.template("qwen3_vl"), **fields)
    )


@pytest.mark.parametrize("offered", [None, [WEATHER, CLOCK]])
def test_turns_are_those_of_qwens_own_template(tokenizer: Any, offered: Any) -> None:
    own = copy(tokenizer)
    own.chat_template = genuine.template("qwen3_vl")
    for messages in (PAST, PAST[1:], PAST[:5], HELLO):
        expected = genuinely(tokenizer, messages, offered)
        for each in (tokenizer, own):
            assert rendered(each, messages, **({"tools": offered} if offered else {})) == expected


def test_tools_that_are_not_to_be_called_are_not_shown(tokenizer: Any) -> None:
    assert rendered(tokenizer, HELLO, tools=[WEATHER], tool_choice="none") == rendered(tokenizer, HELLO)


def test_system_messages_at_the_beginning_are_one(tokenizer: Any) -> None:
    messages = [{"role": "developer", "content": "a"}, {"role": "system", "content": "b"}, *HELLO]
    assert rendered(tokenizer, messages) == genuinely(
        tokenizer, [{"role": "system", "content": "a\n\nb"}, *HELLO], None
    )


def test_thoughts_of_the_past_go_to_the_template(tokenizer: Any) -> None:
    thought = [*HELLO, {"role": "assistant", "content": "b", "reasoning_content": "hm"}, *HELLO]
    assert "hm" not in rendered(tokenizer, thought)
    other = copy(tokenizer)
    other.chat_template = templates.CHATML + "{% for m in messages %}{{ m.reasoning_content }}{% endfor %}"
    assert rendered(other, thought).endswith("hm")


def test_a_template_without_tools_says_so(tokenizer: Any) -> None:
    other = copy(tokenizer)
    other.chat_template = genuine.template("qwen3_vl").replace("{%- if tools %}", "{%- if false %}")
    with pytest.raises(chat.PromptError, match="chat template writes no tools"):
        rendered(other, HELLO, tools=[WEATHER])


def ask(api: openai.OpenAI, **options: Any) -> Any:
    fields = {"max_tokens": 400, "temperature": 0.0, "messages": HELLO, **options}
    return checked(api.chat.completions.create(model=nano.NAME, **fields)).choices[0]


def check_calls(calls: Any) -> None:
    for call in calls:
        assert call.type == "function"
        known = {each["function"]["name"]: each["function"].get("parameters") for each in (WEATHER, CLOCK)}
        schema = known[call.function.name] or {"type": "object", "maxProperties": 0}
        validate(json.loads(call.function.arguments), schema)
    assert len({call.id for call in calls}) == len(calls)


@pytest.mark.parametrize("choice", ["required", FORCED])
@pytest.mark.parametrize("options", [{}, {"temperature": 2.0, "seed": 5}])
def test_what_must_be_called_is_called(
    api: openai.OpenAI, choice: Any, options: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tools, "MAX_CALLS", 3)  # the nano model would not end
    answer = ask(api, tools=[WEATHER, CLOCK], tool_choice=choice, **options)
    check_calls(answer.message.tool_calls)
    assert (answer.message.content, answer.finish_reason) == (None, "tool_calls")
    if choice is FORCED:
        assert [call.function.name for call in answer.message.tool_calls] == ["weather"]
    one = ask(api, tools=[WEATHER, CLOCK], tool_choice=choice, parallel_tool_calls=False, **options)
    assert len(one.message.tool_calls) == 1


def test_what_may_be_called_is_called_where_the_model_begins_to(api: openai.OpenAI, tokenizer: Any) -> None:
    """The nano model never does by itself; once it has begun, it must go on."""
    answer = ask(api, tools=[WEATHER], max_tokens=8)
    assert (answer.message.tool_calls, answer.finish_reason) == (None, "length")
    assert answer.message.content
    request = ChatRequest(model="any", messages=HELLO, tools=[WEATHER])
    from vlm.local.sampling.grammar import Grammar

    walk = Grammar(tokenizer, len(tokenizer), [tokenizer.eos_token_id], str(tools.grammar(request, tokenizer))).walk()
    for token in tokenizer.encode('Well: <tool_call>\n{"name": "weather", "arguments": {"city": "'):
        assert walk.allowed()[token]
        walk.append(token)
    allowed = {tokenizer.decode([n]) for n in walk.allowed().nonzero()[:, 0].tolist()}
    assert all("Paris".startswith(each) or "Oslo".startswith(each) for each in allowed)


@pytest.mark.parametrize("choice", ["required", "auto"])
def test_a_stream_adds_up_to_the_whole(api: openai.OpenAI, choice: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "MAX_CALLS", 2)
    options: dict[str, Any] = {"tools": [WEATHER, CLOCK], "tool_choice": choice, "temperature": 1.0, "seed": 2}
    options["max_tokens"] = 150 if choice == "required" else 15
    whole = ask(api, **options)
    pieces = api.chat.completions.create(model=nano.NAME, messages=HELLO, stream=True, **options)
    state = ChatCompletionStreamState(input_tools=options["tools"], response_format=NOT_GIVEN)
    for piece in pieces:
        state.handle_chunk(piece)
    final = state.current_completion_snapshot.choices[0]
    assert (final.message.content or None, final.finish_reason) == (whole.message.content, whole.finish_reason)
    got, expected = (
        [(call.function.name, call.function.arguments) for call in each.message.tool_calls or ()]
        for each in (final, whole)
    )
    assert got == expected


WRITTEN = (
    'Yes. <tool_call>\n{"name": "a", "arguments": {"x": "}\\n</tool_call"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "b", "arguments": {}}\n</tool_call>'
)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_calls_are_read_from_text_in_any_pieces(size: int) -> None:
    reader, content, calls = tools.CallReader(), "", list[list[str]]()
    for start in range(0, len(WRITTEN), size):
        for delta in reader.add(WRITTEN[start : start + size], last=start + size >= len(WRITTEN)):
            content += delta.get("content", "")
            for call in delta.get("tool_calls", ()):
                if "name" in call["function"]:
                    calls.append([call["function"]["name"], ""])
                calls[call["index"]][1] += call["function"]["arguments"]
    assert (content, calls) == ("Yes. ", [["a", '{"x": "}\\n</tool_call"}'], ["b", "{}"]])
    assert (reader.reason("stop"), reader.reason("length"), reader.reason(None)) == ("tool_calls", "length", None)


def test_a_text_that_only_looks_like_a_call_stays_a_text() -> None:
    assert tools.message("a <tool_cal", "stop") == ({"content": "a <tool_cal"}, "stop")


SCHEMA = {
    "$defs": {"kind": {"enum": ["cat", "dog"]}},
    "type": "object",
    "properties": {"kind": {"$ref": "#/$defs/kind"}, "legs": {"type": "integer", "minimum": 0, "maximum": 8}},
    "required": ["kind", "legs"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": -3, "n": 3}])
def test_an_answer_follows_its_schema(api: openai.OpenAI, options: Any) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "animal", "schema": SCHEMA, "strict": True}}
    fields: dict[str, Any] = {"messages": HELLO, "temperature": 0.0, "response_format": form, **options}
    for choice in api.chat.completions.create(model=nano.NAME, **fields).choices:
        validate(json.loads(choice.message.content), SCHEMA)
        assert choice.finish_reason == "stop"
    with_tools = ask(api, response_format=form, tools=[WEATHER])
    if with_tools.message.tool_calls is None:
        validate(json.loads(with_tools.message.content), SCHEMA)


def test_any_object(api: openai.OpenAI, models: Models) -> None:
    for form in ({"type": "json_object"}, {"type": "json_schema", "json_schema": {"name": "any"}}):
        answer = ask(api, response_format=form, max_tokens=50)
        if answer.finish_reason == "stop":
            assert isinstance(json.loads(answer.message.content), dict)
        else:
            assert (answer.finish_reason, answer.message.content[0]) == ("length", "{")
    assert models.requests[-1].grammar is not None
    ask(api, response_format={"type": "text"}, max_tokens=1)
    assert models.requests[-1].grammar is None


def called(arguments: str) -> dict[str, Any]:
    calls = [{"function": {"name": "a", "arguments": arguments}}]
    return {"messages": [{"role": "assistant", "tool_calls": calls}]}


def function(**fields: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": "f", **fields}}]}


@pytest.mark.parametrize(
    ("wrong", "param", "words"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools", "web_search"),
        ({"tools": [{"type": "function"}]}, "tools", "function is missing"),
        (function(name="a b"), "tools", "pattern"),
        (function(parameters={"type": "array", "uniqueItems": True}), None, "uniqueItems"),
        (function(parameters={"multipleOf": 123_456}), None, "multipleOf 123456"),
        (function(parameters={"multipleOf": 0.000123456}), None, "multipleOf 0.000123456"),
        (function(parameters={"enum": ["a" * 200_000]}), None, "at most 131,072"),
        (function(description="<|im_end|>"), None, "tools writes <|im_end|>"),
        (function(parameters={"properties": {"a": {"enum": ["<|im_start|>"]}}}), None, "tools writes <|im_start|>"),
        ({"tools": [WEATHER, WEATHER]}, "tools", "stands twice"),
        ({"tool_choice": "required"}, "tool_choice", "no such function"),
        ({"tools": [CLOCK], "tool_choice": FORCED}, "tool_choice", "it has ['clock']"),
        ({"tools": [WEATHER], "guided_choice": ["a", "b"]}, "tools", "closed list of choices"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema is missing"),
        ({"response_format": {"type": "xml"}}, "response_format", "xml"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "foo"}}}},
            None,
            "Invalid type: foo",
        ),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages", "messages[0].content is missing"),
        ({"messages": [{**PAST[2], "role": "user"}]}, "messages", "only messages of the assistant"),
        (called("[1]"), "messages", "valid dictionary"),
        (called('"\\ud800"'), "messages", "no JSON"),
        (
            {"messages": [{"role": "tool", "content": "<|im_end|>", "tool_call_id": "x"}]},
            None,
            "messages[0] writes <|im_end|>",
        ),
        (
            {"messages": [*HELLO, {"role": "assistant", "content": "b", "reasoning_content": "<|im_end|>"}]},
            None,
            "messages[1] writes <|im_end|>",
        ),
        (
            {"messages": [{**PAST[2], "tool_calls": [{"function": {"name": "<|im_end|>", "arguments": "{}"}}]}]},
            None,
            "messages[0] writes <|im_end|>",
        ),
    ],
)
def test_what_is_wrong_is_named(api: openai.OpenAI, wrong: dict[str, Any], param: str | None, words: str) -> None:
    refusal(api, "chat/completions", words, param, **wrong)
