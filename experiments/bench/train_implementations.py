"""The contestant of `kshot bench train` that is ours: the local service behind the SDK's client.

The loop is that of `vlm.classifier.fit`, with weights that make the objective the mean over a batch's answer tokens,
which is what the other contestants optimise. Uses the public client alone, but for one count and `_model_alone`.

TODO The contestants of `kshot bench train` that are not ours: plain transformers + PEFT, and TRL's SFTTrainer.

Both load the stock checkpoint and put the case's first adapter on it with stock PEFT. They get the encoded photographs
and decode them whenever they need them, as such programs do. Nothing of the engine is known here.

TRL's settings are the best that 1.16 has for this work: no gradient checkpointing (its default recomputes every
layer), the checkpoint's own type instead of autocast on a CPU, its fused loss (always on since 1.16), fused AdamW (the
default: adamw_torch takes four times as long, a millisecond a step of nano on two cores), no truncation, no saving, no
printing, a log entry a step. It has no packing and no padding-free batches for images, and refuses an adapter on the
output head. torch.compile is not used: every batch has another length, and compiling takes longer than the training
measured here.
"""

import io
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import cycle
from time import perf_counter
from typing import Any

import numpy as np
import tinker
import torch
from PIL import Image
from tinker import types

from experiments.bench.flops import synchronize
from experiments.bench.train_case import (
    ASKED,
    BETAS,
    EPS,
    IGNORED,
    LEARNING_RATE,
    RANK,
    Case,
    Contestant,
    Outcome,
    prompt_of,
)
from experiments.bench.train_case import check_inputs as check
from vlm.models import source
from vlm.prompts import Prompt
from vlm.service import connect

# ---- The contestant of `kshot bench train` that is ours: the local service behind the SDK's client.

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


# ---- The contestants of `kshot bench train` that are not ours: plain transformers + PEFT, and TRL's SFTTrainer.

WORKERS = (0, 2)  # processes that load and prepare data for TRL: whether they help depends on the machine
TRL = {workers: f"TRL, {workers} loader processes" for workers in WORKERS}
PLAIN = "plain transformers + PEFT"
WITH_LOADERS = {name for workers, name in TRL.items() if workers}  # their memory is that of several processes


def peers(workers: Sequence[int] = WORKERS) -> dict[str, Contestant]:
    """The contestants by name; TRL's where it is installed, once for each number of loader processes."""
    from importlib.util import find_spec

    trl = {TRL[count]: partial(_trl, count) for count in workers}
    return {PLAIN: plain, **(trl if find_spec("trl") else {})}


@contextmanager
def plain(case: Case) -> Iterator[Callable[[], Outcome]]:
    """The loop that one writes by hand: decode, process, all logits, backward, AdamW."""
    model, processor = _start(case), _processor(case)
    check(case, case.batches[0], _inputs(case, processor, case.batches[0]), processor.image_token_id)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adam = torch.optim.AdamW(trained, lr=LEARNING_RATE, betas=BETAS, eps=EPS, weight_decay=0.0)
    yield lambda: Outcome([_stock_step(model, adam, _inputs(case, processor, batch)) for batch in case.batches])


def _stock_step(model: Any, adam: torch.optim.Optimizer, inputs: Mapping[str, Any]) -> float:
    loss = model(**{name: tensor.to(model.device) for name, tensor in inputs.items()}).loss
    loss.backward()
    adam.step()
    adam.zero_grad()
    return loss.item()


def _inputs(case: Case, processor: Any, batch: Sequence[int]) -> Mapping[str, Any]:
    """What the stock forward takes: padded on the right, with a label at the answers' tokens alone."""
    images = [Image.open(io.BytesIO(case.photographs[number][0])).convert("RGB") for number in batch]
    answers = [case.answer(number) for number in batch]
    texts = [ASKED + answer for answer in answers]
    inputs = processor(text=texts, images=images, padding=True, padding_side="right", return_tensors="pt")
    labels = torch.full_like(inputs["input_ids"], IGNORED)
    lengths = inputs["attention_mask"].sum(1).tolist()
    for row, (end, answer) in enumerate(zip(lengths, processor.tokenizer(answers)["input_ids"], strict=True)):
        labels[row, end - len(answer) : end] = torch.tensor(answer)
    return {**inputs, "labels": labels}


@contextmanager
def _trl(workers: int, case: Case) -> Iterator[Callable[[], Outcome]]:
    from transformers import PrinterCallback

    with _known_warnings():
        trainer = _trainer(workers, case, _start(case), _processor(case))
        trainer.remove_callback(PrinterCallback)
        first = [trainer.train_dataset[number] for number in range(len(case.batches[0]))]
        check(case, case.batches[0], trainer.data_collator(first), trainer.processing_class.image_token_id)
        yield lambda: _fit(trainer)


def _fit(trainer: Any) -> Outcome:
    trainer.train()
    return Outcome([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


def _trainer(workers: int, case: Case, model: Any, processor: Any) -> Any:
    from trl import SFTConfig, SFTTrainer

    config = SFTConfig(
        output_dir=str(case.state / "trl"),
        use_cpu=case.device == "cpu",
        bf16=model.dtype == torch.bfloat16,
        gradient_checkpointing=False,
        per_device_train_batch_size=len(case.batches[0]),
        num_train_epochs=1,  # all epochs stand in the data set one after another
        train_sampling_strategy="sequential",
        max_length=None,
        dataloader_num_workers=workers,
        dataloader_pin_memory=case.device != "cpu",
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        adam_epsilon=EPS,
        weight_decay=0.0,
        max_grad_norm=0.0,  # no clipping
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )

    class Unreported(SFTTrainer):
        def _send_telemetry(self) -> None:
            """Nobody is told that a benchmark ran."""

    return Unreported(model=model, args=config, train_dataset=_dataset(case), processing_class=processor)


def _dataset(case: Case) -> Any:
    """The views of all epochs as TRL's prompt and completion; `datasets` decodes an image when it is asked for."""
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageColumn

    count = len(case.photographs)
    columns = {
        "image": [{"bytes": image, "path": None} for image, _ in case.photographs],
        "prompt": [ASKED] * count,
        "completion": [case.answer(number) for number in range(count)],
    }
    features = Features({"image": ImageColumn(), "prompt": Value("string"), "completion": Value("string")})
    photographs = Dataset.from_dict(columns, features=features)
    return photographs.select([number for batch in case.batches for number in batch])


def _start(case: Case) -> Any:
    """The stock model with the case's first adapter, ready to train."""
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    stock: Any = AutoModelForImageTextToText.from_pretrained(source(case.model), dtype="auto")
    with _known_warnings():
        return PeftModel.from_pretrained(stock.to(case.device), str(case.adapter), is_trainable=True).train()


def _processor(case: Case) -> Any:
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(source(case.model))


@contextmanager
def _known_warnings() -> Iterator[None]:
    """PEFT and TRL use names that transformers has renamed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)
        yield
