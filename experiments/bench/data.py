"""`kshot bench data`: how fast photographs become the images that models get, and large JPEGs against plain Pillow.

Plain is what the reference recipe does: open, decode all pixels, resize with LANCZOS. Both run on the same bytes.
"""

import io
import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.dataset import Example, Slice, Stored, content_key, stored_bytes
from data.preparation import decode, prepare_all
from experiments.bench.case import GRAIN, SUFFIXES, encoded
from experiments.bench.harness import Rows, in_turn, record, row
from kshot.errors import DatasetError
from kshot.images import FORMATS

MAX_SIDE = 480  # of the reference recipe
THREADS = os.cpu_count() or 1
LARGE = (4000, 3000)  # 12 megapixels
GRAINS = {"": GRAIN, " grainy": 10.0}  # at 12 megapixels about 2 and 4 MB: a phone in daylight and in poor light


def measure(root: Path | None, quick: bool) -> dict[str, Any]:
    """The record of `experiments.bench.harness`. root: a folder of photographs; None: photographs made from a seed.
    Raises DatasetError where the folder has none; ImageError."""
    rng, images = np.random.default_rng(0), list[Stored]()
    if root is None:
        images += [encoded(rng, (640, 480), GRAIN) for _ in range(32)] * (4 if quick else 16)
    else:
        paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        if not paths:
            raise DatasetError(f"{root} has no {', '.join(sorted(SUFFIXES))} files; name a folder of photographs")
        chosen = [paths[n] for n in rng.permutation(len(paths))[: 1_000 if quick else 10_000]]
        images += [Slice(path, 0, path.stat().st_size) for path in chosen]
    rows, ratios = _photographs(images, 3 if quick else 5)
    for kind, grain in GRAINS.items():
        more_rows, more_ratios = _large(encoded(rng, LARGE, grain), kind, 5 if quick else 11)
        rows, ratios = rows + more_rows, ratios | more_ratios
    return record(rows, ratios, ["numpy", "pillow"])


def _photographs(images: Sequence[Stored], rounds: int) -> tuple[Rows, dict[str, float]]:
    """Images a second, read and decoded to MAX_SIDE, and prepared."""
    examples = [Example(content_key(stored_bytes(stored)), stored, 0) for stored in images]
    tasks: dict[str, Callable[[], object]] = {
        f"decode and resize to {MAX_SIDE}": partial(_all, _ours, images, THREADS),
        "the same in plain Pillow": partial(_all, _plain, images, THREADS),
        "prepare (also encode, put aside)": lambda: prepare_all(examples, max_side=MAX_SIDE, hflip=False),
    }
    seconds, _ = in_turn(tasks, rounds)
    facts = {"images": len(images), "threads": THREADS}
    rows = [row(name, [len(images) / s for s in spent], "images/s", **facts) for name, spent in seconds.items()]
    return rows, {"photographs_vs_plain": rows[0]["median"] / rows[1]["median"]}


def _large(image: bytes, kind: str, rounds: int) -> tuple[Rows, dict[str, float]]:
    """Milliseconds a 12-megapixel JPEG, with all threads and with one."""
    rows, ratios = Rows(), {}
    for threads in sorted({1, THREADS}, reverse=True):
        images, text = [image] * (2 * threads), f"12-MP JPEG{kind}, {threads} thread{'s' * (threads > 1)}"
        tasks = {name: partial(_all, f, images, threads) for name, f in (("plain Pillow", _plain), ("ours", _ours))}
        seconds, _ = in_turn(tasks, rounds)
        for name, spent in seconds.items():
            per_image = [1000 * s / len(images) for s in spent]
            rows.append(row(f"{text}: {name}", per_image, "ms/image", bytes=len(image), threads=threads))
        ending = "" if threads == THREADS else "_one_thread"
        ratios[f"jpeg_12mp{kind.replace(' ', '_')}_vs_plain{ending}"] = rows[-2]["median"] / rows[-1]["median"]
    return rows, ratios


def _all(function: Callable[[Stored], object], images: Sequence[Stored], threads: int) -> None:
    with ThreadPoolExecutor(threads) as pool:
        deque(pool.map(function, images), maxlen=0)


def _ours(stored: Stored) -> None:
    decode(stored_bytes(stored), max_side=MAX_SIDE, name=str(stored.path) if isinstance(stored, Slice) else "image")


def _plain(stored: Stored) -> None:
    with Image.open(io.BytesIO(stored_bytes(stored)), formats=FORMATS) as image:
        rgb = image if image.mode == "RGB" else image.convert("RGB")
        scale = min(1.0, MAX_SIDE / max(rgb.size))
        rgb.resize((max(1, int(rgb.width * scale)), max(1, int(rgb.height * scale))), Image.Resampling.LANCZOS)
