"""The budget of memory: what is taken from it, when it is given back, and what is refused."""

import gc
import io
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kshot.errors import BusyError, InputError, RequestError, TooLargeError
from tests.vlm.raw import PROMPT, Raw, refused, sample_of, talking, until
from tests.vlm.serving import Server, served
from vlm.server.limits import images, memory, sizes
from vlm.server.limits.memory import Memory, readable, size_of
from vlm.server.tinker import wire

MB = 1 << 20


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with served(tmp_path_factory.mktemp("state")) as running:
        yield running


@pytest.fixture
def raw(server: Server) -> Any:
    with talking(server.address) as connection:
        yield connection


def test_beyond_the_limit_one_waits_and_what_never_fits_is_refused() -> None:
    budget = Memory(800 * MB)
    with budget.take("bodies", 600 * MB) as taken:
        with pytest.raises(BusyError, match=r"no memory for queues .* \(bodies 600 MB\)"):
            budget.take("queues", 101 * MB)
        small = budget.take("queues", MB)
        with pytest.raises(TooLargeError, match="--memory is 838,860,800 bytes"):
            budget.take("messages", 701 * MB)
        taken.become("answers", 900 * MB, forced=True)  # it is there already
        assert budget.taken["answers"] == 900 * MB
        other = taken.hand_over()
        small.release()
    assert sum(budget.taken.values()) == 900 * MB
    for _ in range(2):
        other.release()
    assert not sum(budget.taken.values())


def test_small_requests_find_room_beside_large_ones_and_kinds_that_stay_have_shares() -> None:
    budget = Memory(800 * MB)
    budget.take("bodies", 700 * MB)
    with pytest.raises(BusyError):
        budget.take("bodies", 2 * MB)
    for _ in range(100):
        budget.take("bodies", MB)
    with pytest.raises(BusyError):
        budget.take("bodies", MB)
    budget = Memory(800 * MB)
    for kind, share in memory.SHARES.items():
        budget.take(kind, int(800 * MB * share))
        with pytest.raises(BusyError):
            budget.take(kind, 1)
        with pytest.raises(BusyError if kind == memory.HELD else TooLargeError):  # its turn comes, and then it fits
            budget.take(kind, int(800 * MB * share) + 1)
    budget.take("queues", 99 * MB)  # what those wait for that are held
    with pytest.raises(ValueError, match="-1 bytes of queues"):
        budget.take("queues", -1)


def test_what_nobody_has_any_more_is_given_back() -> None:
    class Thing:
        pass

    budget, thing = Memory(64 * MB), Thing()
    budget.take("samplers", MB).release_with(thing)
    assert budget.taken["samplers"] == MB
    del thing
    gc.collect()
    assert budget.taken["samplers"] == 0


def test_sizes_as_people_write_them() -> None:
    for text, size in (("4GB", 4 << 30), ("1.5 g", 3 << 29), ("512MiB", 512 * MB), ("1073741824", 1 << 30)):
        assert size_of(text) == size
    for text in ("", "4 apples", "-1GB", "1MB", "GB"):
        with pytest.raises(InputError, match="--memory"):
            size_of(text)
    assert (readable(4 << 30), readable(100 * MB)) == ("4.0 GB", "100 MB")
    assert 0 < memory.default_limit() < 1 << 50


# What bodies become


def field(number: int, content: bytes) -> bytes:
    """A field of bytes of a protobuf message."""
    return bytes([number << 3 | 2]) + varint(len(content)) + content


def varint(number: int) -> bytes:
    low, rest = number & 127, number >> 7
    return bytes([low | 128]) + varint(rest) if rest else bytes([low])


def request_of(*datums: bytes) -> bytes:
    return field(1, b"run") + b"\x10\x01" + field(4, b"cross_entropy") + b"".join(field(3, each) for each in datums)


def text_of(count: int) -> bytes:
    return field(1, field(1, field(1, np.arange(1000, 1000 + count, dtype="<i4").tobytes())))


def tensor_of(inner: bytes, dtype: int, shape: bytes, name: bytes = b"k") -> bytes:
    return field(2, field(1, name) + field(2, inner + b"\x18" + bytes([dtype]) + field(4, shape)))


