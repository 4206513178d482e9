"""LoRA adapters: which layers one covers, its numbers in flat buffers, and linear layers that compute with it.

An adapter is one flat float32 buffer a device, so that a snapshot is one copy and an optimizer step a few operations;
tensors under PEFT's own names are views of it. Layers that read the same input (q, k, v; gate, up) have their A side by
side: one product computes them. The linear layers need few passes over memory and give no gradient for frozen weights.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from kshot.errors import ModelError, RequestError
from vlm.local.model.experts import Pair, by_expert
from vlm.local.model.families import EXPERTS, family_of, targets

if TYPE_CHECKING:
    from peft import LoraConfig

MAX_RANK = 1024  # of what is trained, a rank beyond a layer's width adds nothing but memory
ALPHA = 32  # at any rank, as the Tinker API fixes it
_TEXT = r".*\.layers\.\d+\."
TARGETS = {  # what each flag trains; the first three are those of create_lora_training_client
    "train_attn": _TEXT + r"self_attn\.(q|k|v|o)_proj",
    "train_mlp": _TEXT + r"mlp\.(gate|up|down)_proj",
    "train_unembed": r".*lm_head",
    "train_vision": r".*visual\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.linear_fc[12])",
    "train_merger": r".*visual\.(merger|deepstack_merger_list\.\d+)\.linear_fc[12]",
}
EXPERT_PARAMETERS = {"gate_up_proj": "base_layer.", "down_proj": ""}  # PEFT nests one wrapper a parameter, last outside
NOTHING = "(?!)"  # a regular expression that no name matches
SHARED_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True)
class LoraSpec:
    """What a LoRA adapter covers; two adapters of one spec over one model have the same tensors."""

    rank: int = 32
    train_mlp: bool = True
    train_attn: bool = True
    train_unembed: bool = True
    train_vision: bool = False
    train_merger: bool = False  # of adapters from elsewhere: PEFT's all-linear covers it

    def __post_init__(self) -> None:
        if self.rank > MAX_RANK:
            raise RequestError(f"LoRA of rank {self.rank} is beyond {MAX_RANK}; take a smaller one")
        if self.rank < 1 or not self.patterns_of():
            raise RequestError(f"LoRA of rank {self.rank} on {len(self.patterns_of())} kinds of layers trains nothing")

    def patterns_of(self, targets: Mapping[str, str] = TARGETS) -> list[str]:
        """Regular expressions of the linear layers that are covered, by their names in the stock model."""
        return [pattern for flag, pattern in targets.items() if getattr(self, flag)]

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return ALPHA / self.rank

    @property
    def in_tower(self) -> bool:
        """Whether the vision tower's features depend on the adapter."""
        return self.train_vision or self.train_merger

    def config(
        self, stock: str | None = None, *, experts: bool = False, targets: Mapping[str, str] = TARGETS
    ) -> "LoraConfig":
        """PEFT's configuration. stock: the model's class in transformers. experts: whether the model has experts, which
        `train_mlp` covers. targets: of the model's layout.

        `auto_mapping` is how PEFT's AutoPeftModel finds the class; none of its task types is a vision-language model's.
        """
        from peft import LoraConfig

        parameters = [f"{EXPERTS}.{name}" for name in EXPERT_PARAMETERS] if experts and self.train_mlp else None
        return LoraConfig(
            auto_mapping={"base_model_class": stock, "parent_library": "transformers"} if stock else None,
            r=self.rank,
            lora_alpha=ALPHA,
            lora_dropout=0.0,
            bias="none",
            target_modules="|".join(self.patterns_of(targets)),
            target_parameters=parameters,
        )


@dataclass(frozen=True)
class Piece:
    """One tensor of an adapter: PEFT's name, shape, and where it begins in the flat buffer of its device."""

    name: str
    shape: tuple[int, int]
    device: torch.device
    start: int

    @property
    def end(self) -> int:
        return self.start + self.shape[0] * self.shape[1]

    def of(self, flats: Mapping[torch.device, Tensor]) -> Tensor:
        """The view of this piece."""
        return flats[self.device][self.start : self.end].view(self.shape)


Group = tuple[tuple[Piece, ...], ...]  # of layers that read one input: their As side by side, then each B


