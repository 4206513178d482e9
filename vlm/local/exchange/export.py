"""An adapter in the forms that other programs read: merged into its model, for PEFT to merge, for vLLM.

Of a model whose head is tied to its embeddings (Qwen3-VL 2B and 4B), PEFT merges the head's part into the embeddings
too, which makes another model; it has no setting against that (`ensure_weight_tying` puts an adapter on the embeddings
as well). So a head is untied first: `merged` has one of its own, and for `peft` it is a whole layer (modules_to_save).
What is written is kept only if it gives this engine's logits in plain transformers (and PEFT).
"""

import gc
import io
import json
import shlex
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tinker
import torch
from PIL import Image
from safetensors.torch import save_file
from tinker import types
from torch import Tensor

from kshot.errors import InputError, KshotError, ModelError, RequestError
from kshot.files import replace_folder
from kshot.hub import one_line, translated
from kshot.images import open_image
from vlm import models
from vlm.inputs import ImageRule, image_chunk, model_input
from vlm.local import checkpoint
from vlm.local.checkpoint import Checkpoint
from vlm.local.engine import Engine
from vlm.local.model.attention import Causal
from vlm.local.model.experts import Pair, by_expert
from vlm.local.model.families import EXPERTS, Family, family_of
from vlm.local.model.load import DTYPES, Model, load
from vlm.local.model.lora import Adapter
from vlm.local.model.placement import INDEX, SINGLE, StoredTensor
from vlm.local.model.quantised import ENTRY, Weights
from vlm.templates import image_marks

SHARD = 5 << 30  # bytes of a file of weights, at most, unless one tensor has more
# How far the logits may be apart, of their size, both as root mean squares: in bfloat16 merged weights are rounded, and
# a router may choose another expert somewhere. A layer that is missed is four times as far as that, or more.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}
# vLLM 0.33: vllm/config/lora.py, and vllm/lora/layers/logits_processor.py for the vocabulary
VLLM_RANKS, VLLM_VOCABULARY = (8, 16, 32, 64, 128, 256, 320, 512), 258_048
TIED, LORA_A, LORA_B = "tie_word_embeddings", ".lora_A.weight", ".lora_B.weight"
PEFT_PREFIX = "base_model.model."
QUESTION = "What is the name of the subject in this photo?"


class Proof(NamedTuple):
    """prompts: how many, with images and without. gap: the largest difference of a logit between what was written, in
    transformers (and PEFT), and this engine. reach: the largest logit. use: a command to use it with, or ""."""

    prompts: int
    gap: float
    reach: float
    use: str


class _Base(NamedTuple):
    """The model under an adapter. folder: with its files. image: the id at image positions."""

    name: str
    folder: Path
    device: str
    dtype: torch.dtype
    tied: bool
    vocabulary: int
    rule: ImageRule | None
    image: int
    family: Family


