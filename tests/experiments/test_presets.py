"""The sweeps that ship with kshot, planned on stand-ins of the right shape; a size as a model's name; caps on shots."""

import shutil
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from data import catalog
from data.dataset import Access, Dataset, Example, content_key
from experiments.sweep.config import Settings, load, presets
from experiments.sweep.grid import plan
from kshot.errors import InputError, TooFewImagesError
from vlm import models

EACH = {"caltech101": 30, "cars": 24, "flowers": 10, "pets": 93}  # fewest training images of a class, as published
BLOG = ("caltech101", "cars", "flowers", "pets")
GOOD = "name: mine\ndatasets: [flowers, pets]\nmethods: [pixel-knn]\nshots: [16, 8, 12]\nseeds: [0]\n"


def stand_in(name: str, protocol: str) -> Dataset:
    """As many classes as the benchmark has, with as many training images a class; of a set of the hub two of 16; no
    image that could be read."""
    protocols = [p for p in catalog.find(name).protocols if p.name == (protocol or p.name)]
    classes, protocol = (protocols[0].classes, protocols[0].name) if protocols else (2, "given-split-0123")
    each = EACH.get(name, 16)
    train = [Example(content_key(f"{name} {c} {n}".encode()), b"", c) for c in range(classes) for n in range(each)]
    test = [Example(content_key(f"{name} test {c}".encode()), b"", c) for c in range(classes)]
    return Dataset(name, protocol, tuple(f"kind {c}" for c in range(classes)), train, test)


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    """These and sets of the hub are stand-ins; what cannot be had as asked is refused as it is."""

    def loaded(name: str, *, access: Access | None = None, split_seed: int = 0) -> Dataset:
        asked = access or Access()
        if name.startswith("hub:") or (
            name in EACH and catalog.find(name).has_protocol(asked.protocol or "recipe", asked.kind)
        ):
            return stand_in(name, asked.protocol)
        return real(name, access=asked, split_seed=split_seed)

    real = catalog.load
    monkeypatch.setattr(catalog, "load", loaded)
    monkeypatch.setattr("experiments.sweep.grid.refuse_broken", lambda dataset: None)


@pytest.mark.usefixtures("benchmarks")
@pytest.mark.parametrize("preset", presets())
def test_a_preset_can_be_planned(preset: str) -> None:
    sweep = load(preset, {}, {})
    assert sweep.name == preset
    assert list(sweep.shots) == sorted(set(sweep.shots))
    planned = plan(sweep)
    assert planned.jobs
    assert len({job.cell.key for job in planned.jobs}) == len(planned.jobs)


