"""`kshot push`, and the options of other commands that offer what they wrote to the hub. Without --yes nothing is sent
and the hub is asked nothing."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from experiments.terminal import err, out
from kshot.errors import InputError

if TYPE_CHECKING:
    from experiments.adapters.hub import Upload

PushToHub = Annotated[
    str | None,
    typer.Option("--push-to-hub", metavar="REPO", help="Offer it to OWNER/NAME on the hub; without --yes a dry run."),
]
Yes = Annotated[bool, typer.Option("--yes", help="Really send it.")]
Public = Annotated[bool, typer.Option("--public", help="Make the repository public; otherwise it is private.")]


def push(
    folder: Annotated[Path, typer.Argument(help="An adapter's folder, or a results folder.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="OWNER/NAME on the hub.")],
    yes: Yes = False,
    public: Public = False,
) -> None:
    """Send an adapter or results to the hub; without --yes, say what would be sent."""
    check(repo, yes, public)
    offer(folder, repo, yes, public)


def check(repo: str | None, yes: bool, public: bool) -> None:
    """For commands with these options, before they begin. Raises InputError for a name that is none, a missing token,
    and for options that mean nothing without --push-to-hub."""
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
        _say(f"nothing was sent; this sends it: {shlex.join(words)}")
        return
    with err.status(f"sending to {repo}"):
        sent = hub.push(folder, repo, private=not public, dry_run=False)
    _show(sent)
    _say(f"sent: {sent.url}")


def _show(upload: "Upload") -> None:
    whose = "private" if upload.private else "public"
    _say(f"{upload.repo}: a {upload.kind} repository of the hub, made {whose} unless it is there")
    cells = [size for name, size in upload.files if name.startswith("cells/")]
    for name, size in (file for file in upload.files if not file[0].startswith("cells/")):
        _say(f"{size:>13,}  {name}")
    if cells:
        _say(f"{sum(cells):>13,}  cells/, {len(cells)} records")
    _say(f"{sum(size for _, size in upload.files):>13,}  bytes in {len(upload.files)} files")
    if upload.stays:
        _say(f"stays here: {', '.join(upload.stays)}")
    if upload.leaks:
        _say(f"the base model's folder on this machine is named in {', '.join(upload.leaks)}", style="yellow")


def _say(text: str, style: str | None = None) -> None:
    out.print(text, style=style, markup=False, highlight=False)
