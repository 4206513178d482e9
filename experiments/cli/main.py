"""The command line. Turns arguments into calls and errors into one line; computes nothing itself.

Nothing heavy is imported before a command needs it: `kshot --help` and `kshot data list` answer at once.
"""

import sys
from typing import Annotated, Any

import typer

from experiments.cli import hub
from experiments.cli.bench import app as bench_app
from experiments.cli.data import app as data_app
from experiments.cli.predict import predict
from experiments.cli.serve import serve
from experiments.cli.sweep import demo, report, sweep
from experiments.cli.train import train, zero_shot
from experiments.terminal import err, out
from kshot.errors import INTERRUPTED, InputError, KshotError

app = typer.Typer(
    name="kshot",
    help="Few-shot image classification with a vision-language model that answers in text, against DINOv2 with a head.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(data_app)
app.add_typer(bench_app)
# Typer carries a click of its own; the base of its usage errors has no public name.
UsageError: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")


@app.callback(invoke_without_command=True)
@data_app.callback(invoke_without_command=True)
@bench_app.callback(invoke_without_command=True)
def help_or_version(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if version:
        from importlib.metadata import version as installed

        out.print(f"kshot {installed('kshot')}", highlight=False)
        raise typer.Exit
    if context.invoked_subcommand is None:
        out.print(context.get_help(), markup=False, highlight=False)
        raise typer.Exit


app.command("demo")(demo)
app.command("sweep")(sweep)
app.command("report")(report)
app.command("train")(train)
app.command("push")(hub.push)
app.command("predict")(predict)
app.command("zero-shot")(zero_shot)
app.command("serve")(serve)


def main() -> None:
    """Entry point of the console script: one line for every error, status 2 for bad input and 1 for a failure."""
    try:
        status = app(standalone_mode=False)
    except KshotError as error:
        _fail(str(error), error.exit_status)
    except UsageError as error:
        _fail(f"{error.format_message()} (see kshot --help)", InputError.exit_status)
    except OSError as error:  # a disk that is full or gone
        _fail(str(error), KshotError.exit_status)
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    if status == INTERRUPTED:  # Typer turns Ctrl-C into this status from 0.26 on
        _fail("stopped; what was finished is kept, the same command goes on from there", INTERRUPTED)
    sys.exit(status if isinstance(status, int) else 0)


def _fail(message: str, status: int) -> None:
    err.print(f"kshot: {' '.join(message.split())}", style="red", markup=False, highlight=False)
    sys.exit(status)
