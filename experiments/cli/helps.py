"""The help of a command: its options in groups, and below them the names that options take, with defaults."""

import re
from collections.abc import Callable, Iterator
from typing import Any, get_args

from typer.core import TyperCommand

from kshot.errors import ALIASES, near_name

GROUPS = {  # options by their parameter's name; those of no group stand under "Options"
    "What is compared": ("preset", "dataset", "method", "shots", "seeds", "seed", "most_shots", "model", "backbone"),
    "The data": (
        *("source", "root", "protocol", "split_file", "allow_modified", "allow_shared", "label_column", "split_seed"),
        *("limit_test", "allow_fewer"),
    ),
    "Settings; of several values each is run": (
        *("readout", "image_size", "vlm_features", "prompt", "loss", "loss_power", "start", "calibration", "thinking"),
        *("thoughts", "train_on", "temperature", "max_side", "settings"),
    ),
    "How it is run": (
        *("service", "device", "gpus_per_worker", "executor", "workers", "threads", "only_failed", "track", "dtype"),
    ),
    "Plan": ("only_plan", "quick", "gpu", "count"),
    "Results": ("output", "no_images", "push_to_hub", "yes", "public", "force", "pack", "top", "as_json", "adapter"),
    "Who may ask": ("host", "port", "api_key_file", "shared", "allow_host", "allow_urls"),
    "What is kept": ("state", "keep", "memory", "features"),
}
TAKES = {"str": "NAME", "int": "N", "float": "X", "path": "PATH"}  # of a type: what stands for its values
NO_DEFAULT = {"image_size": "own", "limit_test": "all", "hflip": "0.5, or the data set's own"}
Section = tuple[str, list[tuple[str, str]]]


class Grouped(TyperCommand):
    """A command whose help has groups of options, and sections of names behind them where `sections` gives any."""

    sections: Callable[[], Iterator[Section]] | None = None

    def format_options(self, ctx: Any, formatter: Any) -> None:
        rows = {
            parameter.name: record for parameter in self.get_params(ctx) if (record := parameter.get_help_record(ctx))
        }
        grouped = {name for names in GROUPS.values() for name in names}
        groups = {**GROUPS, "Options": tuple(name for name in rows if name not in grouped)}
        for title, names in groups.items():
            if shown := [rows[name] for name in names if name in rows]:
                with formatter.section(title):
                    formatter.write_dl(shown)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        for title, rows in self.sections() if self.sections else ():
            with formatter.section(title):
                formatter.write_dl(rows)


class SettingsHelp(Grouped):
    """That of a command with --set."""

    @staticmethod
    def sections() -> Iterator[Section]:
        yield "Settings (--set KEY=VALUE): default, and choices", [*_settings()]


class SweepHelp(Grouped):
    """That of kshot sweep."""

    @staticmethod
    def sections() -> Iterator[Section]:
        from experiments.sweep.config import presets
        from experiments.sweep.methods import METHODS
        from experiments.sweep.series import style

        yield "Methods (--method)", [(name, style(name).title) for name in METHODS]
        yield "Presets", [(name, _about(name)) for name in presets()]
        yield from SettingsHelp.sections()


def _readable(option: str) -> str:
    """An option with what it takes in words: `--method <list[str]>` → `--method NAME`."""
    return re.sub(r"<(?:list\[)?(\w+)[^>]*>", lambda found: TAKES.get(found[1], found[0]), option)


def _about(preset: str) -> str:
    from experiments.sweep.config import read

    content = read(preset)
    seeds = len(content["seeds"])
    grid = f"{', '.join(content['datasets'])}; {content['settings']['model']}"
    return f"{grid}; {seeds} seed{'s' if seeds > 1 else ''}"


def _settings() -> Iterator[tuple[str, str]]:
    from experiments.sweep.config import Settings

    for name, field in Settings.model_fields.items():
        values = [str(value) for value in get_args(field.annotation) if isinstance(value, str)]
        usual = NO_DEFAULT[name] if field.default is None else str(field.default)
        yield name, f"{usual}  ({', '.join(values)})" if values else usual


def wrong_usage(error: Any) -> str:
    """A usage error of the parser in one line: what is near, and the command whose help says more."""
    context = getattr(error, "ctx", None)
    path = context.command_path if context else "kshot"
    message, near = str(error.format_message()).rstrip("."), ""
    option = re.fullmatch(r"--[\w-]+", getattr(error, "option_name", "") or "")
    if option and "No such option" in message:
        message, near = f"no option {option[0]}", _near_option(option[0], context)
    elif "No such command" in message and context:
        word = message.split("'")[1]
        message = f"no command {word!r}"
        near = near_name(word, context.command.commands) or ""
    return f"{message}{f'; did you mean {near}?' if near else ''} (see {path} --help)"


def _near_option(option: str, context: Any) -> str:
    """The option, the setting or the device that was meant; "" where there is none."""
    from experiments.sweep.config import Settings

    names = [name for parameter in context.command.params for name in parameter.opts if name.startswith("--")]
    words = {name.removeprefix("--").replace("-", "_"): name for name in names}
    word = option.removeprefix("--").replace("-", "_")
    known = ALIASES.get(word, word)
    if known in words:
        return words[known]
    if known == "cuda" and "device" in words:
        return "--device cuda"
    if known in Settings.model_fields and "set" in words:
        return f"--set {known}=VALUE"
    if near := near_name(word, words):
        return words[near]
    setting = near_name(word, Settings.model_fields) if "set" in words else None
    return f"--set {setting}=VALUE" if setting else ""


def completion(names: Callable[[], Any]) -> Callable[[str], list[str]]:
    """What a shell completes a value from: the names that begin as what is typed."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in names() if name.startswith(incomplete)]

    return complete


def datasets() -> list[str]:
    from data.catalog import DATASETS

    return [*DATASETS]


def methods() -> list[str]:
    from experiments.sweep.methods import METHODS

    return [*METHODS]


def sweeps() -> list[str]:
    from experiments.sweep.config import presets

    return presets()


def models() -> list[str]:
    from vlm.models import MODELS, SHORT

    return [*MODELS, *SHORT]
