"""What chat templates say of thoughts, prompts with and without one, and texts as thought and answer."""

from typing import Any

import pytest
import tinker
from tinker import types

from kshot.errors import PromptError
from tests.vlm import genuine, thinkers
from tests.vlm.helpers import CLASSES, Pictured
from vlm.inputs import ImageRule
from vlm.prompts import Prompt, Template
from vlm.templates import CHATML
from vlm.thinking import Marks, Split, Thought, ThoughtReader, closed_at, marks_of, split, split_tokens

ABOUT = Template("What is this about? {text}", "It is about {label}.")
ON, OFF = {"enable_thinking": True}, {"enable_thinking": False}
QWEN = Marks("<think>", "</think>", "<think>\n", "\n</think>\n\n", ON, OFF)
MUSING = genuine.template("qwen3").replace("think>", "muse>")
BEGUN = Marks("<think>", "</think>", "", "\n</think>\n\n")
CUT = Marks("<think>", "</think>", "", "</think>")
SWITCH = Marks("<think>", "</think>", "", "</think>", {"thinking": True}, {"thinking": False})
FINAL = "<|end|><|start|>assistant<|channel|>final<|message|>"
ANALYSIS = "<|channel|>analysis<|message|>"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (genuine.template("qwen3"), QWEN),
        (genuine.template("qwen3_5_think"), Marks("<think>", "</think>", "", "\n</think>\n\n", ON, OFF)),
        (genuine.template("glm4moe"), Marks("<think>", "</think>", "<think>", "</think>\n", ON, OFF)),
        (genuine.template("gptoss"), Marks(ANALYSIS, FINAL, ANALYSIS, FINAL)),
        (genuine.template("deepseek_r1_distill"), CUT),
        (thinkers.DEEPSEEK, CUT),
        (thinkers.DEEPSEEK_SWITCH, SWITCH),
        (thinkers.vision(), BEGUN),
        (MUSING, Marks("<muse>", "</muse>", "<muse>\n", "\n</muse>\n\n", ON, OFF)),
        (genuine.template("qwen3_vl"), None),
        (genuine.template("qwen2_5"), None),
        (genuine.template("llama3"), None),
        (CHATML, None),
    ],
)
def test_marks_and_switch_are_read_from_the_template(tokenizer: Any, template: str, expected: Marks | None) -> None:
    """Also marks that no tokenizer has as tokens."""
    assert marks_of(tokenizer, template) == expected


def written(prompt: Prompt, asked: tinker.ModelInput) -> str:
    return str(prompt.tokenizer.decode(asked.to_ints()))


@pytest.mark.parametrize(
    ("template", "switches", "opening", "closing"),
    [
        (genuine.template("qwen3"), ({"enable_thinking": False}, {"enable_thinking": True}), "<think>\n", ""),
        (thinkers.DEEPSEEK, ({}, {}), "", "</think>"),
        (thinkers.DEEPSEEK_SWITCH, ({"thinking": False}, {"thinking": True}), "", ""),
        (thinkers.vision(), ({}, {}), "", "\n</think>\n\n"),
    ],
)
def test_prompts_are_those_of_apply_chat_template(template: str, switches: Any, opening: str, closing: str) -> None:
    """opening, closing: what follows the template's prompt with and without a thought."""
    prompt = Prompt(thinkers.with_template(template), None, ("cars", "sea"), ABOUT)
    turns, apply = [{"role": "user", "content": "What is this about? Waves."}], prompt.tokenizer.apply_chat_template
    off, on = (apply(turns, tokenize=False, add_generation_prompt=True, **switch) for switch in switches)
    encode = prompt.tokenizer.encode
    assert prompt.thinking("Waves.").to_ints() == encode(on + opening)
    assert prompt.question("Waves.").to_ints() == encode(off + closing + "It is about")


