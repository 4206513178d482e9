"""`kshot bench data`: how fast photographs become the images that models get, and large JPEGs against plain Pillow.

Plain is what the reference recipe does: open, decode all pixels, resize with LANCZOS. Both run in turn on the same
bytes with the same number of threads.
"""

import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from data.dataset import Example, Slice, Stored, content_key, stored_bytes
from data.preparation import decode, prepare_all
from experiments.bench.harness import FOLDER, finish, in_turn, result, row
from kshot.errors import DatasetError

MAX_SIDE = 480  # of the reference recipe
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
THREADS = os.cpu_count() or 1
LARGE = (4000, 3000)  # 12 megapixels
GRAINS = {"": 5.0, " grainy": 10.0}  # at 12 megapixels about 2 and 4 MB: a phone in daylight and in poor light


def bench(root: Path | None, quick: bool, json_path: Path | None) -> None:
    """Measure, print the table and write the JSON file (default results/bench/data.json). Raises as `run` does, and
    ResultsError."""
    finish(run(root, quick), json_path or FOLDER / "data.json")


def run(root: Path | None, quick: bool) -> dict[str, Any]:
    """The record of `experiments.bench.harness`. root: a folder of photographs; None: made here, from a seed.

    quick: fewer photographs and rounds.
    Raises DatasetError where the folder has none; ImageError.
    """
    rng = np.random.default_rng(0)
    images = _made(rng, 4 if quick else 16) if root is None else _found(root, 1_000 if quick else 10_000, rng)
    rows, ratios = _photographs(images, 3 if quick else 5)
    for kind, grain in GRAINS.items():
        more, ratio = _large(encoded(rng, LARGE, grain), kind, 5 if quick else 11)
        rows, ratios = rows + more, ratios | ratio
    return result(rows, ratios, ["numpy", "pillow"])


def _photographs(images: Sequence[Stored], rounds: int) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Images a second, read and decoded to MAX_SIDE, and prepared."""
    examples = [Example(content_key(stored_bytes(stored)), stored, 0) for stored in images]
    tasks: dict[str, Callable[[], object]] = {
        f"decode and resize to {MAX_SIDE}": lambda: _each(_ours, images, THREADS),
        "the same in plain Pillow": lambda: _each(_plain, images, THREADS),
        "prepare (also encode, put aside)": lambda: prepare_all(examples, max_side=MAX_SIDE, hflip=False),
    }
    seconds = in_turn(tasks, rounds)
    rates = {name: [len(images) / s for s in spent] for name, spent in seconds.items()}
    rows = [row(name, rate, "images/s", images=len(images), threads=THREADS) for name, rate in rates.items()]
    return rows, {"photographs_vs_plain": rows[0]["median"] / rows[1]["median"]}


def _large(image: bytes, kind: str, rounds: int) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Milliseconds a 12-megapixel JPEG, with all threads and with one."""
    rows, ratios = [], {}
    for threads in sorted({1, THREADS}, reverse=True):
        images = [image] * (2 * threads)
        plain, ours = in_turn({f.__name__: _all(f, images, threads) for f in (_plain, _ours)}, rounds).values()
        text = f"12-MP JPEG{kind}, {threads} thread{'s' * (threads > 1)}"
        for name, spent in (("plain Pillow", plain), ("ours", ours)):
            per_image = [1000 * s / len(images) for s in spent]
            rows.append(row(f"{text}: {name}", per_image, "ms/image", bytes=len(image), threads=threads))
        ending = "" if threads == THREADS else "_one_thread"
        ratios[f"jpeg_12mp{kind.replace(' ', '_')}_vs_plain{ending}"] = median(plain) / median(ours)
    return rows, ratios


def _all(function: Callable[[Stored], object], images: Sequence[Stored], threads: int) -> Callable[[], object]:
    return lambda: _each(function, images, threads)


def _each(function: Callable[[Stored], object], images: Sequence[Stored], threads: int) -> None:
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(function, images):
            pass


def _ours(stored: Stored) -> None:
    decode(stored_bytes(stored), max_side=MAX_SIDE, name=str(stored.path) if isinstance(stored, Slice) else "image")


def _plain(stored: Stored) -> None:
    with Image.open(io.BytesIO(stored_bytes(stored))) as image:
        rgb = image if image.mode == "RGB" else image.convert("RGB")
        scale = min(1.0, MAX_SIDE / max(rgb.size))
        rgb.resize((max(1, int(rgb.width * scale)), max(1, int(rgb.height * scale))), Image.Resampling.LANCZOS)


def _found(root: Path, limit: int, rng: np.random.Generator) -> Sequence[Stored]:
    paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not paths:
        raise DatasetError(f"{root} has no {', '.join(sorted(SUFFIXES))} files; name a folder of photographs")
    chosen = [paths[n] for n in rng.permutation(len(paths))[:limit]]
    return [Slice(path, 0, path.stat().st_size) for path in chosen]


def _made(rng: np.random.Generator, times: int) -> Sequence[Stored]:
    """32 photographs of 640x480, each so many times."""
    return [encoded(rng, (640, 480), GRAINS[""]) for _ in range(32)] * times


def encoded(rng: np.random.Generator, size: tuple[int, int], grain: float) -> bytes:
    """A JPEG of quality 90 of smooth noise: octaves that halve in strength, as in nature, under a sensor's grain.

    size: width and height in pixels. grain: standard deviation in levels of 255.
    """
    buffer = io.BytesIO()
    pixels = np.stack([_channel(rng, size) for _ in range(3)], axis=-1)
    pixels += grain * rng.standard_normal(pixels.shape, dtype=np.float32)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _channel(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    octaves = max(size).bit_length() - 1
    channel = Image.new("F", (1, 1), 128.0)
    for n in range(octaves):
        part = tuple(max(1, side >> (octaves - 1 - n)) for side in size)
        smooth = np.asarray(channel.resize((part[0], part[1]), Image.Resampling.BICUBIC))
        channel = Image.fromarray(smooth + 64 * 0.5**n * rng.standard_normal(smooth.shape, dtype=np.float32))
    return np.asarray(channel)
