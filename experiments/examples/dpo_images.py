"""Learns preferences about images: the right name of a digit is preferred to another one (DPO, Rafailov et al. 2023).

    python experiments/examples/dpo_images.py [--service local|ADDRESS] [--steps N]

The loss is a function of this file, which forward_backward_custom takes: it gets the log-probabilities of both answers
and says what they are worth, beside those of the untuned model. Minutes on a CPU.
"""

from argparse import ArgumentParser
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tinker import Datum, types
from torch import Tensor
from torch.nn.functional import logsigmoid

import vlm
from data import catalog
from data.dataset import Example
from data.fewshot import k_shot
from vlm import nano
from vlm.inputs import datum
from vlm.service import tokenizer

SHOTS, BATCH, BETA = 4, 8, 0.5
ADAM = types.AdamParams(learning_rate=1e-3, eps=1e-8)


def pair(prompt: vlm.Prompt, example: Example, other: int) -> list[Datum]:
    """The right answer about an image, and one that names another class."""
    question = prompt.question(example.image)
    return [datum(question, [*prompt.choices[label], *prompt.stops]) for label in (example.label, other)]


def pairs(prompt: vlm.Prompt, examples: Sequence[Example], rng: np.random.Generator) -> list[Datum]:
    """A pair of each example, one after the other: right, wrong, right, wrong, ..."""
    shifts = rng.integers(1, len(prompt.classes), len(examples))
    others = [(each.label + int(shift)) % len(prompt.classes) for each, shift in zip(examples, shifts, strict=True)]
    return [each for example, other in zip(examples, others, strict=True) for each in pair(prompt, example, other)]


def answer_log_probs(data: Sequence[Datum], log_probs: Sequence[Tensor]) -> Tensor:
    """(data,) the log-probability of each answer: the sum over its own tokens, nats."""
    weights = [each.loss_fn_inputs["weights"].to_torch() for each in data]
    return torch.stack([(values * weight).sum() for values, weight in zip(log_probs, weights, strict=True)])


def dpo_loss(data: list[Datum], log_probs: list[Tensor], untuned: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Σ −log σ(β · (gain of the right answer − gain of the wrong one)), a gain being log p / p_untuned, in nats.
    untuned: (data,) log-probabilities of the answers under the untuned model."""
    gains = answer_log_probs(data, log_probs) - untuned
    margins = gains[0::2] - gains[1::2]
    return -logsigmoid(BETA * margins).sum(), {"margin:mean": float(margins.detach().mean())}


def main(address: str, steps: int, tested: int) -> dict[str, Any]:
    """tested: test images, a pair each. Returns the loss of each step, and which share of the held-out pairs has the
    right answer as the likelier one, before and after."""
    digits, service = catalog.load("digits"), vlm.connect(address)
    client = service.create_lora_training_client(nano.NAME, rank=8, seed=0).result()
    prompt = vlm.Prompt(tokenizer(nano.NAME), vlm.ImageRule.from_pretrained(nano.NAME), digits.classes)
    shots = [digits.train[n] for n in k_shot(digits.train, digits.classes, SHOTS, seed=0)]
    rng = np.random.default_rng(0)
    held_out = pairs(prompt, digits.test[:tested], rng)

    def forward(data: list[Datum]) -> Tensor:
        outputs = client.forward(data, "cross_entropy").result().loss_fn_outputs
        return answer_log_probs(data, [each["logprobs"].to_torch() for each in outputs])

    def preferred() -> float:
        found = forward(held_out)
        return float((found[0::2] > found[1::2]).float().mean())

    before, losses = preferred(), list[float]()
    print(f"right answers preferred before: {before:.3f}", flush=True)
    made = [pairs(prompt, [shots[n] for n in rng.permutation(len(shots))[:BATCH]], rng) for _ in range(steps)]
    untuned = [forward(data) for data in made]  # before the first step the run is the untuned model
    for data, base in zip(made, untuned, strict=True):

        def loss(given: list[Datum], log_probs: list[Tensor], base: Tensor = base) -> tuple[Tensor, dict[str, float]]:
            return dpo_loss(given, log_probs, base)

        output, step = client.forward_backward_custom(data, loss), client.optim_step(ADAM)
        losses.append(output.result().metrics["loss:sum"] / BATCH)
        step.result()
        print(f"loss {losses[-1]:.3f}, margin {output.result().metrics['margin:mean']:.3f} nats", flush=True)
    after = preferred()
    print(f"right answers preferred after {steps} steps: {after:.3f}")
    return {"losses": losses, "before": before, "after": after}


if __name__ == "__main__":
    parser = ArgumentParser()
    parser.add_argument("--service", default="local")
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    main(options.service, options.steps, 100)
