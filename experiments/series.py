"""The series of a report: a method, or where a sweep asks with several prompts, a method with one of them.

A series stands where a method's name stands, in sweep.json's content and in cell records. Nothing is parsed out of its
text: `method_of` says which method it is. Knows no numbers and no looks.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from experiments.methods import METHODS
from kshot_errors import ResultsError

Record = Mapping[str, Any]
T = TypeVar("T")


class Series(str):
    """A method with the prompt of this number (from 1) of several; as text, unique among the series of a sweep."""

    method: str
    prompt: int

    def __new__(cls, method: str, prompt: int) -> "Series":
        series = super().__new__(cls, f"{method}, prompt {prompt}")
        series.method, series.prompt = method, prompt
        return series


def by_prompt(sweep: Record, cells: Sequence[Record]) -> tuple[Record, list[Record]]:
    """The sweep and its cells with series for the methods that ask with a prompt, where the sweep has several prompts.

    With one prompt or none they come back as they are, and so does what has series already. Raises ResultsError for a
    cell whose prompt is none of the sweep's.
    """
    prompts = list(sweep.get("prompts", ()))
    if len(prompts) < 2:
        return sweep, list(cells)
    numbers = range(1, len(prompts) + 1)
    methods = [each for m in sweep["methods"] for each in ([Series(m, n) for n in numbers] if _asks(m) else [m])]
    return {**sweep, "methods": methods}, [
        _of_series(cell, prompts) if _asks(cell["method"]) else cell for cell in cells
    ]


def method_of(series: str) -> str:
    """The method's name."""
    return series.method if isinstance(series, Series) else series


def prompt_of(series: str) -> int | None:
    """The number of the prompt, None where there are not several."""
    return series.prompt if isinstance(series, Series) else None


def zero_shot_of(series: str) -> str | None:
    """The series that asks, with the same prompt, the model that this one tunes; None where there is none."""
    row = METHODS.get(method_of(series))
    if row is None or row.zero_shot is None:
        return None
    prompt = prompt_of(series)
    return row.zero_shot if prompt is None else Series(row.zero_shot, prompt)


def from_zero(table: Mapping[str, Mapping[int, T]]) -> dict[str, dict[int, T]]:
    """{series: {shots: value}} in which the curve of a method that tunes begins at 0 shots, with the value of the model
    untuned; where that was not measured, nothing changes."""
    return {series: {**_start(table, series), **row} for series, row in table.items()}


def _start(table: Mapping[str, Mapping[int, T]], series: str) -> dict[int, T]:
    untuned = table.get(zero_shot_of(series) or "", {})
    return {0: untuned[0]} if 0 in untuned else {}


def _asks(method: str) -> bool:
    return method in METHODS and "prompt" in METHODS[method].settings


def _of_series(cell: Record, prompts: Sequence[str]) -> Record:
    prompt = cell["settings"].get("prompt")
    if prompt not in prompts:
        raise ResultsError(f"cell {cell['key']} has prompt {prompt!r}, which is none of the sweep's: {prompts}")
    return {**cell, "method": Series(cell["method"], prompts.index(prompt) + 1)}
