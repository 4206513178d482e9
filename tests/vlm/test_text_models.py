"""Text models of every family, tiny and random: training, sampling, scores and files against transformers and PEFT."""

import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinker
import torch
from peft import AutoPeftModel, AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from tinker import types
from transformers import AutoModelForCausalLM

from kshot.checks import folder_of
from kshot.errors import ModelError, RequestError
from tests.vlm import brute_force
from tests.vlm.checkpoints import TEXTS, copied, text_model, with_config
from tests.vlm.helpers import (
    adapter_of,
    assert_gradients_equal,
    disturb,
    greedy,
    logits_of,
    plain_loss,
    plain_peft,
    stock_logits,
)
from tests.vlm.services import step, stock_log_probs
from tests.vlm.test_losses import published
from vlm import nano
from vlm.inputs import datum, model_input
from vlm.local.clients import LocalSamplingClient, LocalTrainingClient
from vlm.local.exchange.export import export
from vlm.local.model import placement
from vlm.local.model.load import check, load, load_tokenizer
from vlm.local.registry import LocalServiceClient
from vlm.scoring import score_choices

ADAM = types.AdamParams(learning_rate=1e-2, eps=1e-8)
NO_RULE: Any = None  # no image is ever cut
FLAGS: dict[str, dict[str, bool]] = {
    "all": {},
    "attention": {"train_mlp": False, "train_unembed": False},
    "mlp": {"train_attn": False, "train_unembed": False},
    "head": {"train_attn": False, "train_mlp": False},
}


@dataclass(frozen=True)
class Side:
    """A model of ours, and the same by transformers alone."""

    service: LocalServiceClient
    folder: Path
    state: Path
    stock: Any

    def start(self, rank: int = 4, seed: int = 3, **flags: bool) -> LocalTrainingClient:
        client = self.service.create_lora_training_client(str(self.folder), rank=rank, seed=seed, **flags).result()
        disturb(client, seed)
        return client

    def base(self) -> LocalSamplingClient:
        return self.service.create_sampling_client(base_model=str(self.folder)).result()


@pytest.fixture(scope="module", params=TEXTS)
def side(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Side]:
    folder, state = text_model(tmp_path_factory.mktemp(request.param), request.param), tmp_path_factory.mktemp("state")
    service = LocalServiceClient(state)
    yield Side(service, folder, state, AutoModelForCausalLM.from_pretrained(folder).eval())
    service.close()


