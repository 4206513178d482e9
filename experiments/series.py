"""The series of a report: a method, or where a sweep compares, a method with one value of each setting that it compares
(of the prompts, the prompt) and that the method reads.

A series stands where a method's name stands, in sweep.json's content and in cell records. Nothing is parsed out of its
text: `method_of` and `choices_of` say what it is. Knows no numbers and no looks.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple, TypeVar

from experiments.methods import METHODS
from kshot_errors import ResultsError

Record = Mapping[str, Any]
Axes = Mapping[str, Sequence[Any]]  # {setting: the values of it that are compared, as results record them}
T = TypeVar("T")
PROMPT = "prompt"
MAIN = ("vlm-lora", "dinov2-lora")  # what the comparison is about: both tuned on the very same batches
ABSENT = object()


class Choice(NamedTuple):
    """One value of several that a setting has in a sweep: its place among them (from 0), and how many there are."""

    setting: str
    value: Any
    place: int
    of: int


class Series(str):
    """A method under one choice or more; as text, unique among the series of a sweep."""

    method: str
    choices: tuple[Choice, ...]

    def __new__(cls, method: str, choices: Sequence[Choice]) -> "Series":
        series = super().__new__(cls, ", ".join([method, *map(_text, choices)]))
        series.method, series.choices = method, tuple(choices)
        return series


def by_series(sweep: Record, cells: Sequence[Record]) -> tuple[Record, list[Record]]:
    """The sweep and its cells with series for the methods that read a setting of which the sweep compares values.

    Where it compares nothing they come back as they are, and so does what has series already. Raises ResultsError for a
    cell that was run with none of the sweep's values.
    """
    axes = _axes(sweep)
    if not axes:
        return sweep, list(cells)
    methods = [series for method in sweep["methods"] for series in _series(method, axes)]
    return {**sweep, "methods": methods}, [{**cell, "method": _of_cell(cell, axes)} for cell in cells]


def method_of(series: str) -> str:
    """The method's name."""
    return series.method if isinstance(series, Series) else series


def choices_of(series: str) -> tuple[Choice, ...]:
    """What the series was run with of what is compared; nothing of a method that reads none of it."""
    return series.choices if isinstance(series, Series) else ()


def number_of(series: str) -> int:
    """Its place among all series of its method, from 0."""
    number = 0
    for choice in choices_of(series):
        number = number * choice.of + choice.place
    return number


def zero_shot_of(series: str) -> str | None:
    """The series that asks the model that this one tunes, under the same choices as far as it reads them; None where
    there is none."""
    row = METHODS.get(method_of(series))
    if row is None or row.zero_shot is None:
        return None
    return _named(row.zero_shot, [c for c in choices_of(series) if c.setting in METHODS[row.zero_shot].settings])


def main_pairs(series: Iterable[str]) -> list[tuple[str, str]]:
    """Each series of the first method of MAIN with each of the second, of those given and in their order."""
    found = list(dict.fromkeys(series))
    first, second = ([each for each in found if method_of(each) == method] for method in MAIN)
    return list(product(first, second))


def from_zero(table: Mapping[str, Mapping[int, T]]) -> dict[str, dict[int, T]]:
    """{series: {shots: value}} in which the curve of a method that tunes begins at 0 shots, with the value of the model
    untuned; where that was not measured, nothing changes."""
    return {series: {**_start(table, series), **row} for series, row in table.items()}


def _start(table: Mapping[str, Mapping[int, T]], series: str) -> dict[int, T]:
    untuned = table.get(zero_shot_of(series) or "", {})
    return {0: untuned[0]} if 0 in untuned else {}


def _axes(sweep: Record) -> dict[str, Sequence[Any]]:
    """What is compared: settings of which the sweep has two values or more."""
    given = {PROMPT: sweep.get("prompts", ()), **sweep.get("compare", {})}
    return {setting: values for setting, values in given.items() if len(values) > 1}


def _read(method: str, axes: Axes) -> Axes:
    """The axes that the method reads."""
    settings = METHODS[method].settings if method in METHODS else ()
    return {setting: values for setting, values in axes.items() if setting in settings}


def _series(method: str, axes: Axes) -> list[str]:
    """The series of a method: every combination of what is compared and it reads."""
    read = _read(method, axes).items()
    each = ([Choice(setting, v, n, len(values)) for n, v in enumerate(values)] for setting, values in read)
    return [_named(method, choices) for choices in product(*each)]


def _of_cell(cell: Record, axes: Axes) -> str:
    choices = []
    for setting, values in _read(cell["method"], axes).items():
        value = cell["settings"].get(setting, ABSENT)
        if value not in values:
            has = f"no {setting}" if value is ABSENT else f"{setting} {value!r}"
            raise ResultsError(f"cell {cell['key']} has {has}; the sweep's are: {list(values)}")
        choices.append(Choice(setting, value, values.index(value), len(values)))
    return _named(cell["method"], choices)


def _named(method: str, choices: Sequence[Choice]) -> str:
    return Series(method, choices) if choices else method


def _text(choice: Choice) -> str:
    return f"{choice.setting} {choice.place + 1 if choice.setting == PROMPT else choice.value}"
