"""What the scores of choices must be: every choice's own forward pass by the stock model; nothing of ours is in it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import tinker
import torch

from tests.vlm.helpers import stock_inputs
from vlm.inputs import ImageRule

TOGETHER = 50  # rows in one stock pass


def scores(
    stock: Any, asked: tinker.ModelInput, choices: Sequence[Sequence[int]], rule: ImageRule, image: int
) -> dict[str, np.ndarray]:
    """Method → (choices,) log-probabilities after one prompt. image: the tokenizer's id of <|image_pad|>."""
    longest = max(map(len, choices))
    allowed: dict[tuple[int, ...], set[int]] = {}
    for choice in choices:
        for depth, token in enumerate(choice):
            allowed.setdefault(tuple(choice[:depth]), set()).add(token)
    totals: dict[str, list[float]] = {"constrained": [], "likelihood": []}
    for start in range(0, len(choices), TOGETHER):
        some = choices[start : start + TOGETHER]
        for row, choice in zip(_logits(stock, asked, some, rule, longest, image), some, strict=True):
            values = row[: len(choice)].double()
            own = values[torch.arange(len(choice)), torch.tensor(choice)]
            totals["likelihood"].append(float((own - values.logsumexp(-1)).sum()))
            among = [values[d, sorted(allowed[tuple(choice[:d])])].logsumexp(-1) for d in range(len(choice))]
            totals["constrained"].append(float((own - torch.stack(among)).sum()))
    return {method: np.array(each) for method, each in totals.items()}


def decoded(stock: Any, asked: tinker.ModelInput, choices: Sequence[Sequence[int]]) -> int:
    """The choice that is written after a prompt of text by the likeliest token at each step, of those that go on as a
    choice does: a forward pass for each."""
    written: list[int] = []
    while written not in [list(choice) for choice in choices]:
        begun = [choice for choice in choices if list(choice[: len(written)]) == written]
        allowed = sorted({choice[len(written)] for choice in begun})
        with torch.no_grad():
            logits = stock(torch.tensor([[*asked.to_ints(), *written]])).logits[0, -1]
        written.append(allowed[int(logits[allowed].argmax())])
    return [list(choice) for choice in choices].index(written)


def _logits(
    stock: Any, asked: tinker.ModelInput, choices: Sequence[Sequence[int]], rule: ImageRule, longest: int, image: int
) -> torch.Tensor:
    """(choices, longest + 1, vocabulary) logits from the prompt's last position on; rows are padded on the right."""
    prompt = stock_inputs(asked, rule, image)
    count, ids = len(choices), prompt["input_ids"]
    padded = torch.tensor([[*choice, *[0] * (longest - len(choice))] for choice in choices])
    inputs = {
        "input_ids": torch.cat([ids.expand(count, -1), padded], 1),
        "attention_mask": torch.tensor([[1] * (ids.shape[1] + len(c)) + [0] * (longest - len(c)) for c in choices]),
    }
    if "pixel_values" in prompt:
        inputs["pixel_values"] = prompt["pixel_values"].repeat(count, 1)
        inputs["image_grid_thw"] = prompt["image_grid_thw"].repeat(count, 1)
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == image).int()
    stock.base_model.rope_deltas = None
    with torch.no_grad():
        found: torch.Tensor = stock(**inputs, logits_to_keep=longest + 1).logits
    return found
