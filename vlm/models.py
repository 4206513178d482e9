"""Names of models, and the folder that has a name's files.

A name is one of ours, a short one, a folder, or a hub id (ID or ID@REVISION). The hub's files are fetched once,
into its own cache (HF_HOME), which alone answers where there is no network. Only files that hold no code are fetched.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

from kshot import hub
from kshot.errors import ModelError, UnknownNameError
from vlm import nano, smollm2

MODELS = {nano.NAME: nano.folder, smollm2.NAME: smollm2.folder}
# What Qwen3-VL comes in, smallest first: short names of its instruction-tuned models. ./8B is a folder of that name.
SIZES = {size: f"Qwen/Qwen3-VL-{size}-Instruct" for size in ("2B", "4B", "8B", "30B-A3B", "235B-A22B")}
# Qwen3.5 and 3.6, tuned to follow instructions, by their names without the publisher's.
QWEN35 = ("0.8B", "2B", "4B", "9B", "27B", "35B-A3B", "122B-A10B", "397B-A17B")
NEWER = [*(f"Qwen3.5-{size}" for size in QWEN35), "Qwen3.6-27B", "Qwen3.6-35B-A3B"]
SHORT = {**SIZES, **{name: f"Qwen/{name}" for name in NEWER}}  # short name → hub id
SMALL = ("*.json", "*.jinja", "*.txt")  # configuration, processor, tokenizer, and the list of the weight files
WEIGHTS = ("*.safetensors",)  # never pickles
FILES = (*SMALL, *WEIGHTS)
GGUF = "kshot reads safetensors in hub layout alone: give the model that the file was made from"
COMMIT = re.compile(f"@{hub.COMMIT}$")


def full_name(name: str) -> str:
    """What a short name stands for; any other name as it is."""
    return SHORT.get(name, name)


def check(name: str) -> None:
    """Raise UnknownNameError for what can be no model: neither one of ours, nor a folder, nor like a hub id; ModelError
    for a GGUF file."""
    name = full_name(name)
    if Path(name).suffix == ".gguf" or (any(Path(name).glob("*.gguf")) and not _is_folder(name)):
        raise ModelError(f"model {name} is a GGUF file, or a folder of one; {GGUF}")
    odd = name.startswith((".", "/", "~", "kshot/")) or " " in name or name.partition("@")[0].count("/") != 1
    if name in MODELS or _is_folder(name) or not (odd or Path(name).exists()):
        return
    others = "a folder with config.json", "a hub id such as Qwen/Qwen3-VL-2B-Instruct"
    missing = "there is no such folder" if name.startswith((".", "/", "~")) else ""
    hint = "this folder has no config.json" if Path(name).is_dir() else missing
    raise UnknownNameError("model", name, [*MODELS, *SHORT, *others], hint)


def source(name: str) -> str:
    """The folder with a model's configuration, tokenizer and processor; of a hub id these are fetched first.

    Raises UnknownNameError as `check` does, and ModelError where the hub or its cache does not have them.
    """
    check(name)
    folder = _here(full_name(name)) or _fetch_small(full_name(name))
    for path in Path(folder).iterdir():
        if path.exists() and not (path.is_dir() or path.is_file()):  # its reader would wait for ever
            raise ModelError(f"model {name} has a {path.name} that is not a regular file; remove it")
    return folder


def weights(name: str) -> str:
    """The same folder, of the same commit, once the weights are in it too. Raises as `source` does."""
    name = full_name(name)
    folder = source(name)
    if not _here(name):
        with hub.translated(partial(hub_error, name)):
            _fetch_weights(name.partition("@")[0], Path(folder).name)
    return folder


def check_weights(name: str) -> None:
    """Raise ModelError where the weights of a model are neither here nor on the hub, which is asked for no more than
    their names; UnknownNameError as `check` does."""
    if known(name) is not None:
        return
    from huggingface_hub import HfApi

    hub_id, _, revision = full_name(name).partition("@")
    with hub.translated(partial(hub_error, full_name(name))):
        hub.ask(HfApi().model_info, hub_id, revision)


def known(name: str) -> str | None:
    """A name of the model as it is on this machine: its own, or of a hub id ID@COMMIT of what the hub's cache has
    whole. None for a hub id that would have to be fetched. Raises UnknownNameError as `check` does."""
    check(name)
    if is_here(name):
        return full_name(name)
    hub_id, _, revision = full_name(name).partition("@")
    with _quiet():
        commit = hub.cached_commit(hub_id, revision, FILES)
    return f"{hub_id}@{commit}" if commit else None


def pinned(name: str) -> str:
    """A hub's model by the commit that its name stands for now, ID@COMMIT; any other name as it is. Raises as `source`
    does, but not for a name with a commit, for which the hub is not asked."""
    if is_here(name) or COMMIT.search(full_name(name)):
        return full_name(name)
    return f"{full_name(name).partition('@')[0]}@{Path(source(name)).name}"


def loadable(name: str) -> str:
    """What `from_pretrained` of transformers takes for this model: a folder, or the hub's id."""
    here = _here(full_name(name))
    return str(Path(here).resolve()) if here else full_name(name).partition("@")[0]


def _here(name: str) -> str | None:
    """The folder of one of our models, or the folder that a name is."""
    if name in MODELS:
        return str(MODELS[name]())
    return name if _is_folder(name) else None


def is_here(name: str) -> bool:
    """Whether a model comes with kshot or is a folder: nothing of it is fetched."""
    return name in MODELS or _is_folder(full_name(name))


def _is_folder(name: str) -> bool:
    return (Path(name) / "config.json").is_file()


@cache  # one commit for as long as the process runs, and one request
def _fetch_small(name: str) -> str:
    hub_id, _, revision = name.partition("@")
    with hub.translated(partial(hub_error, name)), _quiet():
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
            _snapshot(hub_id, commit, FILES, offline=True)
    except LocalEntryNotFoundError:
        if constants.HF_HUB_OFFLINE:
            raise
        _snapshot(hub_id, commit, FILES)


def _snapshot(hub_id: str, revision: str | None, patterns: Sequence[str], offline: bool = False) -> str:
    """The folder of the hub's cache, called after the commit, with the files of these patterns at its top level."""
    from huggingface_hub import snapshot_download

    return hub.with_retries(
        snapshot_download,
        hub_id,
        revision=revision,
        allow_patterns=list(patterns),
        ignore_patterns=["*/*"],
        local_files_only=offline,
    )


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


def hub_error(name: str, error: Exception) -> ModelError:
    """What went wrong with a model's files on the hub or in its cache, and the way out."""
    hub_id, _, revision = name.partition("@")
    if problem := hub.access_problem(error, "model", name, f"https://huggingface.co/{hub_id}", revision):
        return ModelError(problem)
    if reason := hub.unreachable_reason(error):
        way_out = "go online and try again, set HF_ENDPOINT to a mirror, or"
        problem = f"the hub cannot be reached ({reason}) and its cache lacks files of model {name}"
        return ModelError(f"{problem}; {way_out} give a folder")
    problem = hub.one_line(error)
    if isinstance(error, OSError) and error.errno is not None:
        return ModelError(f"model {name} cannot be stored: {problem}; HF_HOME names the folder of the hub's cache")
    return ModelError(f"model {name} cannot be fetched from the hub ({problem}); give another one, or a folder")
