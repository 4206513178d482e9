"""What options of the command line mean, where several commands share it. Knows no command."""

import os

from kshot.errors import InputError


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
    from experiments.sweep.config import Settings

    for text in settings or []:
        if "=" not in text:
            names = ", ".join(Settings.model_fields)
            raise InputError(f"--set {text!r} has no value; write it as KEY=VALUE with one of: {names}")
    return dict(text.partition("=")[::2] for text in settings or [])


def caps(texts: list[str] | None) -> dict[str, str]:
    """What --most-shots DATASET=K says, each time it is given. Raises InputError for one without a number."""
    parts = [text.rpartition("=") for text in texts or []]
    for text, (dataset, _, most) in zip(texts or [], parts, strict=True):
        if not dataset or not most.isdecimal():
            raise InputError(f"--most-shots {text!r} caps nothing; write it as DATASET=K, such as flowers=10")
    return {dataset: most for dataset, _, most in parts}


def file_name(dataset: str) -> str:
    """A data set's part in the name of its sweep: the last part of a path, in letters that need no quotes."""
    name = os.path.basename(os.path.abspath(dataset.partition(":")[2])) if ":" in dataset else dataset
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name).lstrip("-.") or "folder"
