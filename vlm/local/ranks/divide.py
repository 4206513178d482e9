"""A model whose weights are divided among ranks, by FSDP2: each rank holds a part of all layers, and one of them whole.

`fully_shard` divides decoder layers, tower blocks, embeddings and head; what else there is is small, and whole on every
rank. The files are read layer by layer, and each rank keeps its rows. A layer is gathered for its forward, and again
for its backward, which computes it anew from its input. Of a stock forward FSDP2's own hooks gather the layers, and
nothing is computed twice.

Gathering needs all ranks at once. They have different work, so before each pass they agree on what comes next, and who
has no such pass gathers the same layers and computes nothing (`Turns`).
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from vlm.local.engine import Batch, BetweenLayers, Engine
from vlm.local.model.families import family_of
from vlm.local.model.load import Model, PartReader
from vlm.local.model.lora import Factors, Layout
from vlm.local.model.packed import Layer, Text
from vlm.local.model.stock import StockText
from vlm.local.model.tower import ImageFeatures, Linear, plain
from vlm.local.packs import Pack
from vlm.local.training_run import TrainingRun
from vlm.local.vision import Patches, Vision

TOWER, TEXT, HEAD, TRAIN, NOTHING = range(5)  # passes, in the order in which they go first


class Turns:
    """Which pass comes next, of all ranks. empty: by kind of pass, what gathers its layers and computes nothing."""

    def __init__(self, empty: dict[int, Callable[[], None]]) -> None:
        self._empty, self._inside = empty, False

    @contextmanager
    def turn(self, kind: int) -> Iterator[None]:
        """Around a pass of this kind; passes within a pass are part of it. What fails in it ends all ranks."""
        if self._inside:
            yield
            return
        while (first := self._first(kind)) != kind:
            self._empty[first]()
        self._inside = True
        try:
            yield
        except Exception as error:
            raise RuntimeError(f"in the middle of a pass of all ranks: {type(error).__name__}: {error}") from error
        finally:
            self._inside = False

    def drain(self) -> None:
        """Take part in the others' passes until nobody has any."""
        while (first := self._first(NOTHING)) != NOTHING:
            self._empty[first]()

    @staticmethod
    def _first(kind: int) -> int:
        """The first of the kinds that ranks want."""
        wanted = torch.tensor(kind)
        dist.all_reduce(wanted, dist.ReduceOp.MIN)
        return int(wanted)


@contextmanager
def opened(module: Any) -> Iterator[None]:
    """With the whole weights of a divided module."""
    module.unshard()
    counted.add(module)
    try:
        yield
    finally:
        module.reshard()
        counted.remove(module)


class Held:
    """Bytes of weights in this process: of all parts, and the most that there were at once with what was gathered or
    being read."""

    def __init__(self) -> None:
        self.parts = self.peak = self._more = 0

    def keep(self, module: nn.Module) -> None:
        """Count what stays."""
        self.parts += sum(_bytes(each) for each in module.parameters())
        self.peak = max(self.peak, self.parts + self._more)

    def add(self, module: nn.Module) -> None:
        """Count what is there for a while."""
        self._more += sum(_bytes(each) for each in module.parameters())
        self.peak = max(self.peak, self.parts + self._more)

    def read(self, size: int) -> None:
        """Count what is in memory while each rank takes its rows."""
        self.peak = max(self.peak, self.parts + self._more + size)

    def remove(self, module: nn.Module) -> None:
        """Call it after `reshard`: the whole sizes are those of DTensor."""
        self._more -= sum(each.numel() * each.element_size() for each in module.parameters())


def _bytes(parameter: Tensor) -> int:
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return 0 if local.is_meta else local.numel() * local.element_size()


counted = Held()


