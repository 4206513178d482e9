"""One base model and what is trained and sampled on it; and model inputs as the packed positions of one pass.

Runs and snapshots are LoRA adapters over the shared base. Gradients of a run accumulate until its optimizer step. The
calls here are not thread-safe: the scheduler makes them, in order.

In a batch the rows stand one after the other without padding. M-RoPE positions are those of the stock model: text
counts up on all three axes, an image's tokens spread over (time, height, width), and what follows goes on after the
largest.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import tinker
import torch
from tinker import types
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from kshot.errors import RequestError
from vlm.local import losses
from vlm.local.losses import Loss, loss
from vlm.local.model.attention import Causal, Rows
from vlm.local.model.load import Model
from vlm.local.model.lora import Adapter, Factors, LoraSpec, linear
from vlm.local.model.packed import PackedInputs, mrope_positions
from vlm.local.packs import Item, Pack, packs_of
from vlm.local.training_run import TrainingRun
from vlm.local.vision import ImageFeatures, NoVision, Vision

# Packed batches


@dataclass(frozen=True)
class Batch:
    """Packed rows. inputs: of the text model. next_position: (rows,) the M-RoPE position after each row's last."""

    rows: Rows
    inputs: PackedInputs
    next_position: Tensor

    @property
    def ends(self) -> Tensor:
        """(rows,) where each row's last position is in the pack."""
        return torch.tensor(self.rows.lengths, device=self.inputs.ids.device).cumsum(0) - 1


def length_of(each: tinker.ModelInput) -> int:
    """The positions of an input, as far as they are known before its images are decoded. Raises RequestError for chunks
    that have none."""
    length = 0
    for chunk in each.chunks:
        if not isinstance(chunk, types.EncodedTextChunk | types.ImageChunk):
            raise RequestError(f"chunk of type {chunk.type!r} is not supported; use encoded text and images")
        length += (chunk.expected_tokens or 0) if isinstance(chunk, types.ImageChunk) else chunk.length
    return length


def _images(inputs: Sequence[tinker.ModelInput]) -> list[types.ImageChunk]:
    return [chunk for each in inputs for chunk in each.chunks if isinstance(chunk, types.ImageChunk)]


def _packed_row(
    model: Model, each: tinker.ModelInput, images: Iterator[ImageFeatures]
) -> tuple[list[int], np.ndarray, int]:
    """Token ids, M-RoPE positions (3, length), and the position that comes after them, of one input."""
    ids, shape, after_image = list[int](), list[int | tuple[int, int, int]](), False
    for chunk in each.chunks:
        if isinstance(chunk, types.EncodedTextChunk):
            model.check_tokens(chunk.tokens)
            placeholder = next((token for token in model.placeholders if token in chunk.tokens), None)
            if placeholder is not None:
                raise RequestError(f"token {placeholder} stands for image features; give the image as an ImageChunk")
            after_image = after_image and not chunk.tokens
            ids += chunk.tokens
            shape.append(len(chunk.tokens))
        elif after_image:  # the stock positions take neighbours for one image
            raise RequestError("two image chunks stand side by side; put text between them, as <|vision_end|> is")
        else:
            image, after_image = next(images), True
            ids += [model.image_token] * image.tokens
            shape.append(image.grid)
    return ids, *mrope_positions(tuple(shape), model.merge)


# The engine

Between = Callable[[bool], None]
"""Called after each pass of a request, with whether it was the last. What it raises ends the request as a pass does
that fails."""
BetweenLayers = Callable[[], None]
"""Called within a pass, between layers, on a CPU: others may use the engine meanwhile, without a gradient."""
CustomLoss = Callable[[list[tinker.Datum], list[Tensor]], tuple[Tensor, dict[str, float]]]
LOGITS = 1 << 27  # float32 numbers the head may hold at once: half a gigabyte
ROWS = 64  # prompts or sequences in one pass without a gradient
POSITIONS = 1 << 15  # of prompts, and of nodes behind them, in one pass without a gradient


Snapshot: TypeAlias = Factors | None  # fixed weights to sample from: an adapter's, or those of the base model alone


