"""Any other model of transformers, by its own forward: slower than the packed one, and never wrong.

It is called as the packed text model is. What differs is inside: rows are padded on the right where a pass keeps no
cache. Where it keeps one, rows of one length go through together, as padding would get into a state (linear attention,
convolutions, sliding windows). A branch of a label trie is a copy of the cache after the prompt.

LoRA is added by hooks on linear layers, and by the experts' function. They are there during a call alone, and hold the
adapter themselves: other calls may run between the layers of one.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from kshot.errors import ModelError
from kshot.hub import one_line, translated
from vlm.label_trie import ROOT
from vlm.local.model.attention import Attention, Causal, DecodeStep, Rows, Tree
from vlm.local.model.experts import Pair, routed
from vlm.local.model.families import EXPERTS, PROJECTIONS, STATIC_ROPE, family_of
from vlm.local.model.lora import Factors
from vlm.local.model.ops import wide
from vlm.local.model.packed import PackedInputs, mrope_positions

TURN = "original_max_position_embeddings"
BRANCHED = 1 << 15  # positions of the caches that branches of a trie take together


@dataclass
class _Group:
    """Rows of one length. rows: their numbers. states: the stock cache of all of them. ids: (rows, length), kept where
    the cache may have to be made again."""

    rows: list[int]
    states: Any
    ids: Tensor | None = None


class StockCache:
    """What the stock forward keeps of rows, in groups of one length. capacity: as `joined` was told."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.lengths, self.capacity = torch.tensor(lengths, device=device), max(lengths)
        self.groups = list[_Group]()

    @classmethod
    def joined(cls, parts: Sequence[tuple["StockCache", Sequence[int]]], capacity: int) -> "StockCache":
        """A cache of these rows of each cache, in order (repeated where they stand twice)."""
        lengths = [n for cache, rows in parts for n in cache.lengths[list(rows)].tolist()]
        other, start = cls(lengths, parts[0][0].lengths.device), 0
        other.capacity = capacity
        for cache, rows in parts:
            for group in cache.groups:
                members = [(start + n, group.rows.index(row)) for n, row in enumerate(rows) if row in group.rows]
                if members:
                    numbers, chosen = zip(*members, strict=True)
                    ids = None if group.ids is None else group.ids[[*chosen]]
                    other.groups.append(_Group([*numbers], _selected(group.states, chosen), ids))
            start += len(rows)
        return other


def _selected(states: Any, rows: Sequence[int]) -> Any:
    """A copy of a stock cache with these rows."""
    other = copy.deepcopy(states)
    other.reorder_cache(torch.tensor(rows))
    return other