def tokens(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(1, 4000, count).tolist()


@pytest.fixture(scope="module")
def texts() -> list[tinker.ModelInput]:
    """Longer and shorter than what the scaled rotary embeddings begin from."""
    return [model_input(tokens(count, count)) for count in (7, 90, 30, 31)]


@pytest.fixture(scope="module")
def data(texts: list[tinker.ModelInput]) -> list[tinker.Datum]:
    return [datum(text, tokens(5, n)) for n, text in enumerate(texts)]


def params(length: int = 8, **options: Any) -> types.SamplingParams:
    return types.SamplingParams(max_tokens=length, temperature=0.0, stop=[], **options)


@pytest.mark.parametrize("flags", FLAGS)
def test_loss_and_gradients_equal_stock_peft(side: Side, data: list[tinker.Datum], flags: str) -> None:
    client = side.start(**FLAGS[flags])
    plain = plain_peft(client, side.stock)
    expected = plain_loss(plain, data, NO_RULE)
    expected.backward()
    got = client.forward_backward(data, "cross_entropy").result().metrics["loss:sum"]
    assert got == pytest.approx(expected.item(), rel=1e-5)
    assert_gradients_equal(client, plain)
    assert not any(".mlp.gate." in name for name in adapter_of(client))  # the router


def test_a_loss_of_ones_own_has_the_gradients_of_stock_peft(side: Side, data: list[tinker.Datum]) -> None:
    def squared(data: list[tinker.Datum], log_probs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        weights = [each.loss_fn_inputs["weights"].to_torch() for each in data]
        return torch.stack([(p * w).sum() for p, w in zip(log_probs, weights, strict=True)]).square().sum(), {}

    client = side.start()
    plain = plain_peft(client, side.stock)
    torch.stack([plain_loss(plain, [each], NO_RULE).square() for each in data]).sum().backward()
    client.forward_backward_custom(data, squared).result()
    assert_gradients_equal(client, plain)


def test_samples_and_log_probs_are_those_of_the_stock_model(side: Side, texts: list[tinker.ModelInput]) -> None:
    sampler = side.base()
    together = sampler.sample_batch(texts, params())
    for text, response in zip(texts, together, strict=True):
        ids = torch.tensor(text.to_ints())
        assert response.sequences[0].tokens == greedy(side.stock, text, NO_RULE, 8)
        assert sampler.sample(text, 1, params()).result().sequences[0].tokens == response.sequences[0].tokens
        expected = stock_log_probs(side.stock, text, NO_RULE)[:-1]
        own = sampler.compute_logprobs(text).result()
        assert own[0] is None
        assert own[1:] == pytest.approx(expected.gather(1, ids[1:, None])[:, 0].tolist(), abs=1e-4)
        some = torch.tensor(tokens(3, 0)).expand(len(ids) - 1, 3).contiguous()
        wanted = types.TensorData.from_torch(some)
        asked = sampler.sample(text, 1, params(1), topk_prompt_logprobs=4, target_prompt_logprobs=wanted).result()
        assert asked.target_prompt_logprobs.to_numpy() == pytest.approx(expected.gather(1, some).numpy(), abs=1e-4)
        assert asked.topk_prompt_logprobs_np.logprobs[1:] == pytest.approx(expected.topk(4).values.numpy(), abs=1e-4)


def test_scores_equal_each_choices_own_forward_pass(side: Side, texts: list[tinker.ModelInput]) -> None:
    choices: Sequence[Sequence[int]] = [[5, 6, 9], [5, 7, 9], [5, 7, 8, 9], [11, 9], [12, 5, 6, 9]]
    sampler = side.base()
    for method in ("constrained", "likelihood"):
        got = score_choices(sampler, texts, choices, method)
        for row, text in zip(got, texts, strict=True):
            expected = brute_force.scores(side.stock, text, choices, NO_RULE, -1)
            assert row == pytest.approx(expected[method], abs=1e-4)


@pytest.mark.filterwarnings("ignore")  # of PEFT, of tied heads and of what it calls in transformers
def test_saved_is_reloaded_is_merged_is_stock_peft(
    side: Side, data: list[tinker.Datum], texts: list[tinker.ModelInput], tmp_path: Path
) -> None:
    client = side.start()
    step(client, data, ADAM)
    path = client.save_state("x").result().path
    after = [step(client, data, ADAM) for _ in range(2)]
    resumed = side.service.create_training_client_from_state_with_optimizer(path).result()
    assert [step(resumed, data, ADAM) for _ in range(2)] == after
    sampler, folder = side.service.create_sampling_client(model_path=path).result(), folder_of(side.state, path)
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(side.folder), folder).eval()
    by_itself = [loader.from_pretrained(folder).eval() for loader in (AutoPeftModel, AutoPeftModelForCausalLM)]
    proof = export(folder, tmp_path / "merged", "merged")
    export(folder, tmp_path / "peft", "peft")
    assert (proof.prompts, proof.use) == (3, "")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    apart = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(side.folder), tmp_path / "peft").eval()
    for text in texts:
        expected = logits_of(sampler, text)
        assert (expected - stock_logits(side.stock, text, NO_RULE)).abs().max() > 0.1
        for model in (peft, *by_itself, merged, apart):
            assert stock_logits(model, text, NO_RULE).sub(expected).abs().max() < 1e-3


