"""Models that compute NaN or infinite numbers: an error that names them, wherever numbers leave."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinker
import torch
from safetensors.torch import load_file
from tinker import types

from kshot.errors import NotFiniteError, RequestError
from tests.vlm.checkpoints import copied, with_weights
from tests.vlm.helpers import OtherService, Pictured, adapter_of
from tests.vlm.raw import PROMPT, Raw, accepted, body_of, sample_of, talking
from tests.vlm.serving import served
from vlm import nano
from vlm.classifier import generate, predict
from vlm.embedding import embed
from vlm.inputs import ImageRule, datum, model_input
from vlm.local.clients import LocalSamplingClient, SamplingRequest
from vlm.local.registry import EngineRegistry, LocalServiceClient
from vlm.prompts import Prompt

LAYER = "model.language_model.layers.1.mlp.down_proj.weight"
TOWER = "model.visual.merger.linear_fc2.weight"
ONE = types.SamplingParams(max_tokens=4, temperature=0.0)


def damaged(folder: Path, name: str, value: float) -> Path:
    """The nano model with one number of a tensor changed."""
    copy = copied(nano.folder(), folder)
    weight = load_file(copy / "model.safetensors")[name]
    weight.view(-1)[5] = value
    with_weights(copy, {name: weight})
    return copy


@pytest.fixture(scope="module", params=[(LAYER, torch.nan), (LAYER, torch.inf), (TOWER, torch.nan)], ids=str)
def broken(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return damaged(tmp_path_factory.mktemp("broken"), *request.param)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServiceClient]:
    made = LocalServiceClient(tmp_path_factory.mktemp("state"))
    yield made
    made.close()


@pytest.fixture
def sampler(client: LocalServiceClient, broken: Path) -> LocalSamplingClient:
    return client.create_sampling_client(base_model=str(broken)).result()


@pytest.fixture
def question(prompt: Prompt, examples: list[Pictured]) -> tinker.ModelInput:
    return prompt.question(examples[0].image)


def test_every_way_out_names_the_model(
    sampler: LocalSamplingClient, broken: Path, prompt: Prompt, examples: list[Pictured], question: tinker.ModelInput
) -> None:
    images = [each.image for each in examples[:2]]
    targets = types.TensorData.from_numpy(np.ones((question.length - 1, 2), np.int64))
    ways: dict[str, Callable[[], Any]] = {
        "scores": lambda: predict(sampler, images, prompt),
        "likelihoods": lambda: predict(sampler, images, prompt, "likelihood"),
        "scores elsewhere": lambda: predict(_Remote(sampler), images, prompt),  # type: ignore[arg-type]
        "answers": lambda: generate(sampler, images, prompt),
        "samples": lambda: sampler.sample(question, 2, ONE).result(),
        "drawn": lambda: sampler.sample(question, 2, types.SamplingParams(max_tokens=4, top_k=5, top_p=0.9)).result(),
        "batched": lambda: sampler.start(SamplingRequest(question, ONE)).result(),
        "prompts": lambda: sampler.compute_logprobs(question).result(),
        "top": lambda: sampler.sample(question, 1, ONE, topk_prompt_logprobs=3).result(),
        "targets": lambda: sampler.sample(question, 1, ONE, target_prompt_logprobs=targets).result(),
        "instead": lambda: sampler.sample(question, 1, ONE, prompt_alt_tokens_k=2).result(),
        "features": lambda: embed(sampler, [question], "tower+hidden"),
    }
    for name, way in ways.items():
        with pytest.raises(NotFiniteError, match="not finite") as caught:
            way()
        assert str(broken) in str(caught.value), name
        assert "\n" not in str(caught.value)


class _Remote(OtherService):
    """Another service, which says nothing of NaN."""

    def __init__(self, inner: LocalSamplingClient) -> None:
        self.get_base_model = inner.get_base_model

    def sample(self, prompt: tinker.ModelInput, *_: Any, target_prompt_logprobs: types.TensorData) -> Any:  # type: ignore[override]
        values = np.full(target_prompt_logprobs.shape or (), np.nan, np.float32)
        response = types.SampleResponse(sequences=[], target_prompt_logprobs=types.TensorData.from_numpy(values))
        return type("Done", (), {"result": lambda self: response})()


def test_a_stream_gets_no_token(sampler: LocalSamplingClient, question: tinker.ModelInput) -> None:
    seen: list[Any] = []
    with pytest.raises(NotFiniteError):
        sampler.start(SamplingRequest(question, ONE), seen.append).result()
    assert seen == []


def test_training_changes_nothing(
    client: LocalServiceClient, broken: Path, prompt: Prompt, examples: list[Pictured]
) -> None:
    run = client.create_lora_training_client(str(broken), rank=4, seed=7).result()
    before = {name: tensor.clone() for name, tensor in adapter_of(run).items()}
    data = [prompt.datum(each.image, each.label) for each in examples[:2]]
    for call in (run.forward, run.forward_backward):
        with pytest.raises(NotFiniteError, match="log-probabilities that are not finite"):
            call(data, "cross_entropy").result()
    with pytest.raises(NotFiniteError):
        run.forward_backward_custom(data, lambda _, log_probs: (log_probs[0].sum(), {})).result()
    with pytest.raises(RequestError, match="without gradients"):
        run.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter_of(run).items())


def test_a_loss_without_bounds_is_the_requests_fault(service: LocalServiceClient) -> None:
    run = service.create_lora_training_client(nano.NAME, rank=4, seed=7).result()
    plain = datum(PROMPT, [400, 401])
    length = plain.model_input.length
    fields = {"target_tokens": plain.loss_fn_inputs["target_tokens"], "advantages": np.ones(length, np.float32)}
    data = [tinker.Datum(plain.model_input, {**fields, "logprobs": np.full(length, -1e4, np.float32)})]
    with pytest.raises(RequestError, match="loss 'importance_sampling' is -inf: a ratio"):
        run.forward_backward(data, "importance_sampling").result()
    run.forward_backward([plain], "cross_entropy").result()  # nothing of it was gathered
    assert np.isfinite(run.optim_step(types.AdamParams()).result().metrics["grad_norm:mean"])


def test_one_bad_prompt_fails_alone(
    client: LocalServiceClient, tmp_path: Path, examples: list[Pictured], rule: ImageRule
) -> None:
    """A tower that gives NaN leaves text as it is, also in one batch with an image."""
    folder = str(damaged(tmp_path, TOWER, torch.nan))
    sampler = client.create_sampling_client(base_model=folder).result()
    plain = client.create_sampling_client(base_model=nano.NAME).result()
    text = model_input(plain.get_tokenizer().encode("Once upon a time"))
    longer = SamplingRequest(text, types.SamplingParams(max_tokens=12, temperature=0.0))
    from vlm.inputs import image_chunk

    image = model_input([300], image_chunk(examples[0].image, rule), [301])
    good, bad, last = (sampler.start(each) for each in (longer, SamplingRequest(image, ONE), longer))
    with pytest.raises(NotFiniteError):
        bad.result()
    expected = plain.start(longer).result().sequences[0].tokens
    assert good.result().sequences[0].tokens == last.result().sequences[0].tokens == expected


# On a server


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Raw]:
    state = tmp_path_factory.mktemp("state")
    paths = {"broken": str(damaged(tmp_path_factory.mktemp("broken"), LAYER, torch.nan)), nano.NAME: nano.NAME}
    with served(state, EngineRegistry(state, model_paths=paths)) as server, talking(server.address) as raw:
        yield raw


def test_tinkers_clients_are_told(raw: Raw) -> None:
    run = raw.result(
        "create_model", session_id=raw.session(), model_seq_id=0, base_model="broken", lora_config={"rank": 4}
    )
    passed = accepted(raw.forward(body_of(run["model_id"], 1)))
    sampled = raw.submit(
        "asample", **sample_of(PROMPT, max_tokens=1) | {"base_model": "broken", "prompt_logprobs": True}
    )
    for request_id in (passed, sampled):
        answer = raw.answer(request_id)
        assert answer["category"] == "user"
        assert answer["error"].startswith("model broken ")
        assert "gives log-probabilities that are not finite (NaN or Inf);" in answer["error"]
    assert run["model_id"] in raw.answer(passed)["error"]


@pytest.mark.parametrize(
    "more", [{}, {"stream": True}, {"structured_outputs": {"choice": ["a", "b"]}}, {"logprobs": True}]
)
def test_openais_clients_are_told(raw: Raw, more: dict[str, Any]) -> None:
    body = {"model": "broken", "messages": [{"role": "user", "content": "hello"}], **more}
    answer = raw.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 422
    error = answer.json()["error"]
    assert "model broken gives" in error["message"]
    assert (error["type"], error["param"]) == ("invalid_request_error", "model")
    if not more:
        body = {"model": "broken", "prompt": "hello", "echo": True, "logprobs": 2}
        assert raw.http.post("/v1/completions", json=body).status_code == 422


def test_an_adapter_that_went_wrong_is_found_when_it_is_used(
    raw: Raw, client: LocalServiceClient, tmp_path: Path
) -> None:
    run = client.create_lora_training_client(nano.NAME, rank=4, seed=7).result()
    next(iter(adapter_of(run).values())).view(-1)[0] = torch.nan
    with pytest.raises(RequestError, match="would hold weights that are not finite"):
        run.save_state("broken").result()
    sampler = run.save_weights_and_get_sampling_client().result()
    with pytest.raises(NotFiniteError, match=nano.NAME):
        sampler.sample(PROMPT, 1, ONE).result()


HELLO = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
CHOICE = {"structured_outputs": {"choice": ["a", "b", "crocodile head"]}, "max_tokens": 12}
OPENAI = {
    "top": ("completions", {"prompt": "hello", "logprobs": 20, "max_tokens": 3}),
    "echo": ("completions", {"prompt": "hello", "logprobs": 20, "echo": True, "max_tokens": 0}),
    "chat": ("chat/completions", {**HELLO, "logprobs": True, "top_logprobs": 20}),
    "stream": ("chat/completions", {**HELLO, "logprobs": True, "top_logprobs": 20, "stream": True}),
    "choice": ("chat/completions", {**HELLO, **CHOICE}),
    "choices": ("chat/completions", {**HELLO, **CHOICE, "stream": True}),
    "response": ("responses", {"input": "hello", "max_output_tokens": 2}),
}


def parsed(text: str) -> Any:
    """JSON by its standard, which has neither NaN nor Infinity."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def strict_answers(raw: Raw, model: str) -> dict[str, int]:
    """The status of each way through the OpenAI API, once all that it answers is JSON and errors name the model."""
    statuses = dict[str, int]()
    for name, (path, body) in OPENAI.items():
        answer = raw.http.post(f"/v1/{path}", json={"model": model, "temperature": 0, **body})
        lines = [line for line in answer.text.splitlines() if line.startswith("data: {")]
        for each in [line.removeprefix("data: ") for line in lines] or [answer.text]:
            error = parsed(each).get("error")
            assert not error or "gives" in error["message"], (name, each)
            assert not error or model in error["message"]
        statuses[name] = answer.status_code
    return statuses