@pytest.fixture
def twenty(tmp_path: Path) -> Path:
    """Two classes of 20 images: 16 to train on."""
    for c, name in enumerate(("cat", "dog")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for n in range(20):
            Image.new("RGB", (8, 8), (99 * c, n, 0)).save(tmp_path / f"photos/{name}/{n}.png")
    return tmp_path / "photos"


MORE = (
    ": 256 views of each class, not 64: 2 classes would have 16 steps of training (--set views_per_class=64 keeps that)"
)
KINDS = ("icons", "digits", "folder:photos", "folder:split", "hub:some/set", "caltech101", "flowers")


@pytest.mark.usefixtures("benchmarks")
@pytest.mark.parametrize("preset", presets())
@pytest.mark.parametrize("source", KINDS)
def test_any_preset_is_planned_on_any_set(
    preset: str, source: str, twenty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At its shots, on the set's own protocol where it does not have the preset's, which is then said."""
    monkeypatch.chdir(twenty.parent)
    for kind in ("cat", "dog"):
        shutil.copytree(twenty / kind, f"split/train/{kind}")
        Path(f"split/test/{kind}").mkdir(parents=True)
        Path(f"split/train/{kind}/0.png").rename(f"split/test/{kind}/0.png")
    sweep = load(preset, {"datasets": (source,)}, {})
    planned = plan(sweep)
    (protocol,) = {job.cell.protocol for job in planned.jobs}
    most = 10 if source == "flowers" else 16
    assert {job.cell.shots for job in planned.jobs} == {0, 1, 2, 4, 8, most}
    lines = []
    if sweep.protocol and source not in BLOG:
        lines += [f"protocol recipe is not one of {source}; its own, {protocol}, is used"]
    if most not in sweep.shots_of(source):
        lines += ["flowers: shots stop at 10: class 'kind 0' has no more train images"]
    if preset == "demo" and len(next(iter(planned.datasets.values())).classes) == 2:
        lines += [f"{next(iter(planned.datasets.values())).name}{MORE}"]
    assert planned.adapted == lines
    assert {*lines} <= {*planned.describe()["notes"]} & {*planned.about_data()}
    assert protocol == "recipe" or source not in BLOG


@pytest.mark.usefixtures("benchmarks")
def test_what_some_sets_do_not_have_is_said(twenty: Path) -> None:
    mixed = load("demo", {"datasets": ("flowers", f"folder:{twenty}"), "shots": (1,)}, {})
    planned = plan(mixed, access=Access("hub", protocol="official"))
    assert [job.access for job in planned.jobs if job.source != "flowers"] == [Access()] * 13
    assert {job.cell.protocol for job in planned.jobs if job.source == "flowers"} == {"official"}
    own = planned.datasets[f"folder:{twenty}"].protocol
    assert planned.adapted == [
        "--source is not for folder:photos and is not used there",
        f"protocol official is not one of folder:photos; its own, {own}, is used",
        f"folder:photos{MORE}",
    ]


def test_a_preset_gives_way_to_the_original_files(tmp_path: Path) -> None:
    """Its protocol is the hub's alone."""
    assert catalog.accesses(["flowers"], Access(root=tmp_path), "recipe") == {"flowers": Access(root=tmp_path)}
    assert catalog.accesses(["flowers"], Access(), "coop") == {"flowers": Access(protocol="coop")}


@pytest.mark.usefixtures("benchmarks")
@pytest.mark.parametrize(
    ("datasets", "access", "preset", "message"),
    [
        (
            ("icons", "folder:."),
            Access(protocol="coop"),
            "",
            "--protocol coop is for .*; icons, folder:. has no choice",
        ),
        (("icons", "flowers"), Access(protocol="recipy"), "", "unknown protocol 'recipy' .*did you mean 'recipe'"),
        (("icons", "pets"), Access("archive", protocol="recipe"), "", "recipe needs --source hub, not archive"),
        (("icons",), Access(), "recipy", "unknown protocol 'recipy' .*did you mean 'recipe'"),
    ],
)
def test_a_protocol_that_no_set_has(datasets: tuple[str, ...], access: Access, preset: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan(load("demo", {"datasets": datasets, "protocol": preset, "shots": (1,)}, {}), access=access)


@pytest.mark.parametrize(("shots", "drawn"), [((1, 2, 17, 20), (1, 2, 16)), ((16, 32), (16,)), ((4,), (4,))])
def test_a_preset_is_drawn_at_what_a_set_has(shots: tuple[int, ...], drawn: tuple[int, ...], twenty: Path) -> None:
    """And a command line that gives shots is held to them."""
    source = f"folder:{twenty}"
    planned = plan(load("demo", {"datasets": (source,)}, {}).model_copy(update={"shots": shots}))
    assert {job.cell.shots for job in planned.jobs} == {0, *drawn}
    capped = max(shots) > 16
    line = "folder:photos: shots stop at 16: class 'cat' has no more train images"
    assert planned.adapted == [*([line] if capped else []), f"folder:photos{MORE}"]
    assert planned.describe().get("most_shots") == ({"folder:photos": 16} if capped else None)
    if capped:
        with pytest.raises(TooFewImagesError, match=f"class 'cat' has 16 .*, {max(shots)} shots asked for"):
            plan(load("demo", {"datasets": (source,), "shots": shots}, {}))


def test_shots_that_sets_do_not_have(twenty: Path) -> None:
    """Of each set the smallest class is named, and what can be done."""
    few = shutil.copytree(twenty, twenty.parent / "few")
    for n in range(10):
        (few / f"dog/{n}.png").unlink()
    said = [
        f"folder:{name}: class {kind!r} has {n} distinct train images, 17 shots asked for (1 more class has too few); "
        f"use --shots {n}, --allow-fewer, or in a sweep --most-shots DATASET={n}"
        for name, kind, n in (("photos", "cat", 16), ("few", "dog", 8))
    ]
    sources = f"folder:{twenty}", f"folder:{few}"
    for chosen, message in ((sources[:1], said[0]), (sources, "\n  ".join(["too few images: 2 problems", *said]))):
        with pytest.raises(TooFewImagesError) as raised:
            plan(load("demo", {"datasets": chosen, "shots": (1, 17)}, {}))
        assert str(raised.value) == message
    grid = {"datasets": sources, "shots": (17,), "most_shots": {sources[0]: 16, sources[1]: 8}}
    assert {job.cell.shots for job in plan(load("demo", grid, {})).jobs} == {0, 8, 16}


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


@pytest.mark.parametrize("name", ["Qwen3.5-0.8B", "Qwen3.5-397B-A17B", "Qwen3.6-27B"])
def test_a_newer_models_name_needs_no_publisher(name: str) -> None:
    assert load("blog", {}, {"model": name}).settings.model == f"Qwen/{name}" == models.loadable(name)
    models.check(name)


def test_what_is_no_size_goes_on_as_it_is(tmp_path: Path) -> None:
    assert models.full_name("./8B") == "./8B"
    assert models.full_name("kshot/nano-qwen3-vl") == "kshot/nano-qwen3-vl"
    with pytest.raises(
        InputError,
        match=r"unknown model '3B'.*: kshot.nano-qwen3-vl, .*, 2B, 4B, 8B, 30B-A3B, 235B-A22B",
    ):
        models.check("3B")


def test_a_file_caps_shots_and_a_command_line_goes_over_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(GOOD + "most_shots: {flowers: 10}\n")
    sweep = load(str(path), {}, {})
    assert (sweep.shots_of("flowers"), sweep.shots_of("pets")) == ((10, 8), (16, 8, 12))  # once, where it came first
    assert load(str(path), {"datasets": ("pets",)}, {}).most_shots == {}  # its cap has nothing left to hold for
    assert load(str(path), {"most_shots": {"pets": 9}}, {}).shots_of("pets") == (9, 8)


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