def test_two_interleaved_runs_and_a_mixed_batch_equal_each_alone(side: Side, data: list[tinker.Datum]) -> None:
    alone = [[step(client, data[n : n + 2], ADAM) for n in range(3)] for client in (side.start(2), side.start(8))]
    a, b = side.start(2), side.start(8)
    mingled = [(step(a, data[n : n + 2], ADAM), step(b, data[n : n + 2], ADAM)) for n in range(3)]
    assert [list(losses) for losses in zip(*mingled, strict=True)] == alone
    together = a.forward(data, "cross_entropy").result().loss_fn_outputs
    for each, output in zip(data, together, strict=True):
        (single,) = a.forward([each], "cross_entropy").result().loss_fn_outputs
        assert output["logprobs"].to_numpy() == pytest.approx(single["logprobs"].to_numpy(), abs=1e-4)


def test_an_adapter_that_peft_wrote(side: Side, texts: list[tinker.ModelInput], tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "o_proj", "down_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(side.folder), config).eval()
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(tmp_path / "adapter")
    sampler = side.service.create_sampling_client_from_folder(tmp_path / "adapter").result()
    for text in texts:
        assert (logits_of(sampler, text) - stock_logits(model, text, NO_RULE)).abs().max() < 1e-3


def test_losses_know_no_families(side: Side, data: list[tinker.Datum]) -> None:
    client, rng = side.start(), np.random.default_rng(0)
    now = [each["logprobs"].to_numpy() for each in client.forward(data, "cross_entropy").result().loss_fn_outputs]
    for name, config in (("importance_sampling", {}), ("ppo", {}), ("cispo", {}), ("dro", {"beta": 0.05})):
        expected, given = 0.0, list[tinker.Datum]()
        for each, values in zip(data, now, strict=True):
            weights = each.loss_fn_inputs["weights"].to_numpy()
            fields = {"logprobs": values + 0.3 * weights, "advantages": rng.normal(size=len(values)) * weights}
            fields = {key: value.astype(np.float32) for key, value in fields.items()}
            expected += published(name, values.astype(np.float64), fields, config, values)
            inputs = {key: tinker.TensorData.from_numpy(value) for key, value in fields.items()}
            given.append(
                tinker.Datum(each.model_input, {**inputs, "target_tokens": each.loss_fn_inputs["target_tokens"]})
            )
        got = client.forward_backward(given, name, config).result().metrics["loss:sum"]
        assert got == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_in_bfloat16_it_trains_and_samples(side: Side, data: list[tinker.Datum], tmp_path: Path) -> None:
    service = LocalServiceClient(tmp_path, dtype=torch.bfloat16)
    client = service.create_lora_training_client(str(side.folder), rank=4, seed=0).result()
    losses = [step(client, data, ADAM) for _ in range(4)]
    full = plain_loss(side.stock, data, NO_RULE).item()
    assert losses[0] == pytest.approx(full, rel=0.03)
    assert losses[-1] < 0.9 * losses[0]
    sampler = client.save_weights_and_get_sampling_client().result()
    assert len(sampler.sample(data[0].model_input, 1, params(4)).result().sequences[0].tokens) == 4
    service.close()


# What holds of a text model whatever its family


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_model(tmp_path_factory.mktemp("llama"), "llama")


Refuse = Callable[..., str]


@pytest.fixture
def refused(llama: Path, tmp_path: Path) -> Refuse:
    """What is said, in one line, of the model with other entries in its configuration."""

    def make(**change: object) -> str:
        folder = copied(llama, tmp_path)
        with_config(folder, **change)
        with pytest.raises(ModelError, match=str(folder)) as caught:
            check(str(folder))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return make


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"vocab_size": 100},
            "has another model's tokenizer beside its weights (of 4,070 tokens, where the model",
        ),
        ({"eos_token_id": 7}, "has another model's tokenizer beside its weights (7 ends the model's texts, and is"),
        ({"eos_token_id": [4072, 128009]}, "128009 ends the model's texts, and is None there"),
    ],
)
def test_what_is_not_computed_is_refused(refused: Refuse, change: dict[str, object], words: str) -> None:
    assert words in refused(**change)


