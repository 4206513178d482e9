"""Converts a DINOv2 in an .onnx file to .safetensors, for `--backbone FILE.safetensors`.

    pip install onnx
    python experiments/examples/onnx_to_safetensors.py MODEL.onnx MODEL.safetensors

torch's exporter keeps most names. The weight of a linear layer is stored transposed and without its name: it is found
by the bias that is added to its product. Position embeddings without a name are stored in two parts, CLS and patches.
"""

import re
import sys

import numpy as np
import onnx
from onnx import numpy_helper
from safetensors.numpy import save_file

NAME = re.compile(r"[A-Za-z_]\w*(\.\w+)+|cls_token|pos_embed|reg(ister)?_tokens?")  # not onnx::MatMul_7 or val_7


def convert(source: str, target: str) -> None:
    """Write the named floating-point tensors of `source` to `target`, float32."""
    graph = onnx.load(source).graph
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:  # equal tensors are stored once; Identity nodes have the other names
        if node.op_type == "Identity" and node.input[0] in stored:
            stored[node.output[0]] = stored[node.input[0]]
    tensors = {name: value for name, value in stored.items() if NAME.fullmatch(name) and value.dtype.kind == "f"}
    products = {n.output[0]: n.input[1] for n in graph.node if n.op_type == "MatMul" and n.input[1] in stored}
    for node in graph.node:
        bias = next((name for name in node.input if name in tensors and name.endswith(".bias")), None)
        product = next((name for name in node.input if name in products), None)
        if node.op_type == "Add" and bias and product:
            tensors.setdefault(bias.removesuffix("bias") + "weight", stored[products[product]].T)
    token = next((name for name in tensors if name.endswith("embeddings.cls_token")), None)
    if token and (positions := token.replace("cls_token", "position_embeddings")) not in tensors:
        width = tensors[token].shape[-1]
        parts = [v for n, v in stored.items() if n not in tensors and v.ndim == 3 and v.shape[::2] == (1, width)]
        tensors[positions] = np.concatenate(sorted(parts, key=lambda part: part.shape[1]), axis=1)
    save_file({name: np.ascontiguousarray(value, np.float32) for name, value in tensors.items()}, target)


if __name__ == "__main__":
    convert(*sys.argv[1:])
