"""Makes the nano pair from nothing: `python -m experiments.pretrain.main --work FOLDER`, on a CPU or a GPU.

The stages build on each other and leave a file each, so that the same command goes on after an interruption:
subjects (drawings and names), described (what the students copy), vit (the nano DINOv2), tower (of the nano Qwen3-VL),
answers (the whole of it). The stage `ship` measures both on held-out classes and leaves two folders in hub layout, with
model cards, in place of those of the packages `vlm.nano` and `baselines.nano` or under `--ship-to`.
Every choice in the recipe was made on the words of `subjects.VALIDATION`; the demo's classes are in no stage.

TODO What the nano pair is worth on classes that it never learnt: few-shot accuracy on the words of VALIDATION.

The same drawings, split and methods as in the demo, on other classes. What is chosen about the recipe is chosen here.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils import logging

from baselines import nano as baselines_nano
from data.catalog import find
from data.dataset import Images
from data.embedded import icons
from data.fewshot import k_shot
from data.preparation import prepare_all
from experiments.pretrain import cards
from experiments.pretrain.cards import Making
from experiments.pretrain.learning import Plan
from experiments.pretrain.subjects import VALIDATION, Subjects, subjects
from experiments.sweep.config import Settings, read
from experiments.sweep.methods import METHODS, Task
from kshot.errors import InputError, UnknownNameError
from kshot.files import write_file
from vlm import nano as vlm_nano

# ---- What the nano pair is worth on classes that it never learnt: few-shot accuracy on the words of VALIDATION.


def accuracy(
    method: str, settings: Settings, shots: int, seeds: Sequence[int] = (0, 1, 2), root: Path | None = None
) -> float:
    """Share of test images named right, a mean over seeds; settings name the model or backbone, a folder as a rule.

    A class with fewer designs than the shots takes part with what it has ("cup").
    """
    row = replace(find("icons"), classes=VALIDATION)
    dataset = icons.load(row, root=root, split_seed=settings.split_seed)
    test = prepare_all(dataset.test, max_side=settings.max_side, hflip=False)
    found = []
    for seed in seeds:
        chosen = k_shot(dataset.train, dataset.classes, shots, seed, allow_fewer=True) if shots else []
        train = prepare_all([dataset.train[n] for n in chosen], max_side=settings.max_side, hflip=True)
        task = Task(dataset.classes, train, Images(test), seed, settings, row.hflip)
        scores = METHODS[method].run(task).scores
        found.append(float((scores.argmax(1) == [example.label for example in test]).mean()))
    return mean(found)


# ---- Makes the nano pair from nothing: `python -m experiments.pretrain.main --work FOLDER`, on a CPU or a GPU.

STEPS = {"vit": 7000, "tower": 5000, "answers": 2000}
SHIP = "ship"
LONGEST = 6  # tokens of a name, its end included, that the whole model learns to write


def main() -> None:
    """Run the stages that are asked for and not done."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for what the stages leave")
    parser.add_argument("--stages", default=",".join((*STEPS, SHIP)), help="those to run (default: all, in this order)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--steps", type=int, help="of each stage (default: the recipe's)")
    parser.add_argument("--ship-to", type=Path, help="folder to ship to (default: this repository)")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    logging.disable_progress_bar()
    for stage in asked.stages.split(","):
        if stage == SHIP:
            ship(asked.work, asked.ship_to or Path(__file__).parents[1])
        elif stage in STEPS:
            run(stage, asked.work, Plan(asked.steps or STEPS[stage], seed=asked.seed, device=asked.device))
        else:
            raise UnknownNameError("stage", stage, [*STEPS, SHIP])


def run(stage: str, work: Path, plan: Plan) -> None:
    """Run one stage, unless its file is there. Raises InputError where the stage before it has left nothing."""
    target = work / f"{stage}.safetensors"
    if target.exists():
        print(f"{stage}: {target} is there")
        return
    start = time.time()
    learn = {"vit": _vit, "tower": _tower, "answers": _answers}[stage]
    weights = learn(work, plan, lambda text: print(f"{stage}: {text}", flush=True))
    made = Making(plan.steps, plan.batch, round(time.time() - start), _machine(plan.device))
    _keep(target, weights, {"made": json.dumps(asdict(made))})
    print(f"{stage}: {made}", flush=True)


