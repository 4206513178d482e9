"""One server with a Qwen3.5, a DeepSeek-V3 and SmolLM2: the SDK trains them all side by side."""

from pathlib import Path

import pytest
from tinker import types

from tests.vlm.checkpoints import seeing_model, text_model
from tests.vlm.helpers import needs_smollm2
from tests.vlm.services import PATIENCE, connected, step
from tests.vlm.serving import served
from vlm import smollm2
from vlm.inputs import datum, model_input
from vlm.local.registry import EngineRegistry

ADAM = types.AdamParams(learning_rate=1e-2)
SEES, READS = "mine/qwen3.5", "mine/deepseek-v3"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    one, other = (tmp_path_factory.mktemp(name) for name in ("sees", "reads"))
    return {SEES: str(seeing_model(one, "qwen3_5")), READS: str(text_model(other, "deepseek_v3"))}


def _train_all(models: dict[str, str], state: Path, chunks: list[types.ImageChunk]) -> None:
    registry = EngineRegistry(state, model_paths=models)
    registry.load()  # which takes SmolLM2 longer than the SDK waits
    with served(state, registry) as server, connected(server.address) as service:
        runs = {name: service.create_lora_training_client(name, rank=2, seed=0).result(PATIENCE) for name in models}
        seen = {name: [chunks[0]] if name == SEES else [] for name in models}
        data = {name: [datum(model_input([5, 6], *seen[name], [7, 8]), [9, 10])] for name in models}
        losses = [[step(run, data[name], ADAM) for name, run in runs.items()] for _ in range(4)]
        assert all(last < first for first, last in zip(losses[0], losses[-1], strict=True))
        for name, run in runs.items():
            sampler = run.save_weights_and_get_sampling_client().result(PATIENCE)
            params = types.SamplingParams(max_tokens=3, temperature=0.0)
            answer = sampler.sample(data[name][0].model_input, 2, params).result(PATIENCE)
            assert answer.sequences[0].tokens == answer.sequences[1].tokens
        assert {name: run.get_info().model_data.arch for name, run in runs.items()} == {
            SEES: "qwen3_5",
            READS: "deepseek_v3",
            **({smollm2.NAME: "llama"} if smollm2.NAME in models else {}),
        }


def test_two_are_trained_side_by_side(models: dict[str, str], tmp_path: Path, chunks: list[types.ImageChunk]) -> None:
    _train_all(models, tmp_path, chunks)


@pytest.mark.slow
def test_with_smollm2_beside_them(models: dict[str, str], tmp_path: Path, chunks: list[types.ImageChunk]) -> None:
    needs_smollm2()
    _train_all({**models, smollm2.NAME: smollm2.NAME}, tmp_path, chunks)
