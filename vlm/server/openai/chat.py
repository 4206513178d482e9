"""Messages → the model's input: turns as the model's chat template writes them, and images from their URLs.

Which template that is, `vlm.templates` says, for `vlm.prompts` too. The text of a message can end no turn and begin
none, nor can a tool or a call.

A server that fetches the addresses that strangers name can be used to reach what only it can reach. So: public
addresses alone, looked up once and connected to by number (a name may resolve otherwise the second time), no redirect,
no proxy, and limits of bytes and time.
"""

import asyncio
import base64
import binascii
import json
import socket
from collections.abc import Callable, Sequence
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any, NamedTuple
from urllib.parse import SplitResult, urlsplit

import httpx
import tinker
from tinker import types

from kshot.errors import ImageError, PromptError
from vlm import templates
from vlm.inputs import image_chunk, model_input
from vlm.local.clients import LocalSamplingClient
from vlm.prompts import special_tokens
from vlm.server.limits import images
from vlm.server.limits.memory import Reservation
from vlm.server.openai import tools
from vlm.server.openai.messages import SYSTEM, ImagePart, Message, TextPart
from vlm.server.openai.requests import ChatRequest
from vlm.templates import END_OF_TURN, PROBE, image_marks
from vlm.thinking import Marks, marks_of

MAX_IMAGES = 64  # of one request
END_TOKENS = (END_OF_TURN, "<|endoftext|>")  # tokens that end an answer, as Qwen3-VL's generation settings name them
PROBE_TOOL = {"type": "function", "function": {"name": "probe", "description": "probes it", "parameters": {}}}
PROBE_CALL = {"type": "function", "function": {"name": "probe", "arguments": {"a": 1}}}
PROBE_TURN = {"role": "assistant", "content": "", "tool_calls": [PROBE_CALL]}
PROBE_WRITTEN = f'{tools.BEGIN}probe{tools.MIDDLE}{{"a": 1}}{tools.END}'
MAX_BYTES = 32 << 20  # of one image
ESCAPED = {"%2B": "+", "%2F": "/", "%3D": "=", "%20": "", "%0A": "", "%0D": ""}  # what base64 has and URLs escape
FROM_URL_SAFE = bytes.maketrans(b"-_", b"+/")  # RFC 4648, section 5
SECONDS = 20.0  # to fetch one
PORTS = {"http": 80, "https": 443}
UNICAST = IPv6Network("2000::/3")  # all that IANA has given to the public internet; no other prefix is
NOT_PUBLIC = tuple(  # and is_global of Python 3.11 says otherwise, or they hold IPv4 addresses
    map(ip_network, ("192.0.0.0/24", "192.88.99.0/24", "2001::/32", "2002::/16", "3fff::/20"))
)
Address = IPv4Address | IPv6Address


class Conversation(NamedTuple):
    """A conversation as one text, with a mark where an image is. marks: how its answer may think; None: it will not.
    within: whether the text ends within a thought."""

    text: str
    marks: Marks | None = None
    within: bool = False


async def prompt(
    request: ChatRequest, sampler: LocalSamplingClient, taken: Reservation, *, allow_urls: bool
) -> tuple[tinker.ModelInput, Conversation]:
    """The input of a conversation. taken: grows by what the images need. Raises ImageError for images, PromptError for
    texts that cannot be given, TooLargeError and BusyError for images that take too much."""
    urls = [p.image_url.url for m in request.messages for p in m.content if isinstance(p, ImagePart)]
    if len(urls) > MAX_IMAGES:
        raise ImageError(f"{len(urls)} images are too many; at most {MAX_IMAGES} may be in one request")
    rule = sampler.rule if urls else None  # which a text model does not have, and says so
    tokenizer = sampler.get_tokenizer()
    pool = templates.renderer(tokenizer).pool
    written, texts = await asyncio.get_running_loop().run_in_executor(pool, _texts, request, sampler, len(urls))
    read = [await read_image(url, allow_urls=allow_urls) for url in urls]
    if read:
        taken.grow(await images.decoding_bytes(read))
    chunks: list[types.ModelInputChunk | list[int]] = [texts[0]]
    for image, after in zip(read, texts[1:], strict=True):
        chunks += [await images.in_thread(image_chunk, image, rule), after]
    return model_input(*chunks), written


