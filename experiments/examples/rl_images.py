"""Learns to name digits by reward: answers are sampled, and those that name the digit become likelier.

    python experiments/examples/rl_images.py [--service local|ADDRESS] [--steps N]

The model first learns a little from labelled images, since one that never names a digit gets no reward. Then each step
samples answers to some images, gives 1 for the right name, compares each answer with the others to the same image, and
trains with the loss importance_sampling. Minutes on a CPU.
"""

from argparse import ArgumentParser
from itertools import islice
from typing import Any

import numpy as np
from tinker import TensorData, types

import vlm
from data import catalog
from data.fewshot import k_shot
from vlm import nano
from vlm.classifier import batches, fit, predict
from vlm.inputs import datum
from vlm.service import tokenizer

SHOTS, BATCH, GROUP, LENGTH = 4, 8, 8, 6  # images a class, images a step, answers an image, tokens an answer
START, ADAM = types.AdamParams(learning_rate=3e-3, eps=1e-8), types.AdamParams(learning_rate=1e-3, eps=1e-8)


def main(address: str, first: int, steps: int, tested: int) -> dict[str, Any]:
    """first, steps: of labelled images and of reward. tested: test images. Returns each step's mean reward, and the
    accuracy before and after."""
    digits, service = catalog.load("digits"), vlm.connect(address)
    client = service.create_lora_training_client(nano.NAME, rank=8, seed=0).result()
    prompt = vlm.Prompt(tokenizer(nano.NAME), vlm.ImageRule.from_pretrained(nano.NAME), digits.classes)
    shots = [digits.train[n] for n in k_shot(digits.train, digits.classes, SHOTS, seed=0)]
    test, rng = digits.test[:tested], np.random.default_rng(0)
    views = batches(shots, BATCH, first + steps, rng, hflip=0.0)

    def accuracy() -> float:
        sampler = client.save_weights_and_get_sampling_client().result()
        scores = predict(sampler, [each.image for each in test], prompt)
        return float((scores.argmax(1) == [each.label for each in test]).mean())

    for loss, _ in fit(client, islice(views, first), prompt, START):
        print(f"labelled images: loss {loss.metrics['loss:sum'] / BATCH:.3f}", flush=True)
    before, mean_rewards = accuracy(), list[float]()
    print(f"accuracy before reward: {before:.3f}", flush=True)
    for batch in views:
        sampler = client.save_weights_and_get_sampling_client().result()  # the policy as it is now
        questions = [prompt.question(image) for image, _ in batch]
        asked = [
            sampler.sample(
                question,
                GROUP,
                types.SamplingParams(max_tokens=LENGTH, stop=prompt.stops, seed=int(rng.integers(2**31))),
            )
            for question in questions
        ]
        data, rewards = [], []
        for question, (_, label), answer in zip(questions, batch, asked, strict=True):
            samples = answer.result().sequences
            got = np.array([prompt.parse(prompt.text(each.tokens)) == label for each in samples], float)
            rewards.append(got.mean())
            if got.std() == 0:  # all right or all wrong: there is nothing to prefer
                continue
            before_answer = [0.0] * (question.length - 1)
            for each, gain in zip(samples, (got - got.mean()) / got.std(), strict=True):
                plain = datum(question, each.tokens)
                sampled = {
                    "logprobs": [*before_answer, *each.logprobs],
                    "advantages": [*before_answer, *[gain] * len(each.tokens)],
                }
                fields = {name: TensorData.from_numpy(np.array(row, np.float32)) for name, row in sampled.items()}
                fields["target_tokens"] = plain.loss_fn_inputs["target_tokens"]
                data.append(types.Datum(model_input=plain.model_input, loss_fn_inputs=fields))
        if data:
            loss, step = client.forward_backward(data, "importance_sampling"), client.optim_step(ADAM)
            loss.result(), step.result()
        mean_rewards.append(float(np.mean(rewards)))
        print(f"reward {mean_rewards[-1]:.3f}", flush=True)
    after = accuracy()
    print(f"accuracy after {steps} steps of reward: {after:.3f}")
    return {"rewards": mean_rewards, "before": before, "after": after}


if __name__ == "__main__":
    parser = ArgumentParser()
    parser.add_argument("--service", default="local")
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    main(options.service, 40, options.steps, 200)
