"""POST chat/completions through the official client: Qwen3-VL's turns in tokens, and the stock model's answers."""

import io
from collections.abc import Callable
from copy import copy
from typing import Any
from urllib.parse import quote

import openai
import pytest
import tinker
import torch
from PIL import Image, PngImagePlugin
from tinker import types

from tests.vlm import genuine, openai_served
from tests.vlm.helpers import Pictured, greedy
from tests.vlm.openai_served import HELLO, Models, checked, image_part, recipe, refusal
from vlm import nano
from vlm.inputs import ImageRule, image_chunk
from vlm.prompts import Prompt
from vlm.server.openai import chat
from vlm.server.openai.requests import ChatRequest


def ask(api: openai.OpenAI, messages: Any = HELLO, **options: Any) -> Any:
    return openai_served.ask(api, messages=messages, **{"max_tokens": 8, **options})


def streamed(api: openai.OpenAI, messages: Any = HELLO, **options: Any) -> list[Any]:
    return [checked(piece) for piece in ask(api, messages, stream=True, **options)]


def rendered(tokenizer: Any, messages: Any, **options: Any) -> str:
    request = ChatRequest(model="any", messages=messages, **options)
    return chat.conversation(request, tokenizer).text


def flat(prompt: tinker.ModelInput) -> list[Any]:
    """Tokens, and images as their bytes."""
    parts = [c.tokens if isinstance(c, types.EncodedTextChunk) else [(c.data, c.length)] for c in prompt.chunks]  # type: ignore[union-attr]
    return [each for part in parts for each in part]


BEGUN: dict[str, Any] = {"extra_body": {"continue_final_message": True}, "max_tokens": 12}


def test_the_recipes_question_is_the_same_tokens_and_the_answer_what_stock_generate_writes(
    api: openai.OpenAI, models: Models, stock: Any, prompt: Prompt, examples: list[Pictured], rule: ImageRule
) -> None:
    for example in examples[:3]:
        question = prompt.question(example.image)
        tokens = greedy(stock, question, rule, 12)
        assert prompt.tokenizer.eos_token_id not in tokens  # so that all of it is answered
        answer = ask(api, recipe(example.image), **BEGUN)
        assert flat(models.requests[-1].prompt) == flat(question)
        assert answer.usage.prompt_tokens == question.length  # with the image's positions
        choice = answer.choices[0]
        assert choice.message.content == prompt.tokenizer.decode(tokens)
        assert (choice.message.role, choice.finish_reason) == ("assistant", "length")
    assert answer.id.startswith("chatcmpl-")
    assert (answer.object, answer.model) == ("chat.completion", nano.NAME)


def test_the_token_that_ends_the_turn_is_no_part_of_the_answer(
    api: openai.OpenAI, prompt: Prompt, stock: Any, rule: ImageRule, examples: list[Pictured], monkeypatch: Any
) -> None:
    known = prompt.tokenizer.convert_tokens_to_ids
    assert chat.end_tokens(prompt.tokenizer) == [known("<|endoftext|>"), known("<|im_end|>")]
    tokens = greedy(stock, prompt.question(examples[0].image), rule, 12)
    end = tokens[5]
    kept = tokens[: tokens.index(end)]
    text = prompt.tokenizer.decode(kept)
    monkeypatch.setattr(chat, "end_tokens", lambda _: [end])  # as if this token ended the turn
    answer = ask(api, recipe(examples[0].image), **BEGUN, logprobs=True)
    choice = answer.choices[0]
    assert (choice.message.content, choice.finish_reason) == (text, "stop")
    assert len(choice.logprobs.content) == len(kept)
    *pieces, last = streamed(api, recipe(examples[0].image), **BEGUN, stream_options={"include_usage": True})
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == text
    assert pieces[-1].choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == last.usage.completion_tokens == len(kept) + 1


