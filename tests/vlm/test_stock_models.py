"""Models without a row of their own, tiny and random, by the stock forward: against transformers and PEFT alone."""

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import tinker
import torch
import transformers
from peft import LoraConfig, get_peft_model

from kshot.errors import ModelError
from tests.vlm.checkpoints import STOCKS, UNPACKED, copied, text_model, with_config
from tests.vlm.helpers import adapter_of, disturb, logits_of, stock_logits, taken
from tests.vlm.test_text_models import (  # noqa: F401 - what holds of every text model holds of these
    NO_RULE,
    Side,
    data,
    params,
    test_in_bfloat16_it_trains_and_samples,
    test_loss_and_gradients_equal_stock_peft,
    test_losses_know_no_families,
    test_samples_and_log_probs_are_those_of_the_stock_model,
    test_saved_is_reloaded_is_merged_is_stock_peft,
    test_scores_equal_each_choices_own_forward_pass,
    test_the_configuration_of_a_saved_adapter_names_the_class,
    test_two_interleaved_runs_and_a_mixed_batch_equal_each_alone,
    texts,
    tokens,
)
from vlm.inputs import model_input
from vlm.local.clients import SamplingRequest
from vlm.local.model import stock
from vlm.local.model.load import check
from vlm.local.registry import LocalServiceClient
from vlm.scoring import score_choices


@pytest.fixture(scope="module", params=STOCKS)
def side(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Side]:
    folder, state = text_model(tmp_path_factory.mktemp(request.param), request.param), tmp_path_factory.mktemp("state")
    service = LocalServiceClient(state)
    yield Side(service, folder, state, transformers.AutoModelForCausalLM.from_pretrained(folder).eval())
    service.close()


@pytest.mark.parametrize("kind", UNPACKED)
def test_what_the_packed_way_does_not_compute_goes_the_stock_way(
    kind: str,
    texts: list[tinker.ModelInput],  # noqa: F811
    data: list[tinker.Datum],  # noqa: F811
    tmp_path: Path,
) -> None:
    service, plain = LocalServiceClient(tmp_path / "state"), transformers.AutoModelForCausalLM
    (tmp_path / "model").mkdir()
    folder = text_model(tmp_path / "model", kind)
    unpacked = Side(service, folder, tmp_path / "state", plain.from_pretrained(folder).eval())
    assert isinstance(unpacked.base()._engine.model.text, stock.StockText)
    for flags in ("all", "mlp"):
        test_loss_and_gradients_equal_stock_peft(unpacked, data[1:3], flags)
    test_samples_and_log_probs_are_those_of_the_stock_model(unpacked, texts[1:3])
    test_scores_equal_each_choices_own_forward_pass(unpacked, texts[1:3])
    service.close()


def test_angles_that_turn_with_the_length_of_a_text_turn_in_the_cache_too(tmp_path: Path) -> None:
    folder = text_model(tmp_path, "long angles")
    service, plain = LocalServiceClient(tmp_path / "state"), transformers.AutoModelForCausalLM.from_pretrained(folder)
    sampler = service.create_sampling_client(base_model=str(folder)).result()

    def log_probs(ids: list[int]) -> torch.Tensor:
        """What follows these, by a pass of its own."""
        with torch.inference_mode():
            return plain.eval()(torch.tensor([ids])).logits[0, -1].log_softmax(-1)

    prompts = [tokens(length, length) for length in (62, 63, 64, 65)]  # the angles turn behind 64
    written = sampler.sample_batch([model_input(prompt) for prompt in prompts], params(6))
    for prompt, response in zip(prompts, written, strict=True):
        for token in response.sequences[0].tokens:
            assert token == int(log_probs(prompt).argmax())
            prompt = [*prompt, token]
    choices = [[5, 6, 9], [5, 7, 9], [5, 7, 8, 9], [11, 9]]
    scores = score_choices(sampler, [model_input(prompt) for prompt in prompts], choices, "likelihood")
    for prompt, row in zip(prompts, scores, strict=True):
        steps = [[log_probs([*prompt, *each[:n]])[token] for n, token in enumerate(each)] for each in choices]
        assert row == pytest.approx([float(sum(each)) for each in steps], abs=1e-4)
    service.close()


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_model(tmp_path_factory.mktemp("deepseek"), "deepseek_v3")


