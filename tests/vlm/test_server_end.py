"""What a server does at its end and over days: it stops soon and says nothing that is not so, and nothing grows."""

import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

import httpx
import numpy as np
import pytest
import tinker

import vlm
from kshot.errors import RequestError
from tests.vlm.raw import PROMPT, Raw, accepted, refused, sample_of, talking
from tests.vlm.serving import Server, command, served
from vlm import nano
from vlm.local.scheduler import Scheduler
from vlm.server import runs
from vlm.server import state as server_state


def test_a_stop_is_soon_and_no_answer(tmp_path: Path) -> None:
    """What was under way may be asked for anew of the next server, as after a crash."""
    with command(tmp_path) as server:
        with talking(server.address) as raw:
            run = raw.run(raw.session())
            done = accepted(raw.pass_of(run, 1))
            raw.answer(done)
            open_one = raw.submit("asample", **sample_of(PROMPT, max_tokens=4000, stop=[]) | {"num_samples": 64})
            held = accepted(raw.step(run, 9))

            def wait() -> None:
                with suppress(httpx.TransportError):  # the stop may cut it
                    raw.retrieve(open_one)

            waiting = threading.Thread(target=wait)
            waiting.start()
            begun = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            server.process.wait(120)
            waiting.join()
        assert time.monotonic() - begun < 60  # the samples take minutes
    with served(tmp_path) as again, talking(again.address) as raw:
        raw.output(done)
        assert "unknown" in refused(raw.retrieve(open_one), 410)
        assert "unknown" in refused(raw.retrieve(held), 410)


def test_a_pass_that_takes_long_does_not_keep_a_server_from_ending(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_state, "GRACE", 0.5)
    over = threading.Event()
    with served(tmp_path) as server:
        state = server.state
        state.registry.scheduler.submit(over.wait, 600)
        begun = time.monotonic()
    assert time.monotonic() - begun < 300
    assert not state.ended
    over.set()


def test_what_waits_for_a_number_that_never_comes_is_told(server: Server, raw: Raw) -> None:
    run = raw.run(raw.session())
    held = [accepted(raw.pass_of(run, seq)) for seq in (2, 4)]
    server.state.tidy(time.time())
    assert server.state.runs[run].waiting == 2
    loop = server.state.futures._kept[held[0]].answer.get_loop()
    loop.call_soon_threadsafe(server.state.tidy, time.time() + runs.GAP + 1)
    for request_id in held:
        assert f"request 1 of run {run} never came" in raw.answer(request_id)["error"]
    raw.output(accepted(raw.pass_of(run, 5)))


def test_unsaved_weights_of_a_run_are_those_last_asked_for(
    server: Server, raw: Raw, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_state, "UNSAVED", 2)
    run = raw.run(raw.session())
    made = []
    for seq in range(1, 5):
        snapshot = raw.result("save_weights_for_sampler", model_id=run, seq_id=seq, sampling_session_seq_id=seq)
        made.append(snapshot["sampling_session_id"])
    assert list(server.state.samplers.ephemeral) == made[2:]
    body = sample_of(PROMPT, max_tokens=1) | {"base_model": None, "seq_id": 0}
    gone = raw.result("asample", **body, sampling_session_id=made[0])
    assert "were in memory alone and are gone" in gone["error"]
    raw.sampled(raw.submit("asample", **body, sampling_session_id=made[-1]))


def test_a_worker_that_is_never_idle_does_not_grow() -> None:
    worker, more = Scheduler(), threading.Event()

    def again(left: int) -> None:
        if left:
            threading.Thread(target=worker.submit, args=(again, left - 1)).start()
            time.sleep(0.002)  # the next one is there before this one ends
        else:
            more.set()

    worker.submit(again, 200)
    assert more.wait(30)
    assert worker._thread._work_queue.qsize() <= 1
    worker.close()
    with pytest.raises(RequestError, match="connect again"):
        worker.submit(again, 0)


def test_log_probs_at_image_positions_are_what_was_asked_for(
    server: Server, tmp_path: Path, mixed: list[tinker.Datum]
) -> None:
    """None, as the protocol has it, or a number for clients that multiply all of them with weights."""
    prompt = mixed[0].model_input
    log_probs = []
    with served(tmp_path, image_log_probs=0.0) as zero:
        for address in (server.address, zero.address):
            sampler = vlm.connect(address).create_sampling_client(base_model=nano.NAME).result()
            log_probs.append(np.array(sampler.compute_logprobs(prompt).result(), np.float64))
    missing = np.isnan(log_probs[0])
    assert missing.sum() == 1 + prompt.chunks[1].length
    assert np.isnan(log_probs[1][0])
    assert not log_probs[1][1:][missing[1:]].any()
    np.testing.assert_allclose(log_probs[1][~missing], log_probs[0][~missing], atol=1e-5)