class Engine:
    """Forward passes, gradients and optimizer steps on one model."""

    def __init__(self, model: Model, vision: Vision | None = None) -> None:
        self.model = model
        self.vision: Vision | NoVision = vision or (Vision(model) if model.takes_images else NoVision(model))

    def start(self, spec: LoraSpec, seed: int) -> TrainingRun:
        """A new run: a LoRA adapter initialised from `seed`."""
        return TrainingRun(Adapter.fresh(self.model.layout(spec), seed), self.model.dtype)

    def snapshot(self, adapter: Adapter) -> Snapshot:
        """The adapter's numbers as they are now."""
        return adapter.snapshot(self.model.dtype)

    def snapshot_of(self, run: TrainingRun) -> Snapshot:
        """A run's weights as they are now."""
        return self.snapshot(run.adapter)

    def forward_backward(
        self,
        run: TrainingRun,
        data: Sequence[tinker.Datum],
        loss_fn: str,
        config: Mapping[str, Any] | None,
        *,
        forward_only: bool = False,
        between: Between = lambda last: None,
        between_layers: BetweenLayers | None = None,
    ) -> types.ForwardBackwardOutput:
        """The loss of `data` and, unless `forward_only`, its gradient, added to the run's.

        Log-probabilities come back for every position, except for closed_set and for cross_entropy's gradient: there
        the head runs only where the weight is not 0, and the other positions hold 0. A request that does not fit
        changes nothing; where a pass fails after another one (out of memory; with a trained tower also a bad datum),
        or gives no finite loss, what the run has gathered is dropped, so that no step is made with a part.
        Raises NotFiniteError for a model that gives NaN, RequestError for a loss of infinite size.
        """
        chosen = loss(loss_fn, config)
        every = (forward_only or chosen.uses_sampled) and not chosen.closed
        items = self._items(data, chosen, every=every)
        total, outputs, packs = 0.0, dict[int, tinker.TensorData](), packs_of(items)
        batches = dict[int, Batch]()
        with run.request():
            if not run.factors.spec.in_tower:  # a bad one stops them all; a trained tower's graphs would pile up
                for number, pack in enumerate(packs):
                    batches[number] = self.batch(pack, run.factors)
                    between(False)  # the tower may have had much to do
            for number, pack in enumerate(packs):
                value_of = partial(pack.loss, chosen)
                with torch.set_grad_enabled(not forward_only):  # not while others have their turn
                    batch = batches.pop(number, None) or self.batch(pack, run.factors)
                    log_probs, value = self.computed(run, pack, batch, value_of, between_layers)
                outputs |= pack.log_probs_of(log_probs, self.model.name, run.factors.name)
                total += float(value.detach())
                if pack is not packs[-1]:
                    between(False)
            check_total(loss_fn, total)
            between(True)
        return output_of([outputs[item.number] for item in items], {"loss:sum": total})

    def forward_backward_custom(
        self,
        run: TrainingRun,
        data: Sequence[tinker.Datum],
        loss_fn: CustomLoss,
        *,
        between: Between = lambda last: None,
        between_layers: BetweenLayers | None = None,
    ) -> types.ForwardBackwardOutput:
        """The gradient of any function of the data's log-probabilities, added to the run's (see the SDK).

        loss_fn(data, log_probs) gets float32 tensors, shaped as each datum's targets, and gives a 0-d loss and metrics.
        One pack is one pass; the passes of several are run again for the gradient, so that their graphs are not in
        memory together. Raises RequestError where the loss has no finite gradient; what `loss_fn` raises goes through.
        """
        items = self._targets_alone(data)
        packs = packs_of(items)
        once, outputs = len(packs) == 1, dict[int, tinker.TensorData]()
        for pack in packs:
            with torch.set_grad_enabled(once):
                log_probs = self._log_probs(run.factors, pack, self.batch(pack, run.factors), between_layers)
            outputs |= pack.log_probs_of(log_probs, self.model.name, run.factors.name)
            if not once:  # else a graph waits
                between(False)
        log_probs_of = [outputs[item.number] for item in items]
        value, metrics, slopes = slopes_of(loss_fn, list(data), [each.to_torch() for each in log_probs_of])
        with run.request():
            for pack in packs:
                with torch.enable_grad():
                    if not once:
                        log_probs = self._log_probs(run.factors, pack, self.batch(pack, run.factors), between_layers)
                    slope = torch.cat([slopes[item.number] for item in pack.items]).to(log_probs)
                    run.add(partial(log_probs.backward, slope))
                between(pack is packs[-1])
        return custom_output(value, metrics, slopes, log_probs_of)

    def optim_step(self, run: TrainingRun, params: types.AdamParams) -> types.OptimStepResponse:
        """AdamW with these parameters on the gradients gathered since the last step; raises as `TrainingRun.step`."""
        with self.model.timed("optimizer"):
            return types.OptimStepResponse(metrics={"grad_norm:mean": run.step(params)})

    def end(self) -> None:
        """Nothing: what is in this process goes with it."""

    def prefetch(self, inputs: Sequence[tinker.ModelInput]) -> None:
        """Begin to decode the images that a coming request will need. From any thread; raises nothing about images."""
        self.vision.prefetch(_images(inputs))

    def collate(self, inputs: Sequence[tinker.ModelInput], factors: Factors | None) -> Batch:
        """The packed batch of these inputs, images as the tower sees them with the adapter, if that covers it.

        Raises RequestError for an empty input, foreign chunks and tokens off the vocabulary.
        """
        model, device = self.model, self.model.device
        for each in inputs:
            length_of(each)
        adapted = partial(_tower_linear, factors) if factors is not None and factors.spec.in_tower else None
        images = self.vision.features(_images(inputs), adapted)
        remaining = iter(images)
        rows, positions, after = zip(*(_packed_row(model, each, remaining) for each in inputs), strict=True)
        lengths = [len(ids) for ids in rows]
        wrong = next((length for length in lengths if not 0 < length <= model.context), None)
        if wrong is not None:
            raise RequestError(
                f"a model input has {wrong} positions; this model takes at least one token, at most {model.context}"
            )
        ids = np.array([token for row in rows for token in row], np.int64)
        packed = [torch.from_numpy(ids).to(device), torch.from_numpy(np.concatenate(positions, 1)).to(device)]
        if images:
            values = torch.cat([image.values for image in images], 1).to(device)
            at = np.flatnonzero(ids == model.image_token)
            packed += [torch.from_numpy(at).to(device), values[0], values[1:]]
        return Batch(Rows(lengths, device), PackedInputs(*packed), torch.tensor(after, device=device))

    def _targets_alone(self, data: Sequence[tinker.Datum]) -> list[Item]:
        """As a custom loss needs them: the loss itself alone reads other fields."""
        only = [
            replace(each, loss_fn_inputs={k: v for k, v in each.loss_fn_inputs.items() if k == "target_tokens"})
            for each in data
        ]
        return self._items(only, loss("cross_entropy", None), every=True)

    def _items(self, data: Sequence[tinker.Datum], chosen: Loss, *, every: bool) -> list[Item]:
        if not data:
            raise RequestError("no data given; a forward pass needs at least one datum")
        losses.check_size(data)
        items = [Item.of(number, datum, chosen, every=every) for number, datum in enumerate(data)]
        for item in items:
            targets = item.fields["target_tokens"]
            self.model.check_tokens((targets if targets.ndim == 1 else targets.unique()).tolist(), "target")
            if item.candidates is not None:
                self.model.check_tokens(item.candidates.tokens.tolist(), "candidate")
        return items

    def batch(self, pack: Pack, factors: Factors) -> Batch:
        """The packed rows of a pack. Raises as `collate`, and RequestError where targets do not fit an input."""
        batch = self.collate([item.model_input for item in pack.items], factors)
        for item, length in zip(pack.items, batch.rows.lengths, strict=True):
            if item.length != length:
                raise RequestError(
                    f"datum {item.number}: target_tokens has {item.length} entries, its model input {length} positions "
                    "(an image counts its tokens)"
                )
        return batch

    def computed(
        self,
        run: TrainingRun,
        pack: Pack,
        batch: Batch,
        value_of: Callable[[Tensor], Tensor],
        between_layers: BetweenLayers | None = None,
    ) -> tuple[Tensor, Tensor]:
        """A pack's log-probabilities and the loss that `value_of` makes of them; where gradients are enabled, that of
        the loss is added to the run's."""
        with self.model.timed("forward"):
            log_probs = self._log_probs(run.factors, pack, batch, between_layers)
            value = value_of(log_probs)
        if torch.is_grad_enabled():
            with self.model.timed("backward"):
                run.add(value.backward)
        return log_probs, value

    def _log_probs(self, factors: Factors, pack: Pack, batch: Batch, between_layers: BetweenLayers | None) -> Tensor:
        """(scored,) or (scored, K) float32 log-probabilities of the targets at the pack's scored positions."""
        if not len(pack.scored_positions):
            shape = pack.fields["target_tokens"].shape
            return torch.zeros(shape, device=self.model.device, requires_grad=torch.is_grad_enabled())
        return self._scored(factors, pack, self._states(factors, pack, batch, between_layers))

    def _states(self, factors: Factors, pack: Pack, batch: Batch, between_layers: BetweenLayers | None) -> Tensor:
        """(scored, hidden) the last states at the scored positions."""
        scored = pack.scored_positions.to(self.model.device)
        wanted = None if len(scored) == len(batch.inputs.ids) else scored
        if self.model.device.type != "cpu":  # whose gradients are computed on another thread
            between_layers = None
        return self.model.text.hidden(batch.inputs, Causal(batch.rows, wanted), factors, between_layers)

    def _scored(self, factors: Factors, pack: Pack, hidden: Tensor) -> Tensor:
        """The log-probabilities that these states give."""
        targets = pack.fields["target_tokens"].to(hidden.device)
        if (candidates := pack.candidates) is not None:
            return losses.log_probs(self.model.text, hidden, targets, candidates, factors)
        step = max(1, LOGITS // self.model.vocabulary)
        if len(hidden) <= step:
            return self._score(factors, hidden, targets)
        parts = zip(hidden.split(step), targets.split(step), strict=True)  # logits are made again for their gradient
        return torch.cat([checkpoint(self._score, factors, *part, use_reentrant=False) for part in parts])

    def _score(self, factors: Factors, hidden: Tensor, targets: Tensor) -> Tensor:
        logits = self.model.text.logits(hidden, factors)
        targets = targets.to(logits.device)
        if targets.ndim == 1:
            return -cross_entropy(logits, targets, reduction="none")
        return logits.gather(1, targets) - logits.logsumexp(1, keepdim=True)


def check_total(loss_fn: str, total: float) -> None:
    """Raise RequestError for a loss that is not finite."""
    if not math.isfinite(total):
        raise RequestError(f"loss {loss_fn!r} is {total}: a ratio to the data's logprobs overflows; check them")


def output_of(log_probs: Sequence[tinker.TensorData], metrics: dict[str, float]) -> types.ForwardBackwardOutput:
    return types.ForwardBackwardOutput("ArrayRecord", [{"logprobs": each} for each in log_probs], metrics)


def custom_output(
    value: float, metrics: dict[str, float], slopes: Sequence[Tensor], log_probs: Sequence[tinker.TensorData]
) -> types.ForwardBackwardOutput:
    """Of a custom loss: its value and metrics, its gradients and what they are of."""
    surrogate = sum(float((slope * each.to_torch()).sum()) for slope, each in zip(slopes, log_probs, strict=True))
    return output_of(log_probs, {**metrics, "loss:sum": value, "surrogate_loss:sum": surrogate})


def slopes_of(
    loss_fn: CustomLoss, data: list[tinker.Datum], log_probs: list[Tensor]
) -> tuple[float, dict[str, float], list[Tensor]]:
    """Value and metrics of a custom loss, and its gradient for each datum's log-probabilities."""
    leaves = [each.clone().requires_grad_() for each in log_probs]
    with torch.enable_grad():
        value, metrics = loss_fn(data, leaves)
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
            raise RequestError("a custom loss must be one number that depends on the log-probabilities it was given")
        value.backward()
    slopes = [leaf.grad for leaf in leaves if leaf.grad is not None]
    if len(slopes) < len(leaves):
        raise RequestError("the custom loss does not depend on the log-probabilities of every datum")
    if not all(slope.isfinite().all() for slope in slopes):
        raise RequestError("the gradient of the custom loss is not finite; nothing was gathered")
    return float(value.detach().sum()), dict(metrics), slopes


def _tower_linear(factors: Factors, name: str, layer: nn.Linear, x: Tensor) -> Tensor:
    """A linear layer of the tower with the adapter's part."""
    flat = x.reshape(-1, x.shape[-1])
    out = linear(flat, layer.weight, layer.bias, factors.pair(f"model.visual.{name}"), factors.scale)
    return out.view(*x.shape[:-1], -1)
