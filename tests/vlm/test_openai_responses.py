"""POST responses through the official client: the same answers as the chat's, as items and as events."""

import json
from collections.abc import Callable
from typing import Any

import openai
import pytest
from jsonschema import validate
from openai.types.responses import Response
from pydantic import BaseModel, Field

from tests.vlm.openai_served import HELLO, checked, image_part
from tests.vlm.test_openai_tools import CLOCK, SCHEMA, WEATHER
from vlm import nano


def ask(api: openai.OpenAI, **options: Any) -> Response:
    fields = {"max_output_tokens": 8, "temperature": 0.0, "input": "hello", **options}
    made: Response = checked(api.responses.create(model=nano.NAME, **fields))
    return made


def chat(api: openai.OpenAI, messages: Any, **options: Any) -> Any:
    fields = {"max_tokens": 8, "temperature": 0.0, **options}
    return api.chat.completions.create(model=nano.NAME, messages=messages, **fields)


def test_texts_and_images_are_answered_as_in_a_chat(api: openai.OpenAI, make_image: Callable[..., bytes]) -> None:
    image = image_part(make_image(1, 64, 64))
    url = image["image_url"]["url"]
    parts = [{"type": "input_image", "image_url": url, "detail": "low"}, {"type": "input_text", "text": "What is it?"}]
    messages = [{"role": "user", "content": [image, {"type": "text", "text": "What is it?"}]}]
    system = {"role": "system", "content": "Be brief."}
    for given, options, same in (
        ("hello", {}, HELLO),
        ([{"role": "user", "content": parts}], {}, messages),
        ([{"type": "message", "role": "user", "content": "hello"}], {"instructions": "Be brief."}, [system, *HELLO]),
        ([{"role": "developer", "content": "Be brief."}, *HELLO], {}, [system, *HELLO]),
    ):
        answer, expected = ask(api, input=given, **options), chat(api, same)
        assert answer.output_text == expected.choices[0].message.content
        usage = expected.usage
        assert (answer.usage.input_tokens, answer.usage.output_tokens) == (usage.prompt_tokens, usage.completion_tokens)
        assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")


def test_an_answer_is_sent_back_as_it_came(api: openai.OpenAI) -> None:
    first = ask(api)
    again = [*HELLO, *(item.model_dump() for item in first.output), {"role": "user", "content": "more"}]
    said = {"role": "assistant", "content": first.output_text}
    assert (
        ask(api, input=again).output_text
        == chat(api, [*HELLO, said, {"role": "user", "content": "more"}]).choices[0].message.content
    )


def test_json_by_a_schema(api: openai.OpenAI) -> None:
    form = {"type": "json_schema", "name": "animal", "schema": SCHEMA, "strict": True}
    answer = ask(api, text={"format": form}, max_output_tokens=200)
    validate(json.loads(answer.output_text), SCHEMA)
    assert (answer.status, answer.incomplete_details) == ("completed", None)

    class Animal(BaseModel):
        legs: int = Field(ge=0, le=8)

    parsed = api.responses.parse(model=nano.NAME, input="hello", text_format=Animal, max_output_tokens=200)
    assert 0 <= parsed.output_parsed.legs <= 8  # type: ignore[union-attr]


def test_calls_are_items(api: openai.OpenAI) -> None:
    offered = [{"type": "function", "strict": None, **each["function"]} for each in (WEATHER, CLOCK)]  # type: ignore[dict-item]
    forced = {"type": "function", "name": "weather"}
    answer = ask(api, tools=offered, tool_choice=forced, max_output_tokens=200)
    (call,) = answer.output
    assert (call.type, call.name) == ("function_call", "weather")
    validate(json.loads(call.arguments), WEATHER["function"]["parameters"])
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "20"}
    again = ask(api, input=[*HELLO, call.model_dump(exclude_none=True), result])
    calls = [{"id": "1", "type": "function", "function": {"name": "weather", "arguments": call.arguments}}]
    past = [*HELLO, {"role": "assistant", "tool_calls": calls}, {"role": "tool", "tool_call_id": "1", "content": "20"}]
    assert again.output_text == chat(api, past).choices[0].message.content


@pytest.mark.parametrize("options", [{}, {"tools": [{"type": "function", "name": "clock"}], "tool_choice": "required"}])
def test_a_stream_adds_up_to_the_whole(api: openai.OpenAI, options: dict[str, Any]) -> None:
    options = {"max_output_tokens": 100 if options else 5, "parallel_tool_calls": False, **options}
    whole = ask(api, **options)
    fields: dict[str, Any] = {"model": nano.NAME, "input": "hello", "temperature": 0.0, **options}
    events = list(api.responses.create(stream=True, stream_options={"include_obfuscation": False}, **fields))
    assert [event.sequence_number for event in events] == [*range(len(events))]
    kinds = [event.type for event in events]
    assert kinds[:3] == ["response.created", "response.in_progress", "response.output_item.added"]
    assert kinds[-2:] == ["response.output_item.done", f"response.{whole.status}"]
    final = events[-1].response  # type: ignore[union-attr]
    assert final.output_text == whole.output_text
    (item,), (expected,) = final.output, whole.output
    assert item.type == expected.type
    if item.type == "function_call" and expected.type == "function_call":
        assert (item.name, item.arguments) == (expected.name, expected.arguments)


@pytest.mark.parametrize(
    ("wrong", "param", "words"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "not known"),
        ({"store": True}, "store", "not supported"),
        ({"reasoning": {"effort": "high"}}, None, "has no thinking mode"),
        ({"input": []}, "input", "at least 1"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input", "input[0] is of type 'reasoning'"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input", "input_file"),
        ({"input": [{"role": "robot", "content": "a"}]}, "input", "input[0].role"),
        ({"input": [*HELLO, {"role": "system", "content": "a"}]}, "input", "input[1] is of the system"),
        ({"max_output_tokens": 0}, "max_output_tokens", "greater than or equal to 1"),
        ({"tools": [{"type": "web_search"}]}, "tools", "web_search"),
        ({"text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "foo"}}}}, None, "type: foo"),
        ({"temperature": -1.0}, "temperature", "greater than or equal to 0"),
    ],
)
def test_what_is_wrong_is_named(api: openai.OpenAI, wrong: dict[str, Any], param: str | None, words: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        api.post("/responses", cast_to=object, body={"model": nano.NAME, "input": "hello", **wrong})
    assert words in caught.value.message
    assert caught.value.param == param
