"""A text model and the nano vision-language model in one server, by the SDK and by OpenAI's client."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import tinker
from tinker import types
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.vlm import brute_force
from tests.vlm.checkpoints import text_model
from tests.vlm.helpers import greedy
from tests.vlm.openai_served import HELLO, connected, image_part
from tests.vlm.services import PATIENCE, step
from tests.vlm.services import connected as sdk
from tests.vlm.serving import served
from vlm import nano
from vlm.inputs import datum, model_input
from vlm.local.registry import EngineRegistry

TEXT = "mine/text"
TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]"
NO_RULE: Any = None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = text_model(tmp_path_factory.mktemp("llama"), "llama3")
    settings = json.loads((made / "tokenizer_config.json").read_text())
    (made / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": TEMPLATE}))
    return made


@pytest.fixture(scope="module")
def address(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    state = tmp_path_factory.mktemp("state")
    registry = EngineRegistry(state, model_paths={TEXT: str(folder), nano.NAME: nano.NAME})
    with served(state, registry) as server:
        yield server.address


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[openai.OpenAI]:
    with connected(address) as made:
        yield made


def test_completions_are_stock_generates(client: openai.OpenAI, folder: Path) -> None:
    stock, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    asked = model_input(tokenizer.encode("The capital of France is"))
    answer = client.completions.create(model=TEXT, prompt="The capital of France is", max_tokens=6, temperature=0.0)
    assert answer.choices[0].text == tokenizer.decode(greedy(stock, asked, NO_RULE, 6))
    assert {model.id for model in client.models.list()} == {TEXT, nano.NAME}


def test_chats_are_written_by_the_models_own_template(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": TEXT, "max_tokens": 6, "temperature": 0.0}
    chat = client.chat.completions.create(messages=HELLO, **options).choices[0].message.content
    plain = client.completions.create(prompt="[user] hello\n[assistant]", **options).choices[0].text
    assert chat == plain


def test_choices_have_the_stock_models_probabilities(client: openai.OpenAI, folder: Path) -> None:
    stock, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    names = ["red", "green", "light green"]
    written = [[*tokenizer.encode(name), tokenizer.eos_token_id] for name in names]
    asked = model_input(tokenizer.encode("[user] hello\n[assistant]"))
    expected = brute_force.scores(stock, asked, written, NO_RULE, -1)["constrained"]
    body = {"structured_outputs": {"choice": names}}
    asked_for: dict[str, Any] = {"model": TEXT, "temperature": 0.0, "extra_body": body}
    chosen: Any = client.chat.completions.create(messages=HELLO, **asked_for).choices[0]
    assert chosen.choice_log_probs == pytest.approx(dict(zip(names, expected, strict=True)), abs=1e-4)
    assert chosen.message.content == names[int(expected.argmax())]


def test_images_are_refused_and_the_other_model_takes_them(
    client: openai.OpenAI, chunks: list[types.ImageChunk], address: str
) -> None:
    asked: Any = [{"role": "user", "content": [image_part(chunks[0].data), {"type": "text", "text": "?"}]}]
    with pytest.raises(openai.BadRequestError, match=f"model {TEXT} is a text model and takes no images"):
        client.chat.completions.create(model=TEXT, messages=asked)
    assert client.chat.completions.create(model=nano.NAME, messages=asked, max_tokens=2).choices
    with sdk(address) as service:
        sampler = service.create_sampling_client(base_model=TEXT).result(PATIENCE)
        with pytest.raises(tinker.TinkerError, match="is a text model and takes no images"):
            sampler.compute_logprobs(model_input([5], chunks[0], [6])).result(PATIENCE)


def test_runs_of_both_models_train_side_by_side(address: str, client: openai.OpenAI) -> None:
    data, adam = [datum(model_input([5, 6, 7, 8]), [9, 10])], types.AdamParams(learning_rate=1e-2)
    with sdk(address) as service:
        runs = [
            service.create_lora_training_client(name, rank=2, seed=0).result(PATIENCE) for name in (TEXT, nano.NAME)
        ]
        losses = [[step(run, data, adam) for run in runs] for _ in range(4)]
        assert all(last < first for first, last in zip(losses[0], losses[-1], strict=True))
        assert runs[0].get_info().model_data.arch == "llama"
        for run in runs:
            path = run.save_weights_for_sampler("000080").result(PATIENCE).path
            assert client.completions.create(model=path, prompt="a", max_tokens=2).choices