@pytest.mark.parametrize("question", ["{image}What is it?", "Look: {image} What is it? "])
def test_qwen3_vls_own_template_gives_the_tokens_that_ours_gives(
    prompt: Prompt, rule: ImageRule, examples: list[Pictured], question: str
) -> None:
    """Token for token, and those of transformers."""
    template, image = Template(question, "It is a {label}"), examples[0].image
    own = thinkers.with_template(genuine.template("qwen3_vl"))
    genuinely, ours = (Prompt(each, rule, CLASSES, template) for each in (own, prompt.tokenizer))
    for number in range(2):
        assert genuinely.datum(image, number).model_input == ours.datum(image, number).model_input
    assert genuinely.question(image) == ours.question(image)
    assert genuinely.without_image() == ours.without_image()
    assert genuinely.choices == ours.choices
    before, after = question.split("{image}")
    parts = [{"type": "text", "text": before}, {"type": "image"}, {"type": "text", "text": after}]
    text = own.apply_chat_template([{"role": "user", "content": parts}], tokenize=False, add_generation_prompt=True)
    first, last = (own.encode(each) for each in f"{text}It is a".split("<|image_pad|>"))
    chunks = genuinely.question(image).chunks
    assert [c.tokens for c in chunks if isinstance(c, types.EncodedTextChunk)] == [first, last]
    with pytest.raises(PromptError, match="chat template has no thinking mode; ask without a thought"):
        genuinely.thinking(image)


@genuine.needed
def test_the_genuine_tokenizer_writes_the_same_prompt(rule: ImageRule, examples: list[Pictured]) -> None:
    own, image = genuine.tokenizer(), examples[0].image
    ours = Prompt(own, rule, CLASSES).question(image)  # its template writes no images
    own.chat_template = genuine.template("qwen3_vl")
    assert Prompt(own, rule, CLASSES).question(image) == ours


def test_a_thought_about_an_image(rule: ImageRule, examples: list[Pictured]) -> None:
    """Sampled to its mark, or cut off: what follows is the template's closing and the prefill."""
    prompt = Prompt(thinkers.with_template(thinkers.vision()), rule, CLASSES)
    encode, asked = prompt.tokenizer.encode, prompt.thinking(examples[0].image)
    marks = prompt.marks
    assert marks is not None
    last = asked.chunks[-1]
    assert isinstance(last, types.EncodedTextChunk)
    assert prompt.tokenizer.decode(last.tokens).endswith("<|im_start|>assistant\n<think>\n")
    for sampled, closed, follows in (
        ("wheels\n</think>", True, "wheels\n</think>\n\nThe subject in this photo is:"),
        ("wheels and", False, "wheels and\n</think>\n\nThe subject in this photo is:"),
        ("wheels<|im_end|>", False, "wheels\n</think>\n\nThe subject in this photo is:"),
        ("", False, "\n</think>\n\nThe subject in this photo is:"),
    ):
        tokens = encode(sampled)
        thought = Thought.read(prompt.tokenizer, tokens, marks, prompt.stops)
        assert (thought.closed, thought.length) == (closed, len(tokens))
        after = prompt.after(asked, thought)
        assert [t for c in after.chunks[len(asked.chunks) :] for t in c.tokens] == encode(follows)  # type: ignore[union-attr]
    blind = prompt.question(examples[0].image).chunks[-1]
    assert isinstance(blind, types.EncodedTextChunk)
    assert prompt.tokenizer.decode(blind.tokens).endswith("<think>\n\n</think>\n\nThe subject in this photo is:")


def test_a_mark_of_several_tokens_that_shares_them_with_others(tokenizer: Any) -> None:
    """The tokens before it stay as they were sampled; the characters that share one with it are written again."""
    marks = Marks("<muse>", "</muse>", "<muse>\n", "\n</muse>\n\n")
    prompt = Prompt(thinkers.with_template(MUSING), None, CLASSES, ABOUT)
    for text in ("a cart.", "a cart.\n", "a (cart "):
        sampled = tokenizer.encode(f"{text}</muse>\nand more")
        count = closed_at(tokenizer, sampled, marks.end)
        assert count is not None
        assert marks.end in tokenizer.decode(sampled[:count])
        assert marks.end not in tokenizer.decode(sampled[: count - 1])
        thought = Thought.read(tokenizer, sampled, marks, prompt.stops)
        assert thought.tokens == sampled[: len(thought.tokens)]
        assert tokenizer.decode(thought.tokens) + str(thought.rest) == text
        after = prompt.after(prompt.thinking("x"), thought)
        assert written(prompt, after).endswith(f"<muse>\n{text}</muse>\n\nIt is about")
    assert closed_at(tokenizer, tokenizer.encode("a </mus"), marks.end) is None


