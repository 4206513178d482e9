"""`kshot bench text`: training tokens a second of SmolLM2-135M on instructions of mixed length, against stock programs.

Ours, a plain transformers + PEFT loop and TRL train the same LoRA adapter on the same pairs in the same batches with
the same optimizer, in turn, each in a process of its own; that their losses agree is part of the result. All get token
ids. Stock programs pad a batch to its longest row; ours packs.
"""

import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import tinker
import torch

from experiments.bench import harness
from experiments.bench.case import BETAS, EPS, IGNORED, SEED, adam
from experiments.bench.harness import in_turn, row
from experiments.bench.train import NO_TRL, agreement, train
from experiments.bench.train_implementations import OURS, PLAIN, Implementation, Outcome, trainer
from kshot.errors import KshotError
from vlm import smollm2
from vlm.classifier import steps
from vlm.inputs import datum, model_input
from vlm.models import source
from vlm.service import connect, tokenizer

RANK, LEARNING_RATE = 16, 1e-3
SHORTEST, LONGEST = 20, 400  # tokens of a pair; the logarithm of a length is uniform between them
TRL = "TRL"
PACKAGES = ("accelerate", "gguf", "numpy", "peft", "tinker", "torch", "transformers")
TASKS: dict[str, Callable[[list[str]], list[str]]] = {
    "Sort these words": sorted,
    "Turn the order of these words round": lambda words: words[::-1],
    "Copy these words": list,
    "Leave out every other word": lambda words: words[::2],
}

Pair = tuple[list[int], list[int]]  # tokens of the prompt, and of the answer


@dataclass(frozen=True)
class TextCase:
    """One training task: the pairs of each step. start: of an adapter in `state`, the name as a checkpoint."""

    model: str
    batches: tuple[tuple[Pair, ...], ...]
    state: Path
    start: str = ""
    device: str = "cpu"

    @property
    def adapter(self) -> Path:
        """The folder of the adapter that a client saved, in PEFT's layout."""
        return next(self.state.rglob("adapter_config.json")).parent


def measure(quick: bool) -> dict[str, Any]:
    """The record of `experiments.bench.harness`. Raises ModelError where SmolLM2 is not installed, KshotError for an
    implementation that fails and for losses that differ."""
    harness.quiet()
    count, batch = (3, 2) if quick else (20, 4)
    implementations: dict[str, Implementation] = {OURS: ours, PLAIN: plain, **({TRL: trl} if find_spec("trl") else {})}
    source(smollm2.NAME)  # once, before processes need it
    with tempfile.TemporaryDirectory() as folder, harness.processes(implementations) as started:
        case = TextCase(smollm2.NAME, pairs(tokenizer(smollm2.NAME), count, batch), Path(folder))
        case = started[OURS](with_adapter, case)
        tasks = {name: partial(started[name], train, each, case) for name, each in implementations.items()}
        for name, each in implementations.items():  # imports, and the first step's surprises
            started[name](train, each, replace(case, batches=case.batches[:1]))
        return summary(case, *in_turn(tasks, 1, warm_up=False))  # which takes minutes


def pairs(tokenizer: Any, count: int, batch: int) -> tuple[tuple[Pair, ...], ...]:
    """`count` batches of instructions about words, and their answers, from a seed."""
    rng, names = np.random.default_rng(SEED), list(TASKS)
    words = sorted(token[1:] for token in tokenizer.get_vocab() if token[0] == "Ġ" and token[1:].isalpha())
    words = [word for word in words if word.isascii() and word.islower() and len(word) > 3]

    def encoded(name: str, chosen: list[str]) -> Pair:
        asked = f"<|im_start|>user\n{name}: {' '.join(chosen)}<|im_end|>\n<|im_start|>assistant\n"
        return tokenizer.encode(asked), tokenizer.encode(" ".join(TASKS[name](chosen)) + "<|im_end|>\n")

    def pair() -> Pair:
        length, name = np.exp(rng.uniform(np.log(SHORTEST), np.log(LONGEST))), names[rng.integers(len(names))]
        chosen = rng.choice(words, LONGEST).tolist()
        sizes = range(1, LONGEST)
        within = (made for size in sizes if sum(map(len, made := encoded(name, chosen[:size]))) >= length)
        prompt, answer = next(within)
        return prompt, answer[: LONGEST - len(prompt)]

    return tuple(tuple(pair() for _ in range(batch)) for _ in range(count))


# The programs


@contextmanager
def _client(case: TextCase) -> Iterator[Any]:
    service: Any = connect("local", state_dir=case.state)
    try:
        # Without an adapter on the output head: TRL refuses one there.
        client = service.create_lora_training_client(case.model, rank=RANK, seed=SEED, train_unembed=False).result()
        if case.start:
            client.load_state(case.start).result()
        yield client
    finally:
        service.close()


def with_adapter(case: TextCase) -> TextCase:
    """The case with an adapter to begin with, which a client has saved."""
    with _client(case) as client:
        return replace(case, start=client.save_state("start").result().path)


