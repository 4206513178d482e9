"""`kshot push`, and --push-to-hub of other commands. Without --yes nothing is sent and the hub is not contacted."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from experiments.cli import options as opt
from experiments.terminal import err, out
from kshot.errors import InputError

if TYPE_CHECKING:
    from experiments.adapters.hub import Upload


def push(
    folder: Annotated[Path, typer.Argument(help="An adapter's folder, or a results folder.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="OWNER/NAME on the hub.")],
    yes: opt.Yes = False,
    public: opt.Public = False,
) -> None:
    """Send an adapter or results to the hub; without --yes, say what would be sent."""
    check_options(repo, yes, public)
    offer(folder, repo, yes, public)


def check_options(repo: str | None, yes: bool, public: bool) -> None:
    """For commands with these options, before they begin. Raises InputError for a name that cannot be one, a missing
    token, and for options that mean nothing without --push-to-hub."""
    from experiments.adapters import hub

    if repo is not None:
        hub.check(repo, dry_run=not yes)
    elif yes or public:
        raise InputError(f"{'--yes' if yes else '--public'} is for --push-to-hub REPO; leave it out")


def offer(folder: Path, repo: str, yes: bool, public: bool) -> None:
    """Send a folder that is complete, or say what would be sent. Raises as `hub.push` does."""
    from experiments.adapters import hub

    if not yes:
        _show(hub.push(folder, repo, private=not public))
        words = ["kshot", "push", str(folder), repo, *(["--public"] if public else []), "--yes"]
        _print(f"nothing was sent; this sends it: {shlex.join(words)}")
        return
    with err.status(f"sending to {repo}"):
        sent = hub.push(folder, repo, private=not public, dry_run=False)
    _show(sent)
    _print(f"sent: {sent.url}")


def _show(upload: "Upload") -> None:
    whose = "private" if upload.private else "public"
    _print(f"{upload.repo}: a {upload.kind} repository of the hub, made {whose} unless it is there")
    cells = [size for name, size in upload.files if name.startswith("cells/")]
    for name, size in upload.files:
        if not name.startswith("cells/"):
            _print(f"{size:>13,}  {name}")
    if cells:
        _print(f"{sum(cells):>13,}  cells/, {len(cells)} records")
    _print(f"{sum(size for _, size in upload.files):>13,}  bytes in {len(upload.files)} files")
    if upload.skipped:
        _print(f"stays here: {', '.join(upload.skipped)}")
    if upload.leaks:
        _print(f"the base model's folder on this machine is named in {', '.join(upload.leaks)}", style="yellow")


def _print(text: str, style: str | None = None) -> None:
    out.print(text, style=style, markup=False, highlight=False)
