"""How the nano tokenizer was made: the first merges of a byte-level BPE and its special tokens.

A BPE's merges are ordered by rank, so the first n of them are a BPE of their own; ordinary tokens keep their ids and
the special tokens follow them directly. Source of the shipped one: the Qwen3 tokenizer (Apache-2.0).

    python -m experiments.pretrain.tokenizer TOKENIZER_JSON SIZE > vlm/nano/tokenizer.json
"""

import json
import sys
from typing import Any


def prefix(tokenizer: dict[str, Any], size: int) -> dict[str, Any]:
    """The `tokenizer.json` of the first `size` ids: bytes, then merges in rank order, then all special tokens.

    Raises ValueError where the byte alphabet and the special tokens alone need more than `size` ids.
    """
    model, special = tokenizer["model"], tokenizer["added_tokens"]
    ordinary = size - len(special)
    if ordinary < 256:
        raise ValueError(f"{size} ids do not hold 256 bytes and {len(special)} special tokens")
    vocab = {token: i for token, i in model["vocab"].items() if i < ordinary}
    merges = [pair for pair in model["merges"] if "".join(pair) in vocab]
    special = [{**token, "id": ordinary + i} for i, token in enumerate(special)]
    return {**tokenizer, "added_tokens": special, "model": {**model, "vocab": vocab, "merges": merges}}


def main(path: str, size: str) -> None:
    with open(path, encoding="utf-8") as file:
        short = prefix(json.load(file), int(size))
    json.dump(short, sys.stdout, ensure_ascii=False, separators=(",", ":"))


if __name__ == "__main__":
    main(*sys.argv[1:])
