"""A checkpoint in hub layout, of a text model or a Qwen3-VL: loaded by stock transformers, and held in memory.

What can be wrong is found before a weight is read: the kind of model, missing or broken files, too little memory. The
weights go straight to their devices. No code of a checkpoint is run. Several adapters live over one model.
"""

import logging
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import transformers

from kshot.errors import ModelError, RequestError
from kshot.hub import one_line, translated
from kshot.untrusted import parse_json, read_file
from vlm import models
from vlm.inputs import ImageRule
from vlm.local.model import placement, quantised
from vlm.local.model.families import FAMILIES, READ_AS, Family, family_of, row_of, stock_class, stock_family
from vlm.local.model.lora import Layout, LoraSpec
from vlm.local.model.packed import Text, TextModel
from vlm.local.model.placement import StoredTensor
from vlm.local.model.quantised import Unread, Weights
from vlm.local.model.stock import StockText
from vlm.templates import QWEN

log = logging.getLogger("kshot")

PROCESSED = {  # of the image processor → of the vision tower
    "patch_size": "patch_size",
    "merge_size": "spatial_merge_size",
    "temporal_patch_size": "temporal_patch_size",
}
PROFILED = ("tower", "forward", "backward", "optimizer")  # the parts of a profile
ATTENTION = "sdpa"  # whatever a configuration says: it may name a kernel of the hub, which is code
ADAPTER = "adapter_config.json"
UNBOUNDED = 1 << 20  # positions of a model whose configuration names no limit
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # of safetensors


def check(name: str, *, images: bool = False) -> None:
    """Raise what `Model` would, before any weights are read, and ModelError where a model that must take images takes
    none. Free memory is not checked. The weights of a hub's model are not fetched: only the files beside them are
    checked."""
    folder = Path(models.source(name))
    load_tokenizer(name)
    load_rule(name, required=images)
    family, config = _read_config(name, folder)
    if models.is_here(name):
        weights = Weights(name, folder)
        _from_pretrained(name, family, config, weights, _dtype(config, weights.tensors), {"": "meta"})


def load(name: str, device: str = "cpu", dtype: torch.dtype | None = None) -> Any:
    """The model of a name, folder or hub id, in eval mode and without gradients, on its device or devices.

    device: cpu, cuda, cuda:N, mps, or auto, which spreads whole decoder layers over all visible GPUs.
    dtype: None takes the checkpoint's; for its float16, in which nothing is trained here, bfloat16, or float32 on a
    CPU, and says so in the log. Raises UnknownNameError for what can be no model, and ModelError, in one line
    that says the way out, for whatever cannot be loaded whole.
    """
    family, config = _read_config(name, Path(models.source(name)))
    devices = placement.devices(device)
    weights = Weights(name, Path(models.weights(name)))
    dtype = _compute_dtype(name, dtype, _dtype(config, weights.tensors), devices)
    layers, tied = config.get_text_config().num_hidden_layers, bool(config.tie_word_embeddings)
    size = placement.sizes(weights.tensors, layers, tied, dtype, family)
    free = [placement.free_bytes(each) for each in devices]
    training = placement.training_sizes(weights.tensors, config, dtype, family, LoraSpec().rank)
    device_map = placement.device_map(name, dtype, size, tied, devices, free, family, training)
    return _from_pretrained(name, family, config, weights, dtype, device_map).eval().requires_grad_(False)


def _from_pretrained(
    name: str, family: Family, config: Any, weights: Weights, dtype: torch.dtype, device_map: Mapping[str, Any]
) -> Any:
    stock = getattr(transformers, family.stock)
    with _load_errors(name), _quiet():
        model, info = stock.from_pretrained(
            **weights.source(config, dtype, empty=device_map == {"": "meta"}),
            dtype=dtype,
            device_map=device_map,
            use_safetensors=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # these are in `info` too, and refused here
            output_loading_info=True,
            attn_implementation=ATTENTION if stock._supports_sdpa else "eager",
        )
    _check_whole(name, info)
    return model


def load_tokenizer(name: str) -> Any:
    """The stock tokenizer of a name, folder or hub id. Raises as `load` does, also where its files are missing or are
    those of another kind of model: transformers would make an empty one."""
    folder = Path(models.source(name))
    family, config = _read_config(name, folder)
    with _load_errors(name), _quiet():
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if not tokenizer.encode("a", add_special_tokens=False):
        raise ModelError(f"model {name} has no tokenizer beside its weights (tokenizer.json); copy it there")
    if family.vision and family.packed and tokenizer.convert_ids_to_tokens(config.image_token_id) != QWEN.image:
        raise ModelError(f"model {name} has no Qwen3-VL tokenizer beside its weights (tokenizer.json); copy it there")
    if family.vision and config.image_token_id not in tokenizer.added_tokens_decoder:
        why = f"{config.image_token_id} stands for images, and is no special token there"
        raise ModelError(f"model {name} has another model's tokenizer beside its weights ({why}); copy its own there")
    if not family.vision and (why := _another(tokenizer, config)):
        raise ModelError(f"model {name} has another model's tokenizer beside its weights ({why}); copy its own there")
    return tokenizer


