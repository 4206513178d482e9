"""Checkpoints on disk, in PEFT's own layout: adapter_model.safetensors, adapter_config.json, optimizer, a record.

`tinker://<run>/<kind>/<name>` with the kinds of `kshot.checks` are folders below one state folder; no name leads out of
it. Written to a temporary folder, then renamed. A folder of this layout can be read wherever it lies.
"""

import json
import os
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kshot.checks import KINDS, check_ttl, folder_of
from kshot.errors import ModelError, RequestError, UnknownNameError
from kshot.files import replace_folder, write_file
from kshot.untrusted import check_regular, parse_json, read_file
from vlm.local.exchange import age, foreign
from vlm.local.model.load import Model
from vlm.local.model.lora import Adapter, Layout, LoraSpec
from vlm.models import full_name, known, loadable

if TYPE_CHECKING:
    from peft import LoraConfig

WEIGHTS, OPTIMIZER, RECORD = "adapter_model.safetensors", "optimizer.safetensors", "kshot.json"

MERGING = (
    "Where the model's head is tied to its embeddings, PEFT's bare merge_and_unload() of this adapter changes the "
    "embeddings too, and gives another model. This merges right: kshot export FOLDER --merged OUT (or --peft OUT)."
)


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds. optimizer: the optimizer's tensors, or None where only weights were saved.

    experts: whether the base model has experts, which PEFT's configuration must name. layout: of the adapter, where it
    is known. place: where transformers finds the base model on this machine, a folder or the hub's id, if its name does
    not say it.
    """

    base_model: str
    spec: LoraSpec
    weights: Mapping[str, Tensor]
    experts: bool = False
    layout: Layout | None = None
    optimizer: Mapping[str, Tensor] | None = None
    user_metadata: Mapping[str, str] | None = None
    run_metadata: Mapping[str, str] | None = None  # of the run that saved it
    place: str | None = None
    expires: float | None = None  # seconds of the clock, when it is to be deleted; None: never
    origin: foreign.Foreign | None = None  # where others wrote it

    def adapter(self, model: Model) -> Adapter:
        """Its adapter over a model. Raises ModelError where it does not belong to that."""
        layout = model.layout(self.spec)
        if self.origin is None:
            return Adapter.of(layout, self.weights)
        foreign.check_copies(model.stock, self.origin.copies)
        return Adapter.of(layout, foreign.padded(layout, self.weights))


def state_folder() -> Path:
    """Where checkpoints go unless told otherwise: kshot below XDG_STATE_HOME or ~/.local/state."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "kshot"


def save(
    state: Path, path: str, checkpoint: Checkpoint, *, overwrite: bool = False, encrypt_to: Sequence[Any] = ()
) -> None:
    """Write a checkpoint. encrypt_to: see `vlm.local.exchange.age`; its record stays readable. Raises RequestError
    where one of this name exists and `overwrite` is not set, and for weights that are not finite."""
    target = folder_of(state, path)
    if target.exists() and not overwrite and not is_expired(target):
        or_so = " or overwrite=True" if f"/{KINDS[0]}/" in path else ""
        raise RequestError(f"checkpoint {path} exists; give another name{or_so}")
    if not _is_finite(checkpoint):
        way_out = "a learning rate was too high; go on from an earlier checkpoint"
        raise RequestError(f"checkpoint {path} would hold weights that are not finite: {way_out}")

    def fill(folder: Path) -> None:
        _write(folder, checkpoint)
        if encrypt_to:
            age.encrypt(folder, encrypt_to, RECORD)

    replace_folder(target, fill)


def load(state: Path, path: str) -> Checkpoint:
    """Read a checkpoint. Raises ModelError where there is none or it is damaged."""
    source = folder_of(state, path)
    if not source.is_dir() or is_expired(source):
        raise ModelError(f"checkpoint {path} does not exist in the state folder of this service")
    if (source / f"{WEIGHTS}{age.ENCRYPTED}").is_file():
        raise ModelError(f"checkpoint {path} is encrypted, for those who fetch it; save_state makes one to go on from")
    return _read(source, f"checkpoint {path}", source / OPTIMIZER)


def expires_at(record: Mapping[str, Any]) -> float | None:
    """When a checkpoint is to be deleted, by its record, in seconds of the clock; None: never."""
    value = record.get("expires")
    return float(value) if isinstance(value, int | float) else None


def is_expired(folder: Path, now: float | None = None) -> bool:
    """Whether the time of a checkpoint's folder is over; one without a readable record has none. now: seconds of the
    clock; None: as it is."""
    try:
        ends = expires_at(parse_json(read_file(folder / RECORD)))
    except (OSError, ValueError, AttributeError):
        return False
    return ends is not None and ends <= (time.time() if now is None else now)