TEXTS = [
    ("<think>\nwheels\n</think>\n\na car", Split("wheels", "a car", True)),
    ("\n<think>wheels </th and\n\n", Split("wheels </th and", "", False)),
    ("<think>the subject: star", Split("the subject: star", "", False)),
    ("<think>\n\n</think>\n\nstar", Split("", "star", True)),
    ("a <think> star", Split(None, "a <think> star", False)),
    (" star ", Split(None, " star ", False)),
    ("<thin", Split(None, "<thin", False)),
    ("", Split(None, "", False)),
]


@pytest.mark.parametrize(("text", "expected"), TEXTS)
def test_a_text_is_split_also_where_it_grows_by_characters(text: str, expected: Split) -> None:
    assert split(text, BEGUN) == expected
    reader = ThoughtReader(BEGUN, within=False)
    pairs = [reader.add(sign) for sign in text] + [reader.add("", last=True)]
    thought, answer = ("".join(parts) for parts in zip(*pairs, strict=True))
    assert (thought, answer, reader.closed) == (expected.thought or "", expected.answer, expected.closed)


def test_a_text_within_a_thought(tokenizer: Any) -> None:
    assert split("wheels</think>a car", BEGUN, within=True) == Split("wheels", "a car", True)
    assert split("wheels", BEGUN, within=True) == Split("wheels", "", False)
    assert split("wheels", None) == Split(None, "wheels", False)
    own = thinkers.with_template(thinkers.DEEPSEEK)
    assert split_tokens(own, own.encode("wheels</think>a car<|im_end|>")) == Split("wheels", "a car", True)
    with pytest.raises(PromptError, match="no thinking mode"):
        split_tokens(tokenizer, [5])


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("<think>the subject: star", -1),
        (" <think>the subject: star\n", -1),
        ("The subject in this photo is: <think>star", -1),
        ("<think>it is: star</think>\n\nThe subject in this photo is: car", 1),
        ("a</think><think>subject: star", -1),
        (" star\n", 0),
    ],
)
def test_an_unfinished_thought_is_no_answer(rule: ImageRule, text: str, label: int) -> None:
    prompt = Prompt(thinkers.with_template(thinkers.vision()), rule, CLASSES)
    assert prompt.parse(prompt.text(prompt.tokenizer.encode(text))) == label


@pytest.mark.parametrize("train_on", ["answer", "all"])
def test_the_loss_is_on_the_answer_or_on_the_thought_too(
    rule: ImageRule, examples: list[Pictured], train_on: str
) -> None:
    prompt = Prompt(thinkers.with_template(thinkers.vision()), rule, CLASSES)
    example = prompt.datum(examples[0].image, 3, prompt.thought("It has teeth."), train_on)
    targets, weights = (example.loss_fn_inputs[name].to_numpy() for name in ("target_tokens", "weights"))
    answer = "The subject in this photo is: crocodile\n<|im_end|>"
    thought = "It has teeth.\n</think>\n\n"
    learnt = prompt.tokenizer.decode(targets[weights > 0])
    assert learnt == (thought + answer if train_on == "all" else answer)
    closed = prompt.closed_datum(examples[0].image, 3, prompt.thought("It has teeth.")).model_input
    whole = example.model_input
    assert closed.chunks[:2] == whole.chunks[:2]
    with pytest.raises(PromptError, match="no thinking mode"):
        Prompt(thinkers.with_template(CHATML), rule, CLASSES).datum(examples[0].image, 3, prompt.thought("a"))
