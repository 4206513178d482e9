"""Who trains in `kshot bench train`: kshot's local service, plain transformers + PEFT, and TRL's SFTTrainer.

Ours is the loop of `vlm.classifier.fit` on the public client, with weights that make the objective the mean over a
batch's answer tokens, which is what the others optimise. The others load the stock checkpoint and put the case's first
adapter on it with stock PEFT. They get the encoded photographs and decode them whenever they need them, as such
programs do.

TRL's settings are the best that 1.16 has for this work: no gradient checkpointing (its default recomputes every
layer), the checkpoint's own type instead of autocast on a CPU, its fused loss (always on since 1.16), fused AdamW (the
default: adamw_torch takes four times as long). It has no packing and no padding-free batches for images. torch.compile
is not used: every batch has another length, and compiling takes longer than the training measured here.
"""

import io
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import tinker
import torch
from PIL import Image

from experiments.bench.case import BETAS, EPS, IGNORED, RANK, SEED, USER_TURN, Case, adam, check_inputs
from experiments.bench.harness import timed
from kshot.images import FORMATS
from vlm.classifier import steps
from vlm.models import source
from vlm.prompts import Prompt
from vlm.service import connect

LEARNING_RATE = 1e-3  # large enough that losses which agree after 20 steps mean something
ADAM = adam(LEARNING_RATE)
OURS, PLAIN = "ours", "plain transformers + PEFT"
TRL = {f"TRL, {workers} loader processes": workers for workers in (0, 2)}  # if they help depends on the machine


@dataclass(frozen=True)
class Outcome:
    """What a training gave. losses: the mean over the answers' tokens at each step. tower: images that had gone through
    the vision tower after each step, where that is counted. peak: bytes of memory, the most so far. processor: seconds
    of all threads of the process."""

    losses: list[float]
    tower: Sequence[int] = ()
    peak: int = 0
    processor: float = 0.0


Implementation = Callable[[Any], AbstractContextManager[Callable[[], Outcome]]]  # loads; what it gives then trains


def implementations(quick: bool) -> dict[str, Implementation]:
    """By name; TRL's where it is installed. quick: without loaders, whose start is much of a short training."""
    trl = {name: partial(_trl, count) for name, count in TRL.items() if not (quick and count)}
    return {OURS: ours, PLAIN: plain, **(trl if find_spec("trl") else {})}


# Ours


@contextmanager
def ours(case: Case) -> Iterator[Callable[[], Outcome]]:
    with _client(case) as (client, prompt):

        def train() -> Outcome:
            done = steps(client, _batches(prompt, case, case.batches), "cross_entropy", ADAM)
            measured = [(loss.metrics["loss:sum"], client.tower_forwards) for loss, _ in done]
            return Outcome([loss for loss, _ in measured], [images for _, images in measured])

        yield train


@contextmanager
def _client(case: Case) -> Iterator[tuple[Any, Prompt]]:
    """Of a service of its own, so that it has seen no image; with the case's first adapter, where it has one."""
    service: Any = connect("local", state_dir=case.state, device=case.device)
    try:
        # Without an adapter on the output head: TRL refuses one there.
        client = service.create_lora_training_client(case.model, rank=RANK, seed=SEED, train_unembed=False).result()
        if case.start:
            client.load_state(case.start).result()
        yield client, case.prompt()
    finally:
        service.close()


def with_adapter(case: Case) -> Case:
    """The case with an adapter to begin with, which a client has saved."""
    with _client(case) as (client, _):
        return replace(case, start=client.save_state("start").result().path)


def _batches(prompt: Prompt, case: Case, batches: Iterable[Sequence[int]]) -> Iterator[list[tinker.Datum]]:
    """The datums of each batch, with weights that sum to one, so that the service's sum is a mean."""
    for batch in batches:
        data = [prompt.datum(*case.photographs[number]) for number in batch]
        weights = [datum.loss_fn_inputs["weights"].to_numpy() for datum in data]
        total = np.float32(sum(float(each.sum()) for each in weights))
        for datum, each in zip(data, weights, strict=True):
            datum.loss_fn_inputs["weights"] = tinker.TensorData.from_numpy(each / total)
        yield data