CELLS = 100_000
SPARSE = field(
    2,
    field(1, np.ones(CELLS, "<f4").tobytes())
    + field(3, np.arange(CELLS, dtype="<i8").tobytes())
    + field(2, np.array([0, CELLS], "<i8").tobytes()),
)
WORST = {
    "tokens": lambda: request_of(text_of(200_000)),
    "chunks of one token": lambda: request_of(*[text_of(1) * 4000] * 4),
    "tensors": lambda: request_of(
        *[text_of(1) + b"".join(tensor_of(field(1, bytes(4)), 1, b"\x01", b"k%d" % n) for n in range(20))] * 300
    ),
    "sparse": lambda: request_of(text_of(1) + tensor_of(SPARSE, 1, b"\x01" + varint(CELLS))),
    "bfloat16": lambda: request_of(text_of(1) + tensor_of(field(1, bytes(800_000)), 4, b"")),
    "images": lambda: request_of(*[field(1, field(2, field(1, b"x") + field(2, b"png"))) * 4000] * 2),
}


@pytest.mark.parametrize("shape", WORST)
def test_the_bound_of_a_training_request_is_one(shape: str) -> None:
    body = WORST[shape]()
    bound = sizes.protobuf_bytes(body)
    tracemalloc.start()
    try:
        wire.parse_forward_backward(body)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < bound < 40 * peak


def test_a_body_of_empty_messages_is_refused_before_it_is_parsed(raw: Raw) -> None:
    body = request_of(*[field(1, b"") * 4000] * 40)
    refused(raw.forward(body), 413, "fields")
    with pytest.raises(TooLargeError):
        sizes.protobuf_bytes(request_of(*[b""] * (sizes.MAX_FIELDS + 1)))
    for broken in (b"\x1a\x05ab", b"\x1b", b"\xff" * 11, b"\x1a", bytes(8)):
        with pytest.raises(RequestError, match="no protobuf"):
            sizes.protobuf_bytes(broken)


def test_many_wrong_values_cost_little(raw: Raw) -> None:
    """3.8 MB of wrong tags once took 2.2 GB and froze the server for 25 s."""
    wrong = b'{"tags":[' + b",".join([b"1"] * 1_900_000) + b'],"sdk_version":"0","user_metadata":null}'
    few = b'{"tags":[' + b",".join([b"1"] * (sizes.VALUES - 10)) + b'],"sdk_version":"0","user_metadata":null}'
    tracemalloc.start()
    try:
        refused(
            raw.http.post("/api/v1/create_session", content=wrong, headers={"Content-Type": "application/json"}),
            413,
            "values",
        )
        refused(
            raw.http.post("/api/v1/create_session", content=few, headers={"Content-Type": "application/json"}),
            422,
            "tags",
        )
        assert tracemalloc.get_traced_memory()[1] < 100 * MB
    finally:
        tracemalloc.stop()


def test_long_prompts_are_no_wrong_values() -> None:
    tokens, lists = b"[" + b"1," * 20_000 + b"1]", frozenset({("prompt", "chunks", "*", "tokens")})
    good = b'{"prompt":{"chunks":[{"type":"encoded_text","tokens":' + tokens + b"}]}}"
    sizes.check_json(good, 100, lists)
    for wrong in (good.replace(b"prompt", b"prompts"), good.replace(b"1]", b"1.5]"), good.replace(b"1]", b"true]")):
        with pytest.raises(TooLargeError, match="more than 100 values"):
            sizes.check_json(wrong, 100, lists)
    sizes.check_json(b'{"text":"' + b"," * 1000 + b'"}', 100, lists)


def test_nested_lists_are_refused_before_they_are_built() -> None:
    body = b'{"prompt":[' + b",".join([b"[" * 100 + b"]" * 100] * 10_000) + b"]}"
    tracemalloc.start()
    try:
        with pytest.raises(TooLargeError, match="more than 8,192 values"):
            sizes.check_json(body, 1 << 13, frozenset({("prompt",), ("prompt", "*")}))
        assert tracemalloc.get_traced_memory()[1] < MB
    finally:
        tracemalloc.stop()


# Answers, images, adapters


def test_more_log_probabilities_than_are_built_are_refused(raw: Raw) -> None:
    body = sample_of(PROMPT, max_tokens=500) | {"num_samples": 16, "topk_sample_logprobs": 4096}
    refused(raw.post("asample", **body), 400, "topk_sample_logprobs: more than 1,048,576")


@pytest.mark.parametrize("name", ["topk_prompt_logprobs", "prompt_alt_tokens_k", "topk_sample_logprobs", "max_tokens"])
def test_negative_counts_give_no_memory(server: Server, raw: Raw, name: str) -> None:
    many = {"max_tokens": -(10**9)} if name == "max_tokens" else {"max_tokens": 1}
    body = sample_of(PROMPT, **many) | {"topk_sample_logprobs": 1} | ({} if name == "max_tokens" else {name: -(10**9)})
    refused(raw.post("asample", **body), 400, "negative")
    assert min(server.state.memory.taken.values()) >= 0


