"""The series of a report, which are its curves: a method, or where a sweep compares settings, a method with one value
of each of them that it reads; and how each is named and drawn. A series stands where a method's name stands, in the
content of sweep.json and in cell records; its text is never parsed."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import product
from math import prod
from typing import Any, NamedTuple, TypeVar
from zlib import crc32

from experiments.sweep.config import MODELS, idle
from experiments.sweep.methods import METHODS
from kshot.errors import ResultsError

Record = Mapping[str, Any]
Axes = Mapping[str, Sequence[Any]]  # {setting: the values of it that are compared, as results record them}
T = TypeVar("T")
PROMPT = "prompt"
MAIN = ("vlm-lora", "dinov2-lora")  # the main comparison: both are tuned on the very same batches


class Choice(NamedTuple):
    """One value of several that a setting has in a sweep. number: among them, from 0. total: how many there are. idle:
    whether none of them changes anything under the series' other choices."""

    setting: str
    value: Any
    number: int
    total: int
    idle: bool = False


class Series(str):
    """A method under one choice or more; as text, unique among the series of a sweep."""

    method: str
    choices: tuple[Choice, ...]

    def __new__(cls, method: str, choices: Sequence[Choice]) -> "Series":
        series = super().__new__(cls, ", ".join([method, *(_text(choice) for choice in choices if not choice.idle)]))
        series.method, series.choices = method, tuple(choices)
        return series


def by_series(sweep: Record, cells: Sequence[Record]) -> tuple[Record, list[Record]]:
    """The sweep and its cells with series for the methods that read a setting of which the sweep compares values; where
    it compares nothing they come back as they are, and so does what has series already. Raises ResultsError for a cell
    that was run with none of the sweep's values."""
    settings = {PROMPT: sweep.get("prompts", ()), **sweep.get("compare", {})}
    axes = {setting: values for setting, values in settings.items() if len(values) > 1}
    if not axes:
        return sweep, list(cells)
    alone = {"loss": sweep.get("settings", {}).get("loss")}  # where it is not compared
    methods = [series for method in sweep["methods"] for series in _series(method, axes, alone)]
    return {**sweep, "methods": methods}, [{**cell, "method": _of_cell(cell, axes)} for cell in cells]


def method_of(series: str) -> str:
    """The method's name."""
    return series.method if isinstance(series, Series) else series


def choices_of(series: str) -> tuple[Choice, ...]:
    """What the series was run with of what is compared; nothing of a method that reads none of it."""
    return series.choices if isinstance(series, Series) else ()


def number_of(series: str) -> int:
    """Its index among the series of its method, from 0."""
    number = 0
    for choice in choices_of(series):
        number = number * choice.total + choice.number
    return number


def zero_shot_of(series: str) -> str | None:
    """The series of the model that this one tunes, before it is tuned, under the same choices as far as it reads them;
    None where there is none."""
    method = METHODS.get(method_of(series))
    if method is None or method.zero_shot is None:
        return None
    read = METHODS[method.zero_shot].settings
    return _named(method.zero_shot, [choice for choice in choices_of(series) if choice.setting in read])


def frozen_heads(series: str, among: Iterable[str]) -> list[str]:
    """Of other series the heads on the frozen model that this one trains, under the same choices as far as both read
    them; none of a series that trains nothing."""
    trained = METHODS.get(method_of(series))
    if trained is None or not trained.trains:
        return []

    def is_one(other: str) -> bool:
        head = METHODS.get(method_of(other))
        if head is None or head.trains or not head.learns:
            return False
        shared = {*trained.settings} & {*head.settings}
        mine, its = ({choice for choice in choices_of(each) if choice.setting in shared} for each in (series, other))
        return bool(shared & {*MODELS}) and mine == its

    return [*filter(is_one, among)]


def main_pairs(series: Iterable[str]) -> list[tuple[str, str]]:
    """Each series of the first method of MAIN with each of the second, of those given and in their order."""
    unique = list(dict.fromkeys(series))
    first, second = ([each for each in unique if method_of(each) == method] for method in MAIN)
    return list(product(first, second))


def from_zero(table: Mapping[str, Mapping[int, T]]) -> dict[str, dict[int, T]]:
    """{series: {shots: value}} in which the curve of a method that tunes begins at 0 shots, with the value of the model
    untuned; where that was not measured, nothing changes."""
    untuned = {series: table.get(zero_shot_of(series) or "", {}) for series in table}
    starts = {series: {0: row[0]} if 0 in row else {} for series, row in untuned.items()}
    return {series: {**starts[series], **row} for series, row in table.items()}


def _read(method: str, axes: Axes) -> Axes:
    settings = METHODS[method].settings if method in METHODS else ()
    return {setting: values for setting, values in axes.items() if setting in settings}


def _series(method: str, axes: Axes, alone: Mapping[str, Any]) -> list[str]:
    read, made = _read(method, axes), list[str]()
    for values in product(*read.values()):
        chosen = {**alone, **dict(zip(read, values, strict=True))}
        unread = _idle(method, chosen)
        made.append(_named(method, [_choice(setting, read, chosen, unread) for setting in read]))
    return [*dict.fromkeys(made)]


def _idle(method: str, values: Mapping[str, Any]) -> set[str]:
    return idle(METHODS[method].settings, values) if method in METHODS else set()


def _choice(setting: str, read: Axes, chosen: Mapping[str, Any], unread: Collection[str]) -> Choice:
    values = read[setting]
    if setting in unread:
        return Choice(setting, None, 0, len(values), idle=True)
    return Choice(setting, chosen[setting], values.index(chosen[setting]), len(values))


