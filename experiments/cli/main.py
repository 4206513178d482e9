"""The command line: the table of commands, and one line for every error. Commands turn arguments into calls and import
what they need when they run, so that `kshot --help` and `kshot data list` answer at once."""

import sys
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer

from experiments.cli import bench, data
from experiments.cli.adapters import export, predict, push, train
from experiments.cli.helps import Grouped, SettingsHelp, SweepHelp, wrong_usage
from experiments.cli.report import report
from experiments.cli.serve import serve
from experiments.cli.sweep import demo, sweep, zero_shot
from experiments.terminal import fail, out
from kshot.errors import INTERRUPTED, InputError, KshotError

Commands = Mapping[str, Callable[..., None]]


def _named(*functions: Callable[..., None]) -> Commands:
    return {function.__name__.replace("_", "-"): function for function in functions}


COMMANDS = _named(demo, sweep, report, train, push, predict, export, zero_shot, serve)
MEASURES = _named(bench.data, bench.train, bench.score, bench.text, bench.baseline, bench.serve, bench.sweep)
HELPS: Mapping[Callable[..., None], type[Grouped]]
HELPS = {sweep: SweepHelp, train: SettingsHelp, zero_shot: SettingsHelp}
GROUPS = {
    "data": ("The data sets.", {"list": data.list_data, "get": data.get, "check": data.check}),
    "bench": ("How fast the parts are on this machine.", MEASURES),
}
# Typer has a copy of click of its own; the base of its usage errors has no public name.
UsageError: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")


def help_or_version(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if version:
        from importlib.metadata import version as installed

        out.print(f"kshot {installed('kshot')}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        out.print(context.get_help())
        raise typer.Exit


def _with_commands(app: typer.Typer, commands: Commands) -> typer.Typer:
    app.callback(invoke_without_command=True)(help_or_version)
    for name, function in commands.items():
        app.command(name, cls=HELPS.get(function, Grouped))(function)
    return app


app = typer.Typer(
    name="kshot",
    help="Few-shot image classification with a vision-language model that answers in text, against DINOv2 with a head.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for name, (text, functions) in GROUPS.items():
    app.add_typer(_with_commands(typer.Typer(name=name, help=text), functions))
_with_commands(app, COMMANDS)


def main() -> None:
    """Entry point of the console script: one line for every error, status 2 for bad input and 1 for a failure."""
    try:
        status = app(prog_name="kshot", standalone_mode=False)
    except KshotError as error:
        fail(str(error), error.exit_status)
    except UsageError as error:
        fail(wrong_usage(error), InputError.exit_status)
    except UnicodeEncodeError as error:  # of what was to be written, a name from the file system
        fail(f"the name {str(error.object)[:200]} is not UTF-8; rename it", InputError.exit_status)
    except OSError as error:  # a disk that is full or gone
        fail(str(error), KshotError.exit_status)
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    if status == INTERRUPTED:  # Typer turns Ctrl-C into this status from 0.26 on
        fail("stopped; what was finished is kept, the same command goes on from there", INTERRUPTED)
    sys.exit(status if isinstance(status, int) else 0)