def test_waiting_samples_are_bounded_by_their_bytes(server: Server, raw: Raw, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = server.state.memory
    monkeypatch.setattr(taken, "limit", 64 * MB)
    body = sample_of(PROMPT, max_tokens=4) | {"num_samples": 16, "topk_sample_logprobs": 512}

    going = threading.Event()
    server.state.registry.submit(going.wait, 60)
    ids = []
    for _ in range(100):
        response = raw.post("asample", **body)
        if response.status_code != 200:
            break
        ids.append(response.json()["request_id"])
    refused(response, 429, "no memory for queues")
    assert 1 < len(ids) < 20
    assert sum(taken.taken.values()) <= taken.limit
    going.set()
    for request_id in ids:
        raw.sampled(request_id)
    until(lambda: not sum(taken.taken.values()))


def picture(mode: str, side: int, format: str = "PNG", **options: Any) -> bytes:

    buffer = io.BytesIO()
    Image.new(mode, (side, side)).save(buffer, format, **options)
    return buffer.getvalue()


def test_images_of_many_pixels_are_refused_by_their_headers() -> None:
    large, fits = picture("L", 6000), picture("L", 4000)
    with pytest.raises(TooLargeError, match=r"image 1 of the request: 36,000,000 pixels"):
        images.image_bytes([fits, large])
    with pytest.raises(TooLargeError, match="images up to 16"):
        images.image_bytes([fits] * 64)
    assert images.image_bytes([b"no image"]) == 0


DECODE = """
import ctypes, sys
from pathlib import Path
from vlm import nano
from vlm.inputs import ImageRule, image_chunk
from vlm.local.vision import PixelLoader

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024

loader = PixelLoader(rule := ImageRule.from_pretrained(nano.NAME), 0)
for name in sys.argv[1:]:
    ctypes.CDLL(None).malloc_trim(0)  # what the one before has left would be used again, uncounted
    Path("/proc/self/clear_refs").write_text("5")  # the highest mark begins anew
    before = peak()
    loader.take("", image_chunk(Path(name).read_bytes(), rule).data)
    print(peak() - before)
"""


def test_the_bound_of_an_image_is_one(tmp_path: Path) -> None:
    """What decoding needs is measured in one process; a small image of each kind loads what its decoder needs."""
    kinds = {"RGB": ("JPEG", {"progressive": True}), "RGBA": ("PNG", {}), "I;16": ("PNG", {})}
    files, data = list[str](), list[bytes]()
    for mode, (form, options) in kinds.items():
        for side in (64, 2000):
            data.append(picture(mode, side, form, **options))
            (path := tmp_path / f"{mode[0]}{side}").write_bytes(data[-1])
            files.append(str(path))
    command = [sys.executable, "-c", DECODE, *files]
    peaks = [int(line) for line in subprocess.run(command, capture_output=True, check=True).stdout.split()]
    for peak, large in zip(peaks[1::2], data[1::2], strict=True):
        assert peak < images.image_bytes([large]) < 10 * peak


def test_runs_and_snapshots_are_taken_by_their_shapes(
    server: Server, raw: Raw, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget, session = server.state.memory, raw.session()
    run = raw.run(session)
    until(lambda: not budget.taken["answers"])
    adapter = server.state.runs[run].client._run.adapter
    count = sum(flat.numel() for flat in adapter.flats.values())
    assert budget.taken["adapters"] == 16 * count  # float32: weights, gradients, two moments
    raw.result("save_weights_for_sampler", model_id=run, seq_id=1, sampling_session_seq_id=1)
    assert budget.taken["samplers"] == 4 * count
    monkeypatch.setattr(budget, "limit", int(16 * count * 8 / 3) + 1)  # room for no more than that
    busy = raw.answer(raw.create(session, 1))
    assert "no memory for adapters" in busy["error"]
    assert "more than this server takes" in raw.answer(raw.create(session, 2, rank=1024))["error"]
    for number in range(2, 8):  # the run's own that were used least recently go
        raw.result("save_weights_for_sampler", model_id=run, seq_id=number, sampling_session_seq_id=number)
    assert budget.taken["samplers"] <= budget.limit / 4
    raw.post(f"sessions/{session}/finish", reason={}, detail=None)
    until(lambda: not budget.taken["adapters"] + budget.taken["samplers"])
