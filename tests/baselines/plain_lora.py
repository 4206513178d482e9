"""LoRA with a linear head written without the engine: merged weights, stock timm, torch's autograd, AdamW by hand."""

import tinker
import torch
from tinker import types
from torch.func import functional_call

from baselines import nano
from baselines.backbone import load
from baselines.features import resized
from baselines.lora import ALPHA, LoraHeadClient, datum

LINEARS = [f"blocks.{i}.{name}" for i in range(4) for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
State = dict[str, torch.Tensor]


def data_of(images: list[bytes], labels: list[int]) -> list[tinker.Datum]:
    return [datum(image, label) for image, label in zip(images, labels, strict=True)]


def trained(client: LoraHeadClient) -> State:
    """A copy of what the client trains."""
    return {name: p.detach().clone() for name, p in client.parameters.items()}


def gradients(client: LoraHeadClient) -> State:
    """A copy of the accumulated gradients."""
    return {name: p.grad.clone() for name, p in client.parameters.items() if p.grad is not None}


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def step(client: LoraHeadClient, data: list[tinker.Datum], adam: types.AdamParams) -> float:
    loss = client.forward_backward(data, "cross_entropy")
    client.optim_step(adam).result()
    return loss.result().metrics["loss:sum"]


def merged(state: State) -> State:
    """The backbone's parameters with W + (alpha / rank) B A in place of W."""
    parameters = dict(load(nano.NAME).module.named_parameters())
    for name in LINEARS:
        a, b = (state[f"{name}.lora_{half}.default.weight"] for half in "AB")
        parameters[f"{name}.weight"] = parameters[f"{name}.weight"] + ALPHA / len(a) * b @ a
    return parameters


def log_probs(state: State, images: list[bytes]) -> torch.Tensor:
    """(N, n_classes) from the CLS token, one image at a time."""
    backbone, parameters = load(nano.NAME), merged(state)
    rows = []
    for image in images:
        pixels = backbone.normalised([resized(image, backbone.patch)])
        cls = functional_call(backbone.module, parameters, (pixels,))
        rows.append((cls @ state["head.weight"].T + state["head.bias"]).log_softmax(1))
    return torch.cat(rows)


def adamw(state: State, moments: dict[str, list[torch.Tensor]], step: int, p: types.AdamParams) -> tuple[State, float]:
    """The state after one step with its gradients, and their norm. moments: of each tensor, written to."""
    norm = torch.stack([value.grad.square().sum() for value in state.values()]).sum().sqrt().item()
    scale = min(1.0, p.grad_clip_norm / norm) if p.grad_clip_norm else 1.0
    updated = {}
    for name, value in state.items():
        gradient = scale * value.grad
        first, second = moments.setdefault(name, [torch.zeros_like(value), torch.zeros_like(value)])
        first = p.beta1 * first + (1 - p.beta1) * gradient
        second = p.beta2 * second + (1 - p.beta2) * gradient**2
        moments[name] = [first, second]
        m, v = first / (1 - p.beta1**step), second / (1 - p.beta2**step)
        decayed = value * (1 - p.learning_rate * p.weight_decay)
        updated[name] = (decayed - p.learning_rate * m / (v.sqrt() + p.eps)).detach()
    return updated, norm
