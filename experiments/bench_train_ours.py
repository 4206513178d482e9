"""The contestant of `kshot bench train` that is ours: the local service behind the SDK's client.

The loop is that of `vlm.classifier.fit`, with weights that make the objective the mean over a batch's answer tokens,
which is what the other contestants optimise. Uses the public client alone, but for one count and `_model_alone`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import cycle
from time import perf_counter
from typing import Any

import numpy as np
import tinker
from tinker import types

from experiments.bench_train_case import BETAS, EPS, LEARNING_RATE, RANK, Case, Outcome, prompt_of
from experiments.bench_train_flops import synchronize
from vlm.prompts import Prompt
from vlm.service import connect

SEED = 0
ADAM = types.AdamParams(learning_rate=LEARNING_RATE, beta1=BETAS[0], beta2=BETAS[1], eps=EPS)
Data = list[tinker.Datum]  # of one batch


@contextmanager
def ours(case: Case) -> Iterator[Callable[[], Outcome]]:
    with _client(case) as (client, prompt):
        yield lambda: _train(client, prompt, case)


@contextmanager
def _client(case: Case) -> Iterator[tuple[Any, Prompt]]:
    """Of a service of its own, so that no image is known to it; loaded, with the case's first adapter."""
    service: Any = connect("local", state_dir=case.state, device=case.device)
    try:
        client = new_client(service, case)
        if case.start:
            client.load_state(case.start).result()
        yield client, prompt_of(case, client.get_tokenizer())
    finally:
        service.close()


def new_client(service: Any, case: Case) -> Any:
    """A run without an adapter on the output head: TRL refuses one there."""
    return service.create_lora_training_client(case.model, rank=RANK, seed=SEED, train_unembed=False).result()


def _train(client: Any, prompt: Prompt, case: Case) -> Outcome:
    losses, tower = list[float](), list[int]()
    made = (mean_of(data) for data in _made(prompt, case, case.batches))
    data = next(made, None)
    while data is not None:
        loss, data = _step(client, data, made)
        losses.append(loss)
        tower.append(_tower_images(client))
    return Outcome(losses, tower)


def _made(prompt: Prompt, case: Case, batches: Iterable[Sequence[int]]) -> Iterator[Data]:
    return ([prompt.datum(*case.photographs[number]) for number in batch] for batch in batches)


def _step(client: Any, data: Data, made: Iterator[Data]) -> tuple[float, Data | None]:
    """The loss of this step, and the next one's data."""
    loss = client.forward_backward(data, "cross_entropy")
    step = client.optim_step(ADAM)  # both submitted before either is awaited
    coming = next(made, None)  # made while the service works on this one
    value = loss.result().metrics["loss:sum"]
    step.result()
    return value, coming


def step_pairs(case: Case, count: int) -> list[tuple[float, float]]:
    """Seconds of a step of `fit`, and of the model alone on the same data on the same thread, `count` times.

    An epoch before them makes every image known. Who begins is drawn: the second finds the data in the caches.
    """
    pairs, first = [], np.random.default_rng(SEED).random(case.epoch + count) < 0.5
    with _client(case) as (client, prompt):
        made = _made(prompt, case, cycle(case.batches))
        data = next(made)
        for number in range(case.epoch + count):
            alone = partial(client._submit, _model_alone, client, data, case.device)
            before = alone().result() if first[number] else None
            start = perf_counter()
            _, coming = _step(client, data, made)
            spent = perf_counter() - start
            pairs.append((spent, before or alone().result()))
            data = coming or []
    return pairs[case.epoch :]


def _model_alone(client: Any, data: Data, device: str) -> float:
    """Seconds of the arithmetic of a step, on tensors that are ready: forward pass, loss, backward pass, AdamW.

    Follows `Engine.forward_backward` and knows its parts.
    """
    from vlm.local.engine import _Item
    from vlm.local.losses import loss

    engine, run, chosen = client._engine, client._run, loss("cross_entropy", None)
    items = [_Item.of(number, datum, chosen, everything=False) for number, datum in enumerate(data)]
    packs = [(pack, batch, pack.fields(engine.model.device)) for pack, batch in engine._batches(items, run.factors)]
    synchronize(device)
    start = perf_counter()
    for pack, batch, fields in packs:
        run.add(chosen(engine._log_probs(run.factors, pack, batch), fields).backward)
    run.step(ADAM)
    synchronize(device)
    return perf_counter() - start


def mean_of(data: Data) -> Data:
    """The same datums with weights that sum to one, so that the service's sum is a mean."""
    weights = [datum.loss_fn_inputs["weights"].to_numpy() for datum in data]
    total = np.float32(sum(float(each.sum()) for each in weights))
    return [
        tinker.Datum(
            model_input=datum.model_input,
            loss_fn_inputs={**datum.loss_fn_inputs, "weights": tinker.TensorData.from_numpy(each / total)},
        )
        for datum, each in zip(data, weights, strict=True)
    ]


def _tower_images(client: Any) -> int:
    """Images that went through the vision tower of the client's engine: no public number says it."""
    return client._engine.vision.forwards
