"""What a server does at its end and over days: it stops soon and says nothing that is not so, and nothing grows."""

import signal
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tinker

from kshot.errors import RequestError
from tests.vlm.raw import accepted, refused, sample_of, talking
from tests.vlm.serving import command, served
from vlm import nano
from vlm.inputs import datum, model_input
from vlm.local.scheduler import Scheduler
from vlm.server import guard, runs
from vlm.server import state as server_state

PROMPT = model_input([300, 301, 302])
DATA = [datum(PROMPT, [400, 401])]


def test_a_stop_is_soon_and_no_answer(tmp_path: Path) -> None:
    """What was under way may be asked for anew of the next server, as after a crash."""
    with command(tmp_path) as server:
        with talking(server.address) as raw:
            run = raw.run(raw.session())
            done = accepted(raw.pass_of(run, 1, DATA))
            raw.answer(done)
            asked = sample_of(PROMPT, max_tokens=4000, stop=[]) | {"num_samples": 64}
            open_one = accepted(raw.post("asample", **asked))
            held = accepted(raw.step(run, 9))
            waiting = threading.Thread(target=lambda: raw.retrieve(open_one))
            waiting.start()
            begun = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            server.process.wait(30)
            waiting.join()
        assert time.monotonic() - begun < 4
    with command(tmp_path) as server, talking(server.address) as raw:
        raw.output(done)
        assert "unknown" in refused(raw.retrieve(open_one), 410)
        assert "unknown" in refused(raw.retrieve(held), 410)


def test_a_pass_that_takes_long_does_not_keep_a_server_from_ending(tmp_path: Path) -> None:
    over = threading.Event()
    with served(tmp_path) as server:
        state = server.state
        state.registry.scheduler.submit(over.wait, 60)
        begun = time.monotonic()
    assert time.monotonic() - begun < server_state.GRACE + 4
    assert not state.ended
    over.set()


def test_what_waits_for_a_number_that_never_comes_is_told(tmp_path: Path) -> None:
    with served(tmp_path) as server, talking(server.address) as raw:
        run = raw.run(raw.session())
        held = [accepted(raw.pass_of(run, seq, DATA)) for seq in (2, 4)]
        server.state.tidy(time.time())
        assert server.state.runs[run].waiting == 2
        loop = server.state.futures._answers[held[0]].get_loop()
        loop.call_soon_threadsafe(server.state.tidy, time.time() + runs.GAP + 1)
        for request_id in held:
            assert f"request 1 of run {run} never came" in raw.answer(request_id)["error"]
        raw.output(accepted(raw.pass_of(run, 5, DATA)))


def test_an_export_is_refused_and_the_run_goes_on(tmp_path: Path) -> None:
    with served(tmp_path) as server, talking(server.address) as raw:
        run = raw.run(raw.session())
        said = raw.http.post("/api/v1/save_weights_external", json={"model_id": run, "seq_id": 1, "path": "x"})
        assert "save_weights_external is not offered" in raw.answer(accepted(said))["error"]
        raw.output(accepted(raw.pass_of(run, 2, DATA)))


def test_unsaved_weights_of_a_run_are_those_last_asked_for(tmp_path: Path) -> None:
    with served(tmp_path) as server, talking(server.address) as raw:
        run = raw.run(raw.session())
        made = []
        for seq in range(1, server_state.UNSAVED + 3):
            asked = raw.post("save_weights_for_sampler", model_id=run, seq_id=seq, sampling_session_seq_id=seq)
            made.append(raw.answer(accepted(asked))["sampling_session_id"])
        assert list(server.state.samplers.ephemeral) == made[2:]
        body = sample_of(PROMPT, max_tokens=1) | {"base_model": None, "seq_id": 0}
        gone = raw.answer(accepted(raw.post("asample", **body, sampling_session_id=made[0])))
        assert "were in memory alone and are gone" in gone["error"]
        raw.sampled(accepted(raw.post("asample", **body, sampling_session_id=made[-1])))


def test_a_damaged_checkpoint_does_not_keep_a_server_from_starting(tmp_path: Path) -> None:
    with served(tmp_path) as server, talking(server.address) as raw:
        run = raw.run(raw.session())
        for seq, name in enumerate(("good", "bad"), 1):
            raw.answer(accepted(raw.http.post("/api/v1/save_weights", json=save_of(run, seq, name))))
        for name in ("good", "bad"):
            server.state.store.remove_checkpoint(f"tinker://{run}/weights/{name}")
    next(tmp_path.glob("*/weights/bad/kshot.json")).write_text("")
    with served(tmp_path) as server, talking(server.address) as raw:
        listed = [row["tinker_path"] for row in raw.get("checkpoints").json()["checkpoints"]]
    assert listed == [f"tinker://{run}/weights/good"]


def save_of(run: str, seq: int, name: str) -> dict[str, object]:
    return {"model_id": run, "seq_id": seq, "path": name}


def test_a_body_that_stops_coming_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "PATIENCE", 0.2)
    with served(tmp_path) as server:
        host, _, port = server.address.removeprefix("http://").partition(":")
        with socket.create_connection((host, int(port)), 10) as slow:
            head = f"POST /api/v1/create_session HTTP/1.1\r\nHost: {host}\r\nX-API-Key: tml-local\r\n"
            slow.sendall(f"{head}Content-Type: application/json\r\nContent-Length: 99\r\n\r\n{{".encode())
            answered = slow.recv(4096).decode()
        assert answered.startswith("HTTP/1.1 429")
        for _ in range(100):  # it is told before its part is given back
            if not server.app.budget.taken:
                break
            time.sleep(0.02)
        assert server.app.budget.taken == 0


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


def test_log_probs_at_image_positions_are_what_was_asked_for(tmp_path: Path, mixed: list[tinker.Datum]) -> None:
    """None, as the protocol has it, or a number for clients that multiply all of them with weights."""
    import vlm

    prompt = mixed[0].model_input
    found = []
    for state, options in (("nan", {}), ("zero", {"image_log_probs": 0.0})):
        with served(tmp_path / state, **options) as server:
            sampler = vlm.connect(server.address).create_sampling_client(base_model=nano.NAME).result()
            found.append(sampler.compute_logprobs(prompt).result())
    missing = [n for n, value in enumerate(found[0]) if value is None]
    assert len(missing) == 1 + prompt.chunks[1].length
    assert found[1][0] is None
    np.testing.assert_allclose([found[1][n] for n in missing[1:]], 0.0)
    kept = [n for n in range(len(found[0])) if n not in missing]
    np.testing.assert_allclose([found[1][n] for n in kept], [found[0][n] for n in kept], atol=1e-5)
