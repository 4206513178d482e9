"""Send a trained model or a results folder to the Hugging Face hub, in one commit; or list what would be sent: weights
and cards of a model; reports, records, their table and figures of results. Predictions, images and all else stay here.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from experiments.adapters import folder as adapters
from experiments.sweep.provenance import TOGETHER, file_stem
from experiments.sweep.store import PACKED, Results
from kshot.errors import InputError, KshotError
from kshot.hub import LOG_IN, first_cause, one_line, translated
from vlm.models import loadable

MODEL, DATASET = "model", "dataset"  # the hub's kinds of repositories
PHOTOGRAPH = re.compile(rb"data:image/(?!svg\+xml)")  # figures are drawings; images of data sets are JPEG


@dataclass(frozen=True)
class Upload:
    """What is sent, or would be. files: (name in folder and repository, bytes). skipped: what else lies in the folder.
    leaks: files that name the base model's folder on this machine. url: of the commit; "" where nothing was sent.
    """

    folder: Path
    repo: str
    kind: str
    private: bool
    files: tuple[tuple[str, int], ...]
    skipped: tuple[str, ...] = ()
    leaks: tuple[str, ...] = ()
    url: str = ""


def push(folder: Path, repo: str, *, private: bool, dry_run: bool = True) -> Upload:
    """Send the folder to the repository OWNER/NAME, which is made, private or public, unless it is there. A dry run
    sends nothing and asks the hub nothing. Raises InputError (and its kinds) for a folder or a name that
    cannot be sent and for a missing token, before anything is sent; KshotError where the hub refuses or is not there.
    """
    check(repo, dry_run=dry_run)
    upload = _upload(folder, repo, private)
    if dry_run:
        return upload
    with translated(lambda error: KshotError(_message(repo, error))):
        return _send(upload)


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


def _upload(folder: Path, repo: str, private: bool) -> Upload:
    card: adapters.Card | None = None
    if (folder / "sweep.json").exists():
        kind, names = DATASET, _results_files(folder)
    elif (folder / adapters.CARD).exists() or (folder / adapters.RECORD).exists():
        card = adapters.read_card(folder)
        kind, names = MODEL, sorted(adapters.FILES[card.kind if card else adapters.ADAPTER])
        if missing := [name for name in names if not (folder / name).exists()]:
            raise InputError(f"{folder} has no {missing[0]}: it is not whole; train it again with kshot train")
    else:
        raise InputError(f"{folder} is neither a trained model of kshot nor a results folder; nothing else is sent")
    for name in names:
        if (folder / name).is_symlink() or not (folder / name).is_file():
            raise InputError(f"{folder / name} is no plain file; only such files are sent")
    sizes = tuple((name, (folder / name).stat().st_size) for name in names)
    present = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    skipped = tuple(sorted(present - {name.split("/")[0] for name in names}))
    place = "" if card is None else loadable(card.base_model) if card.kind == adapters.ADAPTER else card.base_model
    place = place if Path(place).is_absolute() else ""  # an id of the hub is no leak
    records = {name: (folder / name).read_text(encoding="utf-8") for name in names if place and name.endswith(".json")}
    leaks = tuple(name for name, text in records.items() if place in text)
    return Upload(folder, repo, kind, private, sizes, skipped, leaks)


def _results_files(folder: Path) -> list[str]:
    sweep, reports = Results(folder).sweep(), ["report.html", "report.md"]
    if missing := [name for name in reports if not (folder / name).is_file()]:
        raise InputError(f"{folder} has no {missing[0]}; kshot report {folder} writes it")
    if PHOTOGRAPH.search((folder / "report.html").read_bytes()):
        way_out = f"kshot report {folder} writes it without"
        raise InputError(f"{folder}/report.html shows images of a data set, which are not sent; {way_out}")
    stems = sorted({TOGETHER, *map(file_stem, sweep["datasets"])})
    figures = [f"figures/{stem}.{suffix}" for stem in stems for suffix in ("png", "svg")]
    cells = sorted(f"cells/{path.name}" for path in (folder / "cells").glob("[!.]*.json"))
    return [*reports, "sweep.json", *cells, *(n for n in ("results.csv", PACKED, *figures) if (folder / n).exists())]


def _send(upload: Upload) -> Upload:
    from huggingface_hub import CommitOperationAdd, HfApi

    api, kind = HfApi(), upload.kind
    api.create_repo(upload.repo, repo_type=kind, private=upload.private, exist_ok=True)
    if upload.private and not api.repo_info(upload.repo, repo_type=kind).private:
        raise InputError(f"{upload.repo} is there and public; give --public, or the name of another repository")
    # not upload_folder, which may make several commits: a repository has all of a folder or nothing of it
    operations = [CommitOperationAdd(name, upload.folder / name) for name, _ in upload.files]
    message = "A trained model of kshot" if kind == MODEL else "Results of kshot"
    commit = api.create_commit(upload.repo, operations, commit_message=message, repo_type=kind)
    return replace(upload, url=str(commit.commit_url))


def _message(repo: str, error: Exception) -> str:
    from huggingface_hub import errors
    from huggingface_hub.utils import httpx

    match error:
        case errors.HfHubHTTPError() if error.response.status_code in (401, 403):
            status = error.response.status_code
            return f"the hub does not let this user write to {repo} ({status}); {LOG_IN} with a token that may write"
        case errors.OfflineModeIsEnabled():
            return f"nothing was sent to {repo}: HF_HUB_OFFLINE is set; unset it and try again"
        case httpx.TransportError():
            reason = one_line(first_cause(error))
            return f"the hub cannot be reached and {repo} is unchanged ({reason}); try again, or set HF_ENDPOINT"
    return f"{repo} was not written: {one_line(first_cause(error))}; the same command tries again"
