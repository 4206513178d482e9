"""Names of models that are neither a folder nor a hub id, and where a name's files are. Loads no model."""

from pathlib import Path

from kshot_errors import UnknownNameError
from vlm import nano

MODELS = {nano.NAME: nano.folder}


def check(name: str) -> None:
    """Raise UnknownNameError for what can be no model: neither one of ours, nor a folder, nor like a hub id."""
    folder = Path(name)
    hub_id = name.count("/") == 1 and not name.startswith((".", "/", "~")) and " " not in name
    ours = name.startswith("kshot/")
    if name in MODELS or (folder / "config.json").is_file() or (hub_id and not ours and not folder.exists()):
        return
    others = "a folder with config.json", "a hub id such as Qwen/Qwen3-VL-2B-Instruct"
    raise UnknownNameError("model", name, [*MODELS, *others])


def source(name: str) -> str:
    """What transformers' from_pretrained takes for this name. Raises UnknownNameError as `check` does."""
    check(name)
    return str(MODELS[name]()) if name in MODELS else name
