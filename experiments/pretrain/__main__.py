"""Trains the nano models from nothing: `python -m experiments.pretrain --work FOLDER`, on a CPU or a GPU.

The stages build on each other and leave a file each, so that the same command continues after an interruption:
subjects (drawings and names), described (what the students learn to reproduce), vit (the nano DINOv2), tower (of the
nano Qwen3-VL), answers (the whole of it). The stage `ship` measures both on held-out classes and writes two folders in
the hub's layout, with model cards, in place of those of the packages `vlm.nano` and `baselines.nano` or under
`--ship-to`. Every choice in the recipe was made on the words of `subjects.VALIDATION`; the demo's classes are in no
stage.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, Qwen3VLForConditionalGeneration
from transformers.utils import logging

from baselines import nano as baselines_nano
from data.catalog import find
from data.dataset import Images
from data.embedded import icons
from data.fewshot import k_shot
from data.preparation import prepare_all
from experiments.pretrain import cards, learning, students
from experiments.pretrain.cards import StageRecord
from experiments.pretrain.learning import Plan, Report
from experiments.pretrain.subjects import VALIDATION, Subjects, subjects
from experiments.sweep.config import Settings, read
from experiments.sweep.methods import METHODS, Task
from kshot.errors import InputError, UnknownNameError
from kshot.files import write_file
from vlm import nano as vlm_nano
from vlm.inputs import ImageRule
from vlm.prompts import Prompt

STEPS = {"vit": 7000, "tower": 5000, "answers": 2000}
SHIP = "ship"
LONGEST = 6  # tokens of a name, its end included, that the whole model learns to write
SEEDS = (0, 1, 2)  # of the few-shot accuracies on the model cards


def main() -> None:
    """Run the stages that are requested and not done."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for the files of the stages")
    parser.add_argument("--stages", default=",".join((*STEPS, SHIP)), help="those to run (default: all, in this order)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--steps", type=int, help="of each stage (default: the recipe's)")
    parser.add_argument("--ship-to", type=Path, help="folder to ship to (default: this repository)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.disable_progress_bar()
    for stage in options.stages.split(","):
        if stage == SHIP:
            ship(options.work, options.ship_to or Path(__file__).parents[2])
        elif stage in STEPS:
            run(stage, options.work, Plan(options.steps or STEPS[stage], seed=options.seed, device=options.device))
        else:
            raise UnknownNameError("stage", stage, [*STEPS, SHIP])


def run(stage: str, work: Path, plan: Plan) -> None:
    """Run one stage, unless its file is there. Raises InputError where the file of the stage before it is missing."""
    target = work / f"{stage}.safetensors"
    if target.exists():
        print(f"{stage}: {target} is there")
        return
    start = time.time()
    weights = TRAIN[stage](work, plan, lambda text: print(f"{stage}: {text}", flush=True))
    threads = torch.get_num_threads()
    cpu = f"{threads} CPU core{'s' if threads > 1 else ''}"
    machine = cpu if plan.device == "cpu" else torch.cuda.get_device_name(plan.device)
    record = StageRecord(plan.steps, plan.batch, round(time.time() - start), machine)
    _save(target, weights, {"made": json.dumps(asdict(record))})
    print(f"{stage}: {record}", flush=True)


def train_vit(work: Path, plan: Plan, report: Report) -> dict[str, Tensor]:
    """The weights of the nano DINOv2."""
    return students.train_dinov2(*_described(work, plan), plan, report)


def train_tower(work: Path, plan: Plan, report: Report) -> dict[str, Tensor]:
    """The weights of the nano Qwen3-VL's vision tower."""
    visual = _untrained_model(plan.seed).model.visual
    students.train_tower(visual, *_described(work, plan), plan, report)
    return _weights(visual)


def train_answers(work: Path, plan: Plan, report: Report) -> dict[str, Tensor]:
    """The weights of the whole nano Qwen3-VL; its tower is that of the stage before."""
    tower = work / "tower.safetensors"
    if not tower.exists():
        raise InputError(f"{tower} is missing; run the stage tower first")
    model, (masks, described) = _untrained_model(plan.seed), _described(work, plan)
    model.model.visual.load_state_dict(load_file(tower))
    names = _subjects(work).names
    tokenizer, rule = AutoTokenizer.from_pretrained(vlm_nano.HERE), ImageRule.from_pretrained(str(vlm_nano.HERE))
    prompt = Prompt(tokenizer, rule, tuple(dict.fromkeys(names)))
    short = {name for name, ids in zip(prompt.classes, prompt.choices, strict=True) if len(ids) <= LONGEST}
    names *= 2  # of the drawings and of their mirror images
    kept = [n for n, name in enumerate(names) if name in short]
    students.train_answers(model, prompt, masks[kept], described[kept], [names[n] for n in kept], plan, report)
    return _weights(model)


TRAIN: dict[str, Callable[[Path, Plan, Report], dict[str, Tensor]]] = {
    "vit": train_vit,
    "tower": train_tower,
    "answers": train_answers,
}


def ship(work: Path, root: Path) -> None:
    """Put both models with their cards under root, and print what their packages must state as REVISION."""
    drawings, vit, text = _subjects(work), root / "baselines/nano", root / "vlm/nano"
    for stage, folder, files in (("vit", vit, baselines_nano.HERE), ("answers", text, vlm_nano.HERE)):
        folder.mkdir(parents=True, exist_ok=True)
        for path in files.glob("*.json"):
            write_file(folder / path.name, path.read_bytes())
        weights = folder / "model.safetensors"
        _save(weights, load_file(work / f"{stage}.safetensors"), {"format": "pt"})
        print(f"{weights}: REVISION = {hashlib.sha256(weights.read_bytes()).hexdigest()[:12]!r}", flush=True)
    records = {}
    for stage in STEPS:
        with safe_open(work / f"{stage}.safetensors", "pt") as file:
            records[stage] = StageRecord(**json.loads(file.metadata()["made"]))
    facts = cards.CardFacts(len(drawings), len(set(drawings.names)), records, accuracies(str(text), str(vit)))
    write_file(vit / "README.md", cards.dinov2_card(facts).encode())
    write_file(text / "README.md", cards.qwen_card(facts).encode())


def accuracies(model: str, backbone: str) -> dict[str, dict[int, float]]:
    """method → shots → few-shot accuracy on the held-out classes, under the demo's settings.

    The drawings, split and methods are those of the demo, the classes are those of VALIDATION.
    """
    settings = Settings.model_validate(read("demo")["settings"] | {"model": model, "backbone": backbone})
    measured: dict[str, dict[int, float]] = {}
    for method in (cards.FLOOR, "dinov2-logreg", "vlm-zero-shot", "vlm-lora"):
        shots = cards.SHOTS if METHODS[method].learns else (0,)
        measured[method] = {k: _accuracy(method, settings, k) for k in shots}
        print(f"{method}: {measured[method]}", flush=True)
    return measured


def _accuracy(method: str, settings: Settings, shots: int) -> float:
    """Share of test images named right, a mean over SEEDS.

    A class with fewer designs than the shots takes part with those it has ("cup").
    """
    spec = replace(find("icons"), classes=VALIDATION)
    dataset = icons.load(spec, root=None, split_seed=settings.split_seed)
    test = prepare_all(dataset.test, max_side=settings.max_side, hflip=False)
    shares = []
    for seed in SEEDS:
        chosen = k_shot(dataset.train, dataset.classes, shots, seed, allow_fewer=True) if shots else []
        train = prepare_all([dataset.train[n] for n in chosen], max_side=settings.max_side, hflip=True)
        task = Task(dataset.classes, train, Images(test), seed, settings, spec.hflip)
        scores = METHODS[method].run(task).scores
        shares.append(float((scores.argmax(1) == [example.label for example in test]).mean()))
    return mean(shares)


def _untrained_model(seed: int) -> Any:
    """The nano Qwen3-VL with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return Qwen3VLForConditionalGeneration(AutoConfig.from_pretrained(vlm_nano.HERE))


def _subjects(work: Path) -> Subjects:
    """The drawings and their names, kept as a file: finding them takes half a minute."""
    masks, names = work / "subjects.safetensors", work / "subjects.json"
    if not names.exists():
        drawings = subjects()
        _save(masks, {"masks": torch.from_numpy(drawings.masks)})
        write_file(names, json.dumps(drawings.names).encode())
    return Subjects(load_file(masks)["masks"].numpy(), tuple(json.loads(names.read_bytes())))


def _described(work: Path, plan: Plan) -> tuple[Tensor, Tensor]:
    """The drawings and their mirror images, and the teacher's descriptions of them."""
    masks, target = torch.from_numpy(_subjects(work).masks), work / "described.safetensors"
    if not target.exists():
        _save(target, {"described": learning.describe(masks, plan.device)})
    return torch.cat([masks, masks.flip(-1)]), load_file(target)["described"]


def _weights(module: Any) -> dict[str, Tensor]:
    """The module's tensors under the stock names, a tied one once."""
    return {n: t.detach().cpu().contiguous() for n, t in module.state_dict().items() if n != "lm_head.weight"}


def _save(target: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write under a temporary name first, so that a file with the target's name is complete."""
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_suffix(".unfinished")
    save_file(tensors, unfinished, metadata)
    unfinished.rename(target)


if __name__ == "__main__":
    main()