def export(adapter: Path, target: Path, form: str, base_model: str | None = None, device: str = "cpu") -> Proof:
    """Write the adapter in a folder, in the form merged, peft or vllm, to a new or empty folder, and prove it.

    base_model: its model under another name than the recorded one, or to fetch it. Raises InputError and ModelError for
    what cannot be had or written so, and KshotError where the proof fails: then nothing is written.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} is there; give a new or empty folder")
    saved = checkpoint.load_folder(adapter)
    name = checkpoint.base_of(adapter, saved, base_model)
    if form == "vllm":
        _check_vllm(adapter, saved)
    base, numbers, prompts, ours = _ours(adapter, saved, name, device)
    gc.collect()  # the engine's model: the one that is written is loaded in its place
    if form == "vllm" and base.vocabulary > VLLM_VOCABULARY:
        raise ModelError(
            f"vLLM takes LoRA on {VLLM_VOCABULARY:,} tokens at most; use --merged, which every server reads"
        )
    proofs = list[Proof]()

    def fill(folder: Path) -> None:
        write = {"merged": _write_merged, "peft": _write_peft, "vllm": _write_vllm}[form]
        write(folder, base, numbers)
        for stock in _loaded(folder, base, form):
            proofs.append(_proof(form, base, ours, _stock_logits(stock, base, prompts)))

    replace_folder(target, fill)
    rank = min((rank for rank in VLLM_RANKS if rank >= saved.spec.rank), default=0)
    words = ["vllm", "serve", models.loadable(name), "--enable-lora", "--max-lora-rank", str(rank)]
    words += ["--lora-modules", f"{target.name}={target}"]
    return max(proofs)._replace(use=shlex.join(words) if form == "vllm" else "")


def _check_vllm(adapter: Path, saved: Checkpoint) -> None:
    way_out = "use --merged, which every server reads"
    if saved.spec.in_tower:
        why = "vLLM leaves out silently unless --enable-tower-connector-lora, an experiment, is given"
        raise ModelError(f"adapter {adapter} covers the vision tower, which {why}; {way_out}")
    if saved.spec.rank > VLLM_RANKS[-1]:
        raise ModelError(f"adapter {adapter} has rank {saved.spec.rank}, beyond vLLM's {VLLM_RANKS[-1]}; {way_out}")


# The proof


def _ours(
    adapter: Path, saved: Checkpoint, name: str, device: str
) -> tuple[_Base, Adapter, list[tinker.ModelInput], list[Tensor]]:
    """The model, the adapter over it, prompts and (positions, vocabulary) logits of each by this engine."""
    model = Model(name, device)
    try:
        numbers = saved.adapter(model)
    except ModelError as error:
        raise ModelError(f"adapter {adapter} does not belong to the model {name}: {error}") from error
    engine, prompts = Engine(model), list(_prompts(model))
    factors = engine.snapshot(numbers)
    ours = list[Tensor]()
    with torch.inference_mode():
        for prompt in prompts:
            batch = engine.collate([prompt], factors)
            hidden = model.text.hidden(batch.inputs, Causal(batch.rows), factors)
            ours.append(model.text.logits(hidden, factors).cpu())
    rule, family = model.rule if model.takes_images else None, family_of(model.stock)
    tied, folder = bool(model.stock.config.tie_word_embeddings), Path(models.weights(name))
    base = _Base(name, folder, device, model.dtype, tied, model.vocabulary, rule, model.image_token, family)
    return base, numbers, prompts, ours


def _prompts(model: Model) -> Iterator[tinker.ModelInput]:
    """Three of text; of a model that takes images also four about an image, and one about two."""
    rng, encode = np.random.default_rng(0), model.tokenizer.encode

    def chunk(width: int, height: int) -> types.ImageChunk:
        file = io.BytesIO()
        pixels = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        pixels.resize((width, height), Image.Resampling.BICUBIC).save(file, "PNG")
        return image_chunk(file.getvalue(), model.rule)

    if model.takes_images:
        start, _, end, _ = image_marks(model.tokenizer)
        for size in ((64, 64), (96, 64), (64, 128), (128, 96)):
            yield model_input(encode(start), chunk(*size), encode(f"{end}{QUESTION}"))
        pair = chunk(64, 64), encode(f"{end} or {start}"), chunk(64, 96)
        yield model_input(encode(start), *pair, encode(f"{end}?"))
    for text in (QUESTION, "The subject in this photo is: a red fox\n", "1 + 1 = 2, 2 + 2 ="):
        yield model_input(encode(text))


def _loaded(folder: Path, base: _Base, form: str) -> Iterator[Any]:
    """What was written, as stock transformers and PEFT load it, one after the other."""
    if form == "merged":
        yield load(str(folder), base.device, base.dtype)
        return
    from peft import PeftModel

    why = "{} cannot be used by PEFT ({})"
    with warnings.catch_warnings(), translated(lambda error: KshotError(why.format(folder, one_line(error)))):
        warnings.simplefilter("ignore")  # of tied heads
        peft = PeftModel.from_pretrained(load(base.name, base.device, base.dtype), str(folder))
    yield peft
    if form == "peft":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield peft.merge_and_unload()


@torch.inference_mode()
def _stock_logits(stock: Any, base: _Base, prompts: Sequence[tinker.ModelInput]) -> list[Tensor]:
    return [stock(**_stock_inputs(base, each).to(stock.device)).logits[0].float().cpu() for each in prompts]


def _stock_inputs(base: _Base, prompt: tinker.ModelInput) -> Any:
    from transformers import BatchFeature

    ids, images = list[int](), list[Image.Image]()
    for chunk in prompt.chunks:
        if isinstance(chunk, types.ImageChunk):
            images.append(open_image(chunk.data))
            ids += [base.image] * chunk.length
        elif isinstance(chunk, types.EncodedTextChunk):
            ids += chunk.tokens
    processor: Any = base.rule and base.rule.processor
    inputs = processor(images=images, return_tensors="pt") if images else BatchFeature()
    inputs["input_ids"] = torch.tensor([ids])
    if images:
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == base.image).int()
    return inputs


def _proof(form: str, base: _Base, ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Proof:
    mine = torch.cat(list(ours))
    off = torch.cat(list(theirs)) - mine
    share, gap, reach = float(off.norm() / mine.norm()), float(off.abs().max()), float(mine.abs().max())
    if not share <= TOLERANCE[base.dtype]:  # nor where it is NaN
        far = f"on {len(ours)} prompts its logits are off by {share:.2g} of their size, and one by {gap:.3g}"
        raise KshotError(f"the {form} form of the adapter gives another model: {far}; nothing was written")
    return Proof(len(ours), gap, reach, "")


# The forms


def _write_merged(folder: Path, base: _Base, adapter: Adapter) -> None:
    """The model's files with the adapter in the weights: one file of weights in memory at a time."""
    untied = base.tied and adapter.layout.spec.train_unembed
    weights = Weights(base.name, base.folder)
    stored, embeddings = {**weights.tensors}, f"{base.family.embeddings}.weight"
    changed, head = _changes(adapter, stored), f"{base.family.head}.weight"
    if untied and head not in stored:
        stored[head] = stored[embeddings]
    if missing := sorted(changed.keys() - stored.keys()):
        raise ModelError(f"checkpoint {base.name} has no {missing[0]}, which the adapter changes; use --peft")
    shards, index = list(_shards(stored)), dict[str, str]()
    for number, names in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        index |= dict.fromkeys(names, file)
        sources = {name: name if name in weights.tensors else embeddings for name in names}
        tensors = {name: _new(weights, source, changed.get(name)) for name, source in sources.items()}
        save_file(tensors, folder / file, FORMAT)
    if len(shards) > 1:
        size = sum(_bytes(tensor) for tensor in stored.values())
        _write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": index})
    for pattern in models.SMALL:
        for path in base.folder.glob(pattern):
            if path.name != INDEX:
                shutil.copyfile(path, folder / path.name)
    if untied or weights.quantised:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        for part in (config, config.get("text_config", {})):
            part.pop(ENTRY, None)  # what is written is dequantised
            part[TIED] = base.tied and not untied
        _write_json(folder / "config.json", config)


