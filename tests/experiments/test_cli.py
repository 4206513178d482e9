"""The command line: one line for what is wrong, nothing written then; what it prints; what it does not import."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
from stored import files

from experiments.cli import sweep as sweep_command
from experiments.sweep.cells import Job
from experiments.sweep.store import Results

HEAVY = {"torch", "transformers", "tinker", "timm", "sklearn", "matplotlib", "pyarrow", "numpy", "fastapi", "uvicorn"}
Files = dict[str, Path]


@pytest.fixture
def places(photos: Path, two_workers: Path, tmp_path: Path) -> Files:
    """What the bad commands below talk about."""
    broken = shutil.copytree(photos, tmp_path / "broken")
    (broken / "a|b" / "3.png").write_bytes(b"\x89PNG no more")
    (tmp_path / "file").write_text("text")
    return {"photos": photos, "broken": broken, "here": tmp_path, "done": two_workers}


@pytest.mark.parametrize(
    ("command", "parts"),
    [
        ("sweep --dataset digitz", ["unknown data set 'digitz' (did you mean 'digits'?)", "icons", "folder:PATH"]),
        ("sweep --dataset folder:{here}/none", ["none is not a folder; give folder:PATH"]),
        ("sweep --dataset folder:{broken}", ["broken: files that", "a|b/3.png: ", "replace or remove it"]),
        ("sweep --method vlm-loar", ["unknown method 'vlm-loar' (did you mean 'vlm-lora'?)", "pixel-knn"]),
        ("sweep --model nope", ["unknown model 'nope'", "kshot/nano-qwen3-vl", "a hub id such as"]),
        ("sweep --model {here}", ["unknown model '{here}' (this folder has no config.json)", "a folder with"]),
        ("sweep --service there", ["unknown service 'there'", "local, tinker, http://HOST:PORT"]),
        ("sweep --service http://127.0.0.1:9", ["no server answers at http://127.0.0.1:9", "start it first"]),
        ("sweep --backbone resnet_dino", ["unknown model", "'resnet_dino'"]),
        ("sweep --executor slurm", ["unknown executor 'slurm'; choose from: local, ray"]),
        ("sweep --track mlflow", ["unknown tracker 'mlflow'; choose from: wandb, trackio, tensorboard"]),
        ("sweep --most-shots flowers", ["--most-shots 'flowers' caps nothing; write it as DATASET=K"]),
        ("sweep --most-shots flowers=4", ["'flowers' is none of the data sets (icons)"]),
        ("sweep --model nope --set model=other", ["model is given twice"]),
        (
            "sweep demo --dataset folder:{photos} --shots 1 --out {photos}",
            ["holds other things and no results", "--out"],
        ),
        ("sweep --device tpu", ["device 'tpu' is not available here (did you mean 'cpu'?); use --device cpu"]),
        ("sweep dmeo", ["unknown preset 'dmeo' (did you mean 'demo'?)", "FILE.yaml"]),
        ("sweep {here}/gone.yaml", ["gone.yaml cannot be read (No such file", "presets are: ", "demo"]),
        ("sweep --set limit_test=0", ["settings.limit_test = '0': ", "greater than 0"]),
        ("sweep --set rnak=4", ["unknown setting 'rnak' (did you mean 'rank'?)", "learning_rate"]),
        ("sweep --set rank", ["--set 'rank' has no value; write it as KEY=VALUE", "batch_size"]),
        ("sweep --limit-test x", ["settings.limit_test = 'x': ", "a valid integer"]),
        ("sweep --shots 0", ["shots.0 = 0: ", "greater than or equal to 1"]),
        ("sweep --shots a,b", ["--shots 'a,b' is not a list of whole numbers; write it as 1,2,4 or as 0-2"]),
        ("sweep --shots=", ["--shots '' is not a list"]),
        ("sweep --seeds 0,-1", ["seeds.1 = -1: ", "greater than or equal to 0"]),
        ("sweep --workers 0", ["'--workers'", "1", "--help"]),
        ("sweep --shotz 1", ["--shotz", "--help"]),
        ("sweep --dataset folder:{photos} --shots 9", ["class '<script>alert(1)' has 8", "9 shots", "--allow-fewer"]),
        (
            "sweep demo --dataset folder:{photos} --shots 1 --out {here}/file/x",
            ["cannot write to {here}/file/x", "--out"],
        ),
        ("sweep demo --dataset folder:{photos} --shots 1 --out /proc/x", ["cannot write to /proc/x", "--out"]),
        (
            "sweep demo --dataset folder:{photos} --shots 1 --out {done}",
            ["configuration (batch_size 4 → 8", "--out"],
        ),
        ("report {here}", ["is no results folder", "sweep.json", "kshot sweep"]),
    ],
)
def test_bad_input_is_one_line_and_changes_nothing(
    places: Files,
    refused: Callable[..., str],
    ran: list[Job],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    parts: list[str],
) -> None:
    monkeypatch.chdir(places["here"])
    before = [files(folder) for folder in places.values()]
    words = [word.format(**places) for word in command.split(" ")]
    refused(*words, parts=[part.format(**places) for part in parts])
    assert (ran, [files(folder) for folder in places.values()]) == ([], before)


def test_a_second_writer_is_sent_away(photos: Path, tmp_path: Path, refused, ran: list[Job]) -> None:
    held = f"{tmp_path} is being written by another kshot; wait for it or use --out"
    with Results(tmp_path).writing():
        refused("sweep", "demo", "--dataset", f"folder:{photos}", "--shots", "1", "--out", tmp_path, parts=[held])
    assert ran == []


@pytest.mark.parametrize(
    ("raised", "status", "line"),
    [
        (OSError(28, "No space left on device"), 1, "kshot: [Errno 28] No space left on device\n"),
        (KeyboardInterrupt(), 130, "kshot: stopped; what was finished is kept, the same command goes on from there\n"),
    ],
)
def test_failures_are_one_line(
    kshot, monkeypatch: pytest.MonkeyPatch, raised: BaseException, status: int, line: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr(sweep_command, "run", fail)
    assert kshot("demo") == (status, "", line)


def test_a_defect_is_not_hidden(kshot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_command, "run", lambda *_, **__: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        kshot("demo")


def test_what_a_sweep_prints_fits_into_80_columns(photos: Path, tmp_path: Path, kshot, ran: list[Job]) -> None:
    methods = [word for method in ("vlm-zero-shot", "dinov2-logreg", "pixel-knn") for word in ("--method", method)]
    limits = ("--shots", "1,2,3,4,5", "--seeds", "0,1", "--out", tmp_path / "out")
    ended = kshot("sweep", "demo", "--dataset", f"folder:{photos}", *methods, *limits)
    lines = ended.out.splitlines()
    assert ended.status == 0
    assert max(len(line) for line in lines if line.startswith(("method", "vlm", "dinov2", "pixel"))) <= 80
    assert [line.split()[0] for line in lines[1:8] if line[:1].strip()] == [
        "method",
        "vlm-zero-shot",
        "dinov2-logreg",
        "pixel-knn",
    ]
    assert "…" not in ended.out
    assert sum("learnt from drawings of icons with" in line for line in lines) == 2
    assert lines[-2:] == [f"wrote {tmp_path}/out/report.html", f"wrote {tmp_path}/out/results.csv"]
    assert ended.err.splitlines()[-1].startswith("21/21 ")
    again = kshot("report", tmp_path / "out")
    assert again.status == 0
    assert [line for line in lines if line != f"wrote {tmp_path}/out"] == again.out.splitlines()


def test_the_list_of_data_fits_into_80_columns(kshot) -> None:
    ended = kshot("data", "list")
    lines = ended.out.splitlines()
    assert ended.status == 0
    assert max(map(len, lines)) <= 80
    assert "…" not in ended.out
    words = " ".join(ended.out.split())
    assert "PATH/{train,test}/<class>/*" in words
    for name in ("icons", "digits", "folder:PATH"):
        assert any(line.startswith(name) for line in lines)


def test_the_quick_commands_import_nothing_heavy() -> None:
    """All in one process: what one of them imports, the set at the end has."""
    names = ("", "sweep", "zero-shot", "train", "predict", "push", "serve", "report", "bench")
    commands = [*(f"{name} --help".split() for name in names), ["data", "list"], ["nonsense"]]
    code = "import sys\nfrom experiments.cli.main import main\n"
    code += f"for words in {commands!r}:\n try: sys.argv = ['kshot', *words]; main()\n except SystemExit as ended:"
    code += f" print(ended.code)\nprint(sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert [line for line in done.stdout.splitlines() if line.isdigit()] == ["0"] * 10 + ["2"]
    assert all(f"Usage: kshot {name}" in done.stdout for name in names)
    # the help of sweep lists the methods, whose module has numpy
    assert done.stdout.endswith("\n['numpy']\n"), done.stdout[-300:]


def test_the_names_of_sweeps(kshot, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    monkeypatch.setattr(sweep_command, "run", lambda sweep, *_, **__: names.append(sweep.name))
    monkeypatch.chdir(photos)
    folders: list[str] = [f"folder:{photos}", "folder:.", "folder:./", f"folder:{photos}/", "folder:/"]
    for dataset in folders:
        assert kshot("sweep", "--dataset", dataset).status == 0
    assert kshot("sweep", "--dataset", "digits", "--dataset", "icons", "--dataset", "digits").status == 0
    assert kshot("demo").status == 0
    assert names == [*["my--b-photos-é"] * 4, "folder", "digits-icons", "demo"]


def test_a_shell_completes_names(kshot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_KSHOT_COMPLETE", "complete_bash")
    for words, names in (("sweep --method dinov2-k", ["dinov2-knn"]), ("sweep blog", ["blog", "blog-small"])):
        monkeypatch.setenv("COMP_WORDS", f"kshot {words}")
        monkeypatch.setenv("COMP_CWORD", str(len(words.split())))
        assert kshot().out.split() == names


def test_without_a_command_the_help_is_shown(kshot) -> None:
    for words, named in ((), "sweep"), (("data",), "list"), (("--help",), "sweep"):
        ended = kshot(*words)
        assert (ended.status, ended.err) == (0, "")
        assert ended.out.startswith("Usage: ")
        assert named in ended.out
    assert kshot("--version").out == f"kshot {version('kshot')}\n"


def test_results_without_predictions_are_reported_as_recorded(kshot, two_workers: Path, tmp_path: Path) -> None:
    """As they are committed."""
    ignored = shutil.ignore_patterns("*.parquet", "report.*", "*.png")
    committed = shutil.copytree(two_workers, tmp_path / "committed", ignore=ignored)
    ended = kshot("report", committed)
    assert ended.status == 0
    assert "has no predictions: its metrics are taken as they are recorded" in ended.out
    assert (committed / "report.html").exists()
    assert not Results(committed).finished()  # a sweep into it would compute them again


def test_a_report_packs_the_cells(kshot, two_workers: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(two_workers, tmp_path / "packed")
    before = Results(folder).cells()
    assert kshot("report", folder, "--pack").status == 0
    assert not (folder / "cells").exists()
    assert Results(folder).cells() == before
    assert kshot("report", folder).status == 0  # with the metrics of the same predictions
    assert Results(folder).cells() == before