def _texts(request: ChatRequest, sampler: LocalSamplingClient, images: int) -> tuple[Conversation, list[list[int]]]:
    """The conversation, and the tokens before, between and after so many images. Raises PromptError."""
    tokenizer = sampler.get_tokenizer()
    written = conversation(request, tokenizer, takes_images=sampler.takes_images)
    texts = written.text.split(image_marks(tokenizer).image)
    if len(texts) != images + 1:
        raise PromptError(f"the chat template has {len(texts) - 1} places for {images} image(s)")
    return written, [encode(tokenizer, each) for each in texts]


def encode(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a part of a prompt, and none besides."""
    return list(tokenizer.encode(text, add_special_tokens=False))


def conversation(request: ChatRequest, tokenizer: Any, *, takes_images: bool = True) -> Conversation:
    """What a request asks. takes_images: whether the model does. Raises PromptError."""
    special = special_tokens(tokenizer)
    for number, message in enumerate(request.messages):
        _check(f"messages[{number}]", message, special)
    offered = [] if request.tool_choice == "none" else tools.for_template(request.tools)
    for name, given in (("tools", offered), ("chat_template_kwargs", request.chat_template_kwargs)):
        _check_text(name, json.dumps(given, ensure_ascii=False), special)
    template = templates.chosen(tokenizer, takes_images=takes_images, tools=offered or None)
    if template is None:
        raise PromptError("the model has no chat template; ask completions, with the whole prompt")
    if offered:
        probe = templates.probed(tokenizer, template, [PROBE, PROBE_TURN], [PROBE_TOOL])
        if PROBE_WRITTEN not in probe or "probes it" not in probe:
            raise PromptError(f"the model's chat template writes no tools with calls in {tools.OPEN}; leave tools out")
    marks = marks_of(tokenizer, template)
    variables = {**_thinking_variables(request, marks), **request.chat_template_kwargs}
    turns = {"begin_answer": request.begins_answer, "go_on": request.continue_final_message}
    try:
        text = templates.written(tokenizer, _messages(request), offered or None, template, variables, **turns)
    except ValueError as error:
        raise PromptError(f"the model's chat template cannot write these messages: {error}") from error
    return Conversation(text) if marks is None or not request.begins_answer else _begun(request, text, marks)


def _thinking_variables(request: ChatRequest, marks: Marks | None) -> dict[str, Any]:
    """The template's variables for what a request says of thoughts. Raises PromptError for a model without them."""
    if not request.thinks:
        return dict(marks.off) if marks and request.thinks is False else {}
    if marks is None:
        effort = f"reasoning_effort = {request.reasoning_effort!r}"
        raise PromptError(f"{effort}: the model's chat template has no thinking mode; leave it out")
    return {**marks.on, "reasoning_effort": request.reasoning_effort}  # which some templates write


def _begun(request: ChatRequest, text: str, marks: Marks) -> Conversation:
    """With the assistant's turn begun, as far as what a request says of thoughts needs it."""
    if request.thinks is False:
        text = marks.answering(text)
    if marks.ended(text):
        return Conversation(text)
    if request.thinks:
        text = marks.thinking(text)
    return Conversation(text, marks, marks.begun(text) or not marks.begin)


def end_tokens(tokenizer: Any) -> list[int]:
    """The tokens that end an answer."""
    ids = tokenizer.added_tokens_encoder
    return sorted({tokenizer.eos_token_id, *(ids[token] for token in END_TOKENS if token in ids)})


def _check(name: str, message: Message, special: Sequence[str]) -> None:
    if message.role != "user" and any(isinstance(part, ImagePart) for part in message.content):
        raise PromptError(f"{name}: only messages of the user may hold images")
    _check_text(name, _text_of([message]), special)
    for each in (message.reasoning_content or "", *(json.dumps(call, ensure_ascii=False) for call in _calls(message))):
        _check_text(name, each, special)


def _check_text(name: str, text: str, special: Sequence[str]) -> None:
    if token := next((token for token in special if token in text), None):
        raise PromptError(f"{name} writes {token}, which steers the model; leave it out")


def _messages(request: ChatRequest) -> list[dict[str, Any]]:
    """As templates take them: the system's as one, texts alone as one text."""
    first, rest = request.messages[: request.instructions], request.messages[request.instructions :]
    made: list[dict[str, Any]] = []
    if first:
        made.append({"role": SYSTEM[0], "content": _text_of(first, "\n\n")})
    for message in rest:
        fields: dict[str, Any] = {"role": message.role, "content": _content(message)}
        if message.reasoning_content is not None:
            fields["reasoning_content"] = message.reasoning_content
        made.append({**fields, "tool_calls": _calls(message)} if message.tool_calls else fields)
    return made


def _content(message: Message) -> str | list[dict[str, str]]:
    if all(isinstance(part, TextPart) for part in message.content):
        return _text_of([message])
    return [{"type": "text", "text": p.text} if isinstance(p, TextPart) else {"type": "image"} for p in message.content]


def _text_of(messages: Sequence[Message], between: str = "") -> str:
    """The texts of messages, a line's end for an image."""
    texts = ("".join(p.text if isinstance(p, TextPart) else "\n" for p in m.content) for m in messages)
    return between.join(texts)


def _calls(message: Message) -> list[dict[str, Any]]:
    return [call.model_dump() for call in message.tool_calls]


# Image URLs


async def read_image(url: str, *, allow_urls: bool) -> bytes:
    """The bytes behind an image URL. Raises ImageError for what is refused, too large or not there."""
    scheme = url.partition(":")[0].lower()
    if scheme == "data":
        return decode_data_url(url)
    if scheme not in PORTS:
        raise ImageError(f"image URL {url!r:.60}: give a data: URL or an http(s) address")
    if not allow_urls:
        raise ImageError(f"image URL {url!r:.60}: this server fetches no images; send it as data:image/png;base64,...")
    return await fetch(url)


def decode_data_url(url: str) -> bytes:
    """The bytes in a base64 data: URL, which may hold percent signs and white space and lack its padding."""
    head, comma, text = url.partition(",")
    if not comma or not head.lower().replace(" ", "").endswith(";base64"):
        raise ImageError(f"image URL {url!r:.40}: a data: URL must read data:image/png;base64,...")
    for code, sign in ESCAPED.items():
        text = text.replace(code, sign).replace(code.lower(), sign)
    data = text.encode().translate(FROM_URL_SAFE, b" \t\r\n\f").rstrip(b"=")
    if len(data) > MAX_BYTES * 4 // 3 + 4:
        raise _too_large(url)
    try:
        return base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"image URL {url!r:.40}: no base64 ({error})") from error


