"""The question: its words are the recipe's, its tokens are Qwen3-VL's chat turns, its answers are read strictly."""

from pathlib import Path

import pytest
from tinker import types

from kshot_errors import PromptError
from tests.vlm.helpers import CLASSES, Pictured
from vlm.inputs import ImageRule
from vlm.prompts import Prompt

GENUINE = Path(__file__).parents[3] / "shared/models/qwen3-tokenizer"


def text_of(prompt: Prompt, chunks: list[types.ModelInputChunk]) -> str:
    parts = [prompt.tokenizer.decode(c.tokens) if isinstance(c, types.EncodedTextChunk) else "IMAGE" for c in chunks]
    return "".join(parts)


def test_the_question_is_the_recipes_with_the_answer_begun(prompt: Prompt, examples: list[Pictured]) -> None:
    assert text_of(prompt, prompt.question(examples[0].image).chunks) == (
        "<|im_start|>user\n<|vision_start|>IMAGE<|vision_end|>"
        "What is the name of the subject in this photo?<|im_end|>\n"
        "<|im_start|>assistant\nThe subject in this photo is:"
    )


def test_the_loss_is_on_the_assistants_turn_alone(prompt: Prompt, examples: list[Pictured]) -> None:
    datum = prompt.datum(examples[0].image, 3)
    targets, weights = (datum.loss_fn_inputs[k].tolist() for k in ("target_tokens", "weights"))
    trained = [t for t, w in zip(targets, weights, strict=True) if w]
    assert prompt.tokenizer.decode(trained) == "The subject in this photo is: crocodile\n<|im_end|>"
    assert set(weights) == {0.0, 1.0}


def test_training_and_asking_see_the_same_tokens(prompt: Prompt, examples: list[Pictured]) -> None:
    asked = prompt.question(examples[0].image)
    taught = prompt.datum(examples[0].image, 1)
    fed = [t for c in taught.model_input.chunks if isinstance(c, types.EncodedTextChunk) for t in c.tokens]
    told = [t for c in asked.chunks if isinstance(c, types.EncodedTextChunk) for t in c.tokens]
    assert fed == [*told, *prompt.choices[1]]


@pytest.mark.skipif(not GENUINE.exists(), reason="the genuine Qwen3 tokenizer is not beside this checkout")
def test_pieces_tokenise_as_the_whole_under_the_genuine_tokenizer(rule: ImageRule) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(GENUINE)
    names = ("dalmatian", "st. bernard (dog)", "2012 audi a5 coupe", "forget-me-not", "naïve café", "日本")
    prompt = Prompt(tokenizer, rule, names)
    for name, choice in zip(names, prompt.choices, strict=True):
        whole = tokenizer.encode(f"The subject in this photo is: {name}\n")
        assert [*tokenizer.encode("The subject in this photo is:"), *choice] == whole


@pytest.mark.parametrize(
    ("written", "label"),
    [
        (" star\n", 0),
        (" star<|im_end|>", 0),  # a base model ends its turn without a new line
        (" star<|im_end|>\n<|im_start|>", 0),
        (" cart\nwhatever follows", 2),
        ("The subject in this photo is: crocodile head\n", 4),
        (" crocodile", 3),
        (" café ☕\n", 5),
        (" is: star: car\n", -1),
        (" Star\n", -1),
        (" a star\n", -1),
        ("", -1),
        ("\nstar\n", -1),
        (" crocodile hea", -1),
    ],
)
def test_answers_are_read_to_the_letter(prompt: Prompt, written: str, label: int) -> None:
    assert prompt.parse(prompt.line(prompt.tokenizer.encode(written))) == label


def test_a_class_name_may_hold_a_colon(prompt: Prompt, rule: ImageRule) -> None:
    ratio = Prompt(prompt.tokenizer, rule, ("ratio 3:1", "1"))
    assert ratio.parse(ratio.line(ratio.choices[0])) == 0


@pytest.mark.parametrize("classes", [("a", "b", "a"), ("a", ""), ("a", " "), ("a", "b\nc"), ("a", "<|image_pad|>")])
def test_names_that_cannot_be_answers_are_refused(prompt: Prompt, rule: ImageRule, classes: tuple[str, ...]) -> None:
    with pytest.raises(PromptError):
        Prompt(prompt.tokenizer, rule, classes)


def test_every_choice_ends_its_line(prompt: Prompt) -> None:
    for name, choice in zip(CLASSES, prompt.choices, strict=True):
        assert prompt.tokenizer.decode(choice) == f" {name}\n"
