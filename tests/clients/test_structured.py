"""Clients that ask for objects: what they get is checked by their own models, which raise for anything else."""

from pathlib import Path
from typing import Any, Literal

import instructor
import openai
import pytest
import tinker
from conftest import MODEL
from instructor.core import IncompleteOutputException
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider
from transformers import AutoTokenizer

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


def taught(address: str, messages: Any, answer: str) -> str:
    """The path of weights that give this answer to these messages: no random model finds a schema in its messages."""
    tokenizer = AutoTokenizer.from_pretrained(Path(__file__).parents[2] / "vlm/nano")
    turns = "".join(f"<|im_start|>{each['role']}\n{each['content']}<|im_end|>\n" for each in messages)
    prompt, end = tokenizer.encode(f"{turns}<|im_start|>assistant\n"), tokenizer.encode(f"{answer}<|im_end|>")
    tokens, weights = [*prompt, *end], [0.0] * (len(prompt) - 1) + [1.0] * len(end)
    inputs: Any = {"target_tokens": tokens[1:], "weights": weights}
    datum = tinker.Datum(model_input=tinker.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)
    service = tinker.ServiceClient(base_url=address, api_key="tml-any")
    training = service.create_lora_training_client(MODEL, rank=8, seed=0)
    for _ in range(40):
        training.forward_backward([datum], "cross_entropy").result()
        training.optim_step(tinker.AdamParams(learning_rate=3e-3)).result()
    return training.save_weights_for_sampler("taught").result().path


def test_instructor_in_json_mode(address: str, api: openai.OpenAI) -> None:
    """Any object is asked for; the schema is in the messages alone."""
    client, sent = instructor.from_openai(api, mode=instructor.Mode.JSON), dict[str, Any]()
    client.on("completion:kwargs", lambda *_, **fields: sent.update(fields))
    messages: Any = [{"role": "user", "content": QUESTION}]
    fields: dict[str, Any] = {"response_model": Animal, "messages": messages, "max_retries": 0, "temperature": 0}
    with pytest.raises(IncompleteOutputException):
        client.chat.completions.create(model=MODEL, max_tokens=1, **fields)
    assert sent["response_format"] == {"type": "json_object"}
    model = taught(address, sent["messages"], '{"kind": "hen", "legs": 2}')
    made = client.chat.completions.create(model=model, max_tokens=60, **fields)
    assert (made.kind, made.legs) == ("hen", 2)


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
