"""LoRA and a linear head on a frozen backbone: trained by the requests that train the language model.

For the training API a classifier is a language model whose sequences have one position, an image, and whose vocabulary
is the classes. The semantics are those of the Tinker API: a loss is a sum over the data, gradients accumulate until the
optimizer's step, the step is AdamW. Every random number comes from `seed`, and the global generators stay as they were.
"""

import copy
import json
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tinker
import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tinker import types
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from baselines.backbone import Backbone, load
from baselines.features import PixelCache, resized, size_batches
from kshot.checks import check_adam
from kshot.errors import ImageError, InputError, ModelError, NotFiniteError, RequestError
from kshot.files import write_folder
from kshot.images import JPEG, PNG
from kshot.untrusted import check_regular, parse_json, read_file

ALPHA = 32
# Images in one pass, at most. Fixed, since the low bits of a batched product depend on the size of the batch.
CHUNK = 32
TRAIN_CHUNK = 16  # with a gradient: for that a ViT-B/14 keeps 9 GB of 16 photographs of 480 x 360 pixels
LOSS = "cross_entropy"
WEIGHTS, RECORD = "head.safetensors", "kshot.json"  # of a saved head
TYPES: dict[str, tuple[type, ...]] = {  # of the record's values
    "model": (str,),
    "readout": (str,),
    "size": (int, type(None)),
    "n_classes": (int,),
    "rank": (int,),
    "log_probs": (bool,),
}
FORMATS: dict[bytes, Literal["png", "jpeg"]] = {PNG: "png", JPEG: "jpeg"}  # by first bytes


def datum(image: bytes, label: int) -> tinker.Datum:
    """Train the class index `label` for a JPEG or PNG file: one image, one target.

    Raises:
        ImageError: bytes of another kind.
    """
    format = next((name for start, name in FORMATS.items() if image.startswith(start)), None)
    if format is None:
        raise ImageError("an image is neither JPEG nor PNG; save it as one of them")
    chunk = types.ImageChunk(data=image, format=format, expected_tokens=1)
    targets = tinker.TensorData.from_numpy(np.array([label], np.int64))
    return tinker.Datum(model_input=tinker.ModelInput(chunks=[chunk]), loss_fn_inputs={"target_tokens": targets})


