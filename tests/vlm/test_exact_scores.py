"""Both scores against every label's own forward pass, for many kinds of names, under two tokenizers."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import tinker

from data.benchmarks.layouts import CALTECH101, CARS, FLOWERS, PETS
from data.dataset import clean_name
from kshot.errors import PromptError
from tests.vlm import genuine
from tests.vlm.brute_force import scores
from tests.vlm.helpers import IMAGE
from vlm import label_trie, nano
from vlm.classifier import predict, predict_and_decode
from vlm.inputs import ImageRule
from vlm.local.clients import LocalSamplingClient
from vlm.local.registry import LocalServiceClient
from vlm.prompts import Prompt, template
from vlm.scoring import score_choices

LETTERS = "abcdefghijklmnopqrstuvwxyz      -'éß"


def random_names(count: int, seed: int) -> list[str]:
    """Distinct names of 1 to 14 characters, among them many that begin others."""
    rng, names = np.random.default_rng(seed), dict[str, None]()
    while len(names) < count:
        name = " ".join("".join(rng.choice(list(LETTERS), rng.integers(1, 15))).split())
        if name:
            names[name] = None
            names[f"{name}{'s' if len(names) % 2 else ' head'}"] = None
    return list(names)[:count]


COOP = [name for name in CALTECH101 if name not in ("BACKGROUND_Google", "Faces_easy")]
NAMES: dict[str, list[str]] = {
    "prefixes": ["crocodile", "crocodile head", "crocodile head left", "croc", "flamingo", "flamingo head"],
    "one token each": ["cat", "dog", "car", "bus", "tree"],
    "digits": [str(n) for n in range(12)],
    "unicode": [
        "café ☕",
        "cafe",
        "日本",
        "日本語",
        "Ω",
        "naïve café",
        "жираф",
        "🦒",
        "🦒🦒",
        "éclair",
        "éclair au café",
    ],
    "Caltech's 100": [clean_name(name) for name in COOP],
    "196 cars": [clean_name(name) for name in CARS],
    "300 random": random_names(300, 0),
}


@dataclass(frozen=True)
class Side:
    """A model behind our service and by transformers alone."""

    service: LocalServiceClient
    name: str
    stock: Any
    image: int

    def prompt(self, names: Sequence[str], text: str = "recipe") -> tuple[Any, Prompt]:
        sampler = self.service.create_sampling_client(base_model=self.name).result()
        rule = ImageRule.from_pretrained(self.name)
        return sampler, Prompt(sampler.get_tokenizer(), rule, tuple(names), template(text))


@pytest.fixture(scope="module", params=["nano", pytest.param("genuine", marks=genuine.needed)])
def side(
    request: pytest.FixtureRequest, service: LocalServiceClient, stock: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Side]:
    if request.param == "nano":
        yield Side(service, nano.NAME, stock, IMAGE)
        return
    from transformers import Qwen3VLForConditionalGeneration

    folder = genuine.model(tmp_path_factory.mktemp("genuine"))
    random = Qwen3VLForConditionalGeneration.from_pretrained(folder).eval()
    yield Side(service, str(folder), random, genuine.IMAGE)


@pytest.mark.parametrize("kind", NAMES)
def test_scores_equal_each_labels_own_forward_pass(kind: str, side: Side, make_image: Callable[..., bytes]) -> None:
    sampler, prompt = side.prompt(NAMES[kind])
    image = make_image(3, 32, 32, format="JPEG")
    expected = scores(side.stock, prompt.question(image), prompt.choices, prompt.rule, side.image)
    for method, values in expected.items():
        assert predict(sampler, [image], prompt, method)[0] == pytest.approx(values, abs=1e-4, rel=1e-5)
    assert np.exp(expected["constrained"]).sum() == pytest.approx(1.0)


def test_a_template_of_ones_own_scores_exactly_too(side: Side, make_image: Callable[..., bytes]) -> None:
    sampler, prompt = side.prompt(NAMES["prefixes"], "Here: {image} What is it? => It is a {label}, I think.")
    image = make_image(3, 32, 32, format="JPEG")
    expected = scores(side.stock, prompt.question(image), prompt.choices, prompt.rule, side.image)
    assert predict(sampler, [image], prompt)[0] == pytest.approx(expected["constrained"], abs=1e-4, rel=1e-5)


def test_greedy_decoding_takes_the_likeliest_token_at_every_step(side: Side, make_image: Callable[..., bytes]) -> None:
    """Against a walk by the stock model that may only write what begins a label."""
    sampler, prompt = side.prompt(NAMES["Caltech's 100"])
    for number in range(3):
        image = make_image(number, 32, 32, format="JPEG")
        log_probs, greedy = predict_and_decode(sampler, [image], prompt)
        assert (log_probs == predict(sampler, [image], prompt)).all()
        assert greedy.tolist() == [walked(side, prompt, image)]


def walked(side: Side, prompt: Prompt, image: bytes) -> int:
    """The label that masking every token that begins no label leaves."""
    written: tuple[int, ...] = ()
    asked = prompt.question(image)
    while written not in prompt.choices:
        allowed = {choice[len(written)] for choice in prompt.choices if choice[: len(written)] == written}
        ahead = [(*written, token) for token in sorted(allowed)]
        values = scores(side.stock, asked, ahead, prompt.rule, side.image)["likelihood"]
        written = ahead[int(values.argmax())]
    return prompt.choices.index(written)


@pytest.mark.parametrize("method", ["constrained", "likelihood"])
def test_scores_in_parts_equal_those_at_once(
    method: str,
    sampler: LocalSamplingClient,
    prompt: Prompt,
    prompts: list[tinker.ModelInput],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither logits nor masks of many nodes are in memory together."""
    whole = score_choices(sampler, prompts, prompt.choices, method)
    monkeypatch.setattr("vlm.local.scoring.LOGITS", 3 * 4096)
    monkeypatch.setattr("vlm.local.scoring.MASK", 3000)
    assert score_choices(sampler, prompts, prompt.choices, method) == pytest.approx(whole, abs=1e-4, rel=1e-5)


def test_a_name_that_stands_twice_is_an_error(side: Side) -> None:
    with pytest.raises(PromptError, match="'dog' stands twice"):
        side.prompt(["cat", "dog", "dog"])
    with pytest.raises(PromptError, match="'éclair' stands twice"):  # the tokenizer composes characters
        side.prompt(["e\u0301clair", "dog", "éclair"])


@genuine.needed
@pytest.mark.parametrize(
    ("names", "count", "most"), [(PETS, 37, 4), (FLOWERS, 102, 10), (COOP, 100, 5), (CARS, 196, 180)]
)
def test_few_tokens_more_than_the_prompt(names: Sequence[str], count: int, most: int) -> None:
    """What one pass needs beyond the prompt for the real class names under the genuine tokenizer."""
    encode = genuine.tokenizer().encode
    choices = [tuple(encode(f" {clean_name(name)}\n")) for name in names]
    assert len(choices) == count
    assert len(label_trie.build(choices, "constrained").tokens) <= most
