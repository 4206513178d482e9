"""Presets and YAML files: what they hold, what may be put over them, what is wrong in one line."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from experiments.sweep.config import Settings, Sweep, load
from experiments.sweep.methods import METHODS
from kshot.errors import InputError

GOOD = "name: mine\ndatasets: [digits]\nmethods: [pixel-knn]\nshots: [1, 2, 2]\nseeds: [0]\n"


@pytest.fixture
def write(tmp_path: Path):
    def write(content: str | bytes) -> str:
        path = tmp_path / "mine.yaml"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return write


def test_the_defaults_are_the_reference_protocol() -> None:
    s = Settings()
    assert (s.max_side, s.rank, s.learning_rate, s.batch_size, s.views_per_class) == (480, 32, 1e-4, 32, 160)
    assert (s.beta1, s.beta2, s.eps, s.limit_test, s.allow_fewer) == (0.9, 0.95, 1e-8, None, False)


def test_a_file_loads_and_what_is_given_goes_over_it(write) -> None:
    path = write(GOOD + "settings: {rank: 8, batch_size: 2, hflip: 0}\n")
    assert load(path, {}, {}).shots == (1, 2)
    sweep = load(path, {"shots": (4, 4, 8), "seeds": (1,)}, {"rank": "16", "limit_test": "5", "eps": "1e-6"})
    assert (sweep.shots, sweep.seeds, sweep.datasets) == ((4, 8), (1,), ("digits",))
    assert sweep.settings == Settings(rank=16, batch_size=2, hflip=0, limit_test=5, eps=1e-6)


def test_a_sweep_does_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load("demo", {}, {}).settings.rank = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [", "cannot be read as YAML"),
        (b"\xff\xfe\x00", "cannot be read as YAML"),
        ("- 1\n", "holds no sweep"),
        ("", "holds no sweep"),
        (GOOD + "shotz: [1]\n", r"unknown setting 'shotz' \(did you mean 'shots'\?\); choose from: name, datasets"),
        (GOOD + "1: 2\n", "1"),
        (GOOD + "settings: {ranks: 1}\n", r"unknown setting 'ranks' \(did you mean 'rank'\?\)"),
        (GOOD + "settings: 3\n", "settings = 3"),
        (GOOD.replace("shots", "#"), "does not say shots; a sweep has: name, datasets"),
        (GOOD.replace("[1, 2, 2]", "[0]"), r"shots.0 = 0: .*greater than or equal to 1"),
        (GOOD.replace("[1, 2, 2]", "[]"), r"shots = \[\]"),
        (GOOD.replace("[1, 2, 2]", "[[1]]"), "shots.0"),
        (GOOD.replace("[digits]", "digits"), "datasets = 'digits'"),
        (GOOD.replace("mine", "../mine"), "name = '../mine'"),
        (GOOD + "most_shots: {flours: 10}\n", r"most_shots: 'flours' is none of the data sets \(digits\)"),
        (GOOD + "most_shots: {digits: 0}\n", r"most_shots\.digits = 0: .*greater than or equal to 1"),
        (GOOD + "most_shots: [10]\n", r"most_shots = \[10\]"),
        (GOOD + "compare: {rank: [1, 2]}\n", "unknown setting to compare 'rank'; choose from: backbone, image_"),
        (GOOD + "compare: {readout: []}\n", r"compare.readout = \[\]: .*at least 1 item"),
        (GOOD + "compare: {readout: cls}\n", "compare.readout = 'cls': Input should be a valid tuple"),
        (GOOD + "compare: {readout: [cls, x]}\n", "compare.readout.1 = 'x': Input should be 'cls'"),
        (GOOD + "compare: 3\n", "compare = 3: "),
        (
            GOOD + "compare: {readout: [cls, last4]}\nsettings: {readout: cls}\n",
            "mine.yaml gives readout twice: in set",
        ),
    ],
)
def test_a_file_that_is_wrong(write, content: str | bytes, message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        load(write(content), {}, {})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("limit_test", "0"), ("rank", "-1"), ("rank", "1.5"), ("learning_rate", "0"), ("learning_rate", "inf")],
        *[("learning_rate", "nan"), ("beta2", "1"), ("allow_fewer", "maybe"), ("max_side", ""), ("split_seed", "-1")],
        *[("hflip", "1.1"), ("hflip", "-0.1"), ("hflip", "no")],
    ],
)
def test_a_setting_out_of_range(key: str, value: str) -> None:
    with pytest.raises(InputError, match=rf"settings\.{key} = '{value}': "):
        load("demo", {}, {key: value})


def test_the_settings_of_methods_are_settings() -> None:
    for method in METHODS.values():
        assert set(method.settings) <= Settings.model_fields.keys()
    grid = {"datasets", "methods", "shots", "seeds", "most_shots", "min_steps", "cap_shots", "prompts"}
    assert {"name", *grid, "protocol", "settings", "compare"} == Sweep.model_fields.keys()


def test_another_model_leaves_the_presets_training_settings_behind() -> None:
    """Also among others that are compared; what is shown, how many images it tests on, stays as the preset has it."""
    nano, small = load("demo", {}, {}).settings, "vit_small_patch14_dinov2.lvd142m"
    assert (nano.learning_rate, nano.views_per_class) == (0.003, 64)
    for other in ({"model": "Qwen/Qwen3-VL-2B-Instruct"}, {"backbone": small}, {"backbone": (nano.backbone, small)}):
        settings = load("demo", {}, other).settings
        assert (settings.learning_rate, settings.views_per_class) == (1e-4, 160)
        assert settings.answer_tokens == Settings().answer_tokens
    assert load("demo", {}, {"model": "a/b", "rank": 8, "learning_rate": 0.5}).settings.learning_rate == 0.5
    for own in ({"model": nano.model, "backbone": nano.backbone}, {"backbone": (nano.backbone, nano.backbone)}):
        assert load("demo", {}, own).variants == [nano]
    assert load("blog-small", {}, {"model": "4B"}).settings.limit_test == 512
    assert load("blog-small", {}, {"model": "2B"}) == load("blog-small", {}, {})