def ship(work: Path, root: Path) -> None:
    """Put both models with their cards under root, and say what their modules must state as REVISION."""
    learnt, vit, text = _subjects(work), root / "baselines/nano", root / "vlm/nano"
    for stage, folder, files in (("vit", vit, baselines_nano.HERE), ("answers", text, vlm_nano.HERE)):
        folder.mkdir(parents=True, exist_ok=True)
        for path in files.glob("*.json"):
            write_file(folder / path.name, path.read_bytes())
        weights = folder / "model.safetensors"
        _keep(weights, load_file(work / f"{stage}.safetensors"), {"format": "pt"})
        print(f"{weights}: REVISION = {hashlib.sha256(weights.read_bytes()).hexdigest()[:12]!r}", flush=True)
    made = {stage: _made(work / f"{stage}.safetensors") for stage in ("vit", "tower", "answers")}
    facts = cards.Facts(len(learnt), len(set(learnt.names)), made, _accuracies(str(text), str(vit)))
    write_file(vit / "README.md", cards.dinov2_card(facts).encode())
    write_file(text / "README.md", cards.qwen_card(facts).encode())


def _accuracies(model: str, backbone: str) -> dict[str, dict[int, float]]:
    """method → shots → accuracy on the held-out classes, under the demo's settings."""
    settings = Settings.model_validate(read("demo")["settings"] | {"model": model, "backbone": backbone})
    found: dict[str, dict[int, float]] = {}
    for method in (cards.FLOOR, "dinov2-logreg", "vlm-zero-shot", "vlm-lora"):
        shots = cards.SHOTS if METHODS[method].learns else (0,)
        found[method] = {k: accuracy(method, settings, k) for k in shots}
        print(f"{method}: {found[method]}", flush=True)
    return found


def _made(path: Path) -> Making:
    with safe_open(path, "pt") as file:
        return Making(**json.loads(file.metadata()["made"]))


def _machine(device: str) -> str:
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{threads} CPU core{'s' if threads > 1 else ''}"


def _vit(work: Path, plan: Plan, report: Any) -> dict[str, Tensor]:
    from experiments.pretrain import dinov2

    return dinov2.train(*_described(work, plan), plan, report)


def _tower(work: Path, plan: Plan, report: Any) -> dict[str, Tensor]:
    from experiments.pretrain import vlm

    visual = _fresh(plan.seed).model.visual
    vlm.train_tower(visual, *_described(work, plan), plan, report)
    return _state(visual)


def _answers(work: Path, plan: Plan, report: Any) -> dict[str, Tensor]:
    from transformers import AutoTokenizer

    from experiments.pretrain import vlm
    from vlm.inputs import ImageRule
    from vlm.prompts import Prompt

    tower = work / "tower.safetensors"
    if not tower.exists():
        raise InputError(f"{tower} is missing; run the stage tower first")
    model, (masks, described), learnt = _fresh(plan.seed), _described(work, plan), _subjects(work)
    model.model.visual.load_state_dict(load_file(tower))
    tokenizer, rule = AutoTokenizer.from_pretrained(vlm_nano.HERE), ImageRule.from_pretrained(str(vlm_nano.HERE))
    prompt = Prompt(tokenizer, rule, tuple(dict.fromkeys(learnt.names)))
    short = {name for name, ids in zip(prompt.classes, prompt.choices, strict=True) if len(ids) <= LONGEST}
    names = learnt.names * 2  # of the drawings and of their mirror images
    kept = [n for n, name in enumerate(names) if name in short]
    vlm.train(model, prompt, masks[kept], described[kept], [names[n] for n in kept], plan, report)
    return _state(model)


def _fresh(seed: int) -> Any:
    """The nano Qwen3-VL with random weights."""
    from transformers import AutoConfig, Qwen3VLForConditionalGeneration

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return Qwen3VLForConditionalGeneration(AutoConfig.from_pretrained(vlm_nano.HERE))


def _subjects(work: Path) -> Subjects:
    """The drawings and their names, kept as a file: finding them takes half a minute."""
    masks, names = work / "subjects.safetensors", work / "subjects.json"
    if not names.exists():
        found = subjects()
        _keep(masks, {"masks": torch.from_numpy(found.masks)})
        write_file(names, json.dumps(found.names).encode())
    return Subjects(load_file(masks)["masks"].numpy(), tuple(json.loads(names.read_bytes())))


def _described(work: Path, plan: Plan) -> tuple[Tensor, Tensor]:
    """The drawings and their mirror images, and what the students are to say of them."""
    from experiments.pretrain.learning import describe

    masks, target = torch.from_numpy(_subjects(work).masks), work / "described.safetensors"
    if not target.exists():
        _keep(target, {"described": describe(masks, plan.device)})
    return torch.cat([masks, masks.flip(-1)]), load_file(target)["described"]


def _state(module: Any) -> dict[str, Tensor]:
    """The module's tensors under the stock names, a tied one once."""
    return {n: t.detach().cpu().contiguous() for n, t in module.state_dict().items() if n != "lm_head.weight"}


def _keep(target: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write through a temporary name, so that what is there is complete."""
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_suffix(".unfinished")
    save_file(tensors, unfinished, metadata)
    unfinished.rename(target)


if __name__ == "__main__":
    main()
