"""What is checked once before the first cell: settings that fit each other and the methods, images enough for the
shots, keys, and that the weights of every model can be had. A model that is nowhere is one line in seconds, not an
error in each cell. (Data sets are read by the plan; room is checked by `experiments.plan`.)"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from baselines import hub as hub_backbones
from baselines import nano as nano_dinov2
from data.dataset import Dataset
from experiments.sweep.cells import Job
from experiments.sweep.config import THINKING, Settings, Sweep, idle
from experiments.sweep.methods import METHODS, check_left_out
from experiments.sweep.provenance import recorded
from experiments.sweep.run import few_shot, validation
from kshot.errors import InputError, PromptError, TooFewImagesError, listed
from vlm import models

# Settings and shots


def check_settings(sweep: Sweep, service: str) -> None:
    """Raise UnknownNameError, PromptError, ModelError or InputError for settings that do not fit each other, a method
    that reads them, the model or the service."""
    used = settings_read(sweep)
    if "model" in used and service == "local":
        models.check(sweep.settings.model)
    if "backbone" in used:
        usual = Settings(backbone=nano_dinov2.NAME)
        encoders = dict.fromkeys((s.backbone, s.readout, s.image_size) for s in sweep.variants)
        if [*encoders] != [(usual.backbone, usual.readout, usual.image_size)]:  # that needs no second of importing
            from baselines.backbone import check

            for encoder in encoders:
                check(*encoder)
    for name in compared_settings(sweep):
        check_apart(sweep.axes[name], [each[name] for each in recorded_along(sweep, name)], f"{name} ")
    if "prompt" in used:
        from vlm.prompts import template

        for text in sweep.axes["prompt"]:
            template(text)
    if "loss" in used:
        _check_losses({settings.loss for settings in sweep.variants}, sweep, service)
    if "kl" in used and sweep.settings.kl and sweep.settings.temperature != 1:
        raise InputError(f"kl is measured at temperature 1, not at {sweep.settings.temperature}; leave one of them out")
    if "thinking" in used:
        _check_thinking(sweep)
    calibrated = [METHODS[name] for name in sweep.methods if "calibration" in METHODS[name].settings]
    if calibrated and sweep.settings.calibration == "validated" and not any(method.learns for method in calibrated):
        choice = "calibration validated chooses on labelled images, and zero-shot has none"
        raise InputError(f"{choice}; give contextual, pmi or none")


def _check_losses(losses: set[str], sweep: Sweep, service: str) -> None:
    if "closed-set" in losses and service == "tinker":
        raise InputError("the loss closed-set is none of the hosted service's; use --service local or --loss text")
    powers = {settings.loss_power for settings in sweep.variants} - {0}
    if powers and losses == {"text"}:
        raise InputError(f"loss_power {min(powers)} is of the loss closed-set, and the sweep has text; give both")


def _check_thinking(sweep: Sweep) -> None:
    """Raise InputError for settings of thoughts that do not fit together, or not the model."""
    s = sweep.settings
    if not s.thinking:
        others = (name for name in THINKING if getattr(s, name) != Settings.model_fields[name].default)
        if lone := next(others, None):
            raise InputError(f"{lone} = {getattr(s, lone)} is for models that think; give --thinking N too")
        return
    tuned = [name for name in sweep.methods if {"prompt", "learning_rate"} <= {*METHODS[name].settings}]
    if silent := [name for name in tuned if "thinking" not in METHODS[name].settings]:
        raise InputError(f"{', '.join(silent)} is tuned without thoughts; leave it or --thinking out")
    if s.calibration != "none":
        raise InputError(f"calibration {s.calibration} is of scores without a thought; leave it or --thinking out")
    if s.train_on == "all" and any(each.loss == "closed-set" for each in sweep.variants):
        raise InputError("the loss closed-set is on the answer alone; give --train-on answer or --loss text")
    from vlm.service import tokenizer
    from vlm.templates import chosen
    from vlm.thinking import marks_of, needed

    words = tokenizer(s.model)
    try:
        needed(marks_of(words, chosen(words, takes_images=True)))
    except PromptError as error:
        raise PromptError(f"--thinking {s.thinking} with model {s.model}: {error}") from error


def check_shots(sweep: Sweep, datasets: Mapping[str, Dataset]) -> None:
    """Draw the most shots that each data set is drawn at, where a method learns. Raises TooFewImagesError."""
    methods, problems = [METHODS[name] for name in sweep.methods if METHODS[name].learns], list[str]()
    for source, dataset in datasets.items() if methods else ():
        most = max(sweep.shots_of(source))
        try:
            for seed in sweep.seeds:
                chosen = few_shot(dataset, most, seed, sweep.settings)
                if any(method.leaves_out for method in methods):
                    check_left_out(dataset.classes, chosen)
                validation(dataset, most, seed, sweep.settings)
        except TooFewImagesError as error:
            problems.append(f"{dataset.name}: {error}")
    if problems:
        raise TooFewImagesError(problems[0] if len(problems) == 1 else listed("too few images", problems))


def check_apart(
    values: Iterable[Any], names: Iterable[Any], prefix: str = "", kind: type[InputError] = InputError
) -> None:
    """Raise `kind` for two values of one name: results are told apart by it, and two folders may share theirs."""
    first: dict[Any, Any] = {}
    for value, name in zip(values, names, strict=True):
        twin = first.setdefault(name, value)
        if twin != value:
            raise kind(f"{prefix}{twin} and {value} would both be called {name}; rename one or leave it out")


def compared_settings(sweep: Sweep) -> list[str]:
    """The settings, besides the prompt, that have several values."""
    return [name for name, values in sweep.compare if len(values) > 1]


def recorded_along(sweep: Sweep, setting: str) -> list[dict[str, Any]]:
    """The first settings as results state them, with each value of one setting in turn."""
    first = sweep.variants[0]
    return [recorded(first.model_copy(update={setting: value})) for value in sweep.axes[setting]]


def settings_read(sweep: Sweep) -> set[str]:
    """The settings that the numbers of its methods depend on."""
    return {name for method in sweep.methods for name in METHODS[method].settings}


def unread(named: Iterable[str], methods: Sequence[str], variants: Sequence[Settings]) -> list[str]:
    """A line on those of the settings `named` that change nothing for these methods, if there are any."""
    read = {name: {*METHODS[name].settings} for name in methods if name in METHODS}
    used = {s for each in variants for own in read.values() for s in own - idle(own, each.model_dump())}
    if lone := sorted({*named} - used):
        return [f"{', '.join(lone)}: of no effect, as nothing here reads it ({', '.join(methods)})"]
    return []


# Keys and weights


def check_key(service: str) -> None:
    """Raise InputError for the hosted service without a key: its SDK would go on asking."""
    if service != "tinker":
        return
    from tinker import auth

    if not auth.tinker_has_credentials():
        raise InputError(
            "the service tinker needs a key; set TINKER_API_KEY, or run `kshot serve` and give its address"
        )


def check_weights(jobs: Sequence[Job]) -> None:
    """Raise ModelError where the weights that these jobs load on this machine are neither here nor, as far as it says,
    on the hub. Nothing is fetched but what is small."""
    for name in _vlms(jobs):
        models.check_weights(name)
    for name in _backbones(jobs):
        hub_backbones.check_weights(name)


def fetch_weights(jobs: Sequence[Job]) -> None:
    """Fetch what these jobs load on this machine, once for all workers. Raises ModelError."""
    for name in _vlms(jobs):
        models.weights(name)
    for name in _backbones(jobs):
        hub_backbones.fetch(name)


def _vlms(jobs: Sequence[Job]) -> list[str]:
    used = (job for job in jobs if job.service == "local" and METHODS[job.cell.method].uses_vlm)
    return [*dict.fromkeys(job.settings.model for job in used)]


def _backbones(jobs: Sequence[Job]) -> list[str]:
    return [*dict.fromkeys(job.settings.backbone for job in jobs if METHODS[job.cell.method].uses_backbone)]
