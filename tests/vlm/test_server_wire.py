"""Protobuf bodies: the SDK's converters on the other side, what is a sparse matrix, and broken bodies."""

import re
from collections.abc import Callable
from itertools import accumulate, chain, pairwise
from typing import Any

import numpy as np
import pytest
import tinker
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tinker import types
from tinker.proto import tinker_public_pb2 as pb
from tinker.proto.response_conv import deserialize_forward_backward_output, deserialize_sample_response
from tinker.types._pydantic_types.tensor_data import TensorData as TensorModel
from tinker.types.prompt_alt_tokens import PromptAltTokens
from tinker.types.provenance_spans import SampledProvenanceSpan
from tinker.types.topk_logprobs import TopkLogprobs

from kshot.errors import KshotError, RequestError
from tests.traced import traced
from tests.vlm.raw import body_of
from vlm.server.tinker.wire import (
    MAX_CHUNKS,
    MAX_DATUMS,
    forward_backward_output,
    parse_forward_backward,
    sample_response,
    tensor_data,
    tensor_from_json,
)

few = settings(max_examples=60, deadline=None)
floats = st.floats(width=32)  # NaN and infinities too
vectors = hnp.arrays(np.float32, st.integers(0, 6), elements=floats)
matrices = hnp.arrays(np.float32, st.tuples(st.integers(0, 4), st.integers(0, 4)), elements=floats)
targets = hnp.arrays(np.int64, st.integers(0, 6))
sparse = hnp.arrays(np.int64, (6, 8), elements=st.integers(1, 2**40), fill=st.just(0)).map(
    lambda cells: tinker.TensorData.from_torch_sparse(torch.from_numpy(cells))
)
texts = st.lists(st.integers(-(2**31), 2**31 - 1), max_size=5).map(lambda ids: types.EncodedTextChunk(tokens=ids))
pictures = st.builds(
    types.ImageChunk,
    data=st.binary(min_size=1, max_size=9),
    format=st.sampled_from(["png", "jpeg"]),
    expected_tokens=st.none() | st.integers(1, 2**31 - 1),
)
tensors = (vectors | matrices | targets).map(tinker.TensorData.from_numpy) | sparse
datums = st.builds(
    tinker.Datum,
    model_input=st.lists(texts | pictures, min_size=1, max_size=4).map(
        lambda chunks: tinker.ModelInput(chunks=[*chunks])
    ),
    loss_fn_inputs=st.dictionaries(st.text(max_size=5), tensors, max_size=3),
)


def same(one: tinker.TensorData | None, other: tinker.TensorData | None) -> bool:
    """Whether two tensors have the same numbers (NaN equal to NaN), type and layout."""
    if one is None or other is None:
        return one is other
    layouts = [(t.dtype, t.shape, t.sparse_crow_indices, t.sparse_col_indices) for t in (one, other)]
    return layouts[0] == layouts[1] and np.array_equal(one._numpy, other._numpy, equal_nan=one.dtype == "float32")


@few
@given(
    st.lists(datums, min_size=1, max_size=3),
    st.none() | st.dictionaries(st.text(max_size=4), st.floats(allow_nan=False) | st.text(max_size=4), min_size=1),
    st.integers(1, 2**31 - 1),
)
def test_what_the_sdk_sends_is_read(
    data: list[tinker.Datum], config: dict[str, float | str] | None, seq_id: int
) -> None:
    read = parse_forward_backward(body_of("run:train:0", seq_id, data, config))
    assert (read.model_id, read.seq_id, read.forward_only) == ("run:train:0", seq_id, False)
    assert (read.loss_fn, read.loss_fn_config) == ("cross_entropy", config)
    assert [each.model_input for each in read.data] == [each.model_input for each in data]
    for mine, theirs in zip(read.data, data, strict=True):
        assert mine.loss_fn_inputs.keys() == theirs.loss_fn_inputs.keys()
        assert all(same(mine.loss_fn_inputs[name], theirs.loss_fn_inputs[name]) for name in mine.loss_fn_inputs)
        assert all(t._numpy.flags.writeable for t in mine.loss_fn_inputs.values())  # torch warns of others


