"""Names of models, and the folder that has a name's files.

A name is one of ours, a size of Qwen3-VL, a folder, or a hub id (ID or ID@REVISION). The hub's files are fetched once,
into its own cache (HF_HOME), which alone answers where there is no network. Only files that hold no code are fetched.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from kshot.errors import KshotError, ModelError, UnknownNameError
from vlm import nano

MODELS = {nano.NAME: nano.folder}
# What Qwen3-VL comes in, smallest first: short names of its instruction-tuned models. ./8B is a folder of that name.
SIZES = {size: f"Qwen/Qwen3-VL-{size}-Instruct" for size in ("2B", "4B", "8B", "30B-A3B", "235B-A22B")}
SMALL = ("*.json", "*.jinja", "*.txt")  # configuration, processor, tokenizer, and the list of the weight files
WEIGHTS = ("*.safetensors",)  # never pickles
TRIES = 3  # of a download whose connection drops in a way that huggingface_hub does not resume


def full_name(name: str) -> str:
    """What a short name stands for; any other name as it is."""
    return SIZES.get(name, name)


def check(name: str) -> None:
    """Raise UnknownNameError for what can be no model: neither one of ours, nor a folder, nor like a hub id."""
    name = full_name(name)
    folder, (hub_id, *_) = Path(name), name.split("@")
    on_hub = hub_id.count("/") == 1 and not name.startswith((".", "/", "~")) and " " not in name
    ours = name.startswith("kshot/")
    if name in MODELS or (folder / "config.json").is_file() or (on_hub and not ours and not folder.exists()):
        return
    others = "a folder with config.json", "a hub id such as Qwen/Qwen3-VL-2B-Instruct"
    raise UnknownNameError("model", name, [*MODELS, *SIZES, *others])


def source(name: str) -> str:
    """The folder with a model's configuration, tokenizer and processor; of a hub id these are fetched first.

    Raises UnknownNameError as `check` does, and ModelError where the hub or its cache does not have them.
    """
    check(name)
    name = full_name(name)
    if name in MODELS:
        return str(MODELS[name]())
    return name if _is_folder(name) else _fetch_small(name)


def weights(name: str) -> str:
    """The same folder, of the same commit, once the weights are in it too. Raises as `source` does."""
    name = full_name(name)
    folder = source(name)
    if name not in MODELS and not _is_folder(name):
        with _errors_of(name):
            _fetch_weights(name.partition("@")[0], Path(folder).name)
    return folder


def loadable(name: str) -> str:
    """What `from_pretrained` of transformers takes for this model: a folder, or the hub's id."""
    name = full_name(name)
    if name in MODELS:
        return str(MODELS[name]())
    return str(Path(name).resolve()) if _is_folder(name) else name.partition("@")[0]


def _is_folder(name: str) -> bool:
    return (Path(name) / "config.json").is_file()


@cache  # one commit for as long as the process runs, and one request
def _fetch_small(name: str) -> str:
    hub_id, _, revision = name.partition("@")
    with _errors_of(name), _quiet():
        folder = _snapshot(hub_id, revision or None, SMALL)
    if not _is_folder(folder):
        raise ModelError(f"{name} has no config.json on the hub; give a model that has one, as Qwen3-VL's do")
    return folder


def _fetch_weights(hub_id: str, commit: str) -> None:
    """Progress is shown, by the hub's own bars, where there is something to fetch."""
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        with _quiet():
            _snapshot(hub_id, commit, (*SMALL, *WEIGHTS), offline=True)
    except LocalEntryNotFoundError:
        if constants.HF_HUB_OFFLINE:
            raise
        _snapshot(hub_id, commit, (*SMALL, *WEIGHTS))


def _snapshot(hub_id: str, revision: str | None, patterns: Sequence[str], offline: bool = False) -> str:
    """The folder of the hub's cache, called after the commit, with the files of these patterns at its top level."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import httpx

    for tries_left in reversed(range(TRIES)):
        try:
            return snapshot_download(
                hub_id,
                revision=revision,
                allow_patterns=list(patterns),
                ignore_patterns=["*/*"],
                local_files_only=offline,
            )
        except httpx.TransportError:
            if not tries_left:
                raise
    raise AssertionError("unreachable")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the hub's progress bars and warnings."""
    from huggingface_hub.utils import disable_progress_bars, logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with disable_progress_bars():
            yield
    finally:
        logging.set_verbosity(verbosity)


@contextmanager
def _errors_of(name: str) -> Iterator[None]:
    """What goes wrong with a hub id, in one line of ours."""
    try:
        yield
    except KshotError:
        raise
    except Exception as error:
        raise ModelError(_plain(name, error)) from error


def _plain(name: str, error: Exception) -> str:
    from huggingface_hub import errors
    from huggingface_hub.utils import httpx

    hub_id, _, revision = name.partition("@")
    page, log_in = f"https://huggingface.co/{hub_id}", "set HF_TOKEN or run `hf auth login`"
    match error:
        case errors.HFValidationError():
            return f"{name!r} cannot be the name of a model on the hub; give OWNER/NAME or OWNER/NAME@REVISION"
        case errors.GatedRepoError():
            return f"model {name} is gated; accept its terms at {page} and {log_in}"
        case errors.RepositoryNotFoundError():
            return f"the hub has no model {name}, or it is private; check the name, or {log_in}"
        case errors.RevisionNotFoundError():
            return f"model {hub_id} has no revision {revision!r}; those it has are at {page}/commits"
        case errors.HfHubHTTPError() if error.response.status_code in (401, 403):
            return f"the hub refuses model {name} to this user ({error.response.status_code}); {log_in}"
        case errors.LocalEntryNotFoundError() | httpx.HTTPError():
            way_out = "go online and try again, set HF_ENDPOINT to a mirror, or give a folder"
            return f"the hub cannot be reached ({_reason(error)}) and its cache lacks files of model {name}; {way_out}"
        case OSError(errno=int()):
            return f"model {name} cannot be stored: {_line(error)}; HF_HOME names the folder of the hub's cache"
    return f"model {name} cannot be fetched from the hub ({_line(error)}); give another one, or a folder"


def _reason(error: BaseException) -> str:
    """What kept the hub away: the first cause."""
    from huggingface_hub import constants

    while error.__cause__ is not None:
        error = error.__cause__
    return "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else _line(error)


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
