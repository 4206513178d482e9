"""The head's clients have every method that the training API's Protocols name, with their parameters."""

import inspect
from typing import Any

import pytest

from baselines.training import LoraHeadClient, LoraHeadSampler
from vlm.service import SamplingClient, TrainingClient

PAIRS = ((TrainingClient, LoraHeadClient), (SamplingClient, LoraHeadSampler))
METHODS = [
    (protocol, name, client)
    for protocol, client in PAIRS
    for name, method in vars(protocol).items()
    if inspect.isfunction(method) and not name.startswith("_")
]


def test_the_protocols_name_methods() -> None:
    assert {name for _, name, _ in METHODS} >= {"forward_backward", "optim_step", "sample", "save_state", "load_state"}


@pytest.mark.parametrize(("protocol", "name", "client"), METHODS)
def test_every_method_takes_what_the_protocol_says(protocol: Any, name: str, client: Any) -> None:
    wanted, own = (list(inspect.signature(getattr(of, name)).parameters.values()) for of in (protocol, client))
    names_kinds_defaults = [[(p.name, p.kind, p.default) for p in each] for each in (wanted, own)]
    assert names_kinds_defaults[1][: len(wanted)] == names_kinds_defaults[0]
    assert all(p.default is not p.empty for p in own[len(wanted) :])
