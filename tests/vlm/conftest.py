"""A local service on the nano model, prompts about small images, and the same model as plain transformers + PEFT."""

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest
import tinker
import torch
from tinker import types

from tests.vlm import checkpoints, openai_served
from tests.vlm.browser import browser, tab  # noqa: F401 - fixtures
from tests.vlm.helpers import CLASSES, Pictured
from tests.vlm.overviews import page_server, running_page  # noqa: F401 - fixtures
from tests.vlm.raw import Raw, talking
from tests.vlm.services import Service, opened
from tests.vlm.serving import Server, listening, served
from vlm import nano
from vlm.inputs import ImageRule, datum, image_chunk, model_input
from vlm.local.clients import LocalSamplingClient, LocalTrainingClient
from vlm.local.registry import LocalServiceClient
from vlm.prompts import Prompt


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServiceClient]:
    client = LocalServiceClient(tmp_path_factory.mktemp("state"))
    yield client
    client.close()


@pytest.fixture
def client(service: LocalServiceClient) -> LocalTrainingClient:
    return service.create_lora_training_client(nano.NAME, rank=4, seed=7).result()


@pytest.fixture(scope="session")
def rule() -> ImageRule:
    return ImageRule.from_pretrained(nano.NAME)


@pytest.fixture(scope="session")
def sampler(service: LocalServiceClient) -> LocalSamplingClient:
    """Of the nano model as it is."""
    return service.create_sampling_client(base_model=nano.NAME).result()


@pytest.fixture(scope="session")
def prompt(service: LocalServiceClient, rule: ImageRule) -> Prompt:
    tokenizer = service.create_sampling_client(base_model=nano.NAME).result().get_tokenizer()
    return Prompt(tokenizer, rule, CLASSES)


@pytest.fixture(scope="session")
def tokenizer(prompt: Prompt) -> Any:
    return prompt.tokenizer


@pytest.fixture(scope="session")
def examples(make_image: Callable[..., bytes]) -> list[Pictured]:
    """Six classes of images of three sizes, two each."""
    sizes = [(64, 64), (96, 64), (64, 128)]
    return [Pictured(make_image(n, *sizes[n % 3], format="JPEG"), n % len(CLASSES)) for n in range(12)]


@pytest.fixture(scope="session")
def chunks(examples: list[Pictured], rule: ImageRule) -> list[types.ImageChunk]:
    return [image_chunk(each.image, rule) for each in examples]


@pytest.fixture(scope="session")
def prompts(prompt: Prompt, examples: list[Pictured], rule: ImageRule) -> list[tinker.ModelInput]:
    """Questions about images of three sizes, one about two images, one about none."""
    encode = prompt.tokenizer.encode
    first, second = (image_chunk(e.image, rule) for e in examples[:2])
    two = model_input(first, encode("<|vision_end|> or <|vision_start|>"), second, encode("Which one?"))
    return [*(prompt.question(e.image) for e in examples[:3]), two, model_input(encode("Once upon a"))]


@pytest.fixture
def mixed(prompt: Prompt, examples: list[Pictured], rule: ImageRule) -> list[tinker.Datum]:
    """Datums of different lengths and image sizes, one of them with two images and one without any."""
    encode = prompt.tokenizer.encode
    first, second = (image_chunk(e.image, rule) for e in examples[1:3])
    two = model_input(encode("one <|vision_start|>"), first, encode("<|vision_end|> two "), second, encode(" same?"))
    text = datum(model_input(encode("The capital of France is")), encode(" Paris\n"))
    return [prompt.datum(examples[0].image, 0), datum(two, encode(" no\n")), text, prompt.datum(examples[2].image, 4)]


OVER_RANKS = pytest.param("ranks", marks=[pytest.mark.ranks, pytest.mark.slow])


@pytest.fixture(scope="module", params=["local", "http", OVER_RANKS])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The engine in this process, the SDK on a server, and the engine over two ranks that divide the weights."""
    with opened(request.param, tmp_path_factory.mktemp(request.param)) as service:
        yield service


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with served(tmp_path_factory.mktemp("state")) as server:
        yield server


@pytest.fixture(scope="module")
def raw(server: Server) -> Iterator[Raw]:
    with talking(server.address) as raw:
        yield raw


@pytest.fixture(scope="module")
def models(service: LocalServiceClient) -> openai_served.Models:
    """What the OpenAI-compatible endpoints serve, and what was asked of it."""
    return openai_served.Models(service)


@pytest.fixture(scope="module")
def address(models: openai_served.Models) -> Iterator[str]:
    with listening(openai_served.application(models)) as address:
        yield address


@pytest.fixture(scope="module")
def api(address: str) -> Iterator[openai.OpenAI]:
    with openai_served.connected(address) as api:
        yield api


@pytest.fixture
def model(stock: Any, rule: ImageRule) -> Any:
    """What `vlm.local.vision.Vision` needs of a model."""
    frozen = copy.deepcopy(stock).requires_grad_(False)
    device = torch.device("cpu")
    return SimpleNamespace(stock=frozen, device=device, rule=rule, name=nano.NAME, timed=lambda _: nullcontext())


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> checkpoints.RandomModel:
    @cache
    def made(kind: str, *, tied: bool) -> Path:
        return checkpoints.random_model(tmp_path_factory.mktemp(kind), kind, tied=tied)

    return made


@pytest.fixture(scope="session")
def stock() -> Any:
    """The nano model by transformers alone: nothing of ours in it."""
    from transformers import Qwen3VLForConditionalGeneration

    return Qwen3VLForConditionalGeneration.from_pretrained(nano.folder()).eval()
