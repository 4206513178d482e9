"""Who trains in `kshot bench train`: kshot's local service, plain transformers + PEFT, and TRL's SFTTrainer.

Ours is the loop of `vlm.classifier.fit` on the public client, with weights that make the objective the mean over a
batch's answer tokens, which is what the others optimise. The others load the stock checkpoint and put the case's first
adapter on it with stock PEFT. They get the encoded photographs and decode them whenever they need them, as such
programs do.

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
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from itertools import cycle
from typing import Any

import numpy as np
import tinker
import torch
from PIL import Image
from tinker import types

from experiments.bench.case import BETAS, EPS, IGNORED, RANK, SEED, USER_TURN, Case, adapter_folder, check_inputs
from experiments.bench.harness import timed
from vlm.models import source
from vlm.prompts import Prompt
from vlm.service import connect

LEARNING_RATE = 1e-3  # large enough that losses which agree after 20 steps mean something
ADAM = types.AdamParams(learning_rate=LEARNING_RATE, beta1=BETAS[0], beta2=BETAS[1], eps=EPS)
WORKERS = (0, 2)  # processes that load and prepare data for TRL: whether they help depends on the machine
OURS, PLAIN = "ours", "plain transformers + PEFT"
TRL = {workers: f"TRL, {workers} loader processes" for workers in WORKERS}
WITH_LOADERS = {name for workers, name in TRL.items() if workers}  # their memory is that of several processes


@dataclass(frozen=True)
class Outcome:
    """What a training gave. losses: the mean over the answers' tokens at each step. tower: images that had gone through
    the vision tower after each step, where that is counted. peak: bytes, the most so far: on a CPU of the process,
    libraries included; on a GPU what torch had allocated there."""

    losses: list[float]
    tower: Sequence[int] = ()
    peak: int = 0


Implementation = Callable[[Case], AbstractContextManager[Callable[[], Outcome]]]  # loads; what it gives then trains


def peers(workers: Sequence[int] = WORKERS) -> dict[str, Implementation]:
    """The other implementations by name; TRL's where it is installed, once for each number of loader processes."""
    trl = {TRL[count]: partial(_trl, count) for count in workers}
    return {PLAIN: plain, **(trl if find_spec("trl") else {})}


# Ours


@contextmanager
def ours(case: Case) -> Iterator[Callable[[], Outcome]]:
    with _client(case) as (service, client, prompt):
        sampler = service.create_sampling_client(base_model=case.model).result()  # which counts the tower's images

        def train() -> Outcome:
            losses, tower, batches = list[float](), list[int](), _batches(prompt, case, case.batches)
            data = next(batches, None)
            while data is not None:
                loss, data = _step(client, data, batches)
                losses.append(loss)
                tower.append(sampler.tower_forwards)
            return Outcome(losses, tower)

        yield train


@contextmanager
def _client(case: Case) -> Iterator[tuple[Any, Any, Prompt]]:
    """Of a service of its own, so that it has seen no image; with the case's first adapter, where it has one."""
    service: Any = connect("local", state_dir=case.state, device=case.device)
    try:
        # Without an adapter on the output head: TRL refuses one there.
        client = service.create_lora_training_client(case.model, rank=RANK, seed=SEED, train_unembed=False).result()
        if case.start:
            client.load_state(case.start).result()
        yield service, client, case.prompt(client.get_tokenizer())
    finally:
        service.close()


def with_adapter(case: Case) -> Case:
    """The case with an adapter to begin with, which a client has saved."""
    with _client(case) as (_, client, _):
        start = client.save_state("start").result().path
    return replace(case, start=start, adapter=adapter_folder(case))


def _batches(prompt: Prompt, case: Case, batches: Iterable[Sequence[int]]) -> Iterator[list[tinker.Datum]]:
    """The datums of each batch, with weights that sum to one, so that the service's sum is a mean."""
    for batch in batches:
        data = [prompt.datum(*case.photographs[number]) for number in batch]
        weights = [datum.loss_fn_inputs["weights"].to_numpy() for datum in data]
        total = np.float32(sum(float(each.sum()) for each in weights))
        for datum, each in zip(data, weights, strict=True):
            datum.loss_fn_inputs["weights"] = tinker.TensorData.from_numpy(each / total)
        yield data


def _step(
    client: Any, data: list[tinker.Datum], batches: Iterator[list[tinker.Datum]]
) -> tuple[float, list[tinker.Datum] | None]:
    """The loss of this step, and the next one's data."""
    loss = client.forward_backward(data, "cross_entropy")
    step = client.optim_step(ADAM)  # both submitted before either is awaited
    coming = next(batches, None)  # made while the service works on this one
    value = loss.result().metrics["loss:sum"]
    step.result()
    return value, coming