FORMAT = {"format": "pt"}  # what transformers writes into a safetensors file, and asks for
Change = Callable[[Tensor], object]  # adds to a float32 tensor


def _changes(adapter: Adapter, stored: Mapping[str, StoredTensor]) -> dict[str, Change]:
    """By the name of a stored tensor, what is added to it. The experts of a layer are stored together, or (Qwen3-MoE)
    each by itself."""
    named, scale, rank = adapter.named(), adapter.layout.spec.scale, adapter.layout.spec.rank
    changes = dict[str, Change]()
    for name, a in named.items():
        layer, first, _ = name.removeprefix(PEFT_PREFIX).partition(LORA_A)
        if not first:
            continue
        pair = a.float().cpu(), named[name.replace(LORA_A, LORA_B)].float().cpu()
        outer, inner, _ = layer.partition(f"{EXPERTS}.base_layer")
        if inner or layer.endswith(EXPERTS):
            together = f"{outer}{EXPERTS}.gate_up_proj" if inner else f"{layer}.down_proj"
            experts = by_expert(pair, len(a) // rank)
            if together in stored:
                changes[together] = _to_experts(experts, scale)
            else:
                changes |= _to_each(together, experts, scale)
        else:
            changes[f"{layer}.weight"] = _to_linear(pair, scale)
    return changes


def _to_linear(pair: tuple[Tensor, Tensor], scale: float) -> Change:
    return lambda weight: weight.addmm_(pair[1], pair[0], alpha=scale)


def _to_experts(pair: Pair, scale: float) -> Change:
    a, b = pair  # (experts, rank, in), (experts, out, rank)

    def add(weight: Tensor) -> None:
        # the hub's files have (experts, in, out), transformers' own (experts, out, in): told apart as it does
        as_here = weight.shape == (len(a), b.shape[1], a.shape[2])
        for number, each in enumerate(weight if as_here else weight.mT):
            each.addmm_(b[number], a[number], alpha=scale)

    return add


def _to_each(together: str, pair: Pair, scale: float) -> Iterator[tuple[str, Change]]:
    """The same of experts that are stored one by one, gate and up apart."""
    module, _, projection = together.rpartition(".")
    names = ("gate_proj", "up_proj") if projection == "gate_up_proj" else (projection,)
    for number, (a, b) in enumerate(zip(*pair, strict=True)):
        for name, part in zip(names, b.chunk(len(names)), strict=True):
            yield f"{module}.{number}.{name}.weight", _to_linear((a, part), scale)


def _new(weights: Weights, name: str, change: Change | None) -> Tensor:
    """A tensor as it is stored, or with what the adapter adds, in float32 and then as it was."""
    dtype = DTYPES.get(weights.tensors[name].dtype)
    tensor = weights.read(name, torch.float32 if change else dtype or torch.float32)
    if change is not None:
        tensor = tensor.to(torch.float32, copy=True)
        change(tensor)
    return tensor.to(dtype or tensor.dtype)


def _shards(stored: Mapping[str, StoredTensor]) -> Iterator[list[str]]:
    """The names by files, in order."""
    names, size = list[str](), 0
    for name, tensor in stored.items():
        if names and size + _bytes(tensor) > SHARD:
            yield names
            names, size = [], 0
        names.append(name)
        size += _bytes(tensor)
    yield names


def _bytes(tensor: StoredTensor) -> int:
    return tensor.elements * DTYPES.get(tensor.dtype, torch.float64).itemsize


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_peft(folder: Path, base: _Base, adapter: Adapter) -> None:
    """For PEFT to load and to merge."""
    spec, weights = adapter.layout.spec, _plain(adapter)
    config = adapter.layout.config()
    if base.tied and spec.train_unembed:
        try:
            config = adapter.layout.config(replace(spec, train_unembed=False))
        except RequestError as error:
            raise ModelError(f"PEFT cannot merge an adapter of a tied head alone; use --merged ({error})") from error
        config.modules_to_save = [base.family.head]
        embeddings = f"{base.family.embeddings}.weight"
        stored, head = Weights(base.name, base.folder), f"{base.family.head}.weight"
        weights = {name: tensor for name, tensor in weights.items() if f".{base.family.head}." not in name}
        change = _changes(adapter, stored.tensors)[head]
        weights[f"{PEFT_PREFIX}{head}"] = _new(stored, embeddings, change)
    checkpoint.write_peft(folder, weights, config, base.name)


def _write_vllm(folder: Path, base: _Base, adapter: Adapter) -> None:
    """For vLLM: layers listed by the ends of their names, and an lm_head, which it keeps apart from tied embeddings."""
    config, weights = adapter.layout.config(), _plain(adapter)
    layers = {name.partition(".lora_")[0] for name in weights if f".{EXPERTS}." not in name}
    config.target_modules = sorted({layer.rpartition(".")[2] for layer in layers})
    checkpoint.write_peft(folder, weights, config, base.name)


def _plain(adapter: Adapter) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in adapter.named().items()}
