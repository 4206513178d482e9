"""Models that think, by OpenAI's client: thought and answer apart, whole and streamed; limits of thoughts."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.vlm import brute_force, genuine, thinkers
from tests.vlm.helpers import greedy
from tests.vlm.openai_served import HELLO, connected
from tests.vlm.serving import served
from vlm.inputs import model_input
from vlm.local.registry import EngineRegistry
from vlm.server.openai import chat, requests
from vlm.server.openai.requests import ChatRequest

QWEN, DEEPSEEK = "mine/qwen", "mine/deepseek"
TEMPLATES = {QWEN: genuine.template("qwen3"), DEEPSEEK: thinkers.DEEPSEEK}
OPENED = {
    QWEN: "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n<think>\n",
    DEEPSEEK: "[User]hello[Assistant]<think>\n",
}
CLOSING = {QWEN: "\n</think>\n\n", DEEPSEEK: "</think>"}
NO_RULE: Any = None
FEW = 5  # tokens of a thought, at low effort


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: thinkers.model(tmp_path_factory.mktemp("m"), text) for name, text in TEMPLATES.items()}


@pytest.fixture(scope="module")
def client(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    state = tmp_path_factory.mktemp("state")
    registry = EngineRegistry(state, model_paths={name: str(folder) for name, folder in folders.items()})
    with served(state, registry) as server, connected(server.address) as made:
        yield made


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(requests.EFFORTS, "low", FEW)


def ask(client: openai.OpenAI, model: str, messages: Any = HELLO, **options: Any) -> Any:
    fields = {"model": model, "messages": messages, "temperature": 0.0, "max_tokens": 16, **options}
    return client.chat.completions.create(**fields)


def by_hand(folder: Path, model: str) -> tuple[str, str, int]:
    """Thought, answer and tokens of the thought, by the stock model: FEW tokens, the closing, the rest of 16."""
    stock, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    opened, closing = tokenizer.encode(OPENED[model]), tokenizer.encode(CLOSING[model])
    thought = greedy(stock, model_input(opened), NO_RULE, FEW)
    answer = greedy(stock, model_input([*opened, *thought, *closing]), NO_RULE, 16 - FEW - len(closing))
    mark = tokenizer.convert_tokens_to_ids("</think>")
    ends = {tokenizer.eos_token_id, mark}
    assert not ends & {*thought, *answer}, "another seed"
    return tokenizer.decode(thought).strip(), tokenizer.decode(answer).lstrip(), FEW + closing.index(mark) + 1


@pytest.mark.parametrize("model", TEMPLATES)
def test_a_thought_is_closed_at_its_limit_and_the_answer_follows(
    client: openai.OpenAI, folders: dict[str, Path], model: str
) -> None:
    thought, answer, length = by_hand(folders[model], model)
    whole = ask(client, model, reasoning_effort="low")
    message = whole.choices[0].message
    assert (message.reasoning_content, message.content) == (thought, answer)
    assert whole.usage.completion_tokens == 16
    assert whole.usage.completion_tokens_details.reasoning_tokens == length
    pieces = list(ask(client, model, reasoning_effort="low", stream=True, stream_options={"include_usage": True}))
    deltas = [piece.choices[0].delta for piece in pieces[:-1]]
    assert "".join(getattr(each, "reasoning_content", None) or "" for each in deltas) == thought
    assert "".join(each.content or "" for each in deltas) == answer
    assert pieces[-1].usage == whole.usage
    kinds = ["reasoning_content" if getattr(each, "reasoning_content", None) else "content" for each in deltas[1:-1]]
    assert kinds == sorted(kinds, reverse=True), "first the thought, then the answer"
    assert kinds.count("reasoning_content") > 1


def test_an_unfinished_thought_is_no_content(client: openai.OpenAI) -> None:
    for options in ({}, {"reasoning_effort": "high"}):
        cut = ask(client, DEEPSEEK, max_tokens=4, **options)
        assert cut.choices[0].message.content == ""
        assert cut.choices[0].message.reasoning_content
        assert cut.choices[0].finish_reason == "length"
        assert cut.usage.completion_tokens_details.reasoning_tokens == 4


def test_without_a_thought(client: openai.OpenAI, folders: dict[str, Path]) -> None:
    """By effort and by the template's own switch; and where the template has none, its thought is closed at once."""
    stock = AutoModelForCausalLM.from_pretrained(folders[QWEN]).eval()
    tokenizer = AutoTokenizer.from_pretrained(folders[QWEN])
    off = tokenizer.apply_chat_template(HELLO, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    expected = tokenizer.decode(greedy(stock, model_input(tokenizer.encode(off)), NO_RULE, 16))
    for options in ({"reasoning_effort": "none"}, {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}}):
        answer = ask(client, QWEN, **options)
        assert answer.choices[0].message.content == expected
        assert not hasattr(answer.choices[0].message, "reasoning_content")
    closed = client.completions.create(
        model=DEEPSEEK, prompt=OPENED[DEEPSEEK] + "</think>", max_tokens=16, temperature=0
    )
    assert ask(client, DEEPSEEK, reasoning_effort="none").choices[0].message.content == closed.choices[0].text