def test_a_run_whose_steps_went_too_far_is_named_and_all_answers_are_json(raw: Raw) -> None:
    run = raw.run(session := raw.session())
    raw.output(accepted(raw.pass_of(run, 1)))
    raw.answer(accepted(raw.step(run, 2, 1e30)))
    passed = raw.answer(accepted(raw.pass_of(run, 3)))
    assert f"with run {run} gives" in passed["error"]
    saved = raw.result("save_weights_for_sampler", model_id=run, seq_id=4, path="b")["path"]
    assert set(strict_answers(raw, saved).values()) == {422}
    raw.result("save_weights_for_sampler", model_id=run, seq_id=5, sampling_session_seq_id=0)
    body = sample_of(PROMPT, max_tokens=2) | {"base_model": None, "seq_id": 1}
    answer = raw.answer(raw.submit("asample", **body, sampling_session_id=f"{session}:sample:0"))
    assert f"with run {run} gives log-probabilities that are not finite" in answer["error"]
    for name in ("overview", "training_runs", "checkpoints"):
        parsed(raw.get(name).text)


def test_log_probabilities_of_minus_infinity_are_told_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits are numbers, and their differences are not: what is likeliest has a log-probability, all others none."""
    with served(tmp_path) as server, talking(server.address) as raw:
        text = server.state.registry.engine(nano.NAME).model.text
        logits = text.logits

        def far_apart(*args: Any) -> torch.Tensor:
            values = logits(*args)
            return torch.where(values == values.amax(-1, keepdim=True), 3e38, -3e38)

        monkeypatch.setattr(text, "logits", far_apart)
        statuses = strict_answers(raw, nano.NAME)
        assert {name: status for name, status in statuses.items() if status != 422} == {"response": 200}
        ways: list[dict[str, Any]] = [{"prompt_logprobs": True}, {"topk_prompt_logprobs": 9}]
        ways += [{"target_prompt_logprobs": {"data": [0, 1, 2, 3], "dtype": "int64", "shape": [2, 2]}}]
        for way in [*ways, {"topk_sample_logprobs": 9}]:
            answer = raw.answer(raw.submit("asample", **sample_of(PROMPT, max_tokens=2, temperature=0.0) | way))
            assert "gives log-probabilities that are not finite" in answer["error"]
        raw.sampled(raw.submit("asample", **sample_of(PROMPT, max_tokens=2, temperature=0.0)))


@pytest.mark.parametrize("number", [np.inf, np.nan, 2.5, 1.0])
def test_targets_that_are_no_tokens_are_refused_by_name(raw: Raw, number: float) -> None:
    targets = {"data": [number, 1.0], "dtype": "float32", "shape": [2, 1]}
    body = sample_of(PROMPT, max_tokens=1) | {"target_prompt_logprobs": targets}
    answer = raw.http.post("/api/v1/asample", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert "target_prompt_logprobs holds float32 numbers" in raw.answer(accepted(answer))["error"]
