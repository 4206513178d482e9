"""Pictures made of photographs: from which files, how, and what is said where there are none."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments.pretrain.photographs import OBJECTS, PACKAGES, SCENES, SIDE, files, photographs, piece, placed
from kshot.errors import InputError


def noise(size: tuple[int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """A red square that is cut out, in a folder of OBJECTS; a blue scene in each of SCENES; and what is none."""
    thing = Image.new("RGBA", (40, 60), (0, 0, 0, 0))
    thing.paste((255, 0, 0, 255), (10, 20, 30, 40))
    for package in PACKAGES:
        folder = tmp_path / package.name / package.folders[0]
        (folder / "cartoon").mkdir(parents=True)
        (folder / "notes.txt").write_text("no picture")
        image = thing if package is OBJECTS else Image.new("RGB", (300, 200), (0, 0, 255))
        image.save(folder / "one.png")
        if package.without:
            image.save(folder / f"{package.without[0]}.png")
    return tmp_path


def test_the_photographs_are_those_that_the_list_names(packages: Path) -> None:
    for package in PACKAGES:
        assert [path.name for path in files(packages, package)] == ["one.png"]
        assert package.licence
        assert package.version


def test_pictures_are_objects_on_grounds_and_pieces_of_scenes(packages: Path) -> None:
    pictures = photographs(packages, 60)
    assert pictures.shape == (60, 3, SIDE, SIDE)
    assert pictures.dtype == np.uint8
    red = ((pictures[:, 0] > 250) & (pictures[:, 1] < 5) & (pictures[:, 2] < 5)).mean((1, 2))
    blue = ((pictures[:, 2] > 250) & (pictures[:, 0] < 5) & (pictures[:, 1] < 5)).mean((1, 2))
    objects, scenes = red > 0.1, blue > 0.99
    assert objects.sum() + scenes.sum() == 60
    assert 30 <= objects.sum() <= 48  # 0.65 of 60, and three standard deviations to either side
    assert (blue[objects] > 0.01).any()
    assert (blue[objects] == 0).any()
    assert np.array_equal(pictures, photographs(packages, 60))
    assert not np.array_equal(pictures, photographs(packages, 60, seed=1))


def test_a_missing_package_is_named_with_the_command_that_gets_it(packages: Path) -> None:
    (packages / SCENES[0].name).rename(packages / "elsewhere")
    with pytest.raises(InputError, match=rf"apt-get download {SCENES[0].name}=.* && dpkg -x"):
        photographs(packages, 1)


@pytest.mark.parametrize("size", [(500, 200), (96, 400)])
def test_a_piece_is_a_square_of_the_scene(size: tuple[int, int]) -> None:
    """A scene of two ramps: from a piece's own ramps follow where it lies and how large it is."""
    width, height = size
    x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    scene = Image.fromarray(np.stack([x * 250 / width, y * 250 / height, 0 * x], 2).astype(np.uint8))
    for seed in range(20):
        cut = np.asarray(piece(scene, np.random.default_rng(seed)))[8:-8, 8:-8].astype(float)
        across = (cut[:, -1, 0] - cut[:, 0, 0]).mean() * width / 250
        along = (cut[-1, :, 1] - cut[0, :, 1]).mean() * height / 250
        assert across == pytest.approx(along, abs=0.05 * min(size))
        assert 0.2 * min(size) < across * SIDE / (SIDE - 17) < 1.05 * min(size)


def test_an_object_lies_whole_on_its_ground() -> None:
    ground = Image.fromarray(noise((SIDE, SIDE)))
    thing = Image.new("RGBA", (90, 45), (255, 0, 0, 255))
    for seed in range(20):
        changed = (np.asarray(placed(thing, ground, np.random.default_rng(seed))) != np.asarray(ground)).any(2)
        box = Image.fromarray(changed).getbbox()
        assert box is not None
        width, height = box[2] - box[0], box[3] - box[1]
        assert 0.55 * SIDE - 1 <= width <= SIDE
        assert height == pytest.approx(width / 2, abs=1)