def test_an_answer_by_a_schema_follows_the_thought(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}
    form: Any = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    for model in TEMPLATES:
        answer = ask(client, model, reasoning_effort="low", response_format=form, max_tokens=40)
        assert json.loads(answer.choices[0].message.content)["a"] in ("x", "y")
        assert answer.choices[0].message.reasoning_content


def test_choices_are_scored_behind_an_empty_thought(client: openai.OpenAI, folders: dict[str, Path]) -> None:
    stock = AutoModelForCausalLM.from_pretrained(folders[QWEN]).eval()
    tokenizer, names = AutoTokenizer.from_pretrained(folders[QWEN]), ["red", "green"]
    off = tokenizer.apply_chat_template(HELLO, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    written = [[*tokenizer.encode(name), tokenizer.eos_token_id] for name in names]
    expected = brute_force.scores(stock, model_input(tokenizer.encode(off)), written, NO_RULE, -1)["constrained"]
    body = {"structured_outputs": {"choice": names}}
    options: Any = {"model": QWEN, "messages": HELLO, "extra_body": body}
    chosen: Any = client.chat.completions.create(**options).choices[0]
    assert chosen.choice_log_probs == pytest.approx(dict(zip(names, expected, strict=True)), abs=1e-4)
    with pytest.raises(openai.BadRequestError, match="does not go with choices"):
        client.chat.completions.create(**options, reasoning_effort="low")


PAST: list[dict[str, Any]] = [
    *HELLO,
    {"role": "assistant", "content": "b", "reasoning_content": "first"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "d", "reasoning_content": "second"},
]


@pytest.mark.parametrize("turns", [PAST, [*PAST, *HELLO]])
@pytest.mark.parametrize("switch", [{}, {"enable_thinking": False}, {"enable_thinking": True}])
def test_past_thoughts_are_as_the_template_treats_them(turns: Any, switch: dict[str, bool]) -> None:
    own = thinkers.with_template(TEMPLATES[QWEN])
    request = ChatRequest(model="any", messages=copy.deepcopy(turns), chat_template_kwargs=switch)
    expected = own.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **switch)
    assert chat.conversation(request, own, takes_images=False).text == expected
    assert ("second" in expected, "first" in expected) == (len(turns) == 4, False)


def test_the_responses_api_counts_thoughts_and_leaves_them_out(client: openai.OpenAI, folders: dict[str, Path]) -> None:
    _, answer, length = by_hand(folders[DEEPSEEK], DEEPSEEK)
    made = client.responses.create(
        model=DEEPSEEK, input="hello", reasoning={"effort": "low"}, temperature=0, max_output_tokens=16
    )
    assert made.output_text == answer
    assert made.usage is not None
    assert made.usage.output_tokens_details.reasoning_tokens == length
