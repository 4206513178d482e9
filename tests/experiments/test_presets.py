"""The sweeps that ship with kshot, planned on stand-ins of the right shape; a size as a model's name; caps on shots."""

from collections import Counter
from pathlib import Path

import pytest

from data import catalog
from data.benchmarks.specs import BENCHMARKS
from data.dataset import Access, Dataset, Example, content_key
from experiments.sweep.config import Settings, capped, load, presets
from experiments.sweep.grid import plan
from kshot.errors import InputError
from vlm import models

EACH = {"caltech101": 30, "cars": 24, "flowers": 10, "pets": 93}  # fewest training images of a class, as published
BLOG = ("caltech101", "cars", "flowers", "pets")
GOOD = "name: mine\ndatasets: [flowers, pets]\nmethods: [pixel-knn]\nshots: [8, 16, 12]\nseeds: [0]\n"


def stand_in(name: str, protocol: str) -> Dataset:
    """As many classes as the benchmark has, with as many training images a class; no image that could be read."""
    classes = next(p.classes for row in BENCHMARKS if row.name == name for p in row.protocols if p.name == protocol)
    train = [
        Example(content_key(f"{name} {c} {n}".encode()), b"", c) for c in range(classes) for n in range(EACH[name])
    ]
    test = [Example(content_key(f"{name} test {c}".encode()), b"", c) for c in range(classes)]
    return Dataset(name, protocol, tuple(f"kind {c}" for c in range(classes)), train, test)


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(name: str, *, access: Access | None = None, split_seed: int = 0) -> Dataset:
        return stand_in(name, access.protocol if access else "") if name in EACH else real(name, split_seed=split_seed)

    real = catalog.load
    monkeypatch.setattr(catalog, "load", loaded)


@pytest.mark.usefixtures("benchmarks")
@pytest.mark.parametrize("preset", presets())
def test_a_preset_can_be_planned(preset: str) -> None:
    sweep = load(preset, {}, {})
    assert sweep.name == preset
    assert list(sweep.shots) == sorted(set(sweep.shots))
    planned = plan(sweep)
    assert planned.jobs
    assert len({job.cell.key for job in planned.jobs}) == len(planned.jobs)


@pytest.mark.usefixtures("benchmarks")
def test_the_blog_is_four_sets_with_flowers_at_ten() -> None:
    sweep = load("blog", {}, {})
    cells = [job.cell for job in plan(sweep).jobs]
    assert Counter(cell.dataset for cell in cells) == dict.fromkeys(BLOG, 1 + 3 * 5 * 3)
    shots = {name: {cell.shots for cell in cells if cell.dataset == name} - {0} for name in BLOG}
    assert shots == {name: {1, 2, 4, 8, 16} for name in BLOG} | {"flowers": {1, 2, 4, 8, 10}}
    assert {cell.protocol for cell in cells} == {"recipe"}


def test_the_blog_is_the_reference_protocol_but_for_its_models() -> None:
    recipe, blog, small = Settings(), load("blog", {}, {}).settings, load("blog-small", {}, {}).settings
    named = {"model": models.SIZES["8B"], "backbone": "vit_base_patch14_dinov2.lvd142m"}
    assert blog == recipe.model_copy(update=named)
    assert small == recipe.model_copy(update={**named, "model": models.SIZES["2B"], "limit_test": 512})
    assert load("blog-small", {}, {}).seeds == (0,)


@pytest.mark.parametrize("size", models.SIZES)
def test_a_size_is_a_models_name(size: str) -> None:
    assert load("blog", {}, {"model": size}).settings.model == f"Qwen/Qwen3-VL-{size}-Instruct"
    assert Settings(model=size) == Settings(model=models.SIZES[size])
    models.check(size)
    assert models.loadable(size) == models.SIZES[size]


def test_what_is_no_size_goes_on_as_it_is(tmp_path: Path) -> None:
    assert models.full_name("./8B") == "./8B"
    assert models.full_name("kshot/nano-qwen3-vl") == "kshot/nano-qwen3-vl"
    with pytest.raises(InputError, match=r"unknown model '3B'.*: kshot.nano-qwen3-vl, 2B, 4B, 8B, 30B-A3B, 235B-A22B"):
        models.check("3B")


def test_another_model_leaves_what_is_shown_as_the_preset_has_it() -> None:
    """How many images it tests on is of the data."""
    settings = load("blog-small", {}, {"model": "4B"}).settings
    assert (settings.model, settings.limit_test) == (models.SIZES["4B"], 512)
    assert load("blog-small", {}, {"model": models.SIZES["2B"]}) == load("blog-small", {}, {})


@pytest.mark.parametrize(
    ("shots", "most", "expected"),
    [
        ((1, 8, 16), None, (1, 8, 16)),
        ((1, 8, 16), 10, (1, 8, 10)),
        ((16, 8, 32), 10, (10, 8)),
        ((10, 16), 10, (10,)),
        ((1, 2), 10, (1, 2)),
    ],
)
def test_shots_above_a_cap_become_the_cap_once(shots: tuple[int, ...], most: int | None, expected: tuple[int, ...]):
    assert capped(shots, most) == expected


def test_a_file_caps_shots_and_a_command_line_goes_over_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(GOOD + "most_shots: {flowers: 10}\n")
    sweep = load(str(path), {}, {})
    assert (sweep.shots_of("flowers"), sweep.shots_of("pets")) == ((8, 10), (8, 16, 12))
    assert load(str(path), {"datasets": ("pets",)}, {}).most_shots == {}  # its cap has nothing left to hold for
    assert load(str(path), {"most_shots": {"pets": 9}}, {}).shots_of("pets") == (8, 9)


@pytest.mark.parametrize(
    ("caps", "message"),
    [
        ("{flours: 10}", r"most_shots: 'flours' is none of the data sets \(flowers, pets\)"),
        ("{flowers: 0}", r"most_shots\.flowers = 0: .*greater than or equal to 1"),
        ("[10]", r"most_shots = \[10\]"),
    ],
)
def test_a_cap_that_is_wrong(tmp_path: Path, caps: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(GOOD + f"most_shots: {caps}\n")
    with pytest.raises(InputError, match=message) as raised:
        load(str(path), {}, {})
    assert "\n" not in str(raised.value)


def test_a_cap_on_a_set_that_the_command_line_does_not_name() -> None:
    with pytest.raises(InputError, match="'cars' is none of the data sets"):
        load("blog", {"datasets": ("pets",), "most_shots": {"cars": 1}}, {})


def test_points_are_the_cells_of_what_a_method_reads() -> None:
    compared = {"readout": ("cls", "last4")}
    sweep = load("demo", {"shots": (1, 4), "seeds": (0, 1)}, compared)
    read = [(s.readout, k, seed) for s, k, seed in sweep.points("icons", ("readout",), learns=True)]
    assert read == [(r, k, seed) for r in ("cls", "last4") for k in (1, 4) for seed in (0, 1)]
    assert len([*sweep.points("icons", (), learns=True)]) == 4
    assert [(k, seed) for _, k, seed in sweep.points("icons", (), learns=False)] == [(0, 0)]
