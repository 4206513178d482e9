"""What options of the command line mean, where several commands share it. Knows no command."""

import os

from kshot_errors import InputError


def numbers(name: str, text: str | None) -> list[int] | None:
    """The numbers of an option such as --shots 1,2,4. Raises InputError."""
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"--{name} {text!r} is not a list of whole numbers; write it as 1,2,4") from error


def pairs(settings: list[str] | None) -> dict[str, str]:
    """What --set KEY=VALUE says, each time it is given. Raises InputError for one without a value."""
    from experiments.config import Settings

    for text in settings or []:
        if "=" not in text:
            names = ", ".join(Settings.model_fields)
            raise InputError(f"--set {text!r} has no value; write it as KEY=VALUE with one of: {names}")
    return dict(text.partition("=")[::2] for text in settings or [])


def file_name(dataset: str) -> str:
    """A data set's part in the name of its sweep: the last part of a path, in letters that need no quotes."""
    name = os.path.basename(os.path.abspath(dataset.partition(":")[2])) if ":" in dataset else dataset
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name).lstrip("-.") or "folder"
