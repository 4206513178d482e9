"""What users import: `kshot`, light, with its errors; and what it says where a user's module hides one of ours."""

import subprocess
import sys
from pathlib import Path

import pytest

import kshot
from kshot import errors

ROOT = Path(__file__).parents[1]


def python(code: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, check=False)


def test_it_offers_every_error_and_what_it_names() -> None:
    every = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)}
    assert every <= set(kshot.__all__) == set(dir(kshot))
    assert all(getattr(kshot, name) is not None for name in kshot.__all__)
    with pytest.raises(AttributeError, match="'kshot' has no attribute 'no_such'"):
        kshot.no_such  # noqa: B018


@pytest.mark.parametrize("hidden", ["data.py", "data/__init__.py", "data/cats.csv", "vlm.py", "experiments.py"])
def test_a_module_of_the_user_that_hides_ours_is_one_line(tmp_path: Path, hidden: str) -> None:
    (tmp_path / hidden).parent.mkdir(exist_ok=True)
    (tmp_path / hidden).write_text("")
    name = hidden.split("/")[0].removesuffix(".py")
    place = tmp_path / (hidden if hidden.endswith(".py") else name)
    line = f"{place} hides kshot's own package '{name}' from Python; rename it, or start Python in another folder\n"
    assert python("import kshot; kshot.Results", tmp_path).stderr.endswith(f"kshot.errors.InputError: {line}")
    done = python("import sys; from kshot.__main__ import main; sys.argv = ['kshot', 'data', 'list']; main()", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"kshot: {line}")


def test_another_folder_of_the_user_does_not_disturb(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "my_data.py").write_text("")
    done = python("import kshot; print(kshot.Results.__name__)", tmp_path)
    assert (done.stdout, done.stderr) == ("Results\n", "")


@pytest.mark.usefixtures("ran")
def test_a_sweep_from_python(tmp_path: Path) -> None:
    grid = {"datasets": ["digits"], "methods": ["dinov2-logreg", "pixel-knn"], "shots": [1, 2], "seeds": [0]}
    results = kshot.sweep("demo", tmp_path / "out", **grid, settings={"limit_test": 20})
    frame = results.frame()
    assert isinstance(results, kshot.Results)
    assert [*frame.columns[:6]] == ["dataset", "protocol", "method", "shots", "seed", "accuracy"]
    assert frame[["dataset", "method", "shots", "seed"]].values.tolist() == [
        ["digits", method, shots, 0] for method in ("dinov2-logreg", "pixel-knn") for shots in (1, 2)
    ]
    assert frame["accuracy"].between(0, 1).all()
    assert set(frame["limit_test"]) == {20}
    with pytest.raises(kshot.InputError, match="unknown method 'no-such'"):
        kshot.sweep("demo", tmp_path / "other", methods=["no-such"])
