"""Texts are classified through the same trie as images: prompts with {text}, in chats and in plain text."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tinker import types
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from kshot.errors import PromptError
from tests.vlm import brute_force
from tests.vlm.checkpoints import text_model
from tests.vlm.helpers import Pictured
from vlm.calibration import prior
from vlm.classifier import fit, generate, predict, predict_and_decode
from vlm.inputs import ImageRule, model_input
from vlm.local.registry import LocalServiceClient
from vlm.prompts import END, Prompt, Template, template

ABOUT = Template("What is this about? {text}", "It is about {label}.")
NAMES = ("cars", "cards", "sea", "sea life")
BLIND = "<|im_start|>user\nWhat is this about?<|im_end|>\n<|im_start|>assistant\nIt is about"  # without a text
TEXTS = ["An engine with four wheels.", "The queen of hearts.", "Waves and salt.", "A whale\nand a {label}"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def asked(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LocalServiceClient, Prompt]]:
    service = LocalServiceClient(tmp_path_factory.mktemp("state"))
    tokenizer = service.create_sampling_client(base_model=str(folder)).result().get_tokenizer()
    yield service, Prompt(tokenizer, None, NAMES, ABOUT)
    service.close()


def written(prompt: Prompt, text: str) -> str:
    return str(prompt.tokenizer.decode(prompt.question(text).to_ints()))


def test_the_question_is_a_chat_where_the_tokenizer_knows_one(asked: tuple[Any, Prompt]) -> None:
    _, prompt = asked
    assert written(prompt, TEXTS[3]) == (
        "<|im_start|>user\nWhat is this about? A whale\nand a {label}<|im_end|>\n<|im_start|>assistant\nIt is about"
    )
    targets = prompt.datum(TEXTS[0], 2).loss_fn_inputs
    learnt = targets["target_tokens"].to_numpy()[targets["weights"].to_numpy() > 0]
    assert prompt.tokenizer.decode(learnt) == "It is about sea.\n<|im_end|>"


def test_scores_equal_each_labels_own_forward_pass(asked: tuple[Any, Prompt], folder: Path) -> None:
    service, prompt = asked
    sampler = service.create_sampling_client(base_model=str(folder)).result()
    stock: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    no_rule: Any = None
    for method in ("constrained", "likelihood"):
        for row, text in zip(predict(sampler, TEXTS, prompt, method), TEXTS, strict=True):
            expected = brute_force.scores(stock, prompt.question(text), prompt.choices, no_rule, -1)
            assert row == pytest.approx(expected[method], abs=1e-4)
    _, decoded = predict_and_decode(sampler, TEXTS, prompt)
    assert decoded.tolist() == [brute_force.decoded(stock, prompt.question(text), prompt.choices) for text in TEXTS]
    blind = model_input(prompt.tokenizer.encode(BLIND))
    expected = brute_force.scores(stock, blind, prompt.choices, no_rule, -1)["constrained"]
    assert prior("pmi", sampler, prompt) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("loss", ["text", "closed-set"])
def test_it_learns_and_answers(asked: tuple[Any, Prompt], folder: Path, loss: str) -> None:
    service, prompt = asked
    client = service.create_lora_training_client(str(folder), rank=8, seed=0).result()
    views = [list(zip(TEXTS, range(4), strict=True))] * 40
    losses = [
        each.metrics["loss:sum"] for each, _ in fit(client, views, prompt, types.AdamParams(learning_rate=1e-2), loss)
    ]
    assert losses[-1] < losses[0] / 10
    sampler = client.save_weights_and_get_sampling_client().result()
    assert predict(sampler, TEXTS, prompt).argmax(1).tolist() == [0, 1, 2, 3]
    if loss == "text":
        assert [prompt.parse(answer) for answer in generate(sampler, TEXTS, prompt, 16)] == [0, 1, 2, 3]


@pytest.fixture(scope="module")
def plain() -> Any:
    """A tokenizer that knows no chat and begins each text with a token of its own, as Llama's do."""
    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(vocab={**letters, "<s>": 256, "</s>": 257}, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    return PreTrainedTokenizerFast(tokenizer_object=made, **{"bos_token": "<s>", "eos_token": "</s>"})


def test_without_chat_tokens_it_is_one_plain_text(plain: Any) -> None:
    prompt = Prompt(plain, None, NAMES, ABOUT)
    assert written(prompt, "Waves.") == "<s>What is this about? Waves.\nIt is about"
    assert [plain.decode(choice) for choice in prompt.choices[:2]] == [" cars.\n", " cards.\n"]
    assert prompt.stops == [257]
    assert prompt.text([*prompt.choices[0], 257]) == "cars."


def spaced(*merges: tuple[str, str]) -> Any:
    """A tokenizer that begins each text with a space, as SentencePiece's do."""
    letters = ["\u2581", END, *map(chr, range(33, 127)), "</s>", *map("".join, merges)]
    vocabulary = {letter: number for number, letter in enumerate(letters)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[*merges]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=made, **{"eos_token": "</s>"})


@pytest.mark.parametrize("answer", ["It is about {label}.", "It is:{label}", "{label}"])
def test_a_tokenizer_that_begins_texts_with_a_space_writes_one_text(answer: str) -> None:
    tokenizer = spaced(("\u2581", "I"), ("\u2581", "c"))
    prompt = Prompt(tokenizer, None, NAMES, Template(ABOUT.question, answer))
    for name, choice in zip(NAMES, prompt.choices, strict=True):
        whole = f"What is this about? Waves.\n{answer.format(label=name)}\n"
        assert [*prompt.question("Waves.").to_ints(), *choice] == tokenizer.encode(whole)
        assert tokenizer.decode(tokenizer.encode(whole)) == whole


def test_what_a_tokenizer_cannot_write_there_is_refused() -> None:
    with pytest.raises(PromptError, match=r"cannot write 'It is about' right after '\\n'; give another template"):
        Prompt(spaced((END, "I")), None, NAMES, ABOUT).question("Waves.")


def test_a_tokenizer_that_ends_no_text_trains_and_stops_at_nothing(plain: Any) -> None:
    endless = PreTrainedTokenizerFast(tokenizer_object=plain.backend_tokenizer)
    prompt = Prompt(endless, None, NAMES, ABOUT)
    assert len(prompt.choices) == len(NAMES), "scores need no end"
    for ask in (lambda: prompt.stops, lambda: prompt.datum("Waves.", 0), lambda: prompt.text([5])):
        with pytest.raises(PromptError, match="has neither chat turns nor a token that ends a text"):
            ask()


def test_tokens_that_steer_the_model_are_refused_as_the_tokenizer_spells_them(plain: Any) -> None:
    prompt = Prompt(plain, None, NAMES, ABOUT)
    assert written(prompt, "a <| b").startswith("<s>What is this about? a <| b\n")
    with pytest.raises(PromptError, match=r"the text 'Waves.</s>' writes </s>, which steers the model"):
        prompt.question("Waves.</s>")
    with pytest.raises(PromptError, match=r"class name 'sea</s>' writes </s>, which steers the model"):
        Prompt(plain, None, ("cars", "sea</s>"), ABOUT)
    for odd in (Template("{text}<s>", "{label}"), Template("{text}", "<s> {label}")):
        with pytest.raises(PromptError, match=r"of a prompt writes <s>, which steers the model"):
            Prompt(plain, None, NAMES, odd)


def test_mistakes_are_named(asked: tuple[Any, Prompt], examples: list[Pictured], rule: ImageRule) -> None:
    _, prompt = asked
    with pytest.raises(PromptError, match="is about a text, and got an image"):
        prompt.question(examples[0].image)
    with pytest.raises(PromptError, match=r"writes <\|im_end\|>, which steers the model"):
        prompt.question("and <|im_end|>")
    with pytest.raises(PromptError, match=r"is about an image; give \{text\} for a text"):
        Prompt(prompt.tokenizer, rule, NAMES).question("a text")
    with pytest.raises(PromptError, match=r"must hold \{text\} once and no other slot; it has \{image\}, \{text\}"):
        Template("{image}{text}", "{label}")
    with pytest.raises(PromptError, match=r"must hold \{image\}; \{text\} is for `vlm.prompts"):
        template("{text} What? => It is {label}")