def step_pairs(case: Case, count: int) -> list[tuple[float, float]]:
    """Seconds of a step of `fit`, and those of them that the model computed (forward pass, loss, backward pass, AdamW),
    `count` times, after an epoch in which the tower sees every image."""
    pairs = []
    with _client(case) as (_, client, prompt):
        batches = _batches(prompt, case, cycle(case.batches))
        data = next(batches)
        for _ in range(case.epoch + count):
            with client.profile() as parts:
                step = timed(_step, client, data, batches)
            pairs.append((step.seconds, sum(parts.values())))
            data = step.value[1] or []
    return pairs[case.epoch :]


# Stock programs


@contextmanager
def plain(case: Case) -> Iterator[Callable[[], Outcome]]:
    """The loop that one writes by hand: decode, process, all logits, backward, AdamW."""
    model, processor = stock_model(case), stock_processor(case)
    check_inputs(case, case.batches[0], stock_inputs(case, processor, case.batches[0]), processor.image_token_id)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adam = torch.optim.AdamW(trained, lr=LEARNING_RATE, betas=BETAS, eps=EPS, weight_decay=0.0)

    def step(batch: Sequence[int]) -> float:
        inputs = stock_inputs(case, processor, batch)
        loss = model(**{name: tensor.to(model.device) for name, tensor in inputs.items()}).loss
        loss.backward()
        adam.step()
        adam.zero_grad()
        return loss.item()

    yield lambda: Outcome([step(batch) for batch in case.batches])


def stock_inputs(case: Case, processor: Any, batch: Sequence[int]) -> Mapping[str, Any]:
    """What the stock forward takes: padded on the right, with a label at the answers' tokens alone."""
    images = [Image.open(io.BytesIO(case.photographs[number][0])).convert("RGB") for number in batch]
    answers = [case.answer(number) for number in batch]
    texts = [USER_TURN + answer for answer in answers]
    inputs = processor(text=texts, images=images, padding=True, padding_side="right", return_tensors="pt")
    labels = torch.full_like(inputs["input_ids"], IGNORED)
    lengths = inputs["attention_mask"].sum(1).tolist()
    for row, (end, answer) in enumerate(zip(lengths, processor.tokenizer(answers)["input_ids"], strict=True)):
        labels[row, end - len(answer) : end] = torch.tensor(answer)
    return {**inputs, "labels": labels}


def stock_model(case: Case, *, merge: bool = False) -> Any:
    """The stock model with the case's adapter: ready to train, or merged into its weights. A head that is tied to the
    embeddings gets weights of its own before merging, which would change the embeddings too."""
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    stock: Any = AutoModelForImageTextToText.from_pretrained(source(case.model), dtype="auto")
    if merge:
        stock.lm_head.weight = torch.nn.Parameter(stock.lm_head.weight.detach().clone())
        stock.config.tie_word_embeddings = stock.config.text_config.tie_word_embeddings = False
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # names that transformers has renamed
        model = PeftModel.from_pretrained(stock.to(case.device), str(case.adapter), is_trainable=not merge)
        return model.merge_and_unload().eval() if merge else model.train()


def stock_processor(case: Case) -> Any:
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(source(case.model))


@contextmanager
def _trl(workers: int, case: Case) -> Iterator[Callable[[], Outcome]]:
    from transformers import PrinterCallback

    def train() -> Outcome:
        trainer.train()
        return Outcome([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])

    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # names that transformers has renamed
        trainer = _trainer(workers, case, stock_model(case), stock_processor(case))
        trainer.remove_callback(PrinterCallback)
        first = [trainer.train_dataset[number] for number in range(len(case.batches[0]))]
        check_inputs(case, case.batches[0], trainer.data_collator(first), trainer.processing_class.image_token_id)
        yield train


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
            """A benchmark is not reported."""

    return Unreported(model=model, args=config, train_dataset=_dataset(case), processing_class=processor)


def _dataset(case: Case) -> Any:
    """The views of all epochs as TRL's prompt and completion; `datasets` decodes an image when it is used."""
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageColumn

    count = len(case.photographs)
    columns = {
        "image": [{"bytes": image, "path": None} for image in case.images],
        "prompt": [USER_TURN] * count,
        "completion": [case.answer(number) for number in range(count)],
    }
    features = Features({"image": ImageColumn(), "prompt": Value("string"), "completion": Value("string")})
    photographs = Dataset.from_dict(columns, features=features)
    return photographs.select([number for batch in case.batches for number in batch])
