"""What a sweep is: the schema of presets and YAML files, how they are read, and the command line of a recorded one."""

import re
import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from itertools import product
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from data import catalog
from kshot import hub
from kshot.errors import InputError, UnknownNameError
from kshot.untrusted import YAML_BYTES, parse_yaml, read_file
from vlm.models import full_name
from vlm.places import place_of

if TYPE_CHECKING:
    from data.dataset import Access


def _share_or_count(start: float) -> float:
    if start > 1 and not start.is_integer():
        raise ValueError("it must be a share below 1, or a whole number of steps")
    return start


OWN = "own"  # each image's own size, where text is needed; in settings it is None
Readout = Literal["cls", "cls+mean", "last4", "last4+mean", "pooled"]
ImageSize = Annotated[PositiveInt | None, BeforeValidator(lambda size: None if size == OWN else size)]
VlmFeatures = Literal["tower", "hidden", "tower+hidden"]
LossName = Literal["text", "closed-set"]
LossPower = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Start = Annotated[float, Field(ge=0, allow_inf_nan=False), AfterValidator(_share_or_count)]
Shots = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0)]
ModelName = Annotated[str, AfterValidator(full_name)]
DatasetName = Annotated[str, AfterValidator(catalog.full_name)]


class Settings(BaseModel):
    """Everything besides data set, method, shots and seed that a cell's numbers may depend on. The defaults are the
    reference protocol (the official vlm_classifier recipe)."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    model: ModelName = "Qwen/Qwen3-VL-2B-Instruct"
    backbone: str = "vit_base_patch14_dinov2.lvd142m"
    readout: Readout = "cls"  # which tokens of the backbone, see baselines.backbone
    image_size: ImageSize = None  # pixels, square, of the backbone's input; None: the image's own size
    vlm_features: VlmFeatures = "tower"  # the input of vlm-vision-linear's head
    max_side: PositiveInt = 480
    limit_test: PositiveInt | None = None
    split_seed: Seed = 0
    allow_fewer: bool = False
    shuffle_test: bool = False  # a control: each test image takes the place of another
    views_per_class: PositiveInt = 160
    hflip: Annotated[float | None, Field(ge=0, le=1)] = None  # share of mirrored views; None: the data set's own
    batch_size: PositiveInt = 32
    rank: PositiveInt = 32
    learning_rate: PositiveFloat = 1e-4
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    eps: PositiveFloat = 1e-8
    prompt: str = "recipe"  # a preset or a template, see vlm.prompts
    answer_tokens: PositiveInt = 128  # of a free answer, at most
    loss: LossName = "text"
    loss_power: LossPower = 0.0  # q of closed-set: (1 - p^q) / q of the right class; 0: -log p, 1: the expected reward
    start: Start = 0.0  # of the steps, the first ones train with the loss text: a share below 1, or their number
    calibration: Literal["none", "contextual", "pmi", "validated"] = "none"
    group_size: Annotated[int, Field(ge=2)] = 8  # answers that vlm-rl samples to a training image
    temperature: PositiveFloat = 1.0  # of this sampling
    policy_loss: Literal["importance_sampling", "ppo"] = "importance_sampling"  # of the API, of vlm-rl
    kl: Annotated[float, Field(ge=0)] = 0.0  # what a nat away from the base model costs of a token's advantage
    thinking: Annotated[int, Field(ge=0)] = 0  # tokens of a thought before the answer, at most; 0: no thought
    thoughts: PositiveInt = 1  # about a test image
    thinking_temperature: Annotated[float, Field(ge=0)] = 1.0
    thinking_seed: Seed = 0
    train_on: Literal["answer", "all"] = "answer"  # what the loss is on, where there is a thought

    def steps(self, classes: int) -> int:
        """Optimizer steps of constant compute: `views_per_class` views of each class whatever the shots."""
        return -(-self.views_per_class * classes // self.batch_size)

    def start_steps(self, steps: int) -> int:
        """How many of so many steps `start` is; all at most."""
        share = ceil(round(self.start * steps, 9))  # 0.07 of 100 are 7, not 7.000000000000001
        return min(steps, share if self.start < 1 else int(self.start))


T = TypeVar("T")
Distinct = Annotated[tuple[T, ...], AfterValidator(lambda values: tuple(dict.fromkeys(values)))]
Several = Annotated[Distinct[T], Field(min_length=1)]


class Compare(BaseModel):
    """The settings of which a sweep may compare values; one that is not given has the one value of the settings."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    backbone: Several[str] = ()
    image_size: Several[ImageSize] = ()
    readout: Several[Readout] = ()
    vlm_features: Several[VlmFeatures] = ()
    loss: Several[LossName] = ()
    loss_power: Several[LossPower] = ()
    start: Several[Start] = ()


