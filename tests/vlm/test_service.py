"""connect: who answers the training API; the nano model's files; batches, and the loop of training on any service."""

import asyncio
import hashlib
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinker
from tinker import types

import vlm
from experiments.pretrain.__main__ import prefix
from kshot.checks import folder_of
from kshot.errors import ModelError, RequestError, UnknownNameError
from tests.vlm import genuine
from tests.vlm.helpers import Pictured
from vlm import models, nano, smollm2
from vlm.classifier import batches, fit, steps
from vlm.local.clients import LocalSamplingClient, LocalTrainingClient
from vlm.local.registry import LocalServiceClient
from vlm.service import check, check_model


def test_connect_says_who_can_be_asked(tmp_path: Path) -> None:
    assert isinstance(vlm.connect("local", state_dir=tmp_path), LocalServiceClient)
    with pytest.raises(UnknownNameError, match="local, tinker, http"):
        vlm.connect("cloud")


@pytest.mark.parametrize("address", ["http://[::1", "http://127.0.0.1:99999", "http://", "ftp://127.0.0.1"])
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(UnknownNameError, match=r"unknown service .* local, tinker, http"):
        check(address)


def test_a_host_that_can_be_none() -> None:
    with pytest.raises(RequestError, match=r"no server answers at http://a\.\.b:9 \("):
        check("http://a..b:9")


