"""How a series is called and drawn: title, colour, marker and line, and in which order series stand.

It does not know numbers or figures; a method that has no row here gets a look by its name.
"""

from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import NamedTuple
from zlib import crc32

from experiments.series import PROMPT, Choice, choices_of, method_of, number_of


class Style(NamedTuple):
    """How one series is written and drawn. hollow: a marker of which only the edge has the colour."""

    title: str
    colour: str
    marker: str
    line: str = "-"
    hollow: bool = False


# Colours of Okabe and Ito (2008), their yellow replaced by the olive of Tol's "muted" set: yellow is too pale on white.
STYLES = {
    "vlm-zero-shot": Style("VLM zero-shot", "#E69F00", "*"),
    "vlm-lora": Style("VLM + LoRA", "#D55E00", "o"),
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
# How a choice is said, where its value alone would not do; and what a setting is called where its values are counted.
SAID: dict[str, Callable[[Choice], str]] = {
    PROMPT: lambda choice: f"prompt {choice.place + 1}",
    "image_size": lambda choice: "own size" if choice.value is None else f"{choice.value} px",
}
COUNTED = {"image_size": "image size", "vlm_features": "VLM feature set"}


def style(series: str) -> Style:
    """The method's row, or a spare one chosen by its name; where settings are compared, a shade of it, whose title says
    the choices."""
    method, choices, number = method_of(series), choices_of(series), number_of(series)
    colour, marker = SPARE[crc32(method.encode()) % len(SPARE)]
    look = STYLES.get(method) or Style(method, colour, marker, "-.")
    if not choices:
        return look
    lines = [*dict.fromkeys((look.line, *LINES))]
    line, nuance = divmod(number, _shades(choices))
    shade, far, hollow = SHADES[nuance]
    return Style(
        title=f"{look.title} ({', '.join(map(said, choices))})",
        colour=_mixed(look.colour, shade, far),
        marker=look.marker,
        line=lines[line % len(lines)],
        hollow=hollow,
    )


def _shades(choices: Sequence[Choice]) -> int:
    """How many shades a line has: so many that it stands for the first setting that is compared, where there are
    others and shades suffice for them; else all."""
    first, *others = choices
    needed = prod(choice.of for choice in others)
    return needed if others and needed <= len(SHADES) and first.of <= len(LINES) else len(SHADES)


def said(choice: Choice) -> str:
    """A choice in a title: `prompt 2`, `518 px`, `last4`."""
    return SAID[choice.setting](choice) if choice.setting in SAID else str(choice.value)


def ordered(series: Iterable[str]) -> list[str]:
    """Methods in the order of the table, then the others by name; each with its choices in their order."""
    rank = {method: index for index, method in enumerate(STYLES)}

    def place(each: str) -> tuple[int, str, int]:
        return rank.get(method_of(each), len(rank)), method_of(each), number_of(each)

    return sorted(set(series), key=place)


def _mixed(colour: str, shade: int, far: float) -> str:
    """`#rrggbb` with each part moved as far towards the shade of grey; black, which cannot be darker, towards white."""
    shade = 255 if colour == "#000000" else shade
    parts = (int(colour[n : n + 2], 16) for n in (1, 3, 5))
    return "#" + "".join(f"{round(part + far * (shade - part)):02X}" for part in parts)
