"""Photographs that the students learn to look at, as pictures of 96x96: objects that were cut out, on a plain ground or
on a piece of another photograph, and pieces of whole photographs.

They are read from packages that somebody has unpacked, PACKAGES; none is in this repository or in the weights.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from kshot.errors import InputError
from kshot.images import FORMATS

SIDE = 96  # pixels
COUNT = 6000  # pictures that are made of them
WHOLE = 0.35  # share of the pictures that are a piece of a whole photograph
PLAIN = 0.4  # share of the objects on a plain ground
LONGEST = 1024  # pixels; whole photographs are shrunk to it


@dataclass(frozen=True)
class Package:
    """One package of Debian. folders: where in it photographs are; without: parts of paths that are none."""

    name: str
    version: str
    licence: str
    folders: tuple[str, ...]
    without: tuple[str, ...] = ()


OBJECTS = Package(
    "tuxpaint-stamps-default",
    "2022.06.04-1",
    "GPL-2",
    tuple(
        f"usr/share/tuxpaint/stamps/{subject}"
        for subject in ("animals", "food", "hobbies", "household", "plants", "space", "sports", "vehicles")
    ),
    without=("cartoon", "toys", "plastic", "bathtub_duck"),
)
SCENES = (
    Package("mate-backgrounds", "1.26.0-1", "GPL-2+", ("usr/share/backgrounds/mate/nature",)),
    Package(
        "lomiri-wallpapers-16.04",
        "20.04.0-2",
        "CC-BY-4.0, CC-BY-SA-4.0 and CC0-1.0",
        ("usr/share/backgrounds",),
        without=("warty-final-ubuntu", "analogpattern"),
    ),
)
PACKAGES = (OBJECTS, *SCENES)


def photographs(root: Path, count: int = COUNT, seed: int = 0) -> np.ndarray:
    """(count, 3, 96, 96) uint8 pictures of the packages unpacked in root, each in a folder of its name.

    Raises InputError where one is not there.
    """
    rng = np.random.default_rng(seed)
    scenes = [
        _shrunk(Image.open(path, formats=FORMATS).convert("RGB")) for package in SCENES for path in files(root, package)
    ]
    objects = [_shrunk(Image.open(path, formats=FORMATS).convert("RGBA"), 3 * SIDE) for path in files(root, OBJECTS)]
    pictures = np.empty((count, SIDE, SIDE, 3), np.uint8)
    for picture in pictures:
        if rng.random() < WHOLE:
            picture[:] = np.asarray(piece(scenes[rng.integers(len(scenes))], rng))
        else:
            plain = Image.new("RGB", (SIDE, SIDE), tuple(int(c) for c in rng.integers(0, 256, 3)))
            ground = plain if rng.random() < PLAIN else piece(scenes[rng.integers(len(scenes))], rng)
            picture[:] = np.asarray(placed(objects[rng.integers(len(objects))], ground, rng))
    return pictures.transpose(0, 3, 1, 2)


def files(root: Path, package: Package) -> list[Path]:
    """The photographs of a package, in the order of their names. Raises InputError where there are none."""
    found = [path for folder in package.folders for path in _images(root / package.name / folder)]
    kept = [path for path in found if not any(part in str(path.relative_to(root)) for part in package.without)]
    if not kept:
        raise InputError(
            f"no photographs of {package.name} in {root}; get them with: apt-get download "
            f"{package.name}={package.version} && dpkg -x {package.name}_*.deb {root / package.name}"
        )
    return kept


def piece(scene: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A random square of a scene, a quarter of its shorter side to all of it."""
    side = int(min(scene.size) * rng.uniform(0.25, 1))
    left, top = (int(rng.integers(free - side + 1)) for free in scene.size)
    return scene.resize((SIDE, SIDE), Image.Resampling.BICUBIC, (left, top, left + side, top + side))


def placed(thing: Image.Image, ground: Image.Image, rng: np.random.Generator) -> Image.Image:
    """An object (RGBA) on a ground, its longest side 0.55 to 1 of the picture's, wherever it fits."""
    scale = SIDE * rng.uniform(0.55, 1) / max(thing.size)
    small = thing.resize([max(1, round(scale * extent)) for extent in thing.size], Image.Resampling.BICUBIC)
    small = ImageOps.mirror(small) if rng.random() < 0.5 else small
    left, top = (int(rng.integers(SIDE - extent + 1)) for extent in small.size)
    canvas = ground.copy()
    canvas.paste(small, (left, top), small)
    return canvas


def _images(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.suffix in (".png", ".jpg") and not path.is_symlink())


def _shrunk(image: Image.Image, longest: int = LONGEST) -> Image.Image:
    image.thumbnail((longest, longest), Image.Resampling.BICUBIC)
    box = image.getchannel("A").getbbox() if image.mode == "RGBA" else None
    return image.crop(box) if box else image