class LoraHeadClient:
    """A backbone with LoRA adapters and a linear head on its feature, trained by `forward_backward` and `optim_step` of
    the SDK's `TrainingClient`; untrained, it predicts uniformly.

    The head starts at zero, so the first step moves the head alone. LoRA's A is drawn from `seed` (PEFT's Kaiming
    uniform), B starts at zero; alpha is 32 at any rank, dropout 0. A request is done when its method returns. The same
    requests after the same seed give the same bits.

    Args:
        model, readout, device: see `baselines.backbone.load`, which also lists what is raised. n_classes: at least 2.
        seed: 0 to 2^63 - 1. rank: of LoRA, at least 1. size: side in pixels to which every image is resized, square;
            None keeps each image's own size, rounded to whole patches.

    Raises:
        InputError: n_classes, rank or seed out of range, or the size does not fit the model. ModelError: the model has
            no blocks with linear layers, or computes past some of them.
    """

    def __init__(
        self,
        model: str,
        n_classes: int,
        *,
        seed: int,
        rank: int = 32,
        readout: str = "cls",
        size: int | None = None,
        device: str = "cpu",
    ) -> None:
        if n_classes < 2 or rank < 1:
            raise InputError(f"{n_classes} classes at LoRA rank {rank}; give at least 2 classes and rank 1")
        if not 0 <= seed < 2**63:
            raise InputError(f"seed {seed} must be a whole number from 0 to 2^63 - 1")
        self._record = {"model": model, "n_classes": n_classes, "rank": rank, "readout": readout, "size": size}
        self._backbone, self._size, self.n_classes = load(model, device, readout), size, n_classes
        self._backbone.check_size(size)
        self._adapted = _adapted(self._backbone, rank, seed)
        self._linear = nn.utils.skip_init(nn.Linear, self._backbone.dim, n_classes, device=device)
        for parameter in self._linear.parameters():
            nn.init.zeros_(parameter)
        named = (*self._adapted.named_parameters(), *self._linear.named_parameters(prefix="head"))
        # Those that training changes: of the adapters by their names in timm's module.
        self.parameters = {name: parameter for name, parameter in named if parameter.requires_grad}
        for parameter in self.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        self._optimizer = torch.optim.AdamW(self.parameters.values(), fused=True)
        self._pixels = PixelCache(self._backbone.patch, size)
        self._has_gradients = False

    @torch.no_grad()
    def class_log_probs(self, images: Sequence[bytes]) -> np.ndarray:
        """(N, n_classes) float64 log-probabilities of N encoded images, in nats; the same bit for bit for the same
        images in the same order. Raises ImageError for bytes that are no image, NotFiniteError."""
        result = np.empty((len(images), self.n_classes))
        for start in range(0, len(images), CHUNK):  # pixels of a large set are never in memory together
            rows, chunk = result[start : start + CHUNK], images[start : start + CHUNK]
            pixels = [resized(image, self._backbone.patch, self._size) for image in chunk]
            for members, logits in self._logits(pixels, CHUNK):
                rows[members] = logits.double().log_softmax(dim=1).cpu().numpy()
        if not np.isfinite(result).all():
            raise NotFiniteError(self._backbone.name, "scores", trained=True)
        return result

    def forward_backward(
        self, data: Sequence[tinker.Datum], loss_fn: str, loss_fn_config: Mapping[str, Any] | None = None
    ) -> Future[types.ForwardBackwardOutput]:
        """Σ −log p(target) over the data, in nats; its gradient is added to what was accumulated since the last step.

        data: as `datum` makes them. A request that does not fit changes nothing; where a pass fails (out of memory),
        all accumulated gradients are dropped, so that no step is made with a part.

        Raises:
            RequestError: another loss, or data that do not fit. ImageError: an image that is none. NotFiniteError.
        """
        if loss_fn != LOSS or loss_fn_config:
            raise RequestError(f"loss {loss_fn!r} with {loss_fn_config or 'no configuration'}; use {LOSS!r} with none")
        if not data:
            raise RequestError("no data given; a forward pass needs at least one datum")
        items = [_image_and_label(number, each, self.n_classes) for number, each in enumerate(data)]
        pixels = [self._decoded(number, image) for number, (image, _) in enumerate(items)]
        total, log_probs = 0.0, np.empty((len(items), 1), np.float32)
        try:
            for members, logits in self._logits(pixels, TRAIN_CHUNK):
                targets = torch.tensor([items[n][1] for n in members], device=logits.device)
                losses = cross_entropy(logits, targets, reduction="none")
                loss = losses.sum()
                loss.backward()
                total += loss.item()
                log_probs[members, 0] = -losses.detach().cpu().numpy()
            if not np.isfinite(log_probs).all():
                raise NotFiniteError(self._backbone.name, "log-probabilities", trained=True)
        except BaseException:
            self._clear_gradients()
            raise
        self._has_gradients = True
        outputs = [{"logprobs": tinker.TensorData.from_numpy(row)} for row in log_probs]
        return _done(types.ForwardBackwardOutput("ArrayRecord", outputs, {"loss:sum": total}))

    def optim_step(self, optim_params: types.AdamParams) -> Future[types.OptimStepResponse]:
        """AdamW (Loshchilov & Hutter 2019) on the accumulated gradients, which are then cleared. Answers their norm.

        Raises:
            RequestError: no gradients, parameters out of range, or gradients that are not finite, which are cleared.
        """
        if not self._has_gradients:
            raise RequestError("optim_step without gradients; call forward_backward first")
        check_adam(optim_params)
        limit = optim_params.grad_clip_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), limit)
        if not norm.isfinite():
            self._clear_gradients()
            raise RequestError("the gradients are not finite; they are cleared and the weights stay as they were")
        self._optimizer.param_groups[0].update(
            lr=optim_params.learning_rate,
            betas=(optim_params.beta1, optim_params.beta2),
            eps=optim_params.eps,
            weight_decay=optim_params.weight_decay,
        )
        self._optimizer.step()
        self._clear_gradients()
        return _done(types.OptimStepResponse(metrics={"grad_norm:mean": float(norm)}))

    def save(self, folder: Path) -> None:
        """Write a new folder, complete or not there: the trained tensors and a record that names the frozen backbone.

        Raises InputError where the folder exists. OSError.
        """

        def fill(new: Path) -> None:
            save_file({name: each.detach() for name, each in self.parameters.items()}, new / WEIGHTS)
            (new / RECORD).write_text(json.dumps(self._record, indent=2), encoding="utf-8")

        if folder.exists():
            raise InputError(f"{folder} exists; give another name")
        write_folder(folder, fill)

    @classmethod
    def load(cls, folder: Path, device: str = "cpu", model: str | None = None) -> "LoraHeadClient":
        """What `save` wrote, with a fresh optimizer. model: where its backbone is now; None: where it was. Raises
        ModelError where it is missing or damaged."""
        try:
            record = read_record(folder)
            check_regular(folder / WEIGHTS)
            weights = load_file(folder / WEIGHTS)
            record["model"] = model or record["model"]
            client = cls(**record, seed=0, device=device)  # the seed is of weights that are replaced
            expected, stored = ({n: (t.shape, t.dtype) for n, t in d.items()} for d in (client.parameters, weights))
            if wrong := sorted(n for n in {*expected, *stored} if expected.get(n) != stored.get(n)):
                raise InputError(f"{len(wrong)} tensors do not fit, first {wrong[0]!r}")
            if broken := sorted(name for name, each in weights.items() if not each.isfinite().all()):
                raise ValueError(f"{broken[0]} has numbers that are not finite")
        except (OSError, ValueError, TypeError, KeyError, SafetensorError, InputError) as error:
            reason = " ".join(str(error).split())
            raise ModelError(f"{folder} holds no trained head, or a damaged one ({reason}); train it again") from error
        for name, parameter in client.parameters.items():
            parameter.detach().copy_(weights[name])
        return client

    def _logits(self, pixels: Sequence[np.ndarray], most: int) -> Iterator[tuple[list[int], Tensor]]:
        """(indices, (B, n_classes) logits) of arrays (H, W, 3) uint8: those of one size together, `most` at a time."""
        for members in size_batches(pixels, most):
            batch = self._backbone.normalised([pixels[n] for n in members])
            yield members, self._linear(self._backbone.features(self._adapted, batch))

    def _clear_gradients(self) -> None:
        self._has_gradients = False
        self._optimizer.zero_grad(set_to_none=False)

    def _decoded(self, number: int, image: bytes) -> np.ndarray:
        try:
            return self._pixels(image)
        except ImageError as error:
            raise ImageError(f"datum {number}: {error}") from error