def test_a_conversation_in_chatml(tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, image_part(b""), {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "d"},
    ]
    turns = (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\na<|vision_start|><|image_pad|><|vision_end|>b<|im_end|>\n"
        "<|im_start|>assistant\nc<|im_end|>\n"
        "<|im_start|>user\nd<|im_end|>\n"
    )
    assert rendered(tokenizer, messages) == f"{turns}<|im_start|>assistant\n"
    assert rendered(tokenizer, messages, add_generation_prompt=False) == turns
    begun = [*messages, {"role": "assistant", "content": "e "}]
    assert rendered(tokenizer, begun, continue_final_message=True) == f"{turns}<|im_start|>assistant\ne "


SHORT = (  # a template with images, in other words than ChatML's
    "{% for m in messages %}[{{ m.role }}]{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ p.text }}{% endif %}"
    "{% endfor %}{% endif %};{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
TEXTS = "{% for m in messages %}[{{ m.role }}]{{ m.content + ';' }}{% endfor %}"
STRICT = SHORT + "{% if messages[0].content == 'no' %}{{ raise_exception('not so') }}{% endif %}"


def with_template(tokenizer: Any, template: str) -> Any:
    other = copy(tokenizer)
    other.chat_template = template
    return other


def test_a_template_that_knows_images_is_used_and_no_other(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": [image_part(b""), {"type": "text", "text": "b"}]}]
    own, texts = with_template(tokenizer, SHORT), with_template(tokenizer, TEXTS)
    assert rendered(own, messages) == "[user]<|vision_start|><|image_pad|><|vision_end|>b;[assistant]"
    assert rendered(own, HELLO) == "[user]hello;[assistant]"
    begun = [*HELLO, {"role": "assistant", "content": "It is "}]
    assert rendered(own, begun, continue_final_message=True) == "[user]hello;[assistant]It is "
    assert rendered(texts, HELLO) == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    with pytest.raises(chat.PromptError, match="cannot write these messages: not so"):
        rendered(with_template(tokenizer, STRICT), [{"role": "user", "content": "no"}])


@genuine.needed
def test_the_genuine_tokenizer_writes_the_same(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": [image_part(b""), {"type": "text", "text": "b"}]}]
    assert rendered(genuine.tokenizer(), messages) == rendered(tokenizer, messages)


def as_bytes(image: Image.Image, format: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def test_images_of_any_format_stand_in_their_places(
    api: openai.OpenAI, models: Models, rule: ImageRule, make_image: Callable[..., bytes], tokenizer: Any
) -> None:
    picture, text = Image.open(io.BytesIO(make_image(3, 96, 64))), PngImagePlugin.PngInfo()
    text.add_text("workflow", "{}" * (1 << 20), zip=True)
    images = [
        make_image(1, 64, 64),
        make_image(2, 64, 128, format="JPEG"),
        as_bytes(picture.convert("P"), "GIF"),
        as_bytes(picture.convert("RGBA"), "WEBP", lossless=True),
        as_bytes(picture, "BMP"),
        as_bytes(picture, "PNG", pnginfo=text),
    ]
    content = [
        each for n, image in enumerate(images) for each in (image_part(image), {"type": "text", "text": f" {n}"})
    ]
    answer = ask(api, [{"role": "user", "content": content}], max_tokens=1)
    prompt = models.requests[-1].prompt
    chunks = [image_chunk(image, rule) for image in images]
    assert [c for c in prompt.chunks if isinstance(c, types.ImageChunk)] == chunks
    pieces = ["<|im_start|>user\n<|vision_start|>", *(f"<|vision_end|> {n}<|vision_start|>" for n in range(5))]
    pieces.append("<|vision_end|> 5<|im_end|>\n<|im_start|>assistant\n")
    texts = [c.tokens for c in prompt.chunks if isinstance(c, types.EncodedTextChunk)]
    assert texts == [tokenizer.encode(piece) for piece in pieces]
    assert answer.usage.prompt_tokens == prompt.length > sum(chunk.length for chunk in chunks)


def test_log_probs_are_the_stock_models(api: openai.OpenAI, models: Models, stock: Any, tokenizer: Any) -> None:
    choice = ask(api, max_tokens=4, logprobs=True, top_logprobs=2).choices[0]
    prompt = flat(models.requests[-1].prompt)
    for count, entry in enumerate(choice.logprobs.content):
        with torch.no_grad():
            row = stock(input_ids=torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
        best = row.topk(2)
        assert entry.token == tokenizer.decode([int(best.indices[0])])
        assert entry.bytes == list(entry.token.encode())
        assert entry.logprob == pytest.approx(best.values[0].item(), abs=1e-4)
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert [top.token for top in entry.top_logprobs] == [tokenizer.decode([n]) for n in best.indices.tolist()]
        prompt.append(int(best.indices[0]))
        assert count < 4
    assert "".join(entry.token for entry in choice.logprobs.content) == choice.message.content
    plain = ask(api, max_tokens=4, logprobs=True).choices[0].logprobs
    assert [entry.top_logprobs for entry in plain.content or ()] == [[]] * 4


@pytest.mark.parametrize("options", [{}, {"n": 3, "temperature": 2.0, "seed": 4, "logprobs": True, "top_logprobs": 1}])
def test_a_stream_adds_up_to_the_whole(api: openai.OpenAI, options: dict[str, Any]) -> None:
    whole, pieces = ask(api, **options), streamed(api, **options, stream_options={"include_usage": True})
    assert {(piece.object, piece.id) for piece in pieces} == {("chat.completion.chunk", pieces[0].id)}
    assert pieces[-1].usage == whole.usage
    for choice in whole.choices:
        own = [piece.choices[0] for piece in pieces[:-1] if piece.choices[0].index == choice.index]
        assert [each.delta.role for each in own] == ["assistant"] + [None] * (len(own) - 1)
        assert "".join(each.delta.content or "" for each in own) == choice.message.content
        assert [each.finish_reason for each in own] == [None] * (len(own) - 1) + [choice.finish_reason]
        got = [entry for each in own if each.logprobs for entry in each.logprobs.content or ()]
        expected = (choice.logprobs.content if choice.logprobs else None) or []
        assert [entry.token for entry in got] == [entry.token for entry in expected]
        assert [entry.logprob for entry in got] == pytest.approx([entry.logprob for entry in expected], abs=1e-4)


def test_an_answer_may_have_1024_tokens_unless_told_otherwise(api: openai.OpenAI, models: Models) -> None:
    """As far as the context has room; what is asked for must fit."""
    kept: list[int | None] = []
    for words in (1, 3500):
        stream = api.chat.completions.create(
            model=nano.NAME, messages=[{"role": "user", "content": " car" * words}], stream=True
        )
        next(iter(stream))
        stream.close()
        kept.append(models.requests[-1].params.max_tokens)
    assert kept == [1024, 4096 - models.requests[-1].prompt.length]
    assert 0 < (kept[1] or 0) < 1024
    for name in ("max_tokens", "max_completion_tokens"):
        api.chat.completions.create(model=nano.NAME, messages=HELLO, **{name: 3})  # type: ignore[call-overload]
        assert models.requests[-1].params.max_tokens == 3


@pytest.mark.parametrize(
    ("wrong", "param", "words"),
    [
        ({"functions": [{}]}, "functions", "not supported"),
        ({"audio": {"voice": "x"}}, "audio", "not supported"),
        ({"modalities": ["text", "audio"]}, "modalities", "not supported"),
        ({"reasoning_effort": "high"}, None, "chat template has no thinking mode"),
        ({"reasoning_effort": "huge"}, "reasoning_effort", "'none', 'low', 'medium' or 'high'"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "sets messages, which a request has"),
        ({"chat_template_kwargs": {"a": ["<|im_end|>"]}}, None, "chat_template_kwargs writes <|im_end|>"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "function", "content": "a", "name": "x"}]}, "messages", "'function'"),
        ({"messages": [{"role": "user", "content": "a", "nick": "x"}]}, "messages", "messages[0].nick is not known"),
        ({"messages": [{"role": "user"}]}, "messages", "messages[0].content is missing"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages", "input_audio"),
        ({"messages": [*HELLO, {"role": "system", "content": "a"}]}, "messages", "only the first"),
        ({"messages": [{"role": "user", "content": "a <|im_end|>"}]}, None, "writes <|im_end|>"),
        ({"messages": [{"role": "user", "content": "<|image_pad|>"}]}, None, "steers the model"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": t} for t in ("<|im_", "start|>")]}]},
            None,
            "writes <|im_start|>",
        ),
        ({"messages": [{"role": "system", "content": [image_part(b"x")]}]}, None, "only messages of the user"),
        (
            {"messages": [{"role": "user", "content": [image_part(b"x", detail="huge")]}]},
            "detail",
            "'huge' is not supported",
        ),
        ({"messages": [{"role": "user", "content": [image_part(b"x")]}]}, "messages", "not an image"),
        ({"messages": [{"role": "user", "content": [image_part(b"x")] * 65}]}, "messages", "65 images are too many"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "give one"),
        ({"max_tokens": 4096}, None, "too long"),
        ({"continue_final_message": True}, "continue_final_message", "of the assistant"),
        (
            {"continue_final_message": True, "add_generation_prompt": True},
            "add_generation_prompt",
            "exclude each other",
        ),
    ],
)
def test_what_is_wrong_is_named(api: openai.OpenAI, wrong: dict[str, Any], param: str | None, words: str) -> None:
    refusal(api, "chat/completions", words, param, **wrong)


def test_what_clients_send_besides_changes_nothing(api: openai.OpenAI, make_image: Callable[..., bytes]) -> None:
    part, text = image_part(make_image(1, 64, 64)), {"type": "text", "text": "What is it?"}
    url = part["image_url"]["url"]
    system = {"role": "system", "content": "Be brief."}
    begun = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]

    def answer(*messages: Any, **options: Any) -> str | None:
        return ask(api, [*messages], temperature=1.0, **{"seed": 5, **options}).choices[0].message.content

    asked = {"role": "user", "content": [part, text]}
    expected = answer(asked)
    for detail in ("auto", "low", "high"):
        assert answer({"role": "user", "content": [image_part(make_image(1, 64, 64), detail=detail), text]}) == expected
    assert answer({"role": "user", "content": [{"type": "image_url", "image_url": url}, text]}) == expected
    head, _, data = url.partition(",")
    for other in (data.rstrip("="), quote(data, safe=""), data[:5] + "\r\n " + data[5:]):
        assert (
            answer({"role": "user", "content": [{**part, "image_url": {"url": f"{head},{other}"}}, text]}) == expected
        )
    assert answer({**asked, "name": "me", "type": "text"}) == expected
    assert answer({**system, "role": "developer"}, *HELLO) == answer(system, *HELLO)
    assert answer(begun[0], {**begun[1], "reasoning_content": "hm"}, *HELLO) == answer(*begun, *HELLO)
    pieces = streamed(api, [asked], temperature=1.0, seed=5, stream_options={"include_obfuscation": False})
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == expected
    assert answer(asked, seed=-5) == answer(asked, seed=-5) != expected


def test_what_asks_for_nothing_is_taken(api: openai.OpenAI) -> None:
    nothing: dict[str, Any] = {
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "modalities": ["text"],
    }
    nothing |= {"parallel_tool_calls": False, "store": False, "service_tier": "auto", "metadata": {"a": "b"}}
    nothing |= {"logit_bias": None, "presence_penalty": 0, "user": "me"}
    first = ask(api)
    assert ask(api, extra_body=nothing).choices[0].message.content == first.choices[0].message.content
    message = first.choices[0].message.model_dump()  # as clients send answers back: with nulls
    assert ask(api, [*HELLO, message, *HELLO], max_tokens=1).choices[0].message.content
