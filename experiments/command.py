"""What to type for a sweep that results describe. Knows sweep.json and the options, and runs nothing."""

import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from experiments.config import COMPARED, MODELS, OWN, load


def command(content: Mapping[str, Any]) -> str:
    """What to type for a sweep of this content (sweep.json): every setting in which it is not the demo.

    Where a folder of images lies is not recorded: its path is to be filled in.
    """
    recorded_of = {kind: content["settings"][kind] for kind in MODELS}
    models_of = {kind: tuple(value) if isinstance(value, list) else value for kind, value in recorded_of.items()}
    base = load("demo", {}, models_of).settings.model_dump()
    base.update({kind: value for kind, value in load("demo", {}, {}).settings if kind in MODELS})
    places = [name.replace("folder:", "folder:PATH/TO/", 1) for name in content["datasets"]]
    options = [("--dataset", name) for name in places] + [("--method", m) for m in content["methods"]]
    options += [(f"--{field}", ",".join(map(str, content[field]))) for field in ("shots", "seeds")]
    place = dict(zip(content["datasets"], places, strict=True))
    options += [("--most-shots", f"{place[name]}={most}") for name, most in content.get("most_shots", {}).items()]
    if (service := content.get("service", "local")) != "local":
        options.append(("--service", "ADDRESS" if service == "remote" else service))
    if (device := content.get("device", "cpu")) != "cpu":
        options.append(("--device", device))
    changed = {k: v for k, v in content["settings"].items() if k in base and v != base[k]}
    asked = changed.pop("prompt", [])
    options += [("--prompt", text) for text in ([asked] if isinstance(asked, str) else asked)]
    compared = {name: changed.pop(name) for name in COMPARED if isinstance(changed.get(name), list)}
    for name, values in compared.items():
        options += [(f"--{name.replace('_', '-')}", OWN if value is None else str(value)) for value in values]
    options += [("--set", f"{k}={v}") for k, v in changed.items()]
    facts = content.get("data", {})
    options += _access_options(facts.values())
    modified = any("-modified-" in protocol for protocol in content["protocols"].values())
    flags = " --allow-modified" if modified else ""
    return "kshot sweep " + " ".join(f"{name} {shlex.quote(value)}" for name, value in options) + flags


def _access_options(facts: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """The options by which the data sets were had; where the files lay is not recorded."""
    options: dict[str, str] = {}
    for fact in facts:
        if "protocol" in fact:
            options |= {"--source": fact["source"], "--protocol": fact["protocol"]}
        if fact.get("source") == "archive":
            options |= {"--root": "PATH/TO/THE/ORIGINAL/FILES"}
        if fact.get("protocol") == "coop":
            options |= {"--split-file": "PATH/TO/THE/SPLIT.json"}
    return list(options.items())
