"""How a series is called and drawn: title, colour, marker and line, and in which order series stand.

It does not know numbers or figures; a method that has no row here gets a look by its name.
"""

from collections.abc import Iterable
from typing import NamedTuple
from zlib import crc32

from experiments.series import method_of, prompt_of


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
    "vlm-vision-linear": Style("VLM vision tower + linear", "#CC79A7", "D"),
    "dinov2-logreg": Style("DINOv2 + logistic regression", "#0072B2", "s", "--"),
    "dinov2-ridge": Style("DINOv2 + ridge", "#56B4E9", "^", "--"),
    "dinov2-knn": Style("DINOv2 + kNN", "#009E73", "v", "--"),
    "dinov2-mean": Style("DINOv2 + nearest mean", "#999933", "P", "--"),
    "dinov2-lora": Style("DINOv2 + LoRA", "#000000", "X", "--"),
    "pixel-knn": Style("pixel kNN", "#888888", "h", ":"),
}
SPARE = (("#332288", ">"), ("#882255", "<"), ("#44AA99", "p"), ("#AA4499", "d"), ("#117733", "8"))
# Prompts of one method share its colour: (shade to which it is mixed, how far, whether the marker is hollow).
SHADES = ((0, 0.0, False), (0, 0.45, True), (255, 0.45, False), (0, 0.7, False), (255, 0.3, True))


def style(series: str) -> Style:
    """The method's row, or a spare one chosen by its name; with several prompts, a shade of it."""
    method, prompt = method_of(series), prompt_of(series)
    colour, marker = SPARE[crc32(method.encode()) % len(SPARE)]
    look = STYLES.get(method) or Style(method, colour, marker, "-.")
    if prompt is None:
        return look
    shade, far, hollow = SHADES[(prompt - 1) % len(SHADES)]
    title = f"{look.title} (prompt {prompt})"
    return look._replace(title=title, colour=_mixed(look.colour, shade, far), hollow=hollow)


def ordered(series: Iterable[str]) -> list[str]:
    """Methods in the order of the table, then the others by name; each with its prompts by number."""
    rank = {method: index for index, method in enumerate(STYLES)}

    def place(each: str) -> tuple[int, str, int]:
        return rank.get(method_of(each), len(rank)), method_of(each), prompt_of(each) or 0

    return sorted(set(series), key=place)


def _mixed(colour: str, shade: int, far: float) -> str:
    """`#rrggbb` with each part moved as far towards the shade of grey."""
    parts = (int(colour[n : n + 2], 16) for n in (1, 3, 5))
    return "#" + "".join(f"{round(part + far * (shade - part)):02X}" for part in parts)
