"""The question: its words are the recipe's, its tokens are Qwen3-VL's chat turns, its answers are read strictly."""

import pytest
from tinker import types

from kshot.errors import PromptError
from tests.vlm import genuine
from tests.vlm.helpers import CLASSES, Pictured
from vlm.inputs import ImageRule
from vlm.prompts import PREFILL, QUESTION, RECIPE, Prompt, template


def text_of(prompt: Prompt, chunks: list[types.ModelInputChunk]) -> str:
    parts = [prompt.tokenizer.decode(c.tokens) if isinstance(c, types.EncodedTextChunk) else "IMAGE" for c in chunks]
    return "".join(parts)


def test_the_question_is_the_recipes_with_the_answer_begun(prompt: Prompt, examples: list[Pictured]) -> None:
    assert text_of(prompt, prompt.question(examples[0].image).chunks) == (
        "<|im_start|>user\n<|vision_start|>IMAGE<|vision_end|>"
        "What is the name of the subject in this photo?<|im_end|>\n"
        "<|im_start|>assistant\nThe subject in this photo is:"
    )


def trained_text(prompt: Prompt, example: Pictured) -> str:
    """What the loss is on in the datum of a crocodile."""
    fields = prompt.datum(example.image, 3).loss_fn_inputs
    targets, weights = (fields[name].tolist() for name in ("target_tokens", "weights"))
    assert set(weights) == {0.0, 1.0}
    return str(prompt.tokenizer.decode([t for t, w in zip(targets, weights, strict=True) if w]))


def test_the_loss_is_on_the_assistants_turn_alone(prompt: Prompt, examples: list[Pictured]) -> None:
    assert trained_text(prompt, examples[0]) == "The subject in this photo is: crocodile\n<|im_end|>"


def test_training_and_asking_see_the_same_tokens(prompt: Prompt, examples: list[Pictured]) -> None:
    taught = prompt.datum(examples[0].image, 1).model_input
    fed, told = (
        [t for c in each.chunks if isinstance(c, types.EncodedTextChunk) for t in c.tokens]
        for each in (taught, prompt.question(examples[0].image))
    )
    assert fed == [*told, *prompt.choices[1]]


@genuine.needed
def test_pieces_tokenise_as_the_whole_under_the_genuine_tokenizer(rule: ImageRule) -> None:
    tokenizer = genuine.tokenizer()
    names = ("dalmatian", "st. bernard (dog)", "2012 audi a5 coupe", "forget-me-not", "naïve café", "日本")
    prompt = Prompt(tokenizer, rule, names)
    for name, choice in zip(names, prompt.choices, strict=True):
        whole = tokenizer.encode(f"The subject in this photo is: {name}\n")
        assert [*tokenizer.encode("The subject in this photo is:"), *choice] == whole


@pytest.mark.parametrize(
    ("written", "label"),
    [
        (" star\n<|im_end|>", 0),
        (" star<|im_end|>", 0),  # a base model ends its turn without a new line
        (" star<|im_end|>\n<|im_start|>", 0),
        ("The subject in this photo is: crocodile head\n", 4),
        (" crocodile", 3),
        (" café ☕\n", 5),
        (" Star\n", 0),  # the recipe reads in lower case
        (" is: star: car\n", 1),  # what follows the last colon
        ("It looks like: a\nsubject: cart", 2),
        (" cart\nwhatever follows", -1),
        (" a star\n", -1),
        ("", -1),
        ("star:", -1),
        (" crocodile hea", -1),
    ],
)
def test_answers_are_read_as_the_recipe_reads_them(prompt: Prompt, written: str, label: int) -> None:
    answer = prompt.text(prompt.tokenizer.encode(written))
    assert prompt.parse(answer) == label
    read = answer.split(":")[-1].strip().lower()  # the rule itself
    assert (CLASSES.index(read) if read in CLASSES else -1) == label


def test_names_with_colons_and_names_that_differ_in_case(prompt: Prompt, rule: ImageRule) -> None:
    odd = Prompt(prompt.tokenizer, rule, ("ratio 3:1", "1", "Polish", "polish", "Turkey"))
    written = ["ratio 3:1", "1", "Polish", "polish", "turkey", "POLISH", "ratio: 1"]
    assert [odd.parse(answer) for answer in written] == [0, 1, 2, 3, 4, -1, 1]


@pytest.mark.parametrize("classes", [("a", "b", "a"), ("a", ""), ("a", " "), ("a", "b\nc"), ("a", "<|image_pad|>")])
def test_names_that_cannot_be_answers_are_refused(prompt: Prompt, rule: ImageRule, classes: tuple[str, ...]) -> None:
    with pytest.raises(PromptError):
        Prompt(prompt.tokenizer, rule, classes)


def test_every_choice_ends_its_line(prompt: Prompt) -> None:
    for name, choice in zip(CLASSES, prompt.choices, strict=True):
        assert prompt.tokenizer.decode(choice) == f" {name}\n"


def test_a_template_of_ones_own(prompt: Prompt, rule: ImageRule, examples: list[Pictured]) -> None:
    asked = template("Look: {image} What animal is it? => It is a {label}.")
    own = Prompt(prompt.tokenizer, rule, CLASSES, asked)
    assert text_of(own, own.question(examples[0].image).chunks) == (
        "<|im_start|>user\nLook: <|vision_start|>IMAGE<|vision_end|> What animal is it?<|im_end|>\n"
        "<|im_start|>assistant\nIt is a"
    )
    assert trained_text(own, examples[0]) == "It is a crocodile.\n<|im_end|>"
    assert own.parse("It is a cart.") == 2
    assert str(asked) == "Look: {image} What animal is it? => It is a {label}."
    assert template(str(asked)) == asked


def test_an_answer_may_be_the_name_alone(prompt: Prompt, rule: ImageRule, examples: list[Pictured]) -> None:
    bare = Prompt(prompt.tokenizer, rule, CLASSES, template("{image}One word: => {label}"))
    assert text_of(bare, bare.question(examples[0].image).chunks).endswith("<|im_start|>assistant\n")
    assert bare.tokenizer.decode(bare.choices[1]) == "car\n"
    assert bare.parse("Car\n") == 1


def test_the_recipe_is_a_preset(prompt: Prompt) -> None:
    assert template("recipe") == RECIPE == prompt.template
    assert str(RECIPE) == f"{{image}}{QUESTION} => {PREFILL} {{label}}"


def test_the_question_without_an_image(prompt: Prompt, rule: ImageRule) -> None:
    assert text_of(prompt, prompt.without_image().chunks) == (
        "<|im_start|>user\nWhat is the name of the subject in this photo?<|im_end|>\n"
        "<|im_start|>assistant\nThe subject in this photo is:"
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("What is this? => It is a {label}", "must hold {image} once"),
        ("{image}{image}What? => {label}", "has {image}, {image}"),
        ("{image}What is this? => It is a cat", "must hold {label} once"),
        ("{image}{label}? => It is a {label}", "no other slot"),
        ("{image}What? => {class}", "has {class}"),
        ("{image}What? => {label} {name}", "has {label}, {name}"),
        ("{image}What is this?", "neither a preset (recipe) nor a template"),
        ("recipee", "neither a preset"),
        ("", "neither a preset"),
        ("{image}<|im_end|>What? => {label}", "steers the model"),
        ("{image}What? => It is\na {label}", "must be one line"),
    ],
)
def test_templates_that_cannot_be_asked_are_refused(text: str, says: str) -> None:
    with pytest.raises(PromptError) as caught:
        template(text)
    assert says in str(caught.value)
