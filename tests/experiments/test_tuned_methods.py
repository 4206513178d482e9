"""Methods that tune the VLM otherwise than by its answer in text: from a start of supervised steps, by reward, and with
a head on the tuned model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from trained import TINY

from data import catalog
from data.fewshot import k_shot
from experiments.sweep.cells import Job
from experiments.sweep.config import Settings
from experiments.sweep.methods import METHODS, Outcome, Task, base_sampler, connected, fit_lora, prompt_of
from experiments.sweep.store import Results
from vlm import nano
from vlm.embedding import embed_images

SETTINGS = Settings(
    model=nano.NAME, hflip=0.0, views_per_class=3, batch_size=10, rank=2, learning_rate=3e-3, answer_tokens=6
)


@pytest.fixture(scope="module")
def task() -> Task:
    """Digits, one image a class; three steps."""
    digits = catalog.load("digits")
    train = [digits.train[n] for n in k_shot(digits.train, digits.classes, 1, 0)]
    return Task(digits.classes, train, [each.image for each in digits.test[:6]], 0, SETTINGS)


def outcome(task: Task, method: str, **settings: Any) -> Outcome:
    changed = task.settings.model_copy(update=settings)
    return METHODS[method].run(Task(task.classes, task.train, task.test, task.seed, changed))


def test_a_start_of_all_steps_is_training_with_the_loss_text(task: Task) -> None:
    """And a shorter one is neither that nor training without it."""
    text = outcome(task, "vlm-lora").scores
    closed, begun, whole = (
        outcome(task, "vlm-lora", loss="closed-set", loss_power=1.0, start=start).scores for start in (0, 1, 3)
    )
    assert np.array_equal(whole, text)
    assert np.array_equal(outcome(task, "vlm-rl", start=3.0).scores, text)
    assert len({each.tobytes() for each in (text, closed, begun)}) == 3


def test_reward_trains_by_its_seed(task: Task) -> None:
    """From a start of two steps, a distance from the base included: the same again; the base's scores are others."""
    first, again = (outcome(task, "vlm-rl", start=2.0, group_size=3, kl=0.05) for _ in range(2))
    assert np.array_equal(first.scores, again.scores)
    assert first.scores.shape == (6, 10)
    assert np.exp(first.scores).sum(1) == pytest.approx(1.0)
    assert first.answers is not None
    assert not np.array_equal(first.scores, outcome(task, "vlm-rl", start=2.0, group_size=3).scores)


def test_a_head_on_the_tuned_model_reads_its_last_hidden_state(task: Task) -> None:
    found = outcome(task, "vlm-tuned-linear")
    client = connected("local", "cpu").create_lora_training_client(nano.NAME, rank=2, seed=0).result()
    assert len([*fit_lora(client, task)]) == 3
    tuned, prompt = client.save_weights_and_get_sampling_client().result(), prompt_of(client, task)
    states = [embed_images(tuned, images, prompt, "hidden") for images in ([e.image for e in task.train], task.test)]
    head = make_pipeline(StandardScaler(), LogisticRegression(tol=1e-8, max_iter=5000))
    head.fit(states[0], [example.label for example in task.train])
    assert found.scores == pytest.approx(head.predict_log_proba(states[1]), abs=0.1)  # see baselines.heads.linear
    frozen = embed_images(base_sampler("local", "cpu", nano.NAME), task.test, prompt, "hidden")
    assert not np.allclose(frozen, states[1])
    assert {*found.seconds} == {"fit", "predict"}


def test_a_sweep_of_both(photos: Path, tmp_path: Path, kshot: Any, ran: list[Job]) -> None:
    methods = ("--method", "vlm-rl", "--method", "vlm-tuned-linear")
    options = ("--shots", "1", "--seeds", "0", *TINY, "--set", "group_size=2", "--set", "temperature=0.8")
    ended = kshot("sweep", "demo", "--dataset", f"folder:{photos}", *methods, *options, "--out", tmp_path / "out")
    assert ended.status == 0, ended.err
    frame = Results(tmp_path / "out").frame().set_index("method")
    assert frame.loc["vlm-rl", ["group_size", "temperature", "kl", "start"]].tolist() == [2, 0.8, 0, 0]
    assert frame.loc["vlm-tuned-linear", ["loss", "loss_power", "start"]].tolist() == ["text", 0, 0]
    text = (tmp_path / "out" / "report.md").read_text()
    assert "VLM + LoRA by reward" in text
    assert "VLM + LoRA, linear head" in text
