"""The official recipes on text, unmodified, on SmolLM2 by `kshot serve`: `make test-recipe`.

Their data sets are small files of our own in the hub's form, which `datasets` takes from below the working directory.
They know the chat format of a model by its name, so SmolLM2 has the name of one with its own format, ChatML.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.vlm.helpers import needs_smollm2
from tests.vlm.recipes import MARKS, MINUTES, prepared
from tests.vlm.serving import command
from vlm import smollm2

NAME = "Qwen/Qwen3-4B-Instruct-2507"
PACKAGES = "tinker-cookbook[math-rl]==0.6.1"
SAMPLED = "loss_fn=importance_sampling"  # the default, stable_reinforce, is not defined in public
GSM8K = """---
configs:
- config_name: main
  data_files:
  - {split: train, path: train.jsonl}
  - {split: test, path: test.jsonl}
---
"""
SUBJECTS = ["river", "stone", "cloud", "window", "paper", "apple", "winter", "garden", "bread", "silver"]
WORDS = ["blue", "grey", "white", "clear", "thin", "red", "cold", "green", "brown", "bright"]

pytestmark = MARKS


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The environment, with what the recipes on mathematics need besides, SmolLM2's tokenizer, and the data."""
    needs_smollm2()
    folder = prepared(tmp_path_factory)
    python = folder / "venv/bin/python"
    install = [python, "-m", "uv", "pip", "install", "-q", "--python", python, PACKAGES]
    subprocess.run([*install, "--override", folder / "overrides.txt"], check=True, timeout=20 * MINUTES)
    (folder / NAME).mkdir(parents=True, exist_ok=True)
    for file in smollm2.folder().iterdir():
        if file.suffix in (".json", ".jinja"):
            shutil.copy(file, folder / NAME)
    write_data(folder)
    return folder


@pytest.fixture(scope="module")
def address(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with command(tmp_path_factory.mktemp("state"), "--model", f"{NAME}={smollm2.folder()}") as server:
        yield server.address


def write_data(folder: Path) -> None:
    """No Robots, GSM8K and HH-RLHF in form; in content a keeper of few words, and small sums."""
    pairs = [(f"Say one word about a {s}.", f"The keeper says: {w}.") for s, w in zip(SUBJECTS, WORDS, strict=True)]
    turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in pairs]
    chats = [{"prompt": q, "messages": each} for (q, _), each in zip(pairs, turns, strict=True)]
    sums = [(a, b) for a in range(1, 6) for b in range(1, 6)]
    problems = [{"question": f"What is {a} + {b}?", "answer": f"{a} + {b} = {a + b}\n#### {a + b}"} for a, b in sums]
    asked = [(f"\n\nHuman: {q}\n\nAssistant: ", a) for q, a in pairs]
    preferences = [{"chosen": q + a, "rejected": f"{q}I do not know."} for q, a in asked]
    sets = {"HuggingFaceH4/no_robots": chats, "openai/gsm8k": problems, "Anthropic/hh-rlhf": preferences}
    for name, rows in sets.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for split, some in (("train", rows * 5), ("test", rows[:8])):
            (folder / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    (folder / "openai/gsm8k/README.md").write_text(GSM8K)


def run(work: Path, address: str, module: str, log: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    """A recipe's command, in the folder with its model and data."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TINKER_API_KEY": "tml-local", "TINKER_TELEMETRY": "0"}
    environment.pop("PYTHONPATH", None)  # of this checkout, which the recipe knows nothing of
    given = [f"base_url={address}", f"model_name={NAME}", f"log_path={log}", *options]
    return subprocess.run(
        [work / "venv/bin/python", "-m", f"tinker_cookbook.recipes.{module}", *given],
        **{"cwd": work, "env": environment, "capture_output": True, "text": True, "timeout": 60 * MINUTES},
    )


def figures(log: Path, name: str) -> list[float]:
    """A metric of each step that has it, in order."""
    rows: list[dict[str, Any]] = [json.loads(line) for line in (log / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if name in row]


SUPERVISED = ("batch_size=8", "learning_rate=1e-3", "lora_rank=8", "max_steps=3")
FALLS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "sl_loop": ("sl_loop", "train_mean_nll", SUPERVISED),
    "chat_sl": ("chat_sl.train", "train_mean_nll", SUPERVISED),
    "dpo": ("preference.dpo.train", "dpo_loss", ("dataset=hhh", "batch_size=4", "learning_rate=1e-3", "max_steps=2")),
}
REWARDED: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "rl_loop": ("rl_loop", "reward/total", ("batch_size=2", "group_size=4", "max_tokens=24", SAMPLED)),
    "math_rl": ("math_rl.train", "env/all/reward/total", ("groups_per_batch=4", "group_size=4", SAMPLED)),
}


@pytest.mark.parametrize("name", FALLS)
def test_its_loss_falls(name: str, work: Path, address: str, tmp_path: Path) -> None:
    module, metric, options = FALLS[name]
    done = run(work, address, module, tmp_path / "log", *options)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    found = figures(tmp_path / "log", metric)
    print(f"{name}: {metric} {found[0]:.3f} → {found[-1]:.3f}")
    assert found[-1] < 0.95 * found[0]


@pytest.mark.parametrize("name", REWARDED)
def test_it_samples_and_is_rewarded(name: str, work: Path, address: str, tmp_path: Path) -> None:
    """Two steps, which are too few for the reward to rise. SmolLM2 writes no \\boxed{} of itself, so those of rl_loop
    find nothing to prefer; in math_rl a complete answer is worth more than one that is cut off."""
    module, metric, options = REWARDED[name]
    given = ("lora_rank=8", "learning_rate=1e-4", "max_steps=2")
    done = run(work, address, module, tmp_path / "log", *options, *given)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    found = figures(tmp_path / "log", metric)
    print(f"{name}: {metric} {found[0]:.3f} → {found[-1]:.3f}")
    assert len(found) == 2
    if name == "math_rl":
        assert all(norm > 0 for norm in figures(tmp_path / "log", "grad_norm:mean"))


def test_the_loss_without_a_public_definition_says_what_to_use(work: Path, address: str, tmp_path: Path) -> None:
    done = run(work, address, "rl_loop", tmp_path / "log", "batch_size=2", "group_size=2", "max_steps=1")
    assert done.returncode != 0
    assert "stable_reinforce" in done.stderr
    assert "loss_fn=importance_sampling" in done.stderr
