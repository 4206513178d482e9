"""Tensors that clients send and get: checked before they are built, dense or sparse (CSR). Knows no message format.

Sizes and indices are compared with what is there before anything is allocated, and nothing is made dense, so a shape
of huge dimensions costs nothing.
"""

from collections.abc import Sequence
from math import prod
from typing import Literal

import numpy as np
import tinker
from tinker.types._pydantic_types.tensor_data import TensorData as TensorModel

from kshot_errors import RequestError

MAX_CELLS = 1 << 26  # numbers of a tensor when dense: half a gigabyte of int64

Dtype = Literal["float32", "int64"]
Numbers = np.ndarray | Sequence[float]


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


def of_model(given: TensorModel, where: str) -> tinker.TensorData:
    """The SDK's tensor from one in a JSON body; raises as `tensor_data`."""
    sparse = given.sparse_crow_indices, given.sparse_col_indices
    return tensor_data(given.data, given.dtype, given.shape or [], where, *sparse)


def in_layout_of(asked: tinker.TensorData, dense: tinker.TensorData) -> tinker.TensorData:
    """`dense` as `asked` is laid out, of the same shape: where that is sparse, only the cells it lists.

    So does the protocol answer `target_prompt_logprobs`.
    """
    if asked.sparse_crow_indices is None or asked.sparse_col_indices is None:
        return dense
    counts = np.diff(asked.sparse_crow_indices)
    cells = dense.to_numpy()[np.repeat(np.arange(len(counts)), counts), np.array(asked.sparse_col_indices, np.int64)]
    return tinker.TensorData(cells, dense.dtype, asked.shape, asked.sparse_crow_indices, asked.sparse_col_indices)


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