def _of_cell(cell: Record, axes: Axes) -> str:
    settings, read = cell["settings"], _read(cell["method"], axes)
    unread = _idle(cell["method"], settings)
    for setting in [setting for setting in read if setting not in unread]:
        values, value = read[setting], settings.get(setting)  # which may be None
        if setting not in settings or value not in values:
            has = f"{setting} {value!r}" if setting in settings else f"no {setting}"
            raise ResultsError(f"cell {cell['key']} has {has}; the sweep's are: {list(values)}")
    return _named(cell["method"], [_choice(setting, read, settings, unread) for setting in read])


def _named(method: str, choices: Sequence[Choice]) -> str:
    return Series(method, choices) if choices else method


def _text(choice: Choice) -> str:
    return f"{choice.setting} {choice.number + 1 if choice.setting == PROMPT else choice.value}"


class Style(NamedTuple):
    """How one series is titled and drawn. hollow: a marker of which only the edge has the colour."""

    title: str
    colour: str
    marker: str
    line: str = "-"
    hollow: bool = False


# Colours of Okabe and Ito (2008), their yellow replaced by the olive of Tol's "muted" set: yellow is too pale on white.
STYLES = {
    "vlm-zero-shot": Style("VLM zero-shot", "#E69F00", "*"),
    "vlm-lora": Style("VLM + LoRA", "#D55E00", "o"),
    "vlm-rl": Style("VLM + LoRA by reward", "#661100", "H"),
    "vlm-tuned-linear": Style("VLM + LoRA, linear head", "#CC6677", "d"),
    "vlm-vision-linear": Style("VLM features + linear", "#CC79A7", "D"),
    "dinov2-logreg": Style("DINOv2 + logistic regression", "#0072B2", "s", "--"),
    "dinov2-ridge": Style("DINOv2 + ridge", "#56B4E9", "^", "--"),
    "dinov2-knn": Style("DINOv2 + kNN", "#009E73", "v", "--"),
    "dinov2-mean": Style("DINOv2 + nearest mean", "#999933", "P", "--"),
    "dinov2-lora": Style("DINOv2 + LoRA", "#000000", "X", "--"),
    "pixel-knn": Style("pixel kNN", "#888888", "h", ":"),
}
SPARE = (("#332288", ">"), ("#882255", "<"), ("#44AA99", "p"), ("#AA4499", "d"), ("#117733", "8"))
# Series of one method share its colour: (shade to which it is mixed, how far, whether the marker is hollow). Each line
# has all shades: 20 series of a method look different, beyond that only their titles do.
SHADES = ((0, 0.0, False), (0, 0.45, True), (255, 0.45, False), (0, 0.7, False), (255, 0.3, True))
LINES = ("-", "--", "-.", ":")
# What a setting is called where its values are counted.
COUNTED = {
    "image_size": "image size",
    "vlm_features": "VLM feature set",
    "loss": "loss function",
    "loss_power": "loss power",
}

NAMED = {"loss_power": "q", "start": "start"}  # numbers that a title must name


def style(series: str) -> Style:
    """The method's style, or a spare one chosen by its name; where settings are compared, a shade of it, with the
    choices in the title."""
    method, choices = method_of(series), choices_of(series)
    base = STYLES.get(method) or Style(method, *SPARE[crc32(method.encode()) % len(SPARE)], "-.")
    if not choices:
        return base
    lines = [*dict.fromkeys((base.line, *LINES))]
    line, index = divmod(number_of(series), _shades(choices))
    shade, amount, hollow = SHADES[index]
    return Style(
        title=f"{base.title} ({', '.join(choice_text(choice) for choice in choices if not choice.idle)})",
        colour=_mixed(base.colour, shade, amount),
        marker=base.marker,
        line=lines[line % len(lines)],
        hollow=hollow,
    )


def _shades(choices: Sequence[Choice]) -> int:
    """How many shades a line has: so many that it stands for the first setting that is compared, where there are
    others and shades suffice for them; else all."""
    first, *others = choices
    needed = prod(choice.total for choice in others)
    return needed if others and needed <= len(SHADES) and first.total <= len(LINES) else len(SHADES)


def choice_text(choice: Choice) -> str:
    """A choice in a title: `prompt 2`, `518 px`, `last4`."""
    if choice.setting == PROMPT:
        return f"prompt {choice.number + 1}"
    if choice.setting == "image_size":
        return "own size" if choice.value is None else f"{choice.value} px"
    if choice.setting in NAMED:
        return f"{NAMED[choice.setting]} {choice.value:g}"
    return str(choice.value)


def ordered(series: Iterable[str]) -> list[str]:
    """Methods in the order of the table, then the others by name; each with its choices in their order."""
    rank = {method: index for index, method in enumerate(STYLES)}

    def order(each: str) -> tuple[int, str, int]:
        return rank.get(method_of(each), len(rank)), method_of(each), number_of(each)

    return sorted(set(series), key=order)


def _mixed(colour: str, shade: int, amount: float) -> str:
    """`#rrggbb` with each part moved as far towards the shade of grey; black, which cannot be darker, towards white."""
    shade = 255 if colour == "#000000" else shade
    parts = (int(colour[n : n + 2], 16) for n in (1, 3, 5))
    return "#" + "".join(f"{round(part + amount * (shade - part)):02X}" for part in parts)