def is_public(address: Address) -> bool:
    """Whether an address is one of the public internet, by IANA's registries of special-purpose addresses. One of
    IPv6 that stands for one of IPv4 is not: names have that of IPv4 itself."""
    if any(address in network for network in NOT_PUBLIC) or (address.version == 6 and address not in UNICAST):
        return False
    return address.is_global and not address.is_multicast


async def fetch(url: str, public: Callable[[Address], bool] = is_public) -> bytes:
    """The answer of an http(s) address. public: which addresses may be connected to."""
    try:
        async with asyncio.timeout(SECONDS):
            return await _fetch(url, public)
    except TimeoutError as error:
        raise ImageError(f"image URL {url!r:.60} gave no image within {SECONDS:g} seconds") from error
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
        raise ImageError(f"image URL {url!r:.60} cannot be fetched ({type(error).__name__})") from error


async def _fetch(url: str, public: Callable[[Address], bool]) -> bytes:
    parts = urlsplit(url)
    target = await _target(url, parts, public)
    headers = {"Host": parts.netloc, "Accept": "image/*", "Accept-Encoding": "identity"}
    options = {"sni_hostname": parts.hostname}  # the certificate must be that of the name
    async with (
        httpx.AsyncClient(trust_env=False, follow_redirects=False) as client,
        client.stream("GET", target, headers=headers, extensions=options) as response,
    ):
        if response.status_code != httpx.codes.OK:
            raise ImageError(
                f"image URL {url!r:.60} answers with status {response.status_code}; no redirect is followed"
            )
        data = bytearray()
        async for part in response.aiter_raw():
            data += part
            if len(data) > MAX_BYTES:
                raise _too_large(url)
        return bytes(data)


async def _target(url: str, parts: SplitResult, public: Callable[[Address], bool]) -> str:
    """The URL with its host's address in place of the name."""
    if not parts.hostname or parts.username is not None:
        raise ImageError(f"image URL {url!r:.60} must be http(s)://HOST/..., without a user")
    port = parts.port or PORTS[parts.scheme]
    infos = await asyncio.get_running_loop().getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
    addresses = [ip_address(str(each[4][0]).partition("%")[0]) for each in infos]
    if not addresses or not all(map(public, addresses)):
        raise ImageError(f"image URL {url!r:.60} is not at a public address")
    host = f"[{addresses[0]}]" if addresses[0].version == 6 else str(addresses[0])
    return parts._replace(netloc=f"{host}:{port}", fragment="").geturl()


def _too_large(url: str) -> ImageError:
    return ImageError(f"image URL {url!r:.40} holds more than {MAX_BYTES >> 20} MiB; send a smaller image")
