"""The training API behind one face, for tests that hold on every service: the engine in this process, and the SDK's
client of a server.

What differs between the two is here and nowhere else: where checkpoints lie, and which exceptions name a mistake.
"""

import copy
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinker
import torch
from peft import PeftModel
from tinker import types

import vlm
from kshot.checks import folder_of
from kshot.errors import InputError
from tests.vlm.helpers import stock_inputs
from tests.vlm.serving import KEY, served
from vlm import nano
from vlm.inputs import ImageRule
from vlm.local.registry import LocalServiceClient

REFUSED = (tinker.RequestFailedError, tinker.APIStatusError)
MISTAKES: dict[str, Any] = {"local": InputError, "ranks": InputError, "http": REFUSED}
IN_PROCESS = {"local": {}, "ranks": {"device": "cpu:2", "shard": "divided"}}  # options of the service
PATIENCE = 120.0  # seconds after which a request that never ends has failed


@dataclass(frozen=True)
class Service:
    """A service and the folder in which it keeps checkpoints. client: the one under test, by the SDK's methods."""

    kind: str
    client: Any
    state: Path

    def start(self, rank: int = 4, seed: int = 7, **options: Any) -> Any:
        """A new run on the nano model."""
        return self.client.create_lora_training_client(nano.NAME, rank=rank, seed=seed, **options).result(PATIENCE)

    def base(self) -> Any:
        """A sampling client on the nano model as it is."""
        return self.client.create_sampling_client(base_model=nano.NAME).result(PATIENCE)

    def refuses(self, named: str) -> AbstractContextManager[Any]:
        """Within: a mistake of the client's, and an error that says so."""
        return pytest.raises(MISTAKES[self.kind], match=named)

    def folder(self, path: str) -> Path:
        """Where a checkpoint lies."""
        return folder_of(self.state, path)


@contextmanager
def connected(address: str, *, bereaved: bool = False) -> Iterator[Any]:
    """The unmodified SDK on a server, its session finished at the end, unless there is no server by then (bereaved)."""
    client: Any = vlm.connect(address)
    try:
        yield client
    finally:
        if bereaved:
            client.holder.close()
        else:
            client.close("success").result(PATIENCE)


def rest_of(address: str) -> tinker.RestClient:
    """The SDK's client of a server's lists."""
    return tinker.RestClient(base_url=address, api_key=KEY)


def saved_on(address: str) -> list[str]:
    """The paths of all checkpoints of a server, sorted."""
    rows = rest_of(address).list_user_checkpoints(1000).result(PATIENCE).checkpoints
    return sorted(row.tinker_path for row in rows)


@contextmanager
def opened(kind: str, folder: Path) -> Iterator[Service]:
    """A service of this kind, which keeps its state in `folder`."""
    if kind in IN_PROCESS:
        client = LocalServiceClient(folder, **IN_PROCESS[kind])
        yield Service(kind, client, folder)
        client.close()
        return
    with served(folder) as server, connected(server.address) as remote:
        yield Service(kind, remote, folder)


def peft(stock: Any, folder: Path) -> Any:
    """A stock model under stock PEFT with the adapter in a checkpoint's folder, its numbers ready to be trained."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(copy.deepcopy(stock), folder, is_trainable=True).eval()


def stock_log_probs(model: Any, question: tinker.ModelInput, rule: ImageRule) -> torch.Tensor:
    """(positions, vocabulary) log-probabilities of what follows each position, by a model of transformers alone."""
    inputs = stock_inputs(question, rule)
    for part in model.modules():
        if hasattr(part, "rope_deltas"):
            part.rope_deltas = None  # of the call before
    with torch.no_grad():
        log_probs: torch.Tensor = model(**inputs).logits[0].float().log_softmax(-1)
    return log_probs


def target_log_probs(model: Any, datum: tinker.Datum, rule: ImageRule) -> np.ndarray:
    """(positions,) of a datum's targets, by a model of transformers alone."""
    targets = datum.loss_fn_inputs["target_tokens"].to_torch()
    return stock_log_probs(model, datum.model_input, rule).gather(1, targets[:, None])[:, 0].numpy()


def log_probs(run: Any, data: list[tinker.Datum]) -> list[np.ndarray]:
    """(positions,) of each datum's targets, by a run as it is."""
    outputs = run.forward(data, "cross_entropy").result(PATIENCE).loss_fn_outputs
    return [output["logprobs"].to_numpy() for output in outputs]


def step(run: Any, data: list[tinker.Datum], adam: types.AdamParams) -> float:
    """A whole step; its loss. Both requests are made before either is waited for."""
    loss, stepped = run.forward_backward(data, "cross_entropy"), run.optim_step(adam)
    stepped.result(PATIENCE)
    value: float = loss.result(PATIENCE).metrics["loss:sum"]
    return value


def close(one: list[np.ndarray], other: list[np.ndarray], abs: float = 1e-6) -> bool:
    return all(np.allclose(a, b, rtol=0, atol=abs) for a, b in zip(one, other, strict=True))
