"""The page of a real server while the real SDK trains on it: models, runs, checkpoints, and a curve that grows."""

from pathlib import Path

import tinker
from tinker import types

import vlm
from tests.vlm.browser import Tab, needs_chromium
from tests.vlm.serving import served
from vlm import nano

pytestmark = needs_chromium
ADAM = types.AdamParams(learning_rate=1e-3)


def test_the_page_follows_a_training(tmp_path: Path, mixed: list[tinker.Datum], tab: Tab) -> None:
    with served(tmp_path) as server:
        tab.open(server.address)
        assert nano.NAME in tab.text("body")
        client = vlm.connect(server.address).create_lora_training_client(
            nano.NAME, rank=4, seed=0, user_metadata={"name": "<b>pets</b>"}
        )
        training = client.result()
        losses = []
        for steps in (2, 3):
            for _ in range(steps):
                passed, stepped = training.forward_backward(mixed, "cross_entropy"), training.optim_step(ADAM)
                losses.append(passed.result().metrics["loss:sum"] / len(mixed))
                stepped.result()
            tab.ask()
            tab.until(f"document.querySelector('.readout')?.textContent.includes('step {len(losses)} · loss')")
            assert f"{losses[-1]:.3g}" in tab.text(".readout")
        path = training.save_state("here").result().path
        tab.ask()
        tab.until(f"document.body.innerText.includes({path!r})")
        assert "<b>pets</b>" in tab.text("#runs")