def divided(empty: nn.Module, mesh: DeviceMesh, parts_of: Callable[[str], Sequence[Tensor]]) -> Any:
    """A module on the meta device with this rank's rows of its weights. parts_of: by a parameter's name the tensors
    that stand in it one after the other."""
    buffers = {name: buffer for name, buffer in empty.named_buffers() if not buffer.is_meta}
    read = {id(part): part for name, _ in empty.named_parameters() for part in parts_of(name)}.values()
    module: Any = fully_shard(empty, mesh=mesh, reshard_after_forward=True)
    module.to_empty(device=mesh.device_type)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            local = parameter.to_local()
            parts = parts_of(name)
            size = -(-sum(map(len, parts)) // mesh.size())
            _copy_rows(local, parts, mesh.get_local_rank() * size)
        for name, buffer in buffers.items():
            module.get_buffer(name).copy_(buffer)
    counted.keep(module)
    counted.read(sum(map(_bytes, read)))
    return module


def _copy_rows(target: Tensor, parts: Sequence[Tensor], start: int) -> None:
    """Rows from `start` on of tensors that stand one after the other, as many as the target has."""
    at, begin = 0, 0
    for part in parts:
        first, last = max(start, begin), min(start + len(target), begin + len(part))
        if first < last:
            target[at : at + last - first].copy_(part[first - begin : last - begin])
            at += last - first
        begin += len(part)


class DividedModel(Model):
    """A checkpoint of whose layers each rank holds a part. whole_tower: whether the vision tower is on every rank."""

    def __init__(
        self, name: str, device: str, dtype: torch.dtype | None, path: str, *, whole_tower: bool = False
    ) -> None:
        self.device = torch.device(device)
        made: list[PartReader] = []

        def read() -> Any:
            made.append(PartReader(path, self.device, dtype))
            return made[0].stock

        self.describe(name, path, read)
        (reader,) = made
        self.dtype = reader.dtype
        family = family_of(self.stock)
        self.layout = cache(partial(Layout, self.stock, device=self.device))
        mesh = init_device_mesh(self.device.type, (dist.get_world_size(),))
        self.tower: list[Any] = []
        if family.vision and not whole_tower:
            self._divide_tower(reader, mesh)
        build = _packed if family.packed else _stock
        self.text, gathered = build(self.stock, reader, mesh, name)
        embed, head, layers = gathered
        self.turns = Turns(
            {
                TOWER: partial(_gather, self.tower),
                TEXT: partial(_gather, [embed, *layers]),
                HEAD: partial(_gather, [head]),
                TRAIN: partial(_gather, [embed, *layers, head, *layers[::-1]]),
            }
        )
        self.text.turns = self.turns  # type: ignore[attr-defined]

    def _divide_tower(self, reader: PartReader, mesh: DeviceMesh) -> None:
        visual = self.stock.get_encoder("image")
        name = next(name for name, module in self.stock.named_modules() if module is visual)
        for number, block in enumerate(visual.blocks):
            with reader.read(f"{name}.blocks.{number}."):
                visual.blocks[number] = divided(_empty(block), mesh, partial(_parameter, block))
        self.tower = [*visual.blocks]


def _parameter(module: nn.Module, name: str) -> list[Tensor]:
    return [module.get_parameter(name)]


def _gather(modules: Sequence[Any]) -> None:
    for module in modules:
        with opened(module):
            pass


def _empty(module: nn.Module) -> nn.Module:
    """Its structure, and its buffers, with weights on the meta device."""
    memo: dict[int, Any] = {
        id(each): nn.Parameter(torch.empty_like(each, device="meta"), requires_grad=False)
        for each in module.parameters()
    }
    return copy.deepcopy(module, memo)


Gathered = tuple[Any, Any, list[Any]]  # embeddings, head, layers: what passes gather


def _ends(stock: Any, reader: PartReader, mesh: DeviceMesh, *, shared: bool) -> tuple[Any, Any]:
    """The divided embeddings and head: one module, where they are tied and may be `shared`."""
    made = []
    embed, head = stock.get_input_embeddings(), stock.get_output_embeddings()
    tied = head.weight is embed.weight
    names = {id(module): name for name, module in stock.named_modules()}
    for module in (embed,) if tied and shared else (embed, head):
        source = embed if tied else module
        with reader.read(f"{names[id(source)]}."):
            parts = {"weight": [source.weight]} | {k: [p] for k, p in module.named_parameters() if k != "weight"}
            made.append(divided(_empty(module), mesh, parts.__getitem__))
    return made[0], made[-1]


def _packed(stock: Any, reader: PartReader, mesh: DeviceMesh, name: str) -> tuple[Any, Gathered]:
    family, layers, device = family_of(stock), list[Any](), reader.device
    for number, layer in enumerate(stock.get_submodule(family.layers)):
        at = f"{family.layers}.{number}"
        empty = Layer(at, number, _empty(layer))
        with reader.read(f"{at}."):
            layers.append(divided(empty, mesh, partial(Layer.sources, layer)))
            empty.hold(layer, device)
    embed, head = _ends(stock, reader, mesh, shared=True)
    reader.read_rest()
    return DividedText(stock, layers, embed, head), (embed, head, layers)


def _stock(stock: Any, reader: PartReader, mesh: DeviceMesh, name: str) -> tuple[Any, Gathered]:
    family = family_of(stock)
    held = stock.get_submodule(family.layers)
    for number, layer in enumerate(held):
        with reader.read(f"{family.layers}.{number}."):
            held[number] = divided(_empty(layer), mesh, partial(_parameter, layer))
    embed, head = _ends(stock, reader, mesh, shared=False)
    reader.read_rest()
    stock.set_input_embeddings(embed)
    stock.set_output_embeddings(head)
    for after in (head.set_reshard_after_forward, head.set_reshard_after_backward):
        after(False)
    embed.register_forward_hook(_with_gradient)
    return DividedStock(stock, name), (embed, head, [*held])


def _with_gradient(module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
    """A hook of the embeddings: all ranks go back through all layers."""
    return output.requires_grad_() if torch.is_grad_enabled() else None


class _Recomputed(torch.autograd.Function):
    """A layer's output; for its gradient it is computed again from its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any, call: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.layer, ctx.call = layer, call
        with opened(layer):
            return call(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with opened(ctx.layer), torch.enable_grad():
            torch.autograd.backward(ctx.call(x), gradient)
        return x.grad, None, None


class DividedText(Text):
    """`Text` whose layers are gathered one at a time."""

    turns: Turns

    def __init__(self, stock: Any, layers: Sequence[Any], embed: Any, head: Any) -> None:
        super().__init__(stock, layers)
        self._embed, self._head, self.head = embed, head, head

    def hidden(self, *arguments: Any) -> Tensor:
        with self.turns.turn(TEXT):  # within a turn of TRAIN, if there is a gradient
            return super().hidden(*arguments)

    def embedded(self, ids: Tensor) -> Tensor:
        with opened(self._embed):
            return super().embedded(ids)

    def through(self, layer: Any, x: Tensor, *arguments: Any) -> Tensor:
        if torch.is_grad_enabled() and not x.requires_grad:
            x = x.detach().requires_grad_()  # all ranks go back through all layers
        out: Tensor = _Recomputed.apply(x, layer, lambda x: layer.forward(x, *arguments))
        return out

    def logits(self, hidden: Tensor, factors: Factors | None, tokens: Tensor | None = None) -> Tensor:
        if torch.is_grad_enabled():  # the head is open
            return super().logits(hidden, factors, tokens)
        with self.turns.turn(HEAD), opened(self.head):
            return super().logits(hidden, factors, tokens)


class DividedStock(StockText):
    """`StockText` whose layers are gathered by FSDP2's hooks."""

    turns = Turns({})  # while it is tried, all ranks do the same

    def __init__(self, stock: Any, name: str) -> None:
        self.head = stock.get_output_embeddings()
        super().__init__(stock, name)
        self.head.reshard()

    def _run(self, *arguments: Any, **options: Any) -> tuple[Tensor, Any]:
        with self.turns.turn(TEXT):
            return super()._run(*arguments, **options)

    def logits(self, hidden: Tensor, factors: Factors | None, tokens: Tensor | None = None) -> Tensor:
        if torch.is_grad_enabled():
            return super().logits(hidden, factors, tokens)
        with self.turns.turn(HEAD), opened(self.head):
            return super().logits(hidden, factors, tokens)


class DividedVision(Vision):
    """`Vision` whose blocks are gathered one at a time."""

    _opened = staticmethod(opened)

    def _run(self, images: Sequence[Patches], linear: Linear = plain) -> list[ImageFeatures]:
        model: Any = self._model
        with model.turns.turn(TOWER):
            return super()._run(images, linear)


class DividedEngine(Engine):
    """`Engine` whose passes with a gradient are a turn of all ranks: the text model, the head and its way back, and the
    way back through the text model."""

    def computed(
        self,
        run: TrainingRun,
        pack: Pack,
        batch: Batch,
        value_of: Callable[[Tensor], Tensor],
        between_layers: BetweenLayers | None = None,
    ) -> tuple[Tensor, Tensor]:
        if not (torch.is_grad_enabled() and len(pack.scored_positions)):
            return super().computed(run, pack, batch, value_of)
        model: Any = self.model
        with model.turns.turn(TRAIN):
            with model.timed("forward"):
                hidden = self._states(run.factors, pack, batch, None)
                leaf = hidden.detach().requires_grad_()
            found: list[Tensor] = []

            def backward() -> None:
                with opened(model.text.head):
                    log_probs = self._scored(run.factors, pack, leaf)
                    value = value_of(log_probs)
                    value.backward()
                found.extend((log_probs.detach(), value.detach()))
                hidden.backward(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)

            with model.timed("backward"):
                run.add(backward)
            log_probs, value = found
        return log_probs, value