def test_float16_is_read_as_another_type_and_said(
    llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    AutoModelForCausalLM.from_pretrained(llama).half().save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        model = load(str(tmp_path))
    assert model.dtype == torch.float32
    assert caplog.messages == [
        f"model {tmp_path} is in float16, and is read as float32: nothing is trained in float16 here"
    ]
    assert load(str(tmp_path), dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(ModelError, match="nothing is trained in float16 here; give dtype='bfloat16'"):
        load(str(llama), dtype=torch.float16)


def test_an_empty_tokenizer_is_refused_though_it_begins_texts(llama: Path, tmp_path: Path) -> None:
    folder = copied(llama, tmp_path)
    (folder / "tokenizer.json").unlink()
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=r"has no tokenizer beside its weights \(tokenizer.json\); copy it there"):
        load_tokenizer(str(folder))


def test_images_are_refused(llama: Path, service: LocalServiceClient, chunks: list[types.ImageChunk]) -> None:
    words = f"model {llama} is a text model and takes no images"
    sampler = service.create_sampling_client(base_model=str(llama)).result()
    client = service.create_lora_training_client(str(llama), rank=2).result()
    asked = model_input(tokens(3, 0), chunks[0], tokens(3, 1))
    with pytest.raises(RequestError, match=words):
        sampler.sample(asked, 1, params()).result()
    with pytest.raises(RequestError, match=words):
        client.forward_backward([datum(asked, [5])], "cross_entropy").result()
    with pytest.raises(RequestError, match=words):
        sampler.encode_images(chunks[:1])
    with pytest.raises(RequestError, match=words):
        _ = sampler.rule
    features = sampler.embed_prompts([model_input(tokens(5, 0))], tower=False, hidden=True)
    assert features.shape == (1, 48)


def test_it_lives_beside_the_nano_model(llama: Path, service: LocalServiceClient) -> None:
    first = [
        service.create_sampling_client(base_model=name).result().sample(model_input(tokens(9, 0)), 1, params()).result()
        for name in (str(llama), nano.NAME, str(llama))
    ]
    assert first[0].sequences[0].tokens == first[2].sequences[0].tokens
    assert first[0].sequences[0].tokens != first[1].sequences[0].tokens


def test_too_little_memory_is_said_before_any_weight_is_read(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "free_bytes", lambda device: 1_000_000)
    with pytest.raises(ModelError, match=r"needs 0.0 GB for its weights in float32, but free are 0.0 GB on cpu"):
        load(str(llama))


def test_the_map_covers_every_weight(side: Side) -> None:
    from vlm.local.model.families import family_of

    family, devices = family_of(side.stock), [torch.device("cuda", n) for n in range(3)]
    tensors = placement.stored_tensors("m", side.folder)
    tied = side.stock.config.tie_word_embeddings
    size = placement.sizes(tensors, 2, tied, torch.float32, family)
    assert sum(size) == 4 * sum(parameter.numel() for parameter in side.stock.parameters())
    assert min(size[:-1]) > 0
    places = placement.device_map("m", torch.float32, [1] * 4, tied, devices, [9, 9, 9], family)
    names = [n for n, _ in (*side.stock.named_parameters(remove_duplicate=False), *side.stock.named_buffers())]
    assert all(any(name.startswith(f"{module}.") for module in places) for name in names)


def test_a_gguf_file_is_refused_by_name(llama: Path, tmp_path: Path) -> None:
    folder = copied(llama, tmp_path)
    (folder / "model.safetensors").rename(folder / "model.gguf")
    for name in (folder, folder / "model.gguf"):
        with pytest.raises(ModelError, match=r"GGUF.*; kshot reads safetensors in hub layout alone: give"):
            check(str(name))
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match="is a GGUF file, or a folder of one"):
        check(str(folder))


def test_the_configuration_of_a_saved_adapter_names_the_class(side: Side) -> None:
    client = side.start()
    written = json.loads(
        (folder_of(side.state, client.save_state("c").result().path) / "adapter_config.json").read_text()
    )
    assert written["auto_mapping"]["base_model_class"] == type(side.stock).__name__