class StockText:
    """The text model and the head of a stock model, with the tower's features where it has one."""

    Cache: Any = StockCache

    def __init__(self, stock: Any, name: str = "") -> None:
        """name: of the model, for errors. Raises ModelError for a model that cannot be run in this way."""
        self._stock, self._core, family = stock, stock.base_model, family_of(stock)
        self.layers = [*stock.get_submodule(family.layers)]
        self._head, self._head_name = stock.get_output_embeddings(), family.head
        self.linears = {n: m for n, m in stock.named_modules() if isinstance(m, nn.Linear) and m is not self._head}
        self.experts = {n: m for n, m in stock.named_modules() if n.endswith(EXPERTS)}
        self._three_axes = hasattr(self._core, "get_rope_index")
        rope = getattr(stock.config.get_text_config(), "rope_parameters", None) or {}
        kinds = [rope, *(each for each in rope.values() if isinstance(each, dict))]  # some have one a type of layer
        # angles of other kinds depend on the longest row of a pass
        self._pads = all(each.get("rope_type", "default") in STATIC_ROPE for each in kinds)
        # behind it all positions of a text have other angles
        self._turn = next((each.get(TURN) for each in kinds if each.get("rope_type") == "longrope"), None)
        with translated(lambda error: ModelError(f"model {name} cannot be run ({one_line(error)}); give another")):
            problem = self._problem(family.vision)
        if problem:
            raise ModelError(f"model {name} is of type {stock.config.model_type!r}, which {problem}; give another")

    def _problem(self, vision: bool) -> str:
        """What the model does otherwise than the decoders that are run here, found by trying; or ""."""
        if vision and not self._takes_images():
            return "takes images in another way than as features of patches"
        if "past_key_values" not in signature(self._core.forward).parameters:
            return "keeps no cache that is known here"
        if self._three_axes and self._turn is not None:
            return "has longrope angles on three axes"
        ids = torch.tensor([[1, 2, 3], [1, 2, 4]], device=self._stock.get_input_embeddings().weight.device)
        positions = torch.arange(3, device=ids.device).expand(3, 2, 3)
        with torch.no_grad():  # what modules keep from here is of use to a backward pass too
            x, _ = self._run(ids, positions)
            _, states = self._run(ids[:1, :2], positions[:, :1, :2], keep=True)
            last, _ = self._run(ids[:, 2:], positions[:, :, 2:], states=_selected(states, [0, 0]))
            logits, whole = self.logits(x[0], None), self._stock(input_ids=ids[:1], use_cache=False).logits[0]
        if _far(x[0, :2], x[1, :2], at_most=0.05):  # the same numbers, but for their order in sums
            return "looks ahead in its text"
        if _far(logits, whole.to(logits.device)):
            return "computes its logits not from the last states alone"
        return "writes another text from its cache than without" if _far(last, x[:, 2:]) else ""

    def _takes_images(self) -> bool:
        """Whether it takes the tower's features, and has an image's positions where the engine puts them."""
        if "mm_encoder_outputs" not in signature(self._core.forward).parameters or not self._three_axes:
            return False
        merge = self._stock.config.vision_config.spatial_merge_size
        grid, kinds = (1, 2 * merge, 3 * merge), torch.tensor([[0] * 2 + [1] * 6 + [0] * 2])
        theirs, _ = self._core.get_rope_index(kinds, mm_token_type_ids=kinds, image_grid_thw=torch.tensor([grid]))
        return bool((theirs[:, 0].numpy() == mrope_positions((2, grid, 2), merge)[0]).all())

    def hidden(
        self,
        inputs: PackedInputs,
        attention: Attention,
        factors: Factors | None,
        between_layers: Callable[[], None] | None = None,
    ) -> Tensor:
        """As `packed.Text.hidden`: (positions, hidden), or (wanted, hidden), after the norm."""
        with _Adapted(self, factors, between_layers):
            if isinstance(attention, DecodeStep):
                return self._decode(inputs, attention)
            if isinstance(attention, Tree):
                return self._branches(inputs, attention)
            return self._causal(inputs, cast(Causal, attention))

    def logits(self, hidden: Tensor, factors: Factors | None, tokens: Tensor | None = None) -> Tensor:
        """As `packed.Text.logits`: by the stock forward on these states, with what it does behind its head."""
        pair, scale = (factors.pair(self._head_name), factors.scale) if factors else (None, 1.0)
        head = partial(_some, self._head, pair, scale, tokens) if tokens is not None else None
        hidden = hidden.to(self._head.weight.device)
        with ExitStack() as stack:
            if head:
                stack.enter_context(_calling(self._head, head))
            elif pair is not None:
                stack.callback(self._head.register_forward_hook(partial(_add, pair, scale)).remove)
            stack.enter_context(_calling(self._core, lambda *args, **kwargs: _Given(hidden[None])))
            ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
            return wide(self._stock(input_ids=ids, use_cache=False).logits[0])

    def _causal(self, inputs: PackedInputs, attention: Causal) -> Tensor:
        rows, cache, parts = attention.rows, attention.cache, list[Tensor]()
        padded = self._pads and cache is None
        groups = [[*range(rows.count)]] if padded else _of_one_length(rows.lengths)
        for group in groups:
            x, states = self._rows(inputs, rows, group, keep=cache is not None)
            if isinstance(cache, StockCache):
                ids = None if self._turn is None else _tokens(inputs.ids, rows, group)
                cache.groups.append(_Group(group, states, ids))
            parts += [row[: rows.lengths[number]] for number, row in zip(group, x, strict=True)]
        order = {number: n for n, number in enumerate(number for group in groups for number in group)}
        packed = torch.cat([parts[order[number]] for number in range(rows.count)])
        return packed if attention.wanted is None else packed[attention.wanted.to(packed.device)]

    def _rows(self, inputs: PackedInputs, rows: Rows, group: Sequence[int], *, keep: bool) -> tuple[Tensor, Any]:
        """(rows, longest, hidden) of rows from their beginning, padded behind their end, and the cache to `keep`."""
        lengths = [rows.lengths[number] for number in group]
        starts = torch.tensor(rows.lengths).cumsum(0)[list(group)] - torch.tensor(lengths)
        columns = torch.arange(max(lengths))
        index = starts[:, None] + columns.clamp(max=torch.tensor(lengths)[:, None] - 1)  # behind the end its last one
        index = index.to(inputs.ids.device)
        real = (columns < torch.tensor(lengths)[:, None]).to(index.device)
        ids = inputs.ids[index].masked_fill(~real, 0)
        images = self._images(inputs, index[real])
        return self._run(ids, inputs.position_ids[:, index], images=images, keep=keep)

    def _images(self, inputs: PackedInputs, index: Tensor) -> dict[str, Any]:
        """What the stock forward takes for the tower's features at these positions of the pack, in order."""
        if inputs.image_positions is None or inputs.embeds is None:
            return {}
        at = torch.full_like(inputs.ids, -1)
        at[inputs.image_positions] = torch.arange(len(inputs.image_positions), device=at.device)
        chosen = at[index]
        chosen = chosen[chosen >= 0]
        if not len(chosen):
            return {}
        features: Any = BaseModelOutputWithPooling()
        features.pooler_output = (inputs.embeds[chosen],)
        features.deepstack_features = [(level[chosen],) for level in inputs.deepstack]
        return {"mm_encoder_outputs": {"image": features}}

    def _decode(self, inputs: PackedInputs, step: DecodeStep) -> Tensor:
        cache: Any = step.cache
        found = dict[int, Tensor]()
        for group in cache.groups:
            some = torch.tensor(group.rows, device=inputs.ids.device)
            ids, position_ids = inputs.ids[some, None], inputs.position_ids[:, some, None]
            if group.ids is not None:
                group.ids = torch.cat([group.ids, ids], 1)
            if group.ids is not None and group.ids.shape[1] - 1 == self._turn:
                x, group.states = self._run(group.ids, position_ids, keep=True)
            else:
                x, _ = self._run(ids, position_ids, states=group.states)
            found |= zip(group.rows, x[:, -1], strict=True)
        return torch.stack([found[number] for number in range(len(found))])

    def _branches(self, inputs: PackedInputs, tree: Tree) -> Tensor:
        """(rows x nodes, hidden) of the tree's wanted nodes behind each row."""
        rows, prompt = tree.rows, len(tree.rows.row)
        found = dict[int, Tensor]()
        for group in _of_one_length(rows.lengths):
            x, states = self._rows(inputs, rows, group, keep=True)
            some = torch.tensor(group, device=inputs.ids.device)
            nodes = inputs.ids[prompt:].view(rows.count, -1)[some]
            positions = inputs.position_ids[:, prompt:].view(3, rows.count, -1)[:, some]
            at = {ROOT: x[:, -1]}
            if self._turn is not None and x.shape[1] <= self._turn < x.shape[1] + len(tree.parents):
                tokens = _tokens(inputs.ids[:prompt], rows, group)
                at |= {node: self._whole(tokens, nodes[:, _path(tree.parents, node)]) for node in tree.nodes}
            else:
                room = max(1, BRANCHED // (len(group) * (x.shape[1] + 1)))
                at |= self._grown(tree.parents, [ROOT], states, nodes, positions, room)
            found |= zip(group, torch.stack([at[node] for node in tree.nodes], 1), strict=True)
        return torch.cat([found[number] for number in range(rows.count)])

    def _whole(self, tokens: Tensor, path: Tensor) -> Tensor:
        """(rows, hidden) of the last node of a path behind rows, read from their beginning."""
        x, _ = self._run(torch.cat([tokens, path], 1), tokens)  # no model with positions on three axes
        return x[:, -1]

    def _grown(
        self, parents: Sequence[int], grown: Sequence[int], states: Any, ids: Tensor, positions: Tensor, room: int
    ) -> Iterator[tuple[int, Tensor]]:
        """The states (rows, hidden) of all nodes below those in `grown`, whose caches are `states`: of the first node's
        rows, then of the next one's. ids, positions: (rows, nodes), (3, rows, nodes). room: for how many at once."""
        count, children = len(ids), [node for node, parent in enumerate(parents) if parent in grown]
        for start in range(0, len(children), room):
            some = children[start : start + room]
            chosen = [grown.index(parents[node]) * count + row for node in some for row in range(count)]
            branches, at = _selected(states, chosen), torch.tensor(some, device=ids.device)
            x, _ = self._run(ids[:, at].t().reshape(-1, 1), positions[:, :, at].mT.reshape(3, -1, 1), states=branches)
            yield from zip(some, x[:, -1].view(len(some), count, -1), strict=True)
            yield from self._grown(parents, some, branches, ids, positions, room)

    def _run(
        self,
        ids: Tensor,
        position_ids: Tensor,
        *,
        images: dict[str, Any] | None = None,
        states: Any = None,
        keep: bool = False,
    ) -> tuple[Tensor, Any]:
        """(rows, length, hidden) behind `states`, and the cache. position_ids: (3, rows, length)."""
        options: dict[str, Any] = {"position_ids": position_ids} if self._three_axes else {}
        use_cache = keep or states is not None
        out = self._core(input_ids=ids, past_key_values=states, use_cache=use_cache, **options, **(images or {}))
        return out.last_hidden_state, out.past_key_values if use_cache else None


class _Given:
    """What stands for the text model's output. Of all else that a head may ask for, nothing."""

    def __init__(self, states: Tensor) -> None:
        self.last_hidden_state = states

    def __getitem__(self, number: int) -> Tensor:
        return (self.last_hidden_state,)[number]

    def __getattr__(self, name: str) -> None:
        return None


class _Adapted:
    """While it is open, stock modules compute with an adapter, and the experts' function is the grouped product.

    between: called between layers, and again on the way back; what is called there has its own adapter or none.
    """

    def __init__(self, text: StockText, factors: Factors | None, between: Callable[[], None] | None) -> None:
        self._active, self._between, self._stack = True, between, ExitStack()
        scale = factors.scale if factors else 1.0
        for name, module in text.linears.items() if factors else ():
            if factors and (pair := factors.pair(name)) is not None:
                self._hook(module, partial(_add, pair, scale))
        for name, module in text.experts.items():
            pairs = [factors.pair(f"{name}.{each}") if factors else None for each in PROJECTIONS]
            self._stack.enter_context(_calling(module, partial(_routed, module, pairs, scale)))
        for layer in text.layers[:-1] if between else ():
            self._hook(layer, self._pause)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _hook(self, module: nn.Module, call: Callable[..., Any]) -> None:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            return call(module, args, output) if self._active else None

        self._stack.callback(module.register_forward_hook(hook).remove)

    def _pause(self, layer: nn.Module, args: Any, output: Any) -> None:
        between, x = self._between, output[0] if isinstance(output, tuple) else output
        if between is None:
            return
        self._active = False
        try:
            between()
        finally:
            self._active = True
        if x.requires_grad:
            x.register_hook(lambda _: between())


@contextmanager
def _calling(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """While it is open, the module's forward is another function."""
    before = vars(module).get("forward")  # of accelerate, where a model is on several devices
    module.forward = function
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def _add(pair: Pair, scale: float, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """A hook: the layer's output and scale · x A^T B^T."""
    a, b = pair
    return output + scale * (args[0] @ a.t() @ b.t())


def _routed(
    experts: nn.Module, pairs: Sequence[Pair | None], scale: float, hidden: Tensor, chosen: Tensor, weights: Tensor
) -> Tensor:
    """The experts' forward by the grouped product."""
    gate_up, down = pairs
    return routed(hidden, chosen, weights, experts, gate_up, down, scale)


def _some(head: Any, pair: Pair | None, scale: float, tokens: Tensor, hidden: Tensor) -> Tensor:
    """The head's outputs for these tokens alone, in float32: see `packed.Text.logits`."""
    rows, x = tokens.to(hidden.device), wide(hidden)
    out = x @ wide(head.weight[rows]).t()
    if head.bias is not None:
        out = out + wide(head.bias[rows])
    return out if pair is None else out + scale * (x @ wide(pair[0]).t()) @ wide(pair[1]).index_select(0, rows).t()


def _tokens(ids: Tensor, rows: Rows, group: Sequence[int]) -> Tensor:
    """(rows, length) of rows of one length."""
    parts = ids.split(rows.lengths)
    return torch.stack([parts[number] for number in group])


def _path(parents: Sequence[int], node: int) -> list[int]:
    """The nodes from the first one to this."""
    path = list[int]()
    while node != ROOT:
        path.insert(0, node)
        node = parents[node]
    return path


def _far(one: Tensor, other: Tensor, at_most: float = 0.25) -> bool:
    """Whether two tensors differ by more than rounding in bfloat16. What is not finite is said where it is used."""
    one, other = one.float().nan_to_num(), other.float().nan_to_num()
    return bool((one - other).norm() > at_most * one.norm())


def _of_one_length(lengths: Sequence[int]) -> list[list[int]]:
    """The numbers of the rows, those of one length together."""
    groups = dict[int, list[int]]()
    for number, length in enumerate(lengths):
        groups.setdefault(length, []).append(number)
    return [*groups.values()]