COMPARED = tuple(Compare.model_fields)
# Settings of models that think: results state them only where they are not the usual ones.
THINKING = ("thinking", "thoughts", "thinking_temperature", "thinking_seed", "train_on")
# Settings that came later than results: at their defaults they are no part of a cell's key.
LATER = ("loss_power", "start", "group_size", "temperature", "policy_loss", "kl", *THINKING)


def idle(read: Collection[str], values: Mapping[str, Any]) -> set[str]:
    """Settings of `values` that change nothing for a method that reads `read`: with the loss text, those of the other
    loss, and a start with the loss text."""
    return {"loss_power", "start"} if "loss" in read and values.get("loss") == "text" else set()


class Sweep(BaseModel):
    """A grid of cells: data sets x methods x shots x seeds under one set of settings, or under several: every
    combination of the values that are compared."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=r"^\w[\w .-]*$")]  # the default folder is runs/NAME
    datasets: Several[DatasetName]
    methods: Several[str]
    shots: Several[Shots]
    seeds: Several[Seed]
    # of a data set that has fewer images a class: more shots become these, once
    most_shots: Mapping[DatasetName, Shots] = {}
    min_steps: Annotated[int, Field(ge=0)] = 0  # of training: a set of few classes has more views of each for it
    cap_shots: bool = False  # whether a data set that has fewer images a class is drawn at what it has
    prompts: Distinct[str] = ()  # prompts to compare; none: that of the settings
    protocol: str = ""  # of the data sets that have several: recipe, official or coop; "" is each one's usual
    settings: Settings = Settings()
    compare: Compare = Compare()

    @property
    def axes(self) -> dict[str, tuple[Any, ...]]:
        """Setting → the values that it takes in this sweep, one or more, in the order in which they are reported."""
        prompts = self.prompts or (self.settings.prompt,)
        return {"prompt": prompts, **{name: values for name, values in self.compare if values}}

    @property
    def variants(self) -> list[Settings]:
        """The settings of every combination of these values; those of the later axes change first."""
        grid = product(*self.axes.values())
        return [self.settings.model_copy(update=dict(zip(self.axes, values, strict=True))) for values in grid]

    def on(self, classes: int, hflip: float) -> Self:
        """The sweep on a set of so many classes: with views for min_steps, and the set's hflip where it gives none."""
        s = self.settings
        views = max(s.views_per_class, -(-self.min_steps * s.batch_size // classes))
        mirrored = {"hflip": hflip if s.hflip is None else s.hflip}
        return self.model_copy(update={"settings": s.model_copy(update={"views_per_class": views, **mirrored})})

    def shots_of(self, dataset: str) -> tuple[int, ...]:
        """The shots that a data set is drawn at, in their order."""
        return capped(self.shots, self.most_shots.get(dataset))

    def points(self, dataset: str, read: Collection[str], *, learns: bool) -> Iterator[tuple[Settings, int, int]]:
        """(settings, shots, seed) of each cell of a method on a data set. read: the settings its numbers depend on;
        where others change, the cells are the same; what is idle has its default. A method that does not learn has one:
        0 shots and seed 0."""
        usual = Settings()
        for settings in self.variants:
            unread = idle(read, {"loss": settings.loss})
            changed = {name for name, values in self.axes.items() if getattr(settings, name) != values[0]}
            if changed <= set(read) - unread:
                chosen = settings.model_copy(update={name: getattr(usual, name) for name in unread})
                grid = product(self.shots_of(dataset), self.seeds) if learns else [(0, 0)]
                yield from ((chosen, shots, seed) for shots, seed in grid)

    @model_validator(mode="after")
    def _caps_are_of_its_sets(self) -> Self:
        if unknown := [name for name in self.most_shots if name not in self.datasets]:
            raise ValueError(f"{unknown[0]!r} is none of the data sets ({', '.join(self.datasets)})")
        return self


def capped(shots: Iterable[int], most: int | None) -> tuple[int, ...]:
    """The shots, those above `most` replaced by it, once; None: all as they are."""
    return tuple(dict.fromkeys(k if most is None else min(k, most) for k in shots))


@dataclass(frozen=True)
class RunOptions:
    """How a sweep is run: none of it is part of a cell. service, device: what computes. access: how the data sets are
    had; None: in the usual way. executor: of `experiments.sweep.workers.EXECUTORS`. workers: processes; None: as many
    as there is room for. threads: of each. gpus_per_worker: that each gets, for one VLM over all of them. only_failed:
    run only cells that failed before. track: a tool's name of `experiments.sweep.tracking.TRACKERS`, or None. Its VLM
    is over several processes ("ranks") with a device cpu:N, or several GPUs a worker."""

    service: str = "local"
    device: str = "cpu"
    access: "Access | None" = None
    executor: str = "local"
    workers: int | None = None
    threads: int = 1
    gpus_per_worker: int = 1
    only_failed: bool = False
    track: str | None = None

    @property
    def ranks(self) -> int:
        """Processes over which the VLM of a worker is. Raises InputError for a device that is none."""
        return place_of(self.device).count if self.device.startswith("cpu") else self.gpus_per_worker


MODELS = ("model", "backbone")  # the settings that name one
# those of what models are shown
DATA_SETTINGS = ("max_side", "limit_test", "split_seed", "allow_fewer", "shuffle_test")


def presets() -> list[str]:
    """The names of the sweeps that ship with kshot."""
    names = [path.name for path in (files("experiments") / "presets").iterdir()]
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def load(preset: str, overrides: dict[str, Any], settings: dict[str, Any]) -> Sweep:
    """The sweep of a preset's name or a YAML file, with the values given on the command line put over it.

    settings: {name: value}, or {name: a tuple of values to compare}, in place of what the file sets or compares.
    A preset's training settings fit its own models: where another model is given, the reference protocol's hold.
    The file's caps on shots hold for its data sets that are in the sweep, and no others where shots are given; views
    of each class that are given hold however few steps that makes. Raises UnknownNameError for a preset or a setting
    that is none, InputError for a value that is out of range.
    """
    file = read(preset)
    content = {**file, **overrides, **({"cap_shots": False} if "shots" in overrides else {})}
    if "views_per_class" in settings:
        content["min_steps"] = 0
    _drop_idle_caps(file, content)
    base, compare = content.get("settings") or {}, content.get("compare") or {}
    if isinstance(base, dict) and isinstance(compare, dict):
        if twice := [name for name in base if name in compare]:
            raise InputError(f"{preset} gives {twice[0]} twice: in settings and in compare; leave one out")
        if preset in presets() and any(_is_new(kind, settings, base, compare) for kind in MODELS):
            base = {name: value for name, value in base.items() if name in (*MODELS, *DATA_SETTINGS)}
            content["min_steps"] = 0
        several = {name: values for name, values in settings.items() if isinstance(values, tuple)}
        single = {name: value for name, value in settings.items() if name not in several}
        content["settings"] = {name: value for name, value in {**base, **single}.items() if name not in several}
        content["compare"] = {name: values for name, values in {**compare, **several}.items() if name not in single}
    try:
        return Sweep.model_validate(content)
    except ValidationError as error:
        raise _explained(preset, error) from error


def read(preset: str) -> dict[str, Any]:
    """The content of a preset or a YAML file."""
    if preset in presets():
        path = Path(str(files("experiments") / "presets" / f"{preset}.yaml"))
    elif preset.endswith((".yaml", ".yml")):
        path = Path(preset)
    else:
        is_data = preset in catalog.DATASETS or Path(preset).is_dir()
        hint = f"it is data; give --dataset {preset}" if is_data else ""
        raise UnknownNameError("preset", preset, [*presets(), "FILE.yaml"], hint)
    try:
        content = parse_yaml(read_file(path, YAML_BYTES).decode())
    except OSError as error:
        raise InputError(f"{preset} cannot be read ({error.strerror}); presets are: {', '.join(presets())}") from error
    except ValueError as error:
        raise InputError(f"{preset} cannot be read as YAML: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{preset} holds no sweep: it must be a mapping with name, datasets, methods, shots, seeds")
    return content


def _drop_idle_caps(file: Mapping[str, Any], content: dict[str, Any]) -> None:
    """Put the given caps on shots over the file's, without the file's caps on data sets of its own that the sweep does
    not have; a name that the file never had stays, and is refused later."""
    caps, datasets = file.get("most_shots"), file.get("datasets")
    if isinstance(caps, dict) and isinstance(datasets, list):
        idle = [name for name in datasets if name not in content["datasets"]]
        new = content["most_shots"] if content["most_shots"] is not caps else {}
        content["most_shots"] = {name: cap for name, cap in caps.items() if name not in idle} | new


def _is_new(kind: str, settings: Mapping[str, Any], base: Mapping[str, Any], compare: Mapping[str, Any]) -> bool:
    """Whether `settings` name a model that the file does not have."""
    old = compare.get(kind, (base.get(kind),))
    new = settings.get(kind, old)
    each = old, new if isinstance(new, list | tuple) else (new,)
    had, named = ({full_name(name) if isinstance(name, str) else name for name in names} for names in each)
    return not named <= had


def _explained(preset: str, error: ValidationError) -> InputError:
    """The first error in one line; an unknown name comes first, for it may be why another is missing."""
    first = min(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        kinds: dict[Any, tuple[str, type[BaseModel]]]
        kinds = {"settings": ("setting", Settings), "compare": ("setting to compare", Compare)}
        kind, model = kinds.get(first["loc"][0], ("setting", Sweep))
        return UnknownNameError(kind, str(first["loc"][-1]), model.model_fields)
    if first["type"] == "missing":
        return InputError(f"{preset} does not say {where}; a sweep has: {', '.join(Sweep.model_fields)}")
    if first["type"] == "value_error" and not where:
        return InputError(f"{preset}: most_shots: {first['ctx']['error']}")
    return InputError(f"{where} = {first['input']!r}: {first['msg']}")


def command(content: Mapping[str, Any]) -> str:
    """The command line of a sweep of this content (sweep.json): every setting in which it differs from the demo. Where
    a folder of images lies is not recorded: its path is to be filled in."""
    recorded = {kind: _at_commits(kind, content["settings"]) for kind in MODELS}
    models = {kind: tuple(value) if isinstance(value, list) else value for kind, value in recorded.items()}
    demo = load("demo", {}, models)
    base = demo.settings.model_dump()
    base.update({kind: value for kind, value in load("demo", {}, {}).settings if kind in MODELS})
    sources = {name: name.replace("folder:", "folder:PATH/TO/", 1) for name in content["datasets"]}
    options = [("--dataset", name) for name in sources.values()] + [("--method", m) for m in content["methods"]]
    options += [(f"--{field}", ",".join(map(str, content[field]))) for field in ("shots", "seeds")]
    options += [("--most-shots", f"{sources[name]}={most}") for name, most in content.get("most_shots", {}).items()]
    if (service := content.get("service", "local")) != "local":
        options.append(("--service", "ADDRESS" if service == "remote" else service))
    if (device := content.get("device", "cpu")) != "cpu":
        options.append(("--device", "auto" if device == "all" else device))
    settings = content["settings"] | recorded
    changed = {k: v for k, v in settings.items() if k in base and v != base[k]}
    few = any(demo.settings.steps(len(names)) < demo.min_steps for names in content["classes"].values())
    if few and "views_per_class" not in content:
        changed["views_per_class"] = content["settings"]["views_per_class"]
    prompts = changed.pop("prompt", [])
    options += [("--prompt", text) for text in ([prompts] if isinstance(prompts, str) else prompts)]
    compared = {name: changed.pop(name) for name in COMPARED if isinstance(changed.get(name), list)}
    for name, values in compared.items():
        options += [(f"--{name.replace('_', '-')}", OWN if value is None else str(value)) for value in values]
    options += [("--set", f"{k}={v}") for k, v in changed.items()]
    options += _access_options(content.get("data", {}).values())
    modified = any("-modified-" in protocol for protocol in content["protocols"].values())
    flags = " --allow-modified" if modified else ""
    if any(facts.get("allow_shared") for facts in content.get("data", {}).values()):
        flags += " --allow-shared"
    return "kshot sweep demo " + " ".join(f"{name} {shlex.quote(value)}" for name, value in options) + flags


def commits_of(kind: str, settings: Mapping[str, Any]) -> dict[str, str]:
    """Models of the hub → their commits, by recorded settings. kind: of MODELS."""
    names, revisions = settings[kind], settings.get(f"{kind}_revision")
    several = names if isinstance(names, list) else [names]
    each = revisions if isinstance(revisions, list) else [revisions] * len(several)
    return {name: commit for name, commit in zip(several, each, strict=True) if re.fullmatch(hub.COMMIT, commit or "")}


def _at_commits(kind: str, settings: Mapping[str, Any]) -> Any:
    commits, names = commits_of(kind, settings), settings[kind]
    each = [f"{n}@{commits[n]}" if n in commits else n for n in (names if isinstance(names, list) else [names])]
    return each if isinstance(names, list) else each[0]


def _access_options(facts: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """The options by which the data sets were had; where the files lay is not recorded."""
    options: dict[str, str] = {}
    for fact in facts:
        if "protocol" in fact:
            options |= {"--source": fact["source"], "--protocol": fact["protocol"]}
        if fact.get("source") == "archive":
            options |= {"--root": "PATH/TO/THE/ORIGINAL/FILES"}
        if fact.get("protocol") == "coop":
            options |= {"--split-file": "PATH/TO/THE/SPLIT.json"}
        if "label_column" in fact:
            options |= {"--label-column": fact["label_column"]}
    return list(options.items())
