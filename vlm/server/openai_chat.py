"""Messages → the model's input: turns as the model's chat template writes them, images in their places.

The template is the tokenizer's own if that knows images; else the ChatML turns of Qwen3-VL, which `vlm.prompts` writes
too. What a client says can end no turn and begin none. Knows no HTTP.
"""

import asyncio
from collections.abc import Sequence
from typing import Any

import tinker
from jinja2 import TemplateError
from tinker import types

from kshot_errors import ImageError, PromptError
from vlm.inputs import image_chunk, model_input
from vlm.prompts import TURN
from vlm.server import openai_images
from vlm.server.openai_requests import ChatAsked, ImagePart, Message, TextPart
from vlm.server.openai_sampler import Sampler

MAX_IMAGES = 64  # of one request
START, PLACE, VIDEO = "<|im_start|>", "<|image_pad|>", "<|video_pad|>"
PICTURE = f"<|vision_start|>{PLACE}<|vision_end|>"
ENDS = (TURN, "<|endoftext|>")  # tokens that end an answer, as Qwen3-VL's generation settings name them
PROBE = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]


async def prompt(asked: ChatAsked, sampler: Sampler, *, allow_urls: bool) -> tinker.ModelInput:
    """The input of a conversation. Raises ImageError for images, PromptError for texts that cannot be given."""
    urls = [p.image_url.url for m in asked.messages for p in m.content if isinstance(p, ImagePart)]
    if len(urls) > MAX_IMAGES:
        raise ImageError(f"{len(urls)} images are too many; at most {MAX_IMAGES} may be in one request")
    images = [await openai_images.read(url, allow_urls=allow_urls) for url in urls]
    return await asyncio.to_thread(_prompt, asked, sampler, images)


def _prompt(asked: ChatAsked, sampler: Sampler, images: Sequence[bytes]) -> tinker.ModelInput:
    tokenizer = sampler.get_tokenizer()
    written = text(asked, tokenizer).split(PLACE)
    if len(written) != len(images) + 1:
        raise PromptError(f"the chat template has {len(written) - 1} places for {len(images)} image(s)")
    chunks: list[types.ModelInputChunk | list[int]] = [encode(tokenizer, written[0])]
    for image, after in zip(images, written[1:], strict=True):
        chunks += [image_chunk(image, sampler.rule), encode(tokenizer, after)]
    return model_input(*chunks)


def encode(tokenizer: Any, piece: str) -> list[int]:
    """The tokens of a piece of a prompt, and none besides."""
    return list(tokenizer.encode(piece, add_special_tokens=False))


def text(asked: ChatAsked, tokenizer: Any) -> str:
    """The conversation as one text, PLACE where an image is."""
    steering = steering_tokens(tokenizer)
    for number, message in enumerate(asked.messages):
        _check(f"messages[{number}]", message, steering)
    if not _knows_images(tokenizer):
        return _layout(asked)
    try:
        return str(
            tokenizer.apply_chat_template(
                [{"role": m.role, "content": _content(m)} for m in asked.messages],
                tokenize=False,
                add_generation_prompt=asked.begins_answer,
                continue_final_message=asked.continue_final_message,
            )
        )
    except (TemplateError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise PromptError(f"the model's chat template cannot write these messages: {reason}") from error


def steering_tokens(tokenizer: Any) -> list[str]:
    """The tokens that steer the model: no message may write one."""
    return [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]


def steers(said: str, steering: Sequence[str]) -> str | None:
    """The first of these tokens that a text writes."""
    return next((token for token in steering if token in said), None)


def ends(tokenizer: Any) -> list[int]:
    """The tokens that end an answer."""
    known = tokenizer.added_tokens_encoder
    return sorted({tokenizer.eos_token_id, *(known[token] for token in ENDS if token in known)})


def _check(name: str, message: Message, steering: Sequence[str]) -> None:
    if message.role != "user" and any(isinstance(part, ImagePart) for part in message.content):
        raise PromptError(f"{name}: only messages of the user may hold images")
    said = "".join(part.text if isinstance(part, TextPart) else "\n" for part in message.content)
    if token := steers(said, steering):
        raise PromptError(f"{name} writes {token}, which steers the model; leave it out")


def _knows_images(tokenizer: Any) -> bool:
    """Whether the tokenizer has a chat template that writes an image's place."""
    if not tokenizer.chat_template:
        return False
    try:
        written = tokenizer.apply_chat_template(PROBE, tokenize=False)
    except (TemplateError, TypeError, ValueError):  # one of texts alone trips over a list
        return False
    return bool(written.count(PICTURE) == 1)


def _content(message: Message) -> str | list[dict[str, str]]:
    """As templates take it: texts alone as one text."""
    if all(isinstance(part, TextPart) for part in message.content):
        return _said(message)
    return [{"type": "text", "text": p.text} if isinstance(p, TextPart) else {"type": "image"} for p in message.content]


def _said(message: Message) -> str:
    return "".join(part.text if isinstance(part, TextPart) else PICTURE for part in message.content)


def _layout(asked: ChatAsked) -> str:
    written = "".join(f"{START}{m.role}\n{_said(m)}{TURN}\n" for m in asked.messages)
    if asked.continue_final_message:
        return written.removesuffix(f"{TURN}\n")
    return written + (f"{START}assistant\n" if asked.begins_answer else "")