def test_lora_covers_latent_attention_and_shared_experts_and_never_the_router(deepseek: Path, tmp_path: Path) -> None:
    covered = {
        "train_attn": {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"},
        "train_mlp": {"gate_proj", "up_proj", "down_proj", "experts", "base_layer"},
        "train_unembed": {"lm_head"},
    }
    service = LocalServiceClient(tmp_path)
    for flag, expected in covered.items():
        only = {each: each == flag for each in covered}
        client = service.create_lora_training_client(str(deepseek), rank=2, **only).result()
        layers = {name.partition(".lora_")[0] for name in adapter_of(client)}
        assert {layer.rpartition(".")[2] for layer in layers} == expected
        assert any(".shared_experts." in layer for layer in layers) == (flag == "train_mlp")
    service.close()


def test_kimi_k2_is_read_as_deepseek_v3(deepseek: Path, data: list[tinker.Datum], tmp_path: Path) -> None:  # noqa: F811
    kimi = copied(deepseek, tmp_path)
    with_config(
        kimi, model_type="kimi_k2", auto_map={"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"}
    )
    service = LocalServiceClient(tmp_path / "state")
    runs = [service.create_lora_training_client(str(each), rank=2, seed=1).result() for each in (deepseek, kimi)]
    gradients = []
    for run in runs:
        disturb(run)
        run.forward_backward(data, "cross_entropy").result()
        gradients.append(taken(run))
    assert gradients[0].keys() == gradients[1].keys()
    assert all(gradients[1][name].equal(gradient) for name, gradient in gradients[0].items())
    assert runs[1].get_info().model_data.arch == "deepseek_v3"
    service.close()


def test_branches_one_by_one_are_those_side_by_side(
    side: Side,
    texts: list[tinker.ModelInput],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    choices, sampler = [[5, 6, 9], [5, 7, 9], [5, 7, 8, 9], [11, 9], [12, 5, 6, 9]], side.base()
    together = score_choices(sampler, texts, choices, "likelihood")
    monkeypatch.setattr(stock, "BRANCHED", 1)
    assert score_choices(sampler, texts, choices, "likelihood") == pytest.approx(together, abs=1e-4)


@pytest.mark.parametrize(
    ("kind", "modules"),
    [
        ("deepseek_v3", ["q_a_proj", "kv_a_proj_with_mqa", "o_proj"]),
        ("qwen3_5_text", ["q_proj", "in_proj_qkv", "out_proj", "down_proj"]),
    ],
)
def test_an_adapter_that_peft_wrote(
    kind: str,
    modules: list[str],
    texts: list[tinker.ModelInput],  # noqa: F811
    tmp_path: Path,
) -> None:
    (tmp_path / kind).mkdir()
    folder = text_model(tmp_path / kind, kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(r=3, lora_alpha=7, target_modules=modules, task_type="CAUSAL_LM")
        model = get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(folder), config).eval()
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(tmp_path / "adapter")
    service = LocalServiceClient(tmp_path / "state")
    sampler = service.create_sampling_client_from_folder(tmp_path / "adapter").result()
    for text in texts:
        assert (logits_of(sampler, text) - stock_logits(model, text, NO_RULE)).abs().max() < 1e-3
    service.close()


def test_a_pass_gives_way_between_layers_to_another_adapter(side: Side, data: list[tinker.Datum]) -> None:  # noqa: F811
    """Both ways through the layers, a sampler of other weights runs in between, and neither sees the other."""
    client, other, some = side.start(2), side.start(2, seed=5), data[:1]
    client.forward_backward(some, "cross_entropy").result()
    alone = taken(client)
    sampler = other.save_weights_and_get_sampling_client().result()
    prompt, answers = model_input(tokens(9, 1)), list[list[int]]()

    def between() -> None:
        with torch.no_grad():
            answers.append(sampler._sample([SamplingRequest(prompt, params(3))])[0].sequences[0].tokens)

    client._engine.forward_backward(client._run, some, "cross_entropy", None, between_layers=between)
    mingled = taken(client)
    assert all(torch.equal(mingled[name], gradient) for name, gradient in alone.items())
    layers = side.stock.config.num_hidden_layers - 1
    assert answers == [sampler.sample(prompt, 1, params(3)).result().sequences[0].tokens] * 2 * layers


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "own", "auto_map": {"AutoModel": "m.M"}}, "is of type 'own' and needs its own code (auto_map)"),
        ({"model_type": "own"}, "is of type 'own', a decoder for which transformers has no code"),
        ({"model_type": "bert"}, "is of type 'bert', which is no decoder"),
        ({"model_type": "gpt2"}, "is of type 'gpt2', whose layers, norm and head are not told apart"),
        ({"model_type": "gpt_oss"}, "has a GptOssExperts at model.layers.0.mlp.experts, on which LoRA cannot sit"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_line(
    deepseek: Path, tmp_path: Path, change: dict[str, object], words: str
) -> None:
    folder = copied(deepseek, tmp_path)
    with_config(folder, **change)
    with pytest.raises(ModelError) as caught:
        check(str(folder))
    assert words in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