def datum(**fields: np.ndarray) -> tinker.Datum:
    chunks: list[Any] = [
        types.EncodedTextChunk(tokens=[5, 6]),
        types.ImageChunk(data=b"\x89PNG", format="png", expected_tokens=4),
        types.EncodedTextChunk(tokens=[7]),
    ]
    inputs = {name: tinker.TensorData.from_numpy(values) for name, values in fields.items()}
    return tinker.Datum(model_input=tinker.ModelInput(chunks=chunks), loss_fn_inputs=inputs)


def good() -> pb.ForwardBackwardRequest:
    """Two datums; the second has a sparse field: 2 rows, 3 columns, values 11 at (0, 1), 12 at (1, 0), 13 at (1, 2)."""
    fields: dict[str, Any] = {"target_tokens": np.arange(7), "weights": np.linspace(0, 1, 7, dtype=np.float32)}
    body = body_of("run:train:0", 1, [datum(**fields), datum(**fields)], {"beta": 0.5})
    message = pb.ForwardBackwardRequest.FromString(body)
    tensor = message.data[1].loss_fn_inputs["sparse"]
    tensor.dtype, tensor.sparse_csr.values = pb.DTYPE_INT64, np.array([11, 12, 13]).tobytes()
    tensor.shape.extend([2, 3])
    tensor.sparse_csr.crow_indices, tensor.sparse_csr.col_indices = (
        np.array(x, np.int64).tobytes() for x in ([0, 1, 3], [1, 0, 2])
    )
    return message


def test_fields_that_the_sdk_does_not_send_yet() -> None:
    message = good()
    message.forward_only = True
    weights = message.data[0].loss_fn_inputs["weights"]
    numbers = torch.tensor([1.5, -2.25, float("nan"), float("inf"), 3.0e38, 1e-40, 0.0])
    weights.dtype, weights.dense = pb.DTYPE_BFLOAT16, numbers.bfloat16().view(torch.uint16).numpy().tobytes()
    tokens = message.data[0].loss_fn_inputs["target_tokens"]
    tokens.dtype, tokens.dense = pb.DTYPE_INT32, np.arange(-3, 4, dtype=np.int32).tobytes()
    tokens.ClearField("shape")
    read = parse_forward_backward(message.SerializeToString())
    assert read.forward_only
    fields = read.data[0].loss_fn_inputs
    assert same(fields["weights"], tinker.TensorData.from_torch(numbers.bfloat16()))
    assert same(fields["target_tokens"], tinker.TensorData.from_numpy(np.arange(-3, 4)))
    dense = read.data[1].loss_fn_inputs["sparse"].to_torch()
    assert dense.tolist() == [[0, 11, 0], [12, 0, 13]]


def test_the_newer_configuration_wins_and_the_older_is_read() -> None:
    message = good()
    message.loss_fn_config["beta"] = 0.25
    assert parse_forward_backward(message.SerializeToString()).loss_fn_config == {"beta": 0.5}
    message.loss_fn_config_v2.clear()
    assert parse_forward_backward(message.SerializeToString()).loss_fn_config == {"beta": 0.25}


def test_provenance_changes_nothing() -> None:
    plain = datum(target_tokens=np.arange(7))
    span = SampledProvenanceSpan(sequence_id="a", length=7)
    bodies = (body_of("run", 1, [each]) for each in (plain.with_provenance([span], [span]), plain))
    read, bare = (parse_forward_backward(body).data[0] for body in bodies)
    assert read.model_input == bare.model_input
    assert same(read.loss_fn_inputs["target_tokens"], bare.loss_fn_inputs["target_tokens"])


Edit = Callable[[Any], object]


def _csr(**vectors: list[int]) -> Edit:
    def edit(message: Any) -> None:
        csr = message.data[1].loss_fn_inputs["sparse"].sparse_csr
        for name, values in vectors.items():
            setattr(csr, name, np.array(values, np.int64).tobytes())

    return edit


def _shape(*sizes: int, of: str = "weights") -> Edit:
    def edit(message: Any) -> None:
        message.data[1].loss_fn_inputs[of].shape[:] = sizes

    return edit