@contextmanager
def ours(case: TextCase) -> Iterator[Callable[[], Outcome]]:
    with _client(case) as client:
        data = map(_data, case.batches)
        yield lambda: Outcome(
            [loss.metrics["loss:sum"] for loss, _ in steps(client, data, "cross_entropy", adam(LEARNING_RATE))]
        )


def _data(batch: Sequence[Pair]) -> list[tinker.Datum]:
    """With weights that sum to one, so that the service's sum is a mean."""
    total = sum(len(answer) for _, answer in batch)
    data = [datum(model_input(prompt), answer) for prompt, answer in batch]
    for each in data:
        weights = each.loss_fn_inputs["weights"].to_numpy() / np.float32(total)
        each.loss_fn_inputs["weights"] = tinker.TensorData.from_numpy(weights)
    return data


def _stock(case: TextCase) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    stock = AutoModelForCausalLM.from_pretrained(source(case.model), attn_implementation="sdpa")
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # names that transformers has renamed
        return PeftModel.from_pretrained(stock, str(case.adapter), is_trainable=True).train()


@contextmanager
def plain(case: TextCase) -> Iterator[Callable[[], Outcome]]:
    """The loop that one writes by hand: pad, all logits, backward, AdamW."""
    model = _stock(case)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, betas=BETAS, eps=EPS, weight_decay=0.0)

    def step(batch: Sequence[Pair]) -> float:
        loss = model(**padded(batch)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    yield lambda: Outcome([step(batch) for batch in case.batches])


def padded(batch: Sequence[Pair]) -> dict[str, torch.Tensor]:
    """What the stock forward takes: padded on the right, with a label at the answers' tokens alone."""
    rows = [torch.tensor([*prompt, *answer]) for prompt, answer in batch]
    labels = [torch.tensor([*[IGNORED] * len(prompt), *answer]) for prompt, answer in batch]
    fill = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    there = fill([torch.ones_like(each) for each in rows])
    return {"input_ids": fill(rows), "labels": fill(labels, padding_value=IGNORED), "attention_mask": there}


@contextmanager
def trl(case: TextCase) -> Iterator[Callable[[], Outcome]]:
    """At its best settings here: no checkpoints of activations, no loader processes (the tokens are in memory)."""
    from datasets import Dataset
    from transformers import AutoTokenizer, PrinterCallback

    every = [pair for batch in case.batches for pair in batch]
    masks = [[0] * len(prompt) + [1] * len(answer) for prompt, answer in every]
    dataset = Dataset.from_dict({"input_ids": [p + a for p, a in every], "completion_mask": masks})
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # names that transformers has renamed
        program = trainer(
            case.state / "trl",
            _stock(case),
            AutoTokenizer.from_pretrained(source(case.model)),
            dataset,
            batch=len(case.batches[0]),
            learning_rate=LEARNING_RATE,
            completion_only_loss=True,
        )
        program.remove_callback(PrinterCallback)
        given = program.data_collator([program.train_dataset[n] for n in range(len(case.batches[0]))])
        if not torch.equal(given["labels"], padded(case.batches[0])["labels"]):
            raise KshotError("TRL does not train on the same tokens: nothing to compare")

        def run() -> Outcome:
            program.train()
            return Outcome([entry["loss"] for entry in program.state.log_history if "loss" in entry])

        yield run


def summary(case: TextCase, seconds: Mapping[str, Sequence[float]], trained: Mapping[str, Outcome]) -> dict[str, Any]:
    """The record of what was measured. Raises KshotError where losses differ."""
    lengths = [[len(prompt) + len(answer) for prompt, answer in batch] for batch in case.batches]
    tokens, padded_tokens = sum(map(sum, lengths)), sum(max(each) * len(each) for each in lengths)
    facts = {"steps": len(lengths), "batch": len(lengths[0]), "tokens": tokens, "padded": padded_tokens, "rank": RANK}
    rates = {name: [tokens / spent for spent in each] for name, each in seconds.items()}
    rows = [
        *(row(name, rate, "tokens/s", **facts, **harness.device_facts("cpu")) for name, rate in rates.items()),
        *agreement({name: each.losses for name, each in trained.items()}, exact=True),
        *(row(f"processor time, {name}", [each.processor], "s") for name, each in trained.items()),
        *(row(f"peak memory, {name}", [each.peak / 1e6], "MB") for name, each in trained.items()),
    ]
    others = {"vs_plain": PLAIN, "vs_trl": TRL}
    there = {key: name for key, name in others.items() if name in rates}
    ratios = {key: median(rates[OURS]) / median(rates[name]) for key, name in there.items()}
    # the same by processor time, which other programs of the machine change little
    ratios |= {f"{key}_processor": trained[name].processor / trained[OURS].processor for key, name in there.items()}
    made = harness.record(rows, ratios, [*PACKAGES, *(["trl"] if TRL in rates else [])])
    return made if TRL in rates else {**made, "notes": [NO_TRL]}
