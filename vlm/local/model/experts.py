"""The sparse mixture-of-experts block of Qwen3-VL-MoE with LoRA on its experts.

PEFT's own layer for experts adds the product of A and B to the weights of all of them, a tensor as large as the model's
experts, in every forward. Here the two thin products run on the rows that reach an expert, sorted by expert, and no
change of a weight is ever held. One autograd function covers the block: the experts' own weights are frozen and get no
gradient, and what is cheap to compute again is not kept for the backward. It has no second derivative.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

# A and B, or several Bs where layers share an input. Those of one projection of all experts are as PEFT stores them,
# (r x experts, in) and (out, r x experts), or by expert, (experts, r, in) and (experts, out, r).
Pair: TypeAlias = tuple[Tensor, ...]


def sparse_mlp(x: Tensor, block: nn.Module, gate_up: Pair | None, down: Pair | None, scale: float) -> Tensor:
    """(N, hidden) → (N, hidden): what `block`, a stock Qwen3VLMoeTextSparseMoeBlock, computes with LoRA of `scale`
    (PEFT's alpha / r) on its experts' projections.

    The pairs are in x's dtype and may require gradients: zeros for experts that no row reached. The block is frozen;
    x gets its gradient through the experts and through the router.
    """
    router: Any = block.gate
    _, weights, chosen = router(x)
    return routed(x, chosen, weights, block.experts, gate_up, down, scale)


def routed(
    x: Tensor, chosen: Tensor, weights: Tensor, experts: Any, gate_up: Pair | None, down: Pair | None, scale: float
) -> Tensor:
    """The same behind a router, whichever that is. chosen, weights: (N, k), each row's experts and what they count."""
    groups = Groups.of(chosen, experts.num_experts)
    weights = weights.to(x.dtype)  # some routers give float32
    return _Experts.apply(x, weights, groups, experts, scale, *(gate_up or (None, None)), *(down or (None, None)))


def by_expert(pair: Pair, experts: int) -> Pair:
    """A pair as PEFT stores it → (experts, r, in) and (experts, out, r), B copied, as gradients may flow through.

    PEFT's B has the expert as its fastest index, so it is copied for every product; whoever runs many small forwards
    with the same weights (decoding) saves that by giving `sparse_mlp` the result of this. Pairs by expert pass through.
    """
    a, b = pair
    if a.ndim == 3:
        return pair
    return a.view(experts, -1, a.shape[-1]), b.view(b.shape[0], -1, experts).permute(2, 0, 1).contiguous()


@dataclass(frozen=True)
class Groups:
    """The (row, choice) pairs of a routing sorted by expert, and matrix products with a weight for each expert.

    `order` (N x k,) sorts the pairs (stable), `ends` (experts,) int32 is where each expert's end, k is `choices`.
    """

    order: Tensor
    ends: Tensor
    choices: int

    @classmethod
    def of(cls, chosen: Tensor, experts: int) -> "Groups":
        """From the router's (N, k) choices. On a GPU nothing waits for the result."""
        ordered, order = torch.sort(chosen.flatten(), stable=True)
        number = torch.arange(experts, device=chosen.device)
        ends = torch.searchsorted(ordered, number, right=True, out_int32=True)
        return cls(order, ends, chosen.shape[1])

    @cached_property
    def rows(self) -> Tensor:
        """(N x k,): the row of each sorted pair."""
        return self.order // self.choices

    @cached_property
    def spans(self) -> list[tuple[int, int, int]]:
        """(expert, start, end) of the experts that have rows. Waits for a GPU."""
        ends: list[int] = self.ends.tolist()
        return [(n, start, end) for n, (start, end) in enumerate(pairwise([0, *ends])) if start < end]

    @cached_property
    def _inverse(self) -> Tensor:
        inverse = torch.empty_like(self.order)
        inverse[self.order] = torch.arange(len(inverse), device=inverse.device)
        return inverse

    def unsorted(self, values: Tensor) -> Tensor:
        """(N x k, …) by expert → (N, k, …), in the order of the router's choices."""
        return values[self._inverse].unflatten(0, (-1, self.choices))

    def product(self, rows: Tensor, weight: Tensor, onto: Tensor | None = None) -> Tensor:
        """(N x k, in) times each one's (in, out) of (experts, in, out) → (N x k, out), added to `onto` in place where
        that is given."""
        if _groupable(rows, weight):
            result = functional.grouped_mm(rows, weight, offs=self.ends)
            return result if onto is None else onto.add_(result)
        out = rows.new_empty(len(rows), weight.shape[2]) if onto is None else onto
        for expert, start, end in self.spans:
            # addmm_ with beta 0 ignores what `out` held
            out[start:end].addmm_(rows[start:end], weight[expert], beta=0 if onto is None else 1)
        return out

    def outer(self, left: Tensor, right: Tensor) -> Tensor:
        """(N x k, a) and (N x k, b) → (experts, a, b): each expert's left.T @ right, zero where it has no rows."""
        if _groupable(left, right):
            result = functional.grouped_mm(left.t(), right, offs=self.ends)
            # No kernel promises to write a product over nothing.
            empty = torch.diff(self.ends, prepend=self.ends.new_zeros(1)) == 0
            return result.masked_fill_(empty[:, None, None], 0)
        result = left.new_zeros(len(self.ends), left.shape[1], right.shape[1])
        for expert, start, end in self.spans:
            torch.mm(left[start:end].t(), right[start:end], out=result[expert])
        return result


def _groupable(left: Tensor, right: Tensor) -> bool:
    """Whether torch's grouped product takes these, (rows, a) and (rows, b) or (experts, a, b).

    It is one kernel for bfloat16 on a GPU and elsewhere a loop like the one here. Strides other than 1 have to be
    multiples of 16 bytes (torch's GroupedMMUtils.h), which an odd rank's are not.
    """
    if left.device.type != "cuda" or left.dtype != torch.bfloat16 or right.dtype != left.dtype or not len(left):
        return False
    strides = [step for tensor in (left, right) for step in tensor.stride()[-2:]]
    return hasattr(functional, "grouped_mm") and all(step == 1 or step % 8 == 0 for step in strides)


def _project(groups: Groups, rows: Tensor, weight: Tensor, thin: Pair | None, scale: float) -> tuple[Tensor, Tensor]:
    """(P, in) by (experts, in, out), and by a pair (experts, in, r), (experts, r, out) times `scale`, if there is one →
    (P, out), and what the pair's first gave, scaled: (P, r)."""
    out = groups.product(rows, weight)
    if thin is None:
        return out, rows.new_empty(0)
    low = groups.product(rows, thin[0]).mul_(scale)
    return groups.product(low, thin[1], onto=out), low


def _thin(a: Tensor | None, b: Tensor | None, experts: int, *, back: bool = False) -> Pair | None:
    """The factors of LoRA's two products on the way forward, or on the gradient's way back."""
    if a is None or b is None:
        return None
    a, b = by_expert((a, b), experts)
    return (b, a) if back else (a.mT, b.mT)


def _pair_grads(
    groups: Groups, like: Tensor, rows: Tensor, low: Tensor, grad: Tensor, grad_low: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of A and B, in the layout of `like` (the B given), from what went in and what came back."""
    grad_a, grad_b = groups.outer(grad_low, rows), groups.outer(grad, low)
    if like.ndim == 3:
        return grad_a, grad_b
    return grad_a.flatten(0, 1), grad_b.permute(1, 2, 0).reshape(like.shape)


class _Experts(torch.autograd.Function):
    """Routed rows through the experts' projections and back together, summed in the order of the choices.

    Kept for the backward: the input once (not once a choice), the first projection's output, and the thin products.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, groups: Groups, experts: Any, scale: float, *factors: Tensor | None
    ) -> Tensor:
        a_in, b_in, a_out, b_out = factors
        thin = _thin(a_in, b_in, experts.num_experts)
        both, low_in = _project(groups, x[groups.rows], experts.gate_up_proj.mT, thin, scale)
        gate, up = both.chunk(2, dim=-1)
        thin = _thin(a_out, b_out, experts.num_experts)
        out, low_out = _project(groups, experts.act_fn(gate) * up, experts.down_proj.mT, thin, scale)
        ctx.groups, ctx.experts, ctx.scale = groups, experts, scale
        ctx.save_for_backward(x, weights, both, low_in, low_out, *factors)
        return groups.unsorted(out).mul_(weights[..., None]).sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        groups, experts, scale = ctx.groups, ctx.experts, ctx.scale
        x, weights, both, low_in, low_out, a_in, b_in, a_out, b_out = ctx.saved_tensors
        weight = weights.flatten()[groups.order, None]

        # The down projection is linear: the gradient goes back through it without the routing weights, which then
        # multiply the narrow side of each product. So the weights' own gradient needs no output of an expert.
        grad_rows, thin = grad[groups.rows], _thin(a_out, b_out, experts.num_experts, back=True)
        grad_mid, grad_low = _project(groups, grad_rows, experts.down_proj, thin, scale)
        mid, both = _activated(experts, both)
        grad_weights = groups.unsorted((grad_mid * mid.detach()).sum(-1))
        grads_out: tuple[Tensor | None, Tensor | None] = (None, None)
        if thin:
            grads_out = _pair_grads(groups, b_out, mid.detach(), low_out * weight, grad_rows, grad_low.mul_(weight))
        del grad_rows

        (grad_both,) = torch.autograd.grad(mid, both, grad_mid.mul_(weight))
        del mid, both, grad_mid
        thin = _thin(a_in, b_in, experts.num_experts, back=True)
        grad_x, grad_low = _project(groups, grad_both, experts.gate_up_proj, thin, scale)
        grads_in: tuple[Tensor | None, Tensor | None] = (None, None)
        if thin:
            grads_in = _pair_grads(groups, b_in, x[groups.rows], low_in, grad_both, grad_low)
        return groups.unsorted(grad_x).sum(1), grad_weights, None, None, None, *grads_in, *grads_out


def _activated(experts: Any, both: Tensor) -> tuple[Tensor, Tensor]:
    """The experts' activation of (P, 2 x moe) → (P, moe) and the leaf it was computed from, whatever the function."""
    with torch.enable_grad():
        leaf = both.detach().requires_grad_()
        gate, up = leaf.chunk(2, dim=-1)
        return experts.act_fn(gate) * up, leaf
