"""`kshot predict`: the likeliest classes of images, and on stderr the images that have none."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from experiments.cli import options as opt
from experiments.terminal import err
from kshot.errors import INTERRUPTED, InputError, KshotError, UnknownNameError

if TYPE_CHECKING:
    from experiments.adapters.predict import Prediction, Source

BROKEN_PIPE = 141  # the shells' status of a program whose reader has gone
TOP = 5

Images = Annotated[
    list[str],
    typer.Argument(
        metavar="IMAGE",
        help="A file; a folder, which is searched recursively; a quoted pattern such as 'photos/**/*.jpg'; or - for "
        "standard input: an image, or if it is text (UTF-8), a list of these, one a line.",
    ),
]
Adapter = Annotated[Path | None, typer.Option("--adapter", metavar="DIR", help="A folder that kshot train wrote.")]
Model = Annotated[
    str | None,
    typer.Option("--model", help="Without --adapter: a Qwen3-VL as it is. With it: where its model is now."),
]
ClassNames = Annotated[
    list[str] | None, typer.Option("--class", metavar="NAME", help="A class; repeat. In place of the adapter's.")
]
ClassFile = Annotated[
    Path | None, typer.Option("--classes", metavar="FILE", help="Class names, one a line, in place of --class.")
]
Method = Annotated[
    str,
    typer.Option(
        "--method",
        help="constrained: the model restricted to the class names, exactly. likelihood: that of each whole name, "
        "normalised over the classes by softmax.",
    ),
]
Top = Annotated[int, typer.Option("--top", min=1, metavar="N", help="Classes to show; with --json under the key topN.")]
MaxSide = Annotated[
    int | None, typer.Option("--max-side", min=1, help="Longest side in pixels (default: the adapter's, or 480).")
]


def predict(
    images: Images,
    adapter: Adapter = None,
    model: Model = None,
    classes: ClassNames = None,
    class_file: ClassFile = None,
    method: Method = "constrained",
    prompt: opt.Prompt = None,
    top: Top = TOP,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:N, mps or auto.")] = "cpu",
    max_side: MaxSide = None,
) -> None:
    """The likeliest classes of images, with probabilities; what is no image is named on stderr, and the status is 1."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # beside other programs, threads that spin make each other wait
    from experiments.adapters.predict import METHODS, Source

    if method not in METHODS:
        raise UnknownNameError("method", method, METHODS)
    source = Source(adapter, model, _names(classes, class_file), prompt, max_side, device)
    try:
        failed = _answer(images, source, method, top, as_json=as_json)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what Python flushes at its end goes there
        raise typer.Exit(BROKEN_PIPE) from None
    except KeyboardInterrupt:
        _complain("stopped")
        sys.exit(INTERRUPTED)
    if failed:
        raise typer.Exit(KshotError.exit_status)


def _answer(images: list[str], source: "Source", method: str, top: int, *, as_json: bool) -> int:
    """Print the answers, flushed by windows; how many images have none."""
    from experiments.adapters.predict import Prediction, classifier, pictures

    failed = 0
    found = pictures(images, lambda: sys.stdin.buffer)
    with classifier(source, method, greedy=as_json) as loaded, closing(loaded.predict(found)) as windows:
        names = loaded.prompt.classes
        for window in windows:
            for answer in window:
                if isinstance(answer, Prediction):
                    _print([_json(answer, names, top)] if as_json else _lines(answer, names, top))
                else:
                    failed += 1
                    _complain(str(answer))
            sys.stdout.flush()
    return failed


def _json(answer: "Prediction", names: tuple[str, ...], top: int) -> str:
    likeliest = [{"label": names[label], "probability": p} for label, p in answer.top(top)]
    content: dict[str, Any] = {"image": answer.name, f"top{top}": likeliest}
    if answer.greedy is not None:
        content["greedy"] = names[answer.greedy]
    return json.dumps(content, allow_nan=False)


def _lines(answer: "Prediction", names: tuple[str, ...], top: int) -> Iterator[str]:
    from experiments.adapters.predict import shown

    yield shown(answer.name)
    for label, probability in answer.top(top):
        yield f"  {probability:.4f}  {shown(names[label])}"


def _print(lines: Iterator[str] | list[str]) -> None:
    encoding = sys.stdout.encoding or "utf-8"
    for line in lines:
        sys.stdout.write(f"{line}\n".encode(encoding, "backslashreplace").decode(encoding))


def _complain(reason: str) -> None:
    from experiments.adapters.predict import shown

    sys.stdout.flush()  # in order, where both go to one place
    err.print(f"kshot: {shown(reason)}", style="red", markup=False, highlight=False)


def _names(given: list[str] | None, file: Path | None) -> tuple[str, ...] | None:
    """The class names of the options; None without them. Raises InputError."""
    if file is None:
        return tuple(name.strip() for name in given) if given else None
    if given:
        raise InputError("class names are given twice, with --class and with --classes; leave one out")
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise InputError(f"--classes {file} cannot be read ({error.strerror}); give a file of names") from error
    except UnicodeDecodeError as error:
        raise InputError(f"--classes {file} is no text in UTF-8; write one class name a line") from error
    names = tuple(line.strip() for line in lines if line.strip())
    if not names:
        raise InputError(f"--classes {file} holds no class name; write one a line")
    return names