class Layout:
    """Where everything is that an adapter of a spec holds over a stock model.

    together: whether layers that read the same input are one group; the stock forward computes each by itself. device:
    of all tensors, where that is not each layer's own. targets: regular expressions of what each flag trains. dtype: of
    the buffers. Raises RequestError for a spec that covers nothing of the model, or
    its vision tower where only the stock forward has that.
    """

    def __init__(
        self, stock: nn.Module, spec: LoraSpec, together: bool | None = None, device: torch.device | None = None
    ) -> None:
        self.spec, self.family, self.sizes, self._device = spec, family_of(stock), dict[torch.device, int](), device
        self.dtype = torch.float64 if next(stock.parameters()).dtype == torch.float64 else torch.float32
        self.targets = TARGETS if self.family.packed else targets(stock, self.family)
        self._together = self.family.packed if together is None else together
        self.experts = any(name.endswith(EXPERTS) for name, _ in stock.named_modules())
        if spec.in_tower and not self.family.packed:
            raise RequestError(f"no LoRA is computed on the vision tower of a {self.family.stock}; leave it frozen")
        self.groups = dict(self._groups(stock))  # by the name of the first layer
        if not self.groups:
            raise RequestError(f"a {self.family.stock} has none of the layers that {spec} covers; train others too")

    @cached_property
    def pieces(self) -> dict[str, Piece]:
        """All tensors by PEFT's names."""
        return {piece.name: piece for group in self.groups.values() for part in group for piece in part}

    def config(self, spec: LoraSpec | None = None) -> "LoraConfig":
        """PEFT's configuration of an adapter of this layout, or of what another spec covers of it.

        In a model with experts PEFT takes a layer called gate_proj for theirs, as older transformers had them: there
        the layers beside experts are named as parameters.
        """
        spec = spec or self.spec
        config = spec.config(self.family.stock, experts=self.experts, targets=self.targets)
        if self.experts and spec.train_mlp and not self.family.packed:
            mlp = re.compile(self.targets.get("train_mlp", NOTHING))  # where experts are all there is
            beside = [name for name in self.groups if mlp.fullmatch(name)]
            others = {flag: pattern for flag, pattern in self.targets.items() if flag != "train_mlp"}
            config.target_parameters = [*(config.target_parameters or ()), *(f"{name}.weight" for name in beside)]
            config.target_modules = "|".join(spec.patterns_of(others)) or []
        return config

    def run_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of memory that training needs: weights, gradients and Adam's two moments in float32. If the model's
        `dtype` is another, weights and gradients are held in it as well."""
        copies = 0 if dtype == torch.float32 else 2 * dtype.itemsize
        return sum(self.sizes.values()) * (4 * 4 + copies)

    def snapshot_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of memory for fixed weights in the model's `dtype`. With experts they are held twice: as they are, and
        sorted by expert."""
        return sum(self.sizes.values()) * dtype.itemsize * (2 if self.experts else 1)

    def flats(self, tensors: Mapping[str, Tensor]) -> dict[torch.device, Tensor]:
        """Buffers that hold these tensors, by PEFT's names."""
        flats = {device: torch.empty(size, dtype=self.dtype, device=device) for device, size in self.sizes.items()}
        for name, piece in self.pieces.items():
            piece.of(flats).copy_(tensors[name])
        return flats

    def _groups(self, stock: nn.Module) -> Iterator[tuple[str, Group]]:
        pattern = re.compile("|".join(self.spec.patterns_of(self.targets)) or NOTHING)
        chosen = {name: layer for name, layer in stock.named_modules() if pattern.fullmatch(name)}
        for names in _sharing_input(list(chosen)) if self._together else ([name] for name in chosen):
            shapes = [(chosen[n].in_features, chosen[n].out_features) for n in names]
            yield names[0], self._group(names, shapes, chosen[names[0]].weight.device, 1)
        experts = [(n, m) for n, m in stock.named_modules() if self.spec.train_mlp and n.endswith(EXPERTS)]
        for name, module in experts:
            for parameter, inner in EXPERT_PARAMETERS.items():
                stack, inside = getattr(module, parameter), f"{name}.{inner}".rstrip(".")
                count, out, into = stack.shape
                yield f"{name}.{parameter}", self._group([inside], [(into, out)], stack.device, count)

    def _group(
        self, names: Sequence[str], shapes: Sequence[tuple[int, int]], device: torch.device, experts: int
    ) -> Group:
        rank = self.spec.rank * experts
        a = [self._piece(f"{n}.lora_A", (rank, into), device) for n, (into, _) in zip(names, shapes, strict=True)]
        b = [self._piece(f"{n}.lora_B", (out, rank), device) for n, (_, out) in zip(names, shapes, strict=True)]
        return (tuple(a), *((each,) for each in b))

    def _piece(self, name: str, shape: tuple[int, int], device: torch.device) -> Piece:
        device = self._device or device
        start = self.sizes.get(device, 0)
        piece = Piece(f"base_model.model.{name}.weight", shape, device, start)
        self.sizes[device] = piece.end
        return piece