def read_record(folder: Path) -> dict[str, Any]:
    """The record of a saved head. Raises OSError, and ValueError for what is none or has values of other types."""
    record = parse_json(read_file(folder / RECORD))
    if not isinstance(record, dict):
        raise ValueError(f"{RECORD} holds no record")
    for name, value in record.items():
        if name in TYPES and type(value) not in TYPES[name]:
            raise ValueError(f"{name} in {RECORD} is {reprlib.repr(value)}")
    return record


def _adapted(backbone: Backbone, rank: int, seed: int) -> nn.Module:
    """The backbone with LoRA (Hu et al. 2021, arXiv:2106.09685) on every linear layer of its blocks."""
    frozen = backbone.module
    module = copy.deepcopy(frozen, {id(p): p for p in frozen.parameters()})  # the same tensors as weights
    layers = ((name, layer) for name, layer in module.named_modules() if name.startswith("blocks."))
    targets = [name for name, layer in layers if isinstance(layer, nn.Linear)]
    if not targets:
        way_out = "use a vision transformer of timm, such as DINOv2"
        raise ModelError(f"model {backbone.name!r} has no blocks with linear layers to put LoRA on; {way_out}")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=targets), module)
    _check_reached(backbone, module, targets)
    return module


def _check_reached(backbone: Backbone, module: nn.Module, layers: Sequence[str]) -> None:
    """Raises ModelError where the model does not call one of its layers but uses its weight, as the EVA models of timm
    do: an adapter there would have no effect."""
    unreached, linears = set(layers), [(name, module.get_submodule(name)) for name in layers]
    hooks = [each.register_forward_hook(lambda *_, name=name: unreached.discard(name)) for name, each in linears]
    height, width = backbone.fixed_size or (backbone.patch, backbone.patch)
    with torch.no_grad():
        backbone.features(module, torch.zeros(1, 3, height, width, device=backbone.mean.device))
    for hook in hooks:
        hook.remove()
    if unreached:
        problem = f"computes past {min(unreached)}, where LoRA then does nothing"
        raise ModelError(f"model {backbone.name!r} {problem}; use a DINOv2 model")


def _done(value: Any) -> Future[Any]:
    future = Future[Any]()
    future.set_result(value)
    return future


def _image_and_label(number: int, datum: tinker.Datum, n_classes: int) -> tuple[bytes, int]:
    """The image file and class index of a datum. Raises RequestError for any other datum than `datum` makes."""
    chunks, fields = datum.model_input.chunks, datum.loss_fn_inputs
    if len(chunks) != 1 or not isinstance(chunks[0], types.ImageChunk):
        kinds = ", ".join(type(chunk).__name__ for chunk in chunks) or "nothing"
        raise RequestError(f"datum {number}: a classifier's input is exactly one ImageChunk, got {kinds}")
    targets = fields["target_tokens"].to_numpy() if set(fields) == {"target_tokens"} else np.empty(0)
    if targets.shape != (1,) or targets.dtype != np.int64:
        raise RequestError(f"datum {number}: give target_tokens alone, one class index (int64), got {sorted(fields)}")
    if not 0 <= (label := int(targets[0])) < n_classes:
        raise RequestError(f"datum {number}: target {label} is not one of {n_classes} classes, 0 to {n_classes - 1}")
    return chunks[0].data, label