def _another(tokenizer: Any, config: Any) -> str:
    """Why a tokenizer is not that of a text model's configuration, or "": what ends a text is a special token."""
    if tokenizer.vocab_size > config.vocab_size:
        return f"of {tokenizer.vocab_size:,} tokens, where the model knows {config.vocab_size:,}"
    ends = [config.eos_token_id] if isinstance(config.eos_token_id, int) else config.eos_token_id or ()
    odd = next((token for token in ends if token not in tokenizer.added_tokens_decoder), None)
    return "" if odd is None else f"{odd} ends the model's texts, and is {tokenizer.convert_ids_to_tokens(odd)!r} there"


def load_rule(name: str, *, required: bool = False) -> ImageRule | None:
    """How the images of a name, folder or hub id are cut; None for a text model, or ModelError where it is required.
    Raises as `load` does, also where its image processor is of another model."""
    family, config = _read_config(name, Path(models.source(name)))
    if not family.vision and not required:
        return None
    rule = ImageRule.from_pretrained(name)
    for ours, theirs in PROCESSED.items():
        here, there = getattr(rule.processor, ours), getattr(config.vision_config, theirs, None)
        if here != there:
            raise ModelError(
                f"model {name} is of {theirs} {there}, its image processor of {ours} {here}; copy the "
                "preprocessor_config.json of this model beside its config.json"
            )
    return rule


def _read_config(name: str, folder: Path) -> tuple[Family, Any]:
    """The family and its stock configuration; no other class, and no code of the checkpoint, is ever asked for."""
    with _load_errors(name):
        written = parse_json(read_file(folder / "config.json"))
        kind = written.get("model_type")
    row = FAMILIES.get(kind)
    found = row.stock if row else stock_class(name, written)
    quantised.scheme_of(name, written)
    if (folder / ADAPTER).exists():  # transformers would put it into the model
        raise ModelError(f"model {name} has an adapter beside its weights ({ADAPTER}); move it to a folder of its own")
    with _load_errors(name), _quiet():
        config = getattr(transformers, found).config_class.from_pretrained(folder)
        config.model_type = READ_AS.get(kind, kind)
        quantised.forget(config)
        return row_of(config) or stock_family(name, config, found), config


def _compute_dtype(
    name: str, asked: torch.dtype | None, stored: torch.dtype, devices: Sequence[torch.device]
) -> torch.dtype:
    """What a model computes in: in float16 small gradients are lost without loss scaling, which is not done here.
    Raises ModelError where that is asked for."""
    if asked == torch.float16:
        raise ModelError(f"model {name}: nothing is trained in float16 here; give dtype='bfloat16'")
    if asked or stored != torch.float16:
        return asked or stored
    other = "float32" if devices[0].type == "cpu" else "bfloat16"
    log.warning("model %s is in float16, and is read as %s: nothing is trained in float16 here", name, other)
    return getattr(torch, other)


def _dtype(config: Any, tensors: Mapping[str, StoredTensor]) -> torch.dtype:
    """As the configuration says (the hub's say it of the text model), else what most weights are stored in."""
    named = config.dtype or config.get_text_config().dtype
    if isinstance(named, torch.dtype):
        return named
    stored: Counter[str] = Counter()
    for tensor in tensors.values():
        stored[tensor.dtype] += tensor.elements
    return next((DTYPES[dtype] for dtype, _ in stored.most_common() if dtype in DTYPES), torch.float32)


def _check_whole(name: str, info: Mapping[str, Any]) -> None:
    """Raise ModelError for tensors that were not in the checkpoint (they would be random), or do not belong to it."""
    shapes = [f"{key} ({list(here)}, not {list(there)})" for key, here, there in info["mismatched_keys"]]
    problems = {
        "lacks {} of the model's tensors": info["missing_keys"],
        "has {} tensors of other shapes than the model's": shapes,
        "has {} tensors that the model does not know": info["unexpected_keys"],
    }
    wrong = [f"{what.format(len(keys))}, first {min(keys)}" for what, keys in problems.items() if keys]
    if wrong:
        raise ModelError(f"checkpoint {name} {'; it '.join(wrong)}; give the weights that belong to its config.json")


