"""What all uses of the Hugging Face hub share: another try where a connection drops, sizes of files, what its cache
has, and its errors in plain words."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import ParamSpec, TypeVar

from kshot.errors import KshotError

P = ParamSpec("P")
R = TypeVar("R")

COMMIT = "[0-9a-f]{40}"  # a regular expression
TRIES = 3  # of a download whose connection drops in a way that huggingface_hub does not resume
TIMEOUT = 10.0  # seconds that the hub has to say how large something is
LOG_IN = "set HF_TOKEN or run `hf auth login`"


def with_retries(call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """The call's result. It is made again where the connection drops, TRIES times in all."""
    from huggingface_hub.utils import httpx

    for _ in range(TRIES - 1):
        with suppress(httpx.TransportError):
            return call(*args, **kwargs)
    return call(*args, **kwargs)


def size_of(hub_id: str, revision: str, patterns: Sequence[str], *, dataset: bool = False) -> int | None:
    """Bytes of the files with such names, of a model those at the top level; None where the hub does not tell, within
    TIMEOUT seconds. revision: "" for the newest."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import httpx

    if constants.HF_HUB_OFFLINE:
        return None
    ask = HfApi().dataset_info if dataset else HfApi().model_info
    try:
        info = ask(hub_id, revision=revision or None, files_metadata=True, timeout=TIMEOUT)
    except (HfHubHTTPError, httpx.HTTPError, OSError, ValueError):  # loading says why
        return None
    total = 0
    for file in info.siblings or ():
        top, _, name = file.rfilename.rpartition("/")
        if (dataset or not top) and any(fnmatch(name, pattern) for pattern in patterns):
            total += file.size or 0
    return total


def ask(question: Callable[..., R], hub_id: str, revision: str = "") -> R:
    """The hub's answer about a repository, within TIMEOUT seconds. Raises what the hub's client raises; offline as for
    a file that its cache lacks."""
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalEntryNotFoundError

    if constants.HF_HUB_OFFLINE:
        raise LocalEntryNotFoundError(f"HF_HUB_OFFLINE is set, and {hub_id} is not in the cache")
    return question(hub_id, revision=revision or None, timeout=TIMEOUT)


def cached_commit(hub_id: str, revision: str, patterns: Sequence[str]) -> str | None:
    """The commit of a model of which the hub's cache has all of these files, weights among them; None where it lacks
    any. revision: "" for the newest."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    snapshot = partial(snapshot_download, hub_id, revision=revision or None, local_files_only=True)
    with suppress(OSError, ValueError, CachedRepoTreeNotFoundError):
        folder = Path(snapshot(allow_patterns=list(patterns), ignore_patterns=["*/*"]))
        return folder.name if any(folder.glob("*.safetensors")) else None
    return None


def is_cached(hub_id: str, revision: str, patterns: Sequence[str]) -> bool:
    """Whether it has all of these files."""
    return cached_commit(hub_id, revision, patterns) is not None


@contextmanager
def translated(explained: Callable[[Exception], KshotError]) -> Iterator[None]:
    """Whatever a library raises inside, as the error of kshot that `explained` makes of it; kshot's own go through."""
    try:
        yield
    except KshotError:
        raise
    except Exception as error:
        raise explained(error) from error


def one_line(error: BaseException) -> str:
    """Type and text of an error, shortened, in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def first_cause(error: BaseException) -> BaseException:
    """The error that an error goes back to: it says what happened."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def unreachable_reason(error: BaseException) -> str:
    """Why the hub could not be reached, where its cache lacks what was wanted; "" for another error."""
    from huggingface_hub import constants, errors
    from huggingface_hub.utils import httpx

    if not isinstance(error, errors.LocalEntryNotFoundError | errors.CachedRepoTreeNotFoundError | httpx.HTTPError):
        return ""
    return "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else one_line(first_cause(error))


def access_problem(error: Exception, kind: str, name: str, page: str, revision: str | None) -> str | None:
    """What is wrong with a repository's name or revision, or with this user's access to it, and the way out; None for
    another error.

    kind: "model" or "set". name: OWNER/NAME, of a model also OWNER/NAME@REVISION. page: the repository's address.
    """
    from huggingface_hub import errors

    label = f"model {name}" if kind == "model" else name
    match error:
        case errors.HFValidationError():
            form = "OWNER/NAME or OWNER/NAME@REVISION" if kind == "model" else "OWNER/NAME"
            return f"{name!r} cannot be the name of a {kind} on the hub; give {form}"
        case errors.GatedRepoError():
            return f"{label} is gated; accept its terms at {page} and {LOG_IN}"
        case errors.RepositoryNotFoundError():
            return f"the hub has no {kind} {name}, or it is private; check the name, or {LOG_IN}"
        case errors.RevisionNotFoundError():
            return f"{label.partition('@')[0]} has no revision {revision!r}; those it has are at {page}/commits"
        case errors.HfHubHTTPError() if error.response.status_code in (401, 403):
            return f"the hub refuses {label} to this user ({error.response.status_code}); {LOG_IN}"
    return None
