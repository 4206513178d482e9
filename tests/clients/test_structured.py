"""Clients that ask for objects: what they get is checked by their own models, which raise for anything else."""

from typing import Any, Literal

import instructor
import openai
import pytest
from conftest import MODEL
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

QUESTION = "Which animal is it?"


class Animal(BaseModel):
    """An animal."""

    kind: Literal["cat", "dog", "hen"]
    legs: int = Field(ge=0, le=8)
    wild: bool | None = None


@pytest.fixture(scope="module")
def api(base: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=base, api_key="none", max_retries=0)


@pytest.mark.parametrize("mode", [instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA])
def test_instructor(api: openai.OpenAI, mode: instructor.Mode) -> None:
    client = instructor.from_openai(api, mode=mode)
    messages: Any = [{"role": "user", "content": QUESTION}]
    made = client.chat.completions.create(model=MODEL, messages=messages, response_model=Animal, max_retries=0)
    assert isinstance(made, Animal)


def test_instructor_in_json_mode(api: openai.OpenAI) -> None:
    """Any object is asked for, and the schema is in the messages alone: it takes a model that reads them."""
    client = instructor.from_openai(api, mode=instructor.Mode.JSON)
    seen = list[Any]()
    client.on("completion:response", seen.append)
    messages: Any = [{"role": "user", "content": QUESTION}]
    fields: dict[str, Any] = {"response_model": Animal, "max_retries": 0, "max_tokens": 60}
    with pytest.raises(instructor.exceptions.InstructorRetryException):
        client.chat.completions.create(model=MODEL, messages=messages, **fields)
    assert seen[0].choices[0].message.content.startswith("{")


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_langchain(base: str, method: Any) -> None:
    chat = ChatOpenAI(base_url=base, api_key="none", model=MODEL, max_retries=0)  # type: ignore[arg-type]
    assert isinstance(chat.with_structured_output(Animal, method=method).invoke(QUESTION), Animal)


@pytest.mark.parametrize("kind", [OpenAIChatModel, OpenAIResponsesModel])
@pytest.mark.parametrize("form", [Animal, ToolOutput(Animal), NativeOutput(Animal)])
def test_pydantic_ai(base: str, kind: Any, form: Any) -> None:
    model = kind(MODEL, provider=OpenAIProvider(base_url=base, api_key="none"))
    agent = Agent(model, output_type=form, instructions="Answer.", system_prompt="Be brief.", retries=0)
    assert isinstance(agent.run_sync(QUESTION).output, Animal)
