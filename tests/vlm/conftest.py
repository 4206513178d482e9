"""A local service on the nano model, prompts about small images, and the same model as plain transformers + PEFT."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tinker

from tests.vlm.browser import browser, tab  # noqa: F401 - fixtures
from tests.vlm.helpers import CLASSES, Pictured
from tests.vlm.raw import Raw, talking
from tests.vlm.serving import Server, served
from vlm import nano
from vlm.inputs import ImageRule
from vlm.local.clients import LocalTrainingClient
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
def prompt(service: LocalServiceClient, rule: ImageRule) -> Prompt:
    sampler = service.create_sampling_client(base_model=nano.NAME).result()
    return Prompt(sampler.get_tokenizer(), rule, CLASSES)


@pytest.fixture(scope="session")
def examples(make_image: Callable[..., bytes]) -> list[Pictured]:
    """Six classes of images of three sizes, two each."""
    sizes = [(64, 64), (96, 64), (64, 128)]
    return [Pictured(make_image(n, *sizes[n % 3], format="JPEG"), n % len(CLASSES)) for n in range(12)]


@pytest.fixture
def mixed(prompt: Prompt, examples: list[Pictured], rule: ImageRule) -> list[tinker.Datum]:
    """Datums of different lengths and image sizes, one of them with two images and one without any."""
    from vlm.inputs import datum, image_chunk, model_input

    encode = prompt.tokenizer.encode
    first, second = (image_chunk(e.image, rule) for e in examples[1:3])
    two = model_input(encode("one <|vision_start|>"), first, encode("<|vision_end|> two "), second, encode(" same?"))
    text = datum(model_input(encode("The capital of France is")), encode(" Paris\n"))
    return [prompt.datum(examples[0].image, 0), datum(two, encode(" no\n")), text, prompt.datum(examples[2].image, 4)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with served(tmp_path_factory.mktemp("state")) as server:
        yield server


@pytest.fixture
def raw(server: Server) -> Iterator[Raw]:
    with talking(server.address) as raw:
        yield raw


@pytest.fixture(scope="session")
def stock() -> Any:
    """The nano model by transformers alone: nothing of ours in it."""
    from transformers import Qwen3VLForConditionalGeneration

    return Qwen3VLForConditionalGeneration.from_pretrained(nano.folder()).eval()
