"""Offer an adapter or a results folder to the hub: what would be sent, and on demand sending it. Knows no terminal.

A folder is sent by a list of the files that are known to belong to it: weights and cards of an adapter, or reports,
records and figures of results. Never predictions, images of a data set, or whatever else lies there. One commit.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from experiments.adapters import folder as adapters
from experiments.sweep.provenance import TOGETHER, file_stem
from experiments.sweep.store import Results
from kshot.errors import InputError, KshotError

MODEL, DATASET = "model", "dataset"  # the hub's kinds of repositories
PHOTOGRAPH = re.compile(rb"data:image/(?!svg\+xml)")  # figures are drawings; images of data sets are JPEG
LOG_IN = "set HF_TOKEN or run `hf auth login`"


@dataclass(frozen=True)
class Upload:
    """What is sent, or would be. files: (name in folder and repository, bytes). stays: what else lies in the folder.

    leaks: files that say where on this machine the base model lies. url: of the commit; "" where nothing was sent.
    """

    folder: Path
    repo: str
    kind: str
    private: bool
    files: tuple[tuple[str, int], ...]
    stays: tuple[str, ...] = ()
    leaks: tuple[str, ...] = ()
    url: str = ""


def push(folder: Path, repo: str, *, private: bool, dry_run: bool = True) -> Upload:
    """Send the folder to the repository OWNER/NAME, which is made, private or public, unless it is there.

    A dry run sends nothing and asks the hub nothing. Raises InputError (and its kinds) for a folder or a name that
    cannot be sent and for a missing token, before anything is sent; KshotError where the hub refuses or is not there.
    """
    check(repo, dry_run=dry_run)
    planned = _planned(folder, repo, private)
    if dry_run:
        return planned
    with _errors_of(repo):
        return _sent(planned)


def check(repo: str, *, dry_run: bool) -> None:
    """What can be known before there is a folder. Raises InputError."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(f"{repo!r} cannot be the name of a repository ({' '.join(str(error).split())})") from error
    if "/" not in repo:
        raise InputError(f"{repo!r} does not say whose the repository is; write it as OWNER/{repo}")
    if not dry_run and not get_token():
        raise InputError(f"nothing can be sent to {repo} without a token of the hub; {LOG_IN}")


def _planned(folder: Path, repo: str, private: bool) -> Upload:
    if (folder / "sweep.json").exists():
        kind, names = DATASET, _of_results(folder)
    elif (folder / adapters.CARD).exists() or (folder / adapters.RECORD).exists():
        kind, names = MODEL, _of_adapter(folder)
    else:
        raise InputError(f"{folder} is neither an adapter of kshot train nor a results folder; nothing else is sent")
    for name in names:
        if (folder / name).is_symlink() or not (folder / name).is_file():
            raise InputError(f"{folder / name} is no plain file; only such files are sent")
    sizes = tuple((name, (folder / name).stat().st_size) for name in names)
    there = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    stays = tuple(sorted(there - {name.split("/")[0] for name in names}))
    return Upload(folder, repo, kind, private, sizes, stays, _leaks(folder) if kind == MODEL else ())


def _of_adapter(folder: Path) -> list[str]:
    adapters.read_card(folder)
    if missing := sorted(name for name in adapters.FILES if not (folder / name).exists()):
        raise InputError(f"{folder} has no {missing[0]}: it is no whole adapter; train it again with kshot train")
    return sorted(adapters.FILES)


def _of_results(folder: Path) -> list[str]:
    sweep, reports = Results(folder).sweep(), ["report.html", "report.md"]
    if missing := [name for name in reports if not (folder / name).is_file()]:
        raise InputError(f"{folder} has no {missing[0]}; kshot report {folder} writes it")
    if PHOTOGRAPH.search((folder / "report.html").read_bytes()):
        way_out = f"kshot report {folder} writes it without"
        raise InputError(f"{folder}/report.html shows images of a data set, which are not sent; {way_out}")
    stems = sorted({TOGETHER, *map(file_stem, sweep["datasets"])})
    figures = [f"figures/{stem}.{suffix}" for stem in stems for suffix in ("png", "svg")]
    cells = sorted(f"cells/{path.name}" for path in (folder / "cells").glob("[!.]*.json"))
    return [*reports, "sweep.json", *cells, *(name for name in figures if (folder / name).exists())]


def _leaks(folder: Path) -> tuple[str, ...]:
    card = adapters.read_card(folder)
    if card is None or not Path(card.base_model).is_absolute():
        return ()
    named = [name for name in sorted(adapters.FILES) if name.endswith(".json")]
    return tuple(name for name in named if card.base_model in (folder / name).read_text(encoding="utf-8"))


def _sent(planned: Upload) -> Upload:
    from huggingface_hub import CommitOperationAdd, HfApi

    api, kind = HfApi(), planned.kind
    api.create_repo(planned.repo, repo_type=kind, private=planned.private, exist_ok=True)
    if planned.private and not api.repo_info(planned.repo, repo_type=kind).private:
        raise InputError(f"{planned.repo} is there and public; give --public, or the name of another repository")
    # not upload_folder, which may make several commits: a repository has all of a folder or nothing of it
    operations = [CommitOperationAdd(name, planned.folder / name) for name, _ in planned.files]
    said = "An adapter of kshot" if kind == MODEL else "Results of kshot"
    commit = api.create_commit(planned.repo, operations, commit_message=said, repo_type=kind)
    return Upload(**{**vars(planned), "url": str(commit.commit_url)})


@contextmanager
def _errors_of(repo: str) -> Iterator[None]:
    """What goes wrong with the hub, in one line of ours."""
    try:
        yield
    except KshotError:
        raise
    except Exception as error:
        raise KshotError(_plain(repo, error)) from error


def _plain(repo: str, error: Exception) -> str:
    from huggingface_hub import errors
    from huggingface_hub.utils import httpx

    match error:
        case errors.HfHubHTTPError() if error.response.status_code in (401, 403):
            status = error.response.status_code
            return f"the hub does not let this user write to {repo} ({status}); {LOG_IN} with a token that may write"
        case errors.OfflineModeIsEnabled():
            return f"nothing was sent to {repo}: HF_HUB_OFFLINE is set; unset it and try again"
        case httpx.TransportError():
            return f"the hub cannot be reached and {repo} is unchanged ({_line(error)}); try again, or set HF_ENDPOINT"
    return f"{repo} was not written: {_line(error)}; the same command tries again"


def _line(error: BaseException) -> str:
    while error.__cause__ is not None:  # the first of them says what happened
        error = error.__cause__
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