def step_pairs(case: Case, count: int) -> list[tuple[float, float]]:
    """Seconds of a step of `fit`, and those of them that the model computed (forward pass, loss, backward pass, AdamW),
    `count` times, after an epoch in which the tower sees every image."""
    pairs = []
    with _client(case) as (client, prompt):
        done = steps(client, _batches(prompt, case, cycle(case.batches)), "cross_entropy", ADAM)
        for _ in range(case.epoch + count):
            with client.profile() as parts:
                step = timed(next, done)
            pairs.append((step.seconds, sum(parts.values())))
    return pairs[case.epoch :]


# Stock programs


@contextmanager
def plain(case: Case) -> Iterator[Callable[[], Outcome]]:
    """The loop that one writes by hand: decode, process, all logits, backward, AdamW."""
    model, processor = stock_program(case)
    check_inputs(case, stock_inputs(case, processor, case.batches[0]), processor.image_token_id)
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


def stock_inputs(case: Case, processor: Any, batch: Sequence[int]) -> dict[str, Any]:
    """What the stock forward takes: padded on the right, with a label at the answers' tokens alone."""
    answers = [case.answer(number) for number in batch]
    inputs = processed(processor, [case.photographs[number][0] for number in batch], answers, "right")
    labels = torch.full_like(inputs["input_ids"], IGNORED)
    lengths = inputs["attention_mask"].sum(1).tolist()
    for row, (end, answer) in enumerate(zip(lengths, processor.tokenizer(answers)["input_ids"], strict=True)):
        labels[row, end - len(answer) : end] = torch.tensor(answer)
    return {**inputs, "labels": labels}


def processed(processor: Any, images: Sequence[bytes], answers: Sequence[str], padding_side: str) -> Any:
    """What the stock processor makes of the user's turn about each image and the answer, or its beginning."""
    opened = [Image.open(io.BytesIO(image), formats=FORMATS).convert("RGB") for image in images]
    texts = [USER_TURN + answer for answer in answers]
    return processor(text=texts, images=opened, padding=True, padding_side=padding_side, return_tensors="pt")


def stock_program(case: Case, *, merge: bool = False) -> tuple[Any, Any]:
    """The stock model with the case's adapter, ready to train or merged into its weights; and the stock processor."""
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(source(case.model), trust_remote_code=False)
    how: dict[str, Any] = {"dtype": "auto", "attn_implementation": "sdpa", "trust_remote_code": False}
    stock: Any = AutoModelForImageTextToText.from_pretrained(source(case.model), **how)
    if merge:  # which would change embeddings that are tied to the head
        stock.lm_head.weight = torch.nn.Parameter(stock.lm_head.weight.detach().clone())
        stock.config.tie_word_embeddings = stock.config.text_config.tie_word_embeddings = False
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # names that transformers has renamed
        model = PeftModel.from_pretrained(stock.to(case.device), str(case.adapter), is_trainable=not merge)
        return model.merge_and_unload().eval() if merge else model.train(), processor


@contextmanager
def _trl(workers: int, case: Case) -> Iterator[Callable[[], Outcome]]:
    from transformers import PrinterCallback

    def train() -> Outcome:
        program.train()
        return Outcome([entry["loss"] for entry in program.state.log_history if "loss" in entry])

    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # names that transformers has renamed
        model, processor = stock_program(case)
        batch, workers_of = len(case.batches[0]), {"dataloader_num_workers": workers}
        program = trainer(case.state / "trl", model, processor, _dataset(case), batch, LEARNING_RATE, **workers_of)
        program.remove_callback(PrinterCallback)
        first = [program.train_dataset[number] for number in range(batch)]
        check_inputs(case, program.data_collator(first), program.processing_class.image_token_id)
        yield train


def trainer(
    out: Path, model: Any, processor: Any, dataset: Any, batch: int, learning_rate: float, **options: Any
) -> Any:
    """TRL's, for one pass over the data set in its order with the reference recipe's Adam."""
    from trl import SFTConfig, SFTTrainer

    config = SFTConfig(
        output_dir=str(out),
        use_cpu=model.device.type == "cpu",
        bf16=model.dtype == torch.bfloat16,
        gradient_checkpointing=False,
        per_device_train_batch_size=batch,
        num_train_epochs=1,  # all epochs stand in the data set one after another
        train_sampling_strategy="sequential",
        max_length=None,
        dataloader_pin_memory=model.device.type != "cpu",
        learning_rate=learning_rate,
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
        **options,
    )

    class Unreported(SFTTrainer):
        def _send_telemetry(self) -> None:
            """A benchmark is not reported."""

    return Unreported(model=model, args=config, train_dataset=dataset, processing_class=processor)


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