def _load_errors(name: str) -> AbstractContextManager[None]:
    """Whatever transformers, torch or safetensors raise for a checkpoint, as ModelError in one line."""
    reason = "model {} cannot be loaded ({}); download it again or give another"
    return translated(lambda error: ModelError(reason.format(name, one_line(error))))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' log lines and progress bars; what matters of them is raised instead."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with warnings.catch_warnings():  # it warns where HF_HUB_DISABLE_PROGRESS_BARS has decided already
        warnings.filterwarnings("ignore", message=".*progress bars.*")
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()


class Facts:
    """What is known of a checkpoint, wherever its weights are.

    vocabulary, context: tokens it knows, positions it takes. merge: patches a token of an image has, each way.
    takes_images: False for a text model. image_token, placeholders: the id at image positions, and all ids that no
    text may hold; -1 and none for a text model. device, dtype: where its inputs go, and what it computes in.
    """

    layout: Callable[[LoraSpec], Layout]  # where everything is in an adapter of a spec
    device: torch.device
    dtype: torch.dtype

    def describe(self, name: str, path: str, make: Callable[[], Any]) -> None:
        """make: gives the stock model, of whose configuration and modules alone all is said."""
        self.name = name
        self.tokenizer, self._rule = load_tokenizer(path), load_rule(path)  # what is small fails before what is large
        self.stock = make()
        self.tokenizer_id = models.loadable(path)  # where others on this machine find it
        config = self.stock.config  # reading it is slow, and is done for every token
        self.vocabulary: int = config.get_text_config().vocab_size
        self.width: int = config.get_text_config().hidden_size
        self.context: int = getattr(config.get_text_config(), "max_position_embeddings", None) or UNBOUNDED
        self.takes_images = family_of(self.stock).vision
        self.merge: int = config.vision_config.spatial_merge_size if self.takes_images else 1
        self.image_token: int = config.image_token_id if self.takes_images else -1
        ids = (getattr(config, each, None) for each in ("image_token_id", "video_token_id") if self.takes_images)
        self.placeholders: tuple[int, ...] = tuple(each for each in ids if each is not None)
        self.kind: str = config.model_type
        # around a part of PROFILED: its seconds are added to the profile, where one is open
        self.timed: Callable[[str], AbstractContextManager[Any]] = nullcontext

    @property
    def rule(self) -> ImageRule:
        """How its images are cut. Raises RequestError for a text model."""
        if self._rule is None:
            raise RequestError(f"model {self.name} is a text model and takes no images; ask one that does")
        return self._rule

    def check_tokens(self, tokens: Sequence[int], what: str = "token") -> None:
        """Raise RequestError for the first of `tokens` that the vocabulary does not have."""
        if tokens and not 0 <= min(tokens) <= max(tokens) < self.vocabulary:
            wrong = next(token for token in tokens if not 0 <= token < self.vocabulary)
            raise RequestError(f"{what} {wrong} is outside the vocabulary of {self.vocabulary}")


class Model(Facts):
    """A checkpoint in memory.

    device: where it is put ("auto": on all GPUs); afterwards, where inputs go. dtype: None is the checkpoint's.
    path: its folder or hub id, where its name is another.
    """

    def __init__(
        self, name: str, device: str = "cpu", dtype: torch.dtype | None = None, path: str | None = None
    ) -> None:
        self.describe(name, path or name, partial(load, path or name, device, dtype))
        packed = family_of(self.stock).packed
        self.text: TextModel = Text(self.stock) if packed else StockText(self.stock, name)
        self.layout = cache(partial(Layout, self.stock))
        embeddings = self.stock.get_input_embeddings().weight
        self.device, self.dtype = embeddings.device, embeddings.dtype

    @contextmanager
    def profile(self) -> Iterator[dict[str, float]]:
        """Measure the time spent in the model itself while the context is open. The context yields a dictionary: for
        each part in PROFILED its seconds so far.

        "tower" is the vision tower, for images whose features are not in a cache. "forward" is the text model with its
        head and the loss. Each part waits for the device, so a profiled request may take longer on a GPU.
        """
        before, seconds = self.timed, dict.fromkeys(PROFILED, 0.0)
        self.timed = partial(_timed, seconds, self.device)
        try:
            yield seconds
        finally:
            self.timed = before


class Outline(Facts):
    """A checkpoint whose weights are in other processes. device: of theirs. profiles: those that are open.

    Raises as `Model`, but for what only the weights say.
    """

    def __init__(
        self, name: str, device: torch.device, dtype: torch.dtype | None, path: str, profiles: list[dict[str, float]]
    ) -> None:
        self.describe(name, path, partial(empty, path, device, dtype))
        self.layout = cache(partial(Layout, self.stock, device=torch.device("cpu")))
        self.device, self.dtype, self._profiles = device, next(self.stock.parameters()).dtype, profiles

    @contextmanager
    def profile(self) -> Iterator[dict[str, float]]:
        """As `Model.profile`."""
        seconds = dict.fromkeys(PROFILED, 0.0)
        self._profiles.append(seconds)
        try:
            yield seconds
        finally:
            self._profiles[:] = [each for each in self._profiles if each is not seconds]