def _weights(key: str, value: Any) -> Edit:
    return lambda message: setattr(message.data[1].loss_fn_inputs["weights"], key, value)


def _image(key: str, value: Any) -> Edit:
    return lambda message: setattr(message.data[1].model_input[1].image, key, value)


HERE = r"^datum 1: 'weights'"
THERE = r"^datum 1: 'sparse'"
CHUNK = r"^datum 1: model_input chunk"
BROKEN: dict[str, tuple[Edit, str]] = {
    "no run": (lambda m: m.ClearField("model_id"), "^model_id is missing"),
    "no loss": (lambda m: m.ClearField("loss_fn"), "^loss_fn is missing"),
    "no place in the order": (lambda m: m.ClearField("seq_id"), "^seq_id must be at least 1, got 0"),
    "a negative place": (lambda m: setattr(m, "seq_id", -4), "got -4"),
    "no data": (lambda m: m.ClearField("data"), f"1 to {MAX_DATUMS} datums, got 0"),
    "too many datums": (lambda m: [m.data.add() for _ in range(MAX_DATUMS)], f"got {MAX_DATUMS + 2}; send several"),
    "no value of a key": (lambda m: m.loss_fn_config_v2["be\nta"].SetInParent(), r"no value for 'be\\nta'"),
    "an empty input": (lambda m: m.data[1].ClearField("model_input"), "^datum 1: model_input takes 1 to 4096 chunks"),
    "too many chunks": (lambda m: [m.data[1].model_input.add() for _ in range(MAX_CHUNKS)], "chunks, got 4099"),
    "an empty chunk": (lambda m: m.data[1].model_input[2].Clear(), f"{CHUNK} 2 is empty; only text"),
    "sound": (lambda m: setattr(m.data[1].model_input[2].dmel, "dmel", b"a"), f"{CHUNK} 2 is dmel"),
    "half a token": (
        lambda m: setattr(m.data[1].model_input[2].encoded_text, "tokens", b"abcdef"),
        f"{CHUNK} 2 has 6 bytes, not a multiple of 4",
    ),
    "another picture": (_image("format", "webp"), f"{CHUNK} 1 has the image format 'webp'; send png or jpeg"),
    "no picture": (_image("data", b""), f"{CHUNK} 1 is an image without data"),
    "no tokens": (_image("expected_tokens", 0), "expected_tokens 0"),
    "a foreign size": (
        lambda m: setattr(m.data[1].model_input[1].image.override_dimensions, "width", 9),
        "override_dimensions, which are not supported",
    ),
    "a long name": (
        lambda m: setattr(m.data[1].loss_fn_inputs["x" * 100_000], "dtype", pb.DTYPE_INT64),
        "^datum 1: 'xxxxx.* has neither dense nor",
    ),
    "no type": (_weights("dtype", 0), f"{HERE} has the unknown dtype 0; use one of float32, int64"),
    "a later type": (_weights("dtype", 77), "unknown dtype 77"),
    "no values": (lambda m: m.data[1].loss_fn_inputs["weights"].ClearField("dense"), f"{HERE} has neither dense nor"),
    "half a number": (_weights("dense", b"123456789"), f"{HERE} has 9 bytes, not a multiple of 4"),
    "fewer values": (_shape(8), rf"{HERE} has 7 values, but shape \[8\] is of 8"),
    "a negative size": (_shape(-7, -1), rf"{HERE} has shape \[-7, -1\]"),
    "a huge size": (_shape(1 << 62, 1 << 62), f"{HERE} has shape"),
    "a huge size of nothing": (_shape(0, 1 << 62), f"{HERE} has shape"),
    "a cube": (_shape(7, 1, 1), f"{HERE} has 3 dimensions"),
    "a sparse vector": (_shape(2, of="sparse"), rf"{THERE} is not a sparse CSR matrix: its shape is \[2\]"),
    "a huge sparse matrix": (_shape(2, 1 << 40, of="sparse"), f"{THERE} has shape"),
    "a row too many": (_shape(3, 3, of="sparse"), f"{THERE} .*3 rows need 4 row pointers, got 3"),
    "no row pointers": (_csr(crow_indices=[]), "2 rows need 3 row pointers, got 0"),
    "half an index": (
        lambda m: setattr(m.data[1].loss_fn_inputs["sparse"].sparse_csr, "col_indices", b"123"),
        f"{THERE} indices has 3 bytes, not a multiple of 8",
    ),
    "fewer columns": (_csr(col_indices=[1, 0]), "3 values and 2 column indices"),
    "a late start": (_csr(crow_indices=[1, 1, 3]), "row pointers do not rise from 0 to its 3 values"),
    "rows that end torch": (
        lambda m: (_csr(crow_indices=[0, 2, 0], col_indices=[])(m), _csr(values=[])(m)),
        "do not rise from 0 to its 0 values",
    ),
    "overflowing rows": (_csr(crow_indices=[0, -(2**63), 3]), "do not rise"),
    "a column outside": (_csr(col_indices=[1, 0, 3]), "column indices are from 0 to 3, of 3 columns"),
    "a column twice": (_csr(col_indices=[1, 2, 2]), "do not rise within each row"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_malformed_is_named(kind: str) -> None:
    edit, named = BROKEN[kind]
    message = good()
    parse_forward_backward(message.SerializeToString())
    edit(message)
    with pytest.raises(RequestError, match=named) as caught:
        parse_forward_backward(message.SerializeToString())
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def broken_bodies(count: int) -> list[bytes]:
    """Random bytes, and good bodies with bytes changed, cut out, doubled or inserted."""
    rng, whole = np.random.default_rng(7), good().SerializeToString()
    bodies = [rng.bytes(int(rng.integers(0, 200))) for _ in range(count // 4)]
    while len(bodies) < count:
        body = bytearray(whole)
        for _ in range(int(rng.integers(1, 4))):
            a, b = sorted(int(n) for n in rng.integers(0, len(body) + 1, 2))
            b = min(b, a + 12)
            edits = (rng.bytes(b - a), b"", bytes(body[a:b]) * 2, bytes([int(rng.integers(256))]) + bytes(body[a:b]))
            body[a:b] = edits[int(rng.integers(len(edits)))]
        bodies.append(bytes(body))
    return bodies


def test_broken_bodies_are_refused_or_read_and_build_nothing_large() -> None:
    bodies, lines = broken_bodies(2000), list[int]()
    with traced(200_000):  # the bodies have about 600 bytes
        for body in bodies:
            try:
                parse_forward_backward(body)
            except RequestError as error:
                lines.append(len(str(error).splitlines()))
    assert set(lines) == {1}
    assert 1000 < len(lines) < 2000  # some edits fall into the numbers and change nothing else


def is_csr(rows: int, width: int, count: int, crow: list[int], columns: list[int]) -> bool:
    """The definition, slice by slice: the rows one after the other are the columns, each rising and in the width."""
    parts = [columns[a:b] for a, b in pairwise(crow)]
    fits = len(parts) == rows and len(columns) == count and list(chain(*parts)) == columns
    starts = list(accumulate(map(len, parts), initial=0)) == crow
    return fits and starts and all(part == sorted(set(part)) and set(part) <= set(range(width)) for part in parts)


@settings(max_examples=200, deadline=None)
@given(hnp.arrays(bool, (3, 4)), st.booleans(), st.integers(0, 11), st.none() | st.integers(-1, 5))
def test_sparse_indices_are_taken_where_they_are_csr(
    cells: np.ndarray, in_rows: bool, place: int, changed: int | None
) -> None:
    crow, columns = [0, *np.cumsum(cells.sum(1)).tolist()], np.nonzero(cells)[1].tolist()
    values, edited = np.arange(cells.sum()), crow if in_rows else columns
    if edited:
        edited[place % len(edited) : place % len(edited) + 1] = [] if changed is None else [changed]
    if not is_csr(3, 4, len(values), crow, columns):
        with pytest.raises(RequestError, match=r"^here is not a sparse CSR"):
            tensor_data(values, "int64", [3, 4], "here", crow, columns)
    else:
        dense = np.zeros((3, 4), np.int64)
        dense[[n for n, (a, b) in enumerate(pairwise(crow)) for _ in range(b - a)], columns] = values
        read = tensor_data(values, "int64", [3, 4], "here", crow, columns)
        assert np.array_equal(read.to_numpy(), dense)
        assert torch.equal(read.to_torch(), torch.from_numpy(dense))  # torch takes it too


def test_tensors_from_lists() -> None:
    assert same(tensor_data([3, -1], "int64", [2, 1], "here"), tinker.TensorData.from_numpy(np.array([[3], [-1]])))
    assert same(tensor_data([], "int64", [0, 4], "here"), tinker.TensorData.from_numpy(np.zeros((0, 4), np.int64)))
    assert same(
        tensor_data([1, 0.5], "float32", [], "here"), tinker.TensorData.from_numpy(np.array([1, 0.5], np.float32))
    )
    for values in ([0.5], [2**64], [2**63], [True], ["a"], [[1]]):
        with pytest.raises(RequestError, match=r"^here must be a vector of int64 numbers"):
            tensor_data(values, "int64", [1], "here")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match=r"^here must be a vector of float32 numbers"):
        tensor_data(["a"], "float32", [1], "here")  # type: ignore[list-item]
    for one_side in ({"crow": [0, 1]}, {"columns": [0]}):
        with pytest.raises(RequestError, match=r"^here has only one of"):
            tensor_data([1], "int64", [1, 1], "here", **one_side)
    with pytest.raises(RequestError, match=r"^ids has 2 values, but shape \[3\]"):
        tensor_from_json(TensorModel(data=[1, 2], dtype="int64", shape=[3]), "ids")
    with pytest.raises(RequestError, match=r"^here row pointers must be a vector of int64"):
        tensor_data([1], "int64", [1, 1], "here", [0, 0.5], [0])


records = st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=6)


@few
@given(records, st.dictionaries(st.text(max_size=5), st.floats(), max_size=3), st.integers(0, 2**32 - 1))
def test_training_answers_are_read_by_the_sdk(
    kinds: list[tuple[int, bool]], metrics: dict[str, float], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    outputs = [  # a vector of every length, and a matrix whose width changes from datum to datum
        {
            "logprobs": tinker.TensorData.from_numpy(rng.normal(size=length).astype(np.float32)),
            "top": tinker.TensorData.from_numpy(rng.integers(0, 2**60, (length, 3 if wide else 1))),
        }
        for length, wide in kinds
    ]
    body = forward_backward_output(types.ForwardBackwardOutput("ArrayRecord", outputs, metrics))
    read = deserialize_forward_backward_output(body)
    assert read.loss_fn_output_type == "ArrayRecord"
    assert np.array_equal(list(metrics.values()), [read.metrics[name] for name in metrics], equal_nan=True)
    assert len(read.metrics) == len(metrics)
    assert len(read.loss_fn_outputs) == len(outputs)
    for mine, theirs in zip(outputs, read.loss_fn_outputs, strict=True):
        assert mine.keys() == theirs.keys()
        assert all(same(mine[name], theirs[name]) for name in mine)


def test_training_answers_without_fields_and_with_different_ones() -> None:
    read = deserialize_forward_backward_output(
        forward_backward_output(types.ForwardBackwardOutput("ArrayRecord", [{}, {}], {"loss:sum": 1.5}))
    )
    assert (read.loss_fn_outputs, read.metrics) == ([{}, {}], {"loss:sum": 1.5})
    uneven: list[Any] = [{"logprobs": tinker.TensorData.from_numpy(np.zeros(2, np.float32))}, {}]
    with pytest.raises(KshotError, match="same fields for every datum"):
        forward_backward_output(types.ForwardBackwardOutput("ArrayRecord", uneven, {}))


@few
@given(
    st.lists(st.tuples(st.integers(1, 5), st.booleans(), st.integers(0, 3)), min_size=1, max_size=3),
    st.integers(0, 4),
    st.integers(0, 3),
    st.integers(0, 2**31 - 1),
)
def test_samples_are_read_by_the_sdk(kinds: list[tuple[int, bool, int]], length: int, width: int, hits: int) -> None:
    """kinds: how many tokens each sequence has, whether it was stopped, and how many of the likeliest it comes with.
    length, width: of the prompt's log-probabilities and likeliest tokens."""
    rng = np.random.default_rng(hits)

    def log_probs(*shape: int) -> np.ndarray:
        return np.where(rng.random(shape) < 0.2, np.nan, rng.normal(size=shape)).astype(np.float32)

    def tokens(*shape: int) -> np.ndarray:
        return rng.integers(0, 2**31 - 1, shape).astype(np.int32)

    def top(rows: int, k: int) -> TopkLogprobs | None:
        return TopkLogprobs(tokens(rows, k), log_probs(rows, k)) if rows and k else None

    drawn = [tinker.TensorData.from_numpy(each) for each in (tokens(4, 2).astype(np.int64), log_probs(4, 2))]
    response = types.SampleResponse(
        [
            types.SampledSequence(
                "stop" if stopped else "length",
                "a",
                tokens_np=tokens(count),
                logprobs_np=log_probs(count),
                topk_logprobs_np=top(count, k),
            )
            for count, stopped, k in kinds
        ],
        prompt_logprobs_np=log_probs(length) if length else None,
        topk_prompt_logprobs_np=top(length, width),
        prompt_alt_tokens=PromptAltTokens(*drawn),
        prompt_cache_hit_tokens=hits,
    )
    read = deserialize_sample_response(sample_response(response))
    assert (read.prompt_cache_hit_tokens, read.target_prompt_logprobs) == (hits, None)
    assert same_arrays(read.prompt_logprobs_np, response.prompt_logprobs_np)
    assert same_arrays(read.topk_prompt_logprobs_np, response.topk_prompt_logprobs_np)
    assert same(read.prompt_alt_tokens.tokens, drawn[0])
    assert same(read.prompt_alt_tokens.logprobs, drawn[1])
    for mine, theirs in zip(response.sequences, read.sequences, strict=True):
        assert theirs.stop_reason == mine.stop_reason
        for name in ("tokens_np", "logprobs_np", "topk_logprobs_np"):
            assert same_arrays(getattr(theirs, name), getattr(mine, name)), name


def same_arrays(one: Any, other: Any) -> bool:
    """Whether two arrays, or two pairs of matrices, have the same numbers (NaN equal to NaN), or both are None."""
    if isinstance(one, TopkLogprobs):
        return same_arrays(one.token_ids, other.token_ids) and same_arrays(one.logprobs, other.logprobs)
    return one is other or np.array_equal(one, other, equal_nan=True)


@few
@given(hnp.arrays(np.int64, (7, 5), elements=st.sampled_from([-1, -1, -1, -1, 8, 9])), st.integers(0, 99))
def test_scores_come_back_in_the_layout_asked_for(ids: np.ndarray, seed: int) -> None:
    answer = np.where(ids < 0, 0, np.random.default_rng(seed).normal(size=ids.shape)).astype(np.float32)
    whole = tinker.TensorData.from_numpy(answer)
    for model in (TensorModel.from_torch_sparse(torch.from_numpy(ids), -1), TensorModel.from_numpy(ids)):
        asked = tensor_from_json(TensorModel.model_validate_json(model.model_dump_json()), "ids")
        assert np.array_equal(asked.to_numpy(-1), ids)
        response = types.SampleResponse([], target_prompt_logprobs=whole)
        read = deserialize_sample_response(sample_response(response, asked))
        tensor = read.target_prompt_logprobs
        assert (tensor.dtype, tensor.shape) == ("float32", [7, 5])
        assert tensor.sparse_crow_indices == model.sparse_crow_indices
        assert tensor.sparse_col_indices == model.sparse_col_indices
        assert np.array_equal(tensor.to_numpy(), answer)


def test_a_body_of_another_kind_is_named() -> None:
    for body in (b'{"model_id": "a"}', b"\xff" * 9, b"\x0a\x02\xc3\x28"):
        with pytest.raises(RequestError, match=re.escape("no protobuf ForwardBackwardRequest")):
            parse_forward_backward(body)