def set_ttl(folder: Path, seconds: int | None) -> None:
    """Let a checkpoint's folder expire in so many seconds, or never. Raises RequestError for a time out of range."""
    check_ttl(seconds)
    record = parse_json(read_file(folder / RECORD))
    record.pop("expires", None)
    if seconds is not None:
        record["expires"] = time.time() + seconds
    saved = folder.stat()
    write_file(folder / RECORD, json.dumps(record, indent=2).encode())
    os.utime(folder, ns=(saved.st_atime_ns, saved.st_mtime_ns))  # which says when it was saved


def load_folder(folder: Path) -> Checkpoint:
    """Read the adapter in a folder of this layout, or as others save it, wherever it lies, without optimizer. Raises
    ModelError where there is none, it is damaged, or cannot be computed here."""
    if not folder.is_dir():
        raise ModelError(f"adapter {folder} is no folder; give one that kshot train or PEFT wrote")
    if (folder / RECORD).is_file():
        return _read(folder, f"adapter {folder}")
    if not foreign.is_foreign(folder):
        raise ModelError(f"adapter {folder} has neither {RECORD} nor {foreign.CONFIG}; give a folder with an adapter")
    read = foreign.read(folder)
    adapter = Checkpoint(read.base_model, read.spec, read.weights, origin=read)
    if not _is_finite(adapter):
        raise ModelError(f"adapter {folder} is damaged: not all of its numbers are finite; train it again")
    return adapter


def base_of(folder: Path, adapter: Checkpoint, base_model: str | None, loaded: Collection[str] = ()) -> str:
    """The name of the model that an adapter's folder is used with: the one that is given, or the one that the adapter
    names, if it is `loaded`, a folder, or whole in the hub's cache; nothing is fetched because an adapter names it.
    Raises ModelError with the way out."""
    way_out = "say with base_model (--model) where it is"
    if base_model is not None or adapter.base_model in loaded:
        return base_model or adapter.base_model
    if not adapter.base_model:
        raise ModelError(f"adapter {folder} does not say of which model it is; {way_out}")
    try:
        name = known(adapter.base_model)
    except UnknownNameError as error:
        raise ModelError(
            f"adapter {folder} is of the model {adapter.base_model}, which is not here; {way_out}"
        ) from error
    if name is None:
        what = f"adapter {folder} is of the model {adapter.base_model}, which is not on this machine"
        raise ModelError(f"{what} and is not fetched unasked; to fetch it, give base_model (--model) that name")
    return name


def _read(source: Path, name: str, optimizer: Path | None = None) -> Checkpoint:
    try:
        record = parse_json(read_file(source / RECORD))
        check_regular(source / WEIGHTS)
        if optimizer and optimizer.exists():
            check_regular(optimizer)
        if not isinstance(record["base_model"], str):
            raise TypeError(f"{record['base_model']!r} is no name")
        checkpoint = Checkpoint(
            base_model=record["base_model"],
            spec=_spec(record["lora"]),
            weights=load_file(source / WEIGHTS),
            experts=record["experts"],
            optimizer=load_file(optimizer) if optimizer and optimizer.exists() else None,
            user_metadata=record["user_metadata"],
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError, RequestError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ModelError(f"{name} is damaged ({reason}); restore it, or train and save it again") from error
    if not _is_finite(checkpoint):
        raise ModelError(f"{name} is damaged: not all of its numbers are finite; train it again")
    return checkpoint


def _is_finite(checkpoint: Checkpoint) -> bool:
    return all(tensor.float().isfinite().all() for tensor in checkpoint.weights.values())


def _spec(values: Any) -> LoraSpec:
    """The recorded spec, each value of the kind it was written as. Raises TypeError for others."""
    spec = LoraSpec(**values)
    for field in fields(LoraSpec):
        value = getattr(spec, field.name)
        if type(value) is not type(field.default):
            raise TypeError(f"{field.name} is {value!r}")
    return spec


def write_peft(
    folder: Path, weights: Mapping[str, Tensor], config: "LoraConfig", base_model: str, place: str | None = None
) -> None:
    """Write the two files of an adapter that PEFT reads."""
    save_file(dict(weights), folder / WEIGHTS)
    config.base_model_name_or_path = place or loadable(base_model)
    config.revision = full_name(base_model).partition("@")[2] or None
    config.save_pretrained(str(folder))


def _write(folder: Path, checkpoint: Checkpoint) -> None:
    layout = checkpoint.layout
    config = layout.config() if layout else checkpoint.spec.config(experts=checkpoint.experts)
    write_peft(folder, checkpoint.weights, config, checkpoint.base_model, checkpoint.place)
    if checkpoint.optimizer is not None:
        save_file(dict(checkpoint.optimizer), folder / OPTIMIZER)
    record = {
        "base_model": checkpoint.base_model,
        "lora": asdict(checkpoint.spec),
        "experts": checkpoint.experts,
        "user_metadata": dict(checkpoint.user_metadata or {}),
        "run_metadata": dict(checkpoint.run_metadata or {}),
    }
    if checkpoint.expires is not None:
        record["expires"] = checkpoint.expires
    if checkpoint.spec.train_unembed:
        record["note"] = MERGING
    (folder / RECORD).write_text(json.dumps(record, indent=2), encoding="utf-8")