class PartReader:
    """Reads a checkpoint part by part into a stock model whose weights are on the meta device.

    stock, dtype, device: that model, its type, and where it computes. Raises as `load`.
    """

    def __init__(self, name: str, device: torch.device, dtype: torch.dtype | None) -> None:
        from accelerate import init_empty_weights
        from transformers.conversion_mapping import get_model_conversion_mapping

        family, config = _read_config(name, Path(models.source(name)))
        self._name, self.device = name, device
        self._weights = Weights(name, Path(models.weights(name)))
        self.dtype = _compute_dtype(name, dtype, _dtype(config, self._weights.tensors), [device])
        kind = getattr(transformers, family.stock)
        attention = ATTENTION if kind._supports_sdpa else "eager"
        with _load_errors(name), _quiet(), init_empty_weights(include_buffers=False):
            self.stock: Any = kind._from_config(config, dtype=self.dtype, attn_implementation=attention)
        self.stock.tie_weights()  # out of there, where every parameter becomes another one
        self.stock.eval().requires_grad_(False)
        self._mapping: Any = get_model_conversion_mapping(self.stock, None, None)
        self._sources = self._sources_by_target()

    def _sources_by_target(self) -> dict[str, list[str]]:
        """The model's tensors, or the first that a group of the file's becomes, and the file's for each."""
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        renamings = [each for each in self._mapping if isinstance(each, WeightRenaming)]
        converters = [each for each in self._mapping if isinstance(each, WeightConverter)]
        own, found = self.stock.state_dict(), dict[str, list[str]]()
        for key in self._weights.tensors:
            target, _ = rename_source_key(key, renamings, converters, self.stock.base_model_prefix, own)
            found.setdefault(key if target not in own and key in own else target, []).append(key)
        return found

    @contextmanager
    def read(self, prefix: str) -> Iterator[None]:
        """Have the tensors whose names begin so in memory."""
        before = [  # of these very modules: others may take their places
            (module, name, parameter)
            for at, module in self.stock.named_modules()
            for name, parameter in module.named_parameters(recurse=False)
            if f"{at}.{name}".startswith(prefix)
        ]
        self._load(prefix)
        try:
            yield
        finally:
            for module, name, parameter in before:
                setattr(module, name, parameter)

    def read_rest(self) -> None:
        """Read all that is small and was not read, to stay on the device."""
        left = [n for n, p in self.stock.named_parameters() if p.is_meta and not self._elsewhere(n)]
        for name in left:
            self._load(name)
        for module in self.stock.modules():
            own = module._parameters.items(), module._buffers.items()
            for items, holder in zip(own, (module._parameters, module._buffers), strict=True):
                for name, tensor in [*items]:
                    if tensor is not None and not tensor.is_meta and type(tensor).__name__ != "DTensor":
                        moved = tensor.detach().to(self.device)
                        holder[name] = torch.nn.Parameter(moved, False) if holder is module._parameters else moved

    def _elsewhere(self, name: str) -> bool:
        """Whether a tensor belongs to what is divided."""
        family = family_of(self.stock)
        ends = (f"{family.layers}.", f"{family.embeddings}.", f"{family.head}.")
        return name.startswith(ends)

    def _load(self, prefix: str) -> None:
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        keys = [key for target, keys in self._sources.items() if target.startswith(prefix) for key in keys]
        state = {key: Unread(partial(self._weights.read, key, self.dtype)) for key in keys}
        settings = LoadStateDictConfig(device_map={"": "cpu"}, dtype=self.dtype, weight_mapping=self._mapping)
        with _load_errors(self._name), _quiet():
            info, _ = convert_and_load_state_dict_in_model(self.stock, state, settings)
        missing = {key for key in info.missing_keys if key.startswith(prefix)}
        found = {"missing_keys": missing, "mismatched_keys": info.mismatched_keys, "unexpected_keys": set()}
        _check_whole(self._name, found)


def empty(name: str, device: torch.device, dtype: torch.dtype | None) -> Any:
    """The model as `load` gives it, on torch's meta device: of its weights there are the shapes alone."""
    family, config = _read_config(name, Path(models.source(name)))
    weights = Weights(name, Path(models.weights(name)))
    dtype = _compute_dtype(name, dtype, _dtype(config, weights.tensors), [device])
    return _from_pretrained(name, family, config, weights, dtype, {"": "meta"}).eval().requires_grad_(False)


@contextmanager
def _timed(seconds: dict[str, float], device: torch.device, part: str) -> Iterator[None]:
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else bool
    wait()
    start = time.perf_counter()
    yield
    wait()
    seconds[part] += time.perf_counter() - start