@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "http://localhost:9", "http://[::1]:9"])
def test_addresses_are_the_official_client(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TINKER_API_KEY", raising=False)
    client = vlm.connect(address)
    assert isinstance(client, tinker.ServiceClient)


SDK = {
    LocalServiceClient: tinker.ServiceClient,
    LocalTrainingClient: tinker.TrainingClient,
    LocalSamplingClient: tinker.SamplingClient,
}


@pytest.mark.parametrize("ours", SDK)
def test_methods_take_what_the_sdks_take_in_its_order(ours: type) -> None:
    mine = {name: method for name, method in inspect.getmembers(ours, callable) if not name.startswith("_")}
    shared = [name for name in mine if hasattr(SDK[ours], name) and name != "close"]
    assert len(shared) >= 4
    for name in shared:
        theirs = inspect.signature(getattr(SDK[ours], name)).parameters.values()
        parameters = inspect.signature(mine[name]).parameters.values()
        assert [(p.name, p.kind, p.default) for p in parameters] == [(p.name, p.kind, p.default) for p in theirs], name


@pytest.mark.parametrize("ours", SDK)
def test_every_async_method_of_the_sdk_is_there(ours: type) -> None:
    theirs = {name for name in dir(SDK[ours]) if name.endswith("_async") and not name.startswith("_")}
    assert theirs == {name for name in dir(ours) if name.endswith("_async") and not name.startswith("_")}
    assert all(inspect.iscoroutinefunction(getattr(ours, name)) for name in theirs)


def test_async_methods_do_what_their_twins_do(service: LocalServiceClient, mixed: list[tinker.Datum]) -> None:
    """Those of requests give a future once it is made, as the SDK's do; the others give the result."""
    text, params = mixed[2].model_input, types.SamplingParams(max_tokens=4, seed=3)

    async def awaited() -> tuple[Any, ...]:
        run = await service.create_lora_training_client_async(nano.NAME, rank=2, seed=0)
        loss, step = await run.forward_backward_async(mixed, "cross_entropy"), await run.optim_step_async(ADAM)
        metrics = (await loss.result_async()).metrics, (await step).metrics
        path = (await (await run.save_weights_for_sampler_async("twin"))).path
        samplers = await run.save_weights_and_get_sampling_client_async(), await run.create_sampling_client_async(path)
        samples = [written(await each.sample_async(text, 2, params)) for each in samplers]
        assert samples[0] == samples[1]
        assert (await run.get_info_async()).model_name == await samplers[0].get_base_model_async() == nano.NAME
        return *metrics, samples[0], await samplers[0].compute_logprobs_async(text)

    run = service.create_lora_training_client(nano.NAME, rank=2, seed=0).result()
    loss, step = run.forward_backward(mixed, "cross_entropy"), run.optim_step(ADAM)
    sampler = run.save_weights_and_get_sampling_client().result()
    sequences, log_probs = written(sampler.sample(text, 2, params).result()), sampler.compute_logprobs(text).result()
    assert asyncio.run(awaited()) == (loss.result().metrics, step.result().metrics, sequences, log_probs)


def test_a_name_for_a_snapshot_has_no_effect_and_a_warning(service: LocalServiceClient) -> None:
    """The SDK's own words begin in another way and mean the same."""
    run = service.create_lora_training_client(nano.NAME, rank=2, seed=0).result()
    with pytest.warns(DeprecationWarning, match="name of save_weights_and_get_sampling_client has no effect"):
        sampler = run.save_weights_and_get_sampling_client("mine").result()
    assert sampler.get_base_model() == nano.NAME
    assert service.create_rest_client().list_checkpoints(run.model_id).result().checkpoints == []


def test_handles_belong_to_services_that_others_reach(service: LocalServiceClient) -> None:
    sampler = service.create_sampling_client(base_model=nano.NAME).result()
    with pytest.raises(RequestError, match=r"no handle: .*save_weights_for_sampler.*create_sampling_client"):
        sampler.get_sampler_handle()
    with pytest.raises(RequestError, match=r"no sampler of a handle: .*kshot serve"):
        LocalSamplingClient.from_sampler_handle("abc")


def test_nothing_is_reported(service: LocalServiceClient) -> None:
    run = service.create_lora_training_client(nano.NAME, rank=2, seed=0).result()
    for each in (service, run, run.save_weights_and_get_sampling_client().result(), service.create_rest_client()):
        assert each.get_telemetry() is None


def written(response: types.SampleResponse) -> list[tuple[Any, Any]]:
    """Tokens and log-probabilities of samples: each has an id of its own besides."""
    return [(each.tokens, each.logprobs) for each in response.sequences]


def test_a_run_makes_sampling_clients_of_its_own_model_alone(service: LocalServiceClient, tmp_path: Path) -> None:
    run = service.create_lora_training_client(nano.NAME, rank=2, seed=0).result()
    path = run.save_weights_for_sampler("mine").result().path
    assert run.create_sampling_client(path).result().get_base_model() == nano.NAME
    with pytest.raises(ModelError, match="does not exist"):
        run.create_sampling_client(f"{path}-not").result()
    with pytest.raises(RequestError, match="not supported by the local service"):
        run.create_sampling_client(path, record_stability_info=True)
    record = folder_of(service._registry.state, path) / "kshot.json"
    record.write_text(record.read_text().replace(nano.NAME, "kshot/another"))
    with pytest.raises(RequestError, match=r"is of 'kshot/another', this run of .* use the service's"):
        run.create_sampling_client(path).result()


def test_options_that_only_the_hosted_service_has_are_refused(service: LocalServiceClient) -> None:
    client = service.create_lora_training_client(nano.NAME, rank=2, seed=0).result()
    for call in (
        lambda: client.load_state("x", "token"),
        lambda: service.create_sampling_client(base_model=nano.NAME, record_stability_info=True),
    ):
        with pytest.raises(RequestError, match="not supported by the local service"):
            call()


def test_a_closed_service_says_so(tmp_path: Path) -> None:
    service = LocalServiceClient(tmp_path)
    service.close("success").result()
    with pytest.raises(RequestError, match="connect again"):
        service.create_sampling_client(base_model=nano.NAME)


def test_the_service_names_its_models(service: LocalServiceClient) -> None:
    names = [model.model_name for model in service.get_server_capabilities().supported_models]
    assert names == [nano.NAME, smollm2.NAME]


@pytest.mark.parametrize("name", ["kshot/other", "no such", "../x", "/nowhere", "a/b/c", "tests/vlm"])
def test_what_can_be_no_model_is_refused_at_once(name: str) -> None:
    with pytest.raises(UnknownNameError, match=f"unknown model '{name}'"):
        models.check(name)


def test_hub_ids_and_folders_may_be_models(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for name in ("Qwen/Qwen3-VL-2B-Instruct", str(tmp_path), nano.NAME):
        models.check(name)


def test_models_that_are_nowhere_or_without_a_tokenizer_are_named(service: LocalServiceClient, tmp_path: Path) -> None:
    """transformers would make an empty tokenizer, and every prompt with it."""
    with pytest.raises(ModelError, match="nobody/no-such-model"):
        service.create_sampling_client(base_model="nobody/no-such-model").result()
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((nano.folder() / name).read_bytes())
    with pytest.raises(ModelError, match="tokenizer"):
        service.create_sampling_client(base_model=str(tmp_path)).result()


def test_a_folder_in_hub_layout_is_a_model(service: LocalServiceClient) -> None:
    client = service.create_sampling_client(base_model=str(nano.folder())).result()
    assert client.get_tokenizer().decode(client.get_tokenizer().encode("star")) == "star"


def test_a_check_reads_tokenizer_and_image_processor_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoImageProcessor, AutoTokenizer

    read: list[str] = []
    for each in (AutoImageProcessor, AutoTokenizer):

        def watched(*args: Any, real: Any = each.from_pretrained, kind: str = each.__name__, **options: Any) -> Any:
            read.append(kind)
            return real(*args, **options)

        monkeypatch.setattr(each, "from_pretrained", watched)
    check_model(nano.NAME)
    assert sorted(read) == ["AutoImageProcessor", "AutoTokenizer"]


def test_the_nano_configuration_fits_its_tokenizer() -> None:
    from transformers import AutoConfig, AutoTokenizer

    config, tokenizer = AutoConfig.from_pretrained(nano.folder()), AutoTokenizer.from_pretrained(nano.folder())
    assert config.text_config.vocab_size == len(tokenizer) == 4096
    ids = {
        "<|image_pad|>": config.image_token_id,
        "<|video_pad|>": config.video_token_id,
        "<|vision_start|>": config.vision_start_token_id,
        "<|vision_end|>": config.vision_end_token_id,
    }
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in ids} == ids
    assert tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    text = "Naïve café, 日本! 12.5 <|im_start|>"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_nano_weights_are_small_and_those_its_module_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = (nano.folder() / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest()[:12] == nano.REVISION
    assert len(weights) <= 16 * 2**20
    monkeypatch.setattr(nano, "HERE", tmp_path)
    with pytest.raises(ModelError, match="install kshot again"):
        nano.folder()


def test_the_stock_classes_load_the_nano_model_whole() -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model, info = AutoModelForImageTextToText.from_pretrained(nano.folder(), output_loading_info=True)
    assert type(model).__name__ == "Qwen3VLForConditionalGeneration"
    assert not any(info.values()), info
    assert type(AutoProcessor.from_pretrained(nano.folder())).__name__ == "Qwen3VLProcessor"


@genuine.needed
def test_the_nano_tokenizer_is_a_prefix_of_the_genuine_one() -> None:
    whole = json.loads((genuine.FOLDER / "tokenizer.json").read_text(encoding="utf-8"))
    assert prefix(whole, 4096) == json.loads((nano.HERE / "tokenizer.json").read_text(encoding="utf-8"))
    with pytest.raises(ValueError, match="256 bytes"):
        prefix(whole, 100)


def test_batches_are_shuffled_epochs_end_to_end() -> None:
    examples = [Pictured(bytes([n]), n, bytes([n + 100])) for n in range(5)]
    drawn = list(batches(examples, 4, 5, np.random.default_rng(0), hflip=0.5))
    assert [len(batch) for batch in drawn] == [4] * 5
    labels = [label for batch in drawn for _, label in batch]
    assert [sorted(labels[n : n + 5]) for n in range(0, 20, 5)] == [[0, 1, 2, 3, 4]] * 4
    assert len({tuple(labels[n : n + 5]) for n in range(0, 20, 5)}) > 1
    flipped = [image[0] >= 100 for batch in drawn for image, _ in batch]
    assert 0 < sum(flipped) < 20
    assert drawn == list(batches(examples, 4, 5, np.random.default_rng(0), hflip=0.5))
    assert drawn != list(batches(examples, 4, 5, np.random.default_rng(1), hflip=0.5))


def test_images_without_a_mirror_are_never_flipped() -> None:
    examples = [Pictured(b"a", 0), Pictured(b"b", 1)]
    assert {image for batch in batches(examples, 4, 3, np.random.default_rng(0)) for image, _ in batch} == {b"a", b"b"}
    mirrored = [Pictured(b"a", 0, b"c"), Pictured(b"b", 1, b"d")]
    for probability, expected in ((0.0, {b"a", b"b"}), (1.0, {b"c", b"d"})):
        drawn = batches(mirrored, 4, 3, np.random.default_rng(0), hflip=probability)
        assert {image for batch in drawn for image, _ in batch} == expected


ADAM = types.AdamParams(learning_rate=1e-3)


class Diary:
    """A training client, and its futures, by name: it only writes down what it is asked."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def forward_backward(self, data: list[Any], loss_fn: str) -> Any:
        return self._asked(f"{loss_fn} of {data[0]}")

    def optim_step(self, adam: types.AdamParams) -> Any:
        assert adam is ADAM
        return self._asked("step")

    def data(self, count: int) -> Iterator[Any]:
        for number in range(count):
            self.events.append(f"make {number}")
            yield [number]

    def _asked(self, what: str) -> Any:
        self.events.append(what)
        diary = self

        class Answer:
            def result(self) -> str:
                diary.events.append(f"await {what}")
                return what

        return Answer()


def test_both_requests_are_made_before_either_is_awaited_and_the_next_data_meanwhile() -> None:
    diary: Any = Diary()
    assert list(steps(diary, diary.data(2), "ppo", ADAM)) == [("ppo of 0", "step"), ("ppo of 1", "step")]
    first = ["make 0", "ppo of 0", "step", "make 1", "await ppo of 0", "await step"]
    assert diary.events == [*first, "ppo of 1", "step", "await ppo of 1", "await step"]


def test_without_data_or_with_an_unknown_loss_nothing_is_asked() -> None:
    diary: Any = Diary()
    assert list(steps(diary, [], "cross_entropy", ADAM)) == []
    with pytest.raises(UnknownNameError, match="unknown loss 'hinge'; choose from: text, closed-set"):
        fit(diary, [[(b"", 0)]], diary, ADAM, "hinge")
    assert diary.events == []
