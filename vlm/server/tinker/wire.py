"""Protobuf bodies of the Tinker API ↔ the SDK's types, and the tensors in them.

The other side is `tinker.proto.request_conv` and `tinker.proto.response_conv` of the SDK; the messages are
`tinker.proto.tinker_public_pb2`. Sizes and indices of what a client sent are checked before anything is built from
them, and no sparse tensor is made dense: what is built stays within a small multiple of the body.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from math import prod
from typing import Literal, NamedTuple

import numpy as np
import tinker
from google.protobuf.message import DecodeError
from tinker import types
from tinker.proto import tinker_public_pb2 as pb
from tinker.proto.request_conv import _tensor_data_to_proto as tensor_message
from tinker.types._pydantic_types.tensor_data import TensorData as TensorModel
from tinker.types.topk_logprobs import TopkLogprobs

from kshot.errors import KshotError, RequestError
from kshot.images import EncodedImage

MAX_DATUMS = 2048  # in one request; the SDK splits at 1,024
MAX_CHUNKS = 4096  # in one model input
MAX_CELLS = 1 << 26  # numbers of a tensor when dense: half a gigabyte of int64

Dtype = Literal["float32", "int64"]
Numbers = np.ndarray | Sequence[float]


@dataclass(frozen=True)
class ForwardBackward:
    """A forward or forward_backward request; seq_id orders the requests of a run, from 1 on."""

    model_id: str
    seq_id: int
    data: list[tinker.Datum]
    loss_fn: str
    loss_fn_config: dict[str, float | str] | None
    forward_only: bool


class RequestNumber(NamedTuple):
    """The run of a request and its number there."""

    model_id: str
    seq_id: int


class _Number(NamedTuple):
    """How a tensor's numbers lie on the wire, and what they are in the SDK's types."""

    name: str
    stored: np.dtype
    public: Dtype


_NUMBERS = {
    pb.DTYPE_FLOAT32: _Number("float32", np.dtype("<f4"), "float32"),
    pb.DTYPE_INT64: _Number("int64", np.dtype("<i8"), "int64"),
    pb.DTYPE_INT32: _Number("int32", np.dtype("<i4"), "int64"),
    pb.DTYPE_BFLOAT16: _Number("bfloat16", np.dtype("<u2"), "float32"),
}
_INT32, _INT64 = _NUMBERS[pb.DTYPE_INT32], _NUMBERS[pb.DTYPE_INT64]
_STOP_REASONS = {"stop": pb.STOP_REASON_STOP, "length": pb.STOP_REASON_LENGTH}


def parse_forward_backward(body: bytes) -> ForwardBackward:
    """The request in an uncompressed body (ForwardBackwardRequest of the SDK's protocol).

    Raises RequestError, naming datum and field, for everything that is malformed; token ids, images, the loss and the
    lengths of its fields are not looked at here.
    """
    try:
        message = pb.ForwardBackwardRequest.FromString(body)
    except DecodeError as error:
        raise RequestError("the body is no protobuf ForwardBackwardRequest; send it with the tinker SDK") from error
    for name in ("model_id", "loss_fn"):
        if not getattr(message, name):
            raise RequestError(f"{name} is missing from the forward_backward request")
    if message.seq_id < 1:
        raise RequestError(f"seq_id must be at least 1, got {message.seq_id}")
    if not 1 <= len(message.data) <= MAX_DATUMS:
        raise RequestError(f"a request takes 1 to {MAX_DATUMS} datums, got {len(message.data)}; send several requests")
    data = [_datum(datum, f"datum {number}") for number, datum in enumerate(message.data)]
    config = _config(message)
    return ForwardBackward(message.model_id, message.seq_id, data, message.loss_fn, config, message.forward_only)


def number_of(body: bytes) -> RequestNumber:
    """What a body names, also one that `parse_forward_backward` refuses; "" and 0 where it is no message at all."""
    try:
        message = pb.ForwardBackwardRequest.FromString(body)
    except DecodeError:
        return RequestNumber("", 0)
    return RequestNumber(message.model_id, message.seq_id)


def forward_backward_output(output: types.ForwardBackwardOutput) -> bytes:
    """The body that answers forward and forward_backward: datums one after the other, a vector a field (a single
    number is one of length 1). Raises KshotError where the datums do not have the same fields."""
    message = pb.ForwardBackwardOutput(loss_fn_output_type=output.loss_fn_output_type, metrics=output.metrics)
    if len({frozenset(each) for each in output.loss_fn_outputs}) > 1:  # a reader would mix up the datums
        raise KshotError("the outputs of a forward_backward must have the same fields for every datum")
    arrays = [{k: np.atleast_1d(v.to_numpy()) for k, v in each.items()} for each in output.loss_fn_outputs]
    for _, alike in groupby(arrays, key=_record_key):
        _write_record(message.loss_fn_outputs.add(type_tag=output.loss_fn_output_type), list(alike))
    return message.SerializeToString()


def sample_response(response: types.SampleResponse, layout: tinker.TensorData | None = None) -> bytes:
    """The body that answers asample, of a response in arrays, as the sampler makes it. Sequence ids are not in it: the
    client has them from its submission. layout: the request's target_prompt_logprobs, as whose layout their
    log-probabilities are sent."""
    message = pb.SampleResponse(prompt_cache_hit_tokens=response.prompt_cache_hit_tokens)
    for each in response.sequences:
        _write_sequence(message.sequences.add(), each)
    if response.prompt_logprobs_np is not None:
        message.prompt_logprobs = _bytes(response.prompt_logprobs_np, "<f4")
    if response.topk_prompt_logprobs_np is not None:
        _write_top(message.topk_prompt_logprobs, response.topk_prompt_logprobs_np)
    if (scores := response.target_prompt_logprobs) is not None:
        scores = scores if layout is None else in_layout_of(layout, scores)
        message.target_prompt_logprobs.CopyFrom(tensor_message(scores))
    if (drawn := response.prompt_alt_tokens) is not None:
        message.prompt_alt_tokens.tokens.CopyFrom(tensor_message(drawn.tokens))
        message.prompt_alt_tokens.logprobs.CopyFrom(tensor_message(drawn.logprobs))
    return message.SerializeToString()


def _datum(message: pb.Datum, where: str) -> tinker.Datum:
    # Provenance spans (model_input_spans, loss_fn_input_spans) are left out. They say which sampled sequences the
    # tokens came from and are read by stable_reinforce, which is refused by name; no loss that is computed here is
    # defined by them, so its value and gradient are the same with and without.
    if not 1 <= len(message.model_input) <= MAX_CHUNKS:
        raise RequestError(f"{where}: model_input takes 1 to {MAX_CHUNKS} chunks, got {len(message.model_input)}")
    chunks = [_chunk(each, f"{where}: model_input chunk {n}") for n, each in enumerate(message.model_input)]
    fields = {name: _tensor(each, f"{where}: {name!r:.80}") for name, each in message.loss_fn_inputs.items()}
    return tinker.Datum(tinker.ModelInput.model_construct(chunks=chunks), fields)


def _chunk(message: pb.Chunk, where: str) -> types.EncodedTextChunk | types.ImageChunk:
    kind = message.WhichOneof("chunk")
    if kind == "encoded_text":
        tokens = _numbers(message.encoded_text.tokens, _INT32, where).tolist()
        return types.EncodedTextChunk.model_construct(tokens=tokens)  # ints as they are: not checked one by one again
    if kind != "image":
        raise RequestError(f"{where} is {kind or 'empty'}; only text and images are supported")
    return _image(message.image, where)


def _image(image: pb.ImageChunk, where: str) -> types.ImageChunk:
    if image.format not in ("png", "jpeg"):
        raise RequestError(f"{where} has the image format {image.format!r:.80}; send png or jpeg")
    data = image.data  # a copy each time it is read
    if not data:
        raise RequestError(f"{where} is an image without data")
    if image.HasField("override_dimensions"):
        raise RequestError(f"{where} has override_dimensions, which are not supported; resize the image")
    expected = image.expected_tokens if image.HasField("expected_tokens") else None
    if expected is not None and expected < 1:
        raise RequestError(f"{where} has expected_tokens {expected}; an image has at least 1")
    return types.ImageChunk.model_construct(data=EncodedImage(data), format=image.format, expected_tokens=expected)


def _tensor(message: pb.Tensor, where: str) -> tinker.TensorData:
    number, kind = _NUMBERS.get(message.dtype), message.WhichOneof("encoding")
    if number is None:
        choices = ", ".join(each.name for each in _NUMBERS.values())
        raise RequestError(f"{where} has the unknown dtype {message.dtype}; use one of {choices}")
    if kind is None:
        raise RequestError(f"{where} has neither dense nor sparse_csr values")
    if kind == "dense":
        return tensor_data(_numbers(message.dense, number, where), number.public, message.shape, where)
    csr = message.sparse_csr
    indices = [_numbers(raw, _INT64, f"{where} indices") for raw in (csr.crow_indices, csr.col_indices)]
    return tensor_data(_numbers(csr.values, number, where), number.public, message.shape, where, *indices)


def _numbers(raw: bytes, number: _Number, where: str) -> np.ndarray:
    """The vector in these bytes, a view where it need not be widened."""
    if len(raw) % number.stored.itemsize:
        size = number.stored.itemsize
        raise RequestError(f"{where} has {len(raw)} bytes, not a multiple of {size}, the size of {number.name}")
    values = np.frombuffer(raw, number.stored)
    if number.name == "bfloat16":  # the upper half of a float32
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.int64) if number.name == "int32" else values


def _config(message: pb.ForwardBackwardRequest) -> dict[str, float | str] | None:
    """The loss's configuration: loss_fn_config is the older map, of numbers only, and gives way to the newer one."""
    values: Mapping[str, float | str] = message.loss_fn_config
    if message.loss_fn_config_v2:
        kinds = {key: each.WhichOneof("value") for key, each in message.loss_fn_config_v2.items()}
        for key in (key for key, kind in kinds.items() if kind is None):
            raise RequestError(f"loss_fn_config has no value for {key!r:.80}")
        values = {key: getattr(message.loss_fn_config_v2[key], kind) for key, kind in kinds.items() if kind}
    return dict(values) or None


def _record_key(datum: Mapping[str, np.ndarray]) -> list[tuple[str, str, tuple[int, ...]]]:
    """What the datums of one record have in common."""
    return [(name, str(array.dtype), array.shape[1:]) for name, array in sorted(datum.items())]


def _write_record(record: pb.ArrayRecord, alike: Sequence[Mapping[str, np.ndarray]]) -> None:
    record.num_datums = len(alike)
    for name, first in alike[0].items():
        parts = [datum[name] for datum in alike]
        field = record.fields[name]
        field.dtype = pb.DTYPE_FLOAT32 if first.dtype == np.float32 else pb.DTYPE_INT64
        field.data = b"".join(part.tobytes() for part in parts)
        field.offsets = np.array([0, *accumulate(part.nbytes for part in parts)], "<i8").tobytes()
        field.trailing_shape.extend(first.shape[1:])


def _write_sequence(message: pb.SampledSequence, sequence: types.SampledSequence) -> None:
    message.stop_reason = _STOP_REASONS[sequence.stop_reason]
    message.tokens, message.logprobs = _bytes(sequence.tokens_np, "<i4"), _bytes(sequence.logprobs_np, "<f4")
    if sequence.topk_logprobs_np is not None:
        _write_top(message.topk_sampled_logprobs, sequence.topk_logprobs_np)


def _write_top(message: pb.TopkLogprobs, top: TopkLogprobs) -> None:
    message.length, message.k = top.token_ids.shape
    message.token_ids, message.logprobs = _bytes(top.token_ids, "<i4"), _bytes(top.logprobs, "<f4")


def _bytes(values: np.ndarray | None, dtype: str) -> bytes:
    return np.asarray(values, dtype).tobytes()


# Tensors


def tensor_data(
    values: Numbers,
    dtype: Dtype,
    shape: Sequence[int],
    where: str,
    crow: Numbers | None = None,
    columns: Numbers | None = None,
) -> tinker.TensorData:
    """The SDK's tensor from what a client sent, dense or, where crow and columns are given, sparse (CSR).

    values: the numbers in a row. shape: of the dense tensor, one or two dimensions; empty means a vector. Nothing is
    made dense. Raises RequestError, which begins with `where`, for values that are not of the type and shape, indices
    that are not CSR (as torch checks them), and shapes of more than MAX_CELLS numbers.
    """
    flat = _flat(values, dtype, where)
    if len(shape) > 2:
        raise RequestError(f"{where} has {len(shape)} dimensions; it may have one or two")
    shape = list(shape) or [len(flat)]
    if min(shape) < 0 or max(*shape, prod(shape)) > MAX_CELLS:
        raise RequestError(f"{where} has shape {shape}; its numbers may be from 0 to {MAX_CELLS:,}")
    if crow is None and columns is None:
        if prod(shape) != len(flat):
            raise RequestError(f"{where} has {len(flat)} values, but shape {shape} is of {prod(shape)}")
        return tinker.TensorData(flat, dtype, shape)
    if crow is None or columns is None:
        raise RequestError(f"{where} has only one of its sparse row and column indices; send both")
    indices = _flat(crow, "int64", f"{where} row pointers"), _flat(columns, "int64", f"{where} column indices")
    if fault := _csr_fault(shape, len(flat), *indices):
        raise RequestError(f"{where} is not a sparse CSR matrix: {fault}")
    return tinker.TensorData(flat, dtype, shape, indices[0].tolist(), indices[1].tolist())


def tensor_from_json(tensor: TensorModel, where: str) -> tinker.TensorData:
    """The SDK's tensor from one in a JSON body; raises as `tensor_data`."""
    sparse = tensor.sparse_crow_indices, tensor.sparse_col_indices
    return tensor_data(tensor.data, tensor.dtype, tensor.shape or [], where, *sparse)


def in_layout_of(layout: tinker.TensorData, dense: tinker.TensorData) -> tinker.TensorData:
    """`dense` as `layout` is laid out, of the same shape: where that is sparse, only the cells it lists."""
    if layout.sparse_crow_indices is None or layout.sparse_col_indices is None:
        return dense
    counts = np.diff(layout.sparse_crow_indices)
    cells = dense.to_numpy()[np.repeat(np.arange(len(counts)), counts), np.array(layout.sparse_col_indices, np.int64)]
    return tinker.TensorData(cells, dense.dtype, layout.shape, layout.sparse_crow_indices, layout.sparse_col_indices)


def _flat(values: Numbers, dtype: Dtype, where: str) -> np.ndarray:
    """(n,) as given, if it is a vector of this kind of numbers."""
    try:
        array = np.asarray(values, np.float32 if dtype == "float32" else None)
    except (ValueError, OverflowError, TypeError) as error:
        raise RequestError(f"{where} must be a vector of {dtype} numbers") from error
    if array.ndim != 1 or (dtype == "int64" and array.size and array.dtype != np.int64):
        raise RequestError(f"{where} must be a vector of {dtype} numbers")
    return array.astype(dtype, copy=False)


def _csr_fault(shape: Sequence[int], count: int, crow: np.ndarray, columns: np.ndarray) -> str | None:
    """What is wrong with the indices of a CSR matrix of `count` values, as torch.sparse_csr_tensor defines it.

    None of these may reach torch, whose own check (check_invariants, which the SDK asks for) reads past the end of the
    columns while it looks: row pointers 0, 2, 0, 0 without values end the process (torch 2.15).
    """
    if len(shape) != 2:
        return f"its shape is {list(shape)}, not (rows, columns)"
    if len(crow) != shape[0] + 1:
        return f"{shape[0]} rows need {shape[0] + 1} row pointers, got {len(crow)}"
    if len(columns) != count:
        return f"it has {count} values and {len(columns)} column indices"
    if crow[0] != 0 or crow[-1] != count or (crow[1:] < crow[:-1]).any():
        return f"its row pointers do not rise from 0 to its {count} values"
    if count and (columns.min() < 0 or columns.max() >= shape[1]):
        return f"its column indices are from {columns.min()} to {columns.max()}, of {shape[1]} columns"
    rows = np.repeat(np.arange(shape[0]), np.diff(crow))
    if ((rows[1:] == rows[:-1]) & (columns[1:] <= columns[:-1])).any():
        return "its column indices do not rise within each row"
    return None