def _sharing_input(names: Sequence[str]) -> Iterator[list[str]]:
    """The names, those that read one input together."""
    left = list(names)
    while left:
        parent, _, kind = left[0].rpartition(".")
        together = next((kinds for kinds in SHARED_INPUT if kind in kinds), (kind,))
        members = [name for kind in together if (name := f"{parent}.{kind}" if parent else kind) in left]
        yield members
        left = [name for name in left if name not in members]


def misfits(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The names whose tensor is missing, too many or of another shape, in order."""
    names = {*tensors, *shapes}
    return sorted(n for n in names if n not in tensors or tuple(tensors[n].shape) != shapes.get(n))


class Adapter:
    """The numbers of one adapter: a flat buffer a device. name: whose they are, for errors."""

    def __init__(self, layout: Layout, flats: Mapping[torch.device, Tensor], name: str = "an adapter") -> None:
        self.layout, self.flats, self.name = layout, dict(flats), name

    @classmethod
    def fresh(cls, layout: Layout, seed: int) -> "Adapter":
        """A random from `seed` (uniform to 1/sqrt(in), as PEFT's default), B zero: no change to the model."""
        flats = {device: torch.zeros(size, dtype=layout.dtype, device=device) for device, size in layout.sizes.items()}
        adapter = cls(layout, flats)
        generator = torch.Generator().manual_seed(seed)
        for name, tensor in adapter.named().items():
            if name.endswith(".lora_A.weight"):
                bound = tensor.shape[1] ** -0.5
                tensor.copy_(torch.empty(tensor.shape).uniform_(-bound, bound, generator=generator))
        return adapter

    @classmethod
    def of(cls, layout: Layout, weights: Mapping[str, Tensor]) -> "Adapter":
        """The adapter with these tensors. Raises ModelError where names or shapes are not the layout's."""
        expected = {name: piece.shape for name, piece in layout.pieces.items()}
        if wrong := misfits(weights, expected):
            name, shape = wrong[0], tuple(weights[wrong[0]].shape) if wrong[0] in weights else "missing"
            first = f"{name} is {shape}, not {expected.get(name, 'to be there')}"
            raise ModelError(f"checkpoint does not fit the adapter in {len(wrong)} tensors: {first}")
        return cls(layout, layout.flats(weights))

    def named(self) -> dict[str, Tensor]:
        """PEFT's name → the view of that tensor."""
        return {name: piece.of(self.flats) for name, piece in self.layout.pieces.items()}

    def snapshot(self, dtype: torch.dtype) -> "Factors":
        """The numbers as they are now, for forward passes in `dtype`."""
        flats = {device: flat.detach().to(dtype, copy=True) for device, flat in self.flats.items()}
        return Factors(self.layout, flats, name=self.name)


class Factors:
    """An adapter as a forward pass uses it: by the name of a layer (the first of those that share its input). name: as
    of the adapter."""

    def __init__(
        self,
        layout: Layout,
        flats: Mapping[torch.device, Tensor],
        gradients: Mapping[torch.device, Tensor] | None = None,
        name: str = "an adapter",
    ) -> None:
        self.name, self.spec, self.scale, self._groups = name, layout.spec, layout.spec.scale, dict[str, Pair]()
        for layer, group in layout.groups.items():
            pair = tuple(self._leaf(pieces, flats, gradients) for pieces in group)
            if gradients is None and f"{EXPERTS}." in layer:  # fixed: put in the experts' order once, not at every use
                pair = by_expert(pair, len(pair[0]) // self.spec.rank)
            self._groups[layer] = pair

    def pair(self, name: str) -> Pair | None:
        """A (parts x rank, in), and B (out, rank) of each layer that reads this input; None where there is none."""
        return self._groups.get(name)

    @staticmethod
    def _leaf(pieces: Sequence[Piece], flats: Any, gradients: Any) -> Tensor:
        """The view of neighbouring pieces; a leaf of autograd that adds to `gradients`, if there are any."""
        rows = sum(piece.shape[0] for piece in pieces)
        whole = Piece("", (rows, pieces[0].shape[1]), pieces[0].device, pieces[0].start)
        leaf = whole.of(flats).detach()
        if gradients is not None:
            leaf.requires_grad_()
            leaf.grad = whole.of(gradients)
        return leaf


SMALL = 1 << 20  # numbers in a weight that is worth having twice: with its delta, as one product instead of many


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, pair: Pair | None, scale: float, residual: Tensor | None = None
) -> Tensor:
    """(n, out): x W^T + bias + residual, and for each part of the outputs scale · x A^T B^T (Hu et al. 2021).

    x: (n, in). weight: (out, in), frozen: the rows of the parts one after the other. residual: (n, out).
    Where a pass is long and the layer small, the delta is added to the weight once for all positions.
    """
    if pair is None:
        return _frozen(x, weight, bias, residual)
    out, into = weight.shape
    # by operations; in float32 alone, as a sum in another type would lose the small delta
    merge = weight.dtype == torch.float32 and weight.numel() <= SMALL and len(x) * (out + into) >= 2 * out * into
    return (_Merged if merge else _Separate).apply(x, weight, bias, residual, scale, *pair)


def _frozen(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    if residual is None:
        return functional.linear(x, weight, bias)
    out = torch.addmm(residual, x, weight.t())
    return out if bias is None else out + bias


class _Separate(torch.autograd.Function):
    """The narrow products beside the frozen one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Any, residual: Any, scale: float, *pair: Tensor) -> Tensor:
        a, *bs = pair
        out, inner = _frozen(x, weight, bias, residual), x @ a.t()
        for part, narrow, b in zip(out.split([len(b) for b in bs], 1), inner.chunk(len(bs), 1), bs, strict=True):
            part.addmm_(narrow, b.t(), alpha=scale)
        ctx.save_for_backward(x, weight, inner, *pair)
        ctx.scale, ctx.gathered = scale, _gathered(pair)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight, inner, *pair = ctx.saved_tensors
        a, *bs = pair
        back = torch.empty_like(inner)  # the gradient of x A^T
        parts = gradient.split([len(b) for b in bs], 1)
        for part, into, b in zip(parts, back.chunk(len(bs), 1), bs, strict=True):
            torch.mm(part, b, out=into)
        if ctx.scale != 1:
            back *= ctx.scale
        to_x = (gradient @ weight).addmm_(back, a) if ctx.needs_input_grad[0] else None
        to_residual = gradient if ctx.needs_input_grad[3] else None
        to_pair: Sequence[Tensor | None] = [None for _ in pair]
        if ctx.needs_input_grad[5]:
            of_a, *of_bs = ctx.gathered or (to_pair := [torch.zeros_like(each) for each in pair])
            of_a.addmm_(back.t(), x)
            for of_b, part, narrow in zip(of_bs, parts, inner.chunk(len(bs), 1), strict=True):
                of_b.addmm_(part.t(), narrow, alpha=ctx.scale)
        return to_x, None, None, to_residual, None, *to_pair


def _gathered(leaves: Pair) -> Pair:
    """What the leaves' gradients are added to: to make a tensor for autograd to add costs more than a small sum."""
    gradients = tuple(leaf.grad for leaf in leaves if leaf.grad is not None)
    return gradients if len(gradients) == len(leaves) else ()


class _Merged(torch.autograd.Function):
    """The same with W + scale · B A as the weight: the gradients of A and B alone need the narrow products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Any, residual: Any, scale: float, *pair: Tensor) -> Tensor:
        a, *bs = pair
        b = torch.block_diag(*bs) if len(bs) > 1 else bs[0]
        merged = torch.addmm(weight, b, a, alpha=scale)
        ctx.save_for_backward(x, merged, b, *pair)
        ctx.scale, ctx.gathered = scale, _gathered(pair)
        return _frozen(x, merged, bias, residual)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, merged, b, *pair = ctx.saved_tensors
        a, *bs = pair
        to_x = gradient @ merged if ctx.needs_input_grad[0] else None
        to_residual = gradient if ctx.needs_input_grad[3] else None
        to_pair: Sequence[Tensor | None] = [None for _ in pair]
        if ctx.needs_input_grad[5]:
            of_a, *of_bs = ctx.gathered or (to_pair := [torch.zeros_like(each) for each in pair])
            of_a.addmm_((gradient @ b).t(), x, alpha=ctx.scale)
            to_b = (a @ x.t()) @ gradient  # (parts x rank, out): its blocks belong to the parts
            for n, (of_b, columns) in enumerate(zip(of_bs, to_b.split([len(b) for b in bs], 1), strict=True)):
                of_b.add_(columns.chunk(len(bs))[n].t(), alpha=ctx.scale)
        return to_x, None, None, to_residual, None, *to_pair
