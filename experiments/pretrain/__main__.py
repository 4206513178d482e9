"""Trains the nano models from nothing: `python -m experiments.pretrain --work FOLDER`, on a CPU or a GPU.

The stages build on each other and leave a file each, so that the same command continues after an interruption:
subjects (drawings and names), described (what the students learn to reproduce), vit (the nano DINOv2), tower (of the
nano Qwen3-VL), answers (the whole of it). The stage `ship` measures both on validation words and writes the folders of
`vlm.nano` and `baselines.nano`, with model cards, and the list NEAREST. Every choice in the recipe was made on the
words of `subjects.VALIDATION`; the demo's designs are in no stage. Photographs are read from a folder of unpacked
packages, see `photographs.PACKAGES`.

The tokenizer is older than all of them, a part of Qwen3's (Apache-2.0):

    python -m experiments.pretrain --tokenizer TOKENIZER_JSON SIZE > vlm/nano/tokenizer.json
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from filelock import FileLock
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, Qwen3VLForConditionalGeneration
from transformers.utils import logging

from baselines import nano as baselines_nano
from data.catalog import find
from data.dataset import Images
from data.embedded import icons
from data.fewshot import k_shot
from data.preparation import prepare_all
from experiments.pretrain import learning, students
from experiments.pretrain.checkpoints import progress
from experiments.pretrain.learning import Described, Plan, Report
from experiments.pretrain.photographs import COUNT, PACKAGES, photographs
from experiments.pretrain.subjects import (
    FAMILIES,
    SIMILAR,
    VALIDATION,
    Subjects,
    held_out,
    mirrored_too,
    nearest,
    subjects,
)
from experiments.sweep.config import Settings, read
from experiments.sweep.methods import METHODS, Task
from kshot.errors import InputError, UnknownNameError
from kshot.files import write_file
from vlm import nano as vlm_nano
from vlm.inputs import ImageRule
from vlm.prompts import PREFILL, QUESTION, Prompt

SHIP = "ship"
NEAREST = "results/nearest-drawings.csv"  # of each drawing of the demo, the nearest that the pair learnt from
LICENCES = {"Codicons": "CC-BY-4.0", "Material Design Icons": "Apache-2.0"}  # of the icons that are learnt from
LONGEST = 6  # tokens of a name, its end included, that the whole model learns to write
SEEDS, SHOTS = (0, 1, 2), (1, 4, 16)  # of the few-shot accuracies on the model cards
FLOOR = "pixel-knn"
CARDS = {  # of each template: what the model is a small one of, and the methods in the card's table
    "dinov2": ("DINOv2", ("dinov2-logreg", FLOOR)),
    "qwen3_vl": ("Qwen3-VL", ("vlm-zero-shot", "vlm-lora", FLOOR)),
}


@dataclass(frozen=True)
class StageRecord:
    """How long one stage trained. machine: in words."""

    steps: int
    batch: int
    seconds: int
    machine: str

    def __str__(self) -> str:
        return f"{self.steps:,} steps of {self.batch} pictures, {self.seconds / 60:.0f} minutes on {self.machine}"


def main() -> None:
    """Run the stages that are requested and not done."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--work", type=Path, help="folder for the files of the stages")
    task.add_argument("--tokenizer", nargs=2, metavar=("JSON", "SIZE"), help="instead: print its first SIZE ids")
    parser.add_argument("--stages", default=",".join(ALL), help="those to run (default: all, in this order)")
    parser.add_argument("--photographs", type=Path, help="folder of unpacked packages (default: WORK/photographs)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--steps", type=int, help="of each stage (default: the recipe's)")
    parser.add_argument("--ship-to", type=Path, help="folder to ship to (default: this repository)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.tokenizer:
        path, size = options.tokenizer
        whole = json.loads(Path(path).read_text(encoding="utf-8"))
        json.dump(prefix(whole, int(size)), sys.stdout, ensure_ascii=False, separators=(",", ":"))
        return
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    packages = options.photographs or options.work / "photographs"
    logging.disable_progress_bar()
    for stage in options.stages.split(","):
        if stage == SHIP:
            ship(options.work, options.ship_to or Path(__file__).parents[2])
        elif stage in STAGES:
            steps = options.steps or STAGES[stage][1]
            plan = Plan(steps, seed=options.seed, device=options.device, checkpoint=options.work / f"{stage}.partial")
            run(stage, options.work, packages, plan)
        else:
            raise UnknownNameError("stage", stage, ALL)


def run(stage: str, work: Path, packages: Path, plan: Plan) -> None:
    """Run one stage, unless its file is there. packages: folder of the photographs' packages. Raises InputError where
    they, or the file of the stage before it, are missing."""
    target = work / f"{stage}.safetensors"
    if target.exists():
        print(f"{stage}: {target} is there")
        return
    prepare(work, packages, plan.device)
    partial = work / f"{stage}.partial"
    start = time.time() - progress(partial)[1]
    weights = STAGES[stage][0](work, plan, lambda text: print(f"{stage}: {text}", flush=True))
    threads = torch.get_num_threads()
    cpu = f"{threads} CPU core{'s' if threads > 1 else ''}"
    machine = cpu if plan.device == "cpu" else torch.cuda.get_device_name(plan.device)
    record = StageRecord(plan.steps, plan.batch, round(time.time() - start), machine)
    write_file(target, save(weights, {"made": json.dumps(asdict(record))}))
    partial.unlink(missing_ok=True)
    print(f"{stage}: {record}", flush=True)


def train_vit(work: Path, plan: Plan, report: Report) -> dict[str, Tensor]:
    """The weights of the nano DINOv2."""
    return _weights(students.train_dinov2(_drawings(work), _photographs(work), plan, report))


def train_tower(work: Path, plan: Plan, report: Report) -> dict[str, Tensor]:
    """The weights of the nano Qwen3-VL's vision tower."""
    visual = _untrained_model(plan.seed).model.visual
    width = visual.config.out_hidden_size
    learning.distil(students.Tower(visual), width, _drawings(work), _photographs(work), plan, report)
    return _weights(visual)


def train_answers(work: Path, plan: Plan, report: Report) -> dict[str, Tensor]:
    """The weights of the whole nano Qwen3-VL; its tower is that of the stage before."""
    tower = work / "tower.safetensors"
    if not tower.exists():
        raise InputError(f"{tower} is missing; run the stage tower first")
    model, drawings = _untrained_model(plan.seed), _drawings(work)
    model.model.visual.load_state_dict(load_file(tower))
    names = _subjects(work).names
    tokenizer, rule = AutoTokenizer.from_pretrained(vlm_nano.HERE), ImageRule.from_pretrained(str(vlm_nano.HERE))
    prompt = Prompt(tokenizer, rule, tuple(dict.fromkeys(names)))
    short = {name for name, ids in zip(prompt.classes, prompt.choices, strict=True) if len(ids) <= LONGEST}
    names *= 2  # of the drawings and of their mirror images
    kept = [n for n, name in enumerate(names) if name in short]
    chosen = Described(drawings.pictures[kept], drawings.described[kept])
    students.train_answers(model, prompt, chosen, [names[n] for n in kept], plan, report)
    return _weights(model)


# Of each stage: what trains, and the steps of the recipe.
STAGES: dict[str, tuple[Callable[[Path, Plan, Report], dict[str, Tensor]], int]] = {
    "vit": (train_vit, 3000),
    "tower": (train_tower, 2500),
    "answers": (train_answers, 1500),
}
ALL = (*STAGES, SHIP)


def ship(work: Path, root: Path) -> None:
    """Put both models with their cards and the list NEAREST under root, and print what their packages must state as
    REVISION."""
    drawings, vit, text = _subjects(work), root / "baselines/nano", root / "vlm/nano"
    for stage, folder, files in (("vit", vit, baselines_nano.HERE), ("answers", text, vlm_nano.HERE)):
        folder.mkdir(parents=True, exist_ok=True)
        for path in files.glob("*.json"):
            write_file(folder / path.name, path.read_bytes())
        weights = folder / "model.safetensors"
        write_file(weights, save(load_file(work / f"{stage}.safetensors"), {"format": "pt"}))
        print(f"{weights}: REVISION = {hashlib.sha256(weights.read_bytes()).hexdigest()[:12]!r}", flush=True)
    records = {}
    for stage in STAGES:
        with safe_open(work / f"{stage}.safetensors", "pt") as file:
            records[stage] = StageRecord(**json.loads(file.metadata()["made"]))
    (root / NEAREST).parent.mkdir(exist_ok=True)
    write_file(root / NEAREST, nearest_drawings(drawings).encode())
    facts = {"drawings": len(drawings), "names": len(set(drawings.names)), "stages": records}
    facts["accuracies"] = accuracies(str(text), str(vit))
    write_file(vit / "README.md", card("dinov2", facts).encode())
    write_file(text / "README.md", card("qwen3_vl", facts).encode())


def nearest_drawings(learnt: Subjects) -> str:
    """A CSV: each drawing of the demo's classes, the nearest that was learnt from, as it is or mirrored, and the mean
    absolute difference of their thumbnails."""
    identities, small = held_out(find("icons").classes or ())
    distances, rows = nearest(small, mirrored_too(learnt.small))
    lines = ["drawing,nearest_learnt,mirrored,distance"]
    for identity, distance, row in zip(identities, distances, rows, strict=True):
        mirrored, source = divmod(int(row), len(learnt))
        lines.append(f"{identity},{learnt.sources[source]},{mirrored},{distance:.4f}")
    return "\n".join([*lines, ""])


def card(model: str, facts: Mapping[str, Any]) -> str:
    """README.md of a model of CARDS, in the hub's format. facts: `drawings`, mirror images not counted, and their
    different `names`; the StageRecords of `stages`; `accuracies`: method → shots → share on VALIDATION."""
    original, methods = CARDS[model]
    environment = Environment(
        loader=PackageLoader("experiments.pretrain"),
        undefined=StrictUndefined,
        autoescape=select_autoescape(),  # of HTML alone: this is Markdown
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(f"{model}.md.jinja").render(
        facts=facts,
        original=original,
        methods=methods,
        shots=SHOTS,
        validation=VALIDATION,
        demo=find("icons").classes,
        met=[f"{family} ({LICENCES[family]})" for family in FAMILIES],
        unmet=icons.FAMILIES,
        similar=SIMILAR,
        nearest=NEAREST,
        packages=PACKAGES,
        pictures=COUNT,
        share=learning.PHOTOGRAPHS,
        every=students.EVERY,
        common=students.COMMON,
        question=QUESTION,
        prefill=PREFILL,
    )


def accuracies(model: str, backbone: str) -> dict[str, dict[int, float]]:
    """method → shots → share of test images named right, a mean over SEEDS: the drawings, split, methods and settings
    of the demo with the classes of VALIDATION. A class with fewer designs than the shots takes part with those it has
    ("cup")."""
    models = {"model": model, "backbone": backbone}
    settings = Settings.model_validate(read("demo")["settings"] | models | {"hflip": find("icons").hflip})
    dataset = icons.load(replace(find("icons"), classes=VALIDATION), root=None, split_seed=settings.split_seed)
    test = prepare_all(dataset.test, max_side=settings.max_side, hflip=False)

    def accuracy(method: str, shots: int, seed: int) -> float:
        chosen = k_shot(dataset.train, dataset.classes, shots, seed, allow_fewer=True) if shots else []
        train = prepare_all([dataset.train[n] for n in chosen], max_side=settings.max_side, hflip=True)
        scores = METHODS[method].run(Task(dataset.classes, train, Images(test), seed, settings)).scores
        return float((scores.argmax(1) == [example.label for example in test]).mean())

    measured: dict[str, dict[int, float]] = {}
    for method in (FLOOR, "dinov2-logreg", "vlm-zero-shot", "vlm-lora"):
        shots = SHOTS if METHODS[method].learns else (0,)
        measured[method] = {k: mean(accuracy(method, k, seed) for seed in SEEDS) for k in shots}
        print(f"{method}: {measured[method]}", flush=True)
    return measured


def prefix(tokenizer: dict[str, Any], size: int) -> dict[str, Any]:
    """The `tokenizer.json` of the first `size` ids of a byte-level BPE: bytes, then merges, then all special tokens.

    Merges are ordered by rank, so the first n of them are a BPE of their own; ordinary tokens keep their ids. Raises
    ValueError where the byte alphabet and the special tokens alone need more than `size` ids.
    """
    model, special = tokenizer["model"], tokenizer["added_tokens"]
    ordinary = size - len(special)
    if ordinary < 256:
        raise ValueError(f"{size} ids do not hold 256 bytes and {len(special)} special tokens")
    vocab = {token: i for token, i in model["vocab"].items() if i < ordinary}
    merges = [pair for pair in model["merges"] if "".join(pair) in vocab]
    special = [{**token, "id": ordinary + i} for i, token in enumerate(special)]
    return {**tokenizer, "added_tokens": special, "model": {**model, "vocab": vocab, "merges": merges}}


def _untrained_model(seed: int) -> Any:
    """The nano Qwen3-VL with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return Qwen3VLForConditionalGeneration(AutoConfig.from_pretrained(vlm_nano.HERE))


def prepare(work: Path, packages: Path, device: str) -> None:
    """Make what the stages learn from, as files: minutes, so a second process waits for the first."""
    with FileLock(work / "prepare.lock"):
        if not (names := work / "subjects.json").exists():
            drawn = subjects()
            arrays = {"masks": torch.from_numpy(drawn.masks), "small": torch.from_numpy(drawn.small)}
            write_file(work / "subjects.safetensors", save(arrays))
            write_file(names, json.dumps({"names": drawn.names, "sources": drawn.sources}).encode())
        if not (target := work / "described.safetensors").exists():
            masks = torch.from_numpy(_subjects(work).masks)
            write_file(target, save({"described": learning.describe(masks, device)}))
        if not (target := work / "photographs.safetensors").exists():
            pictures = torch.from_numpy(photographs(packages)).contiguous()
            described = learning.describe_photographs(pictures, device)
            write_file(target, save({"pictures": pictures, "described": described}))


def _subjects(work: Path) -> Subjects:
    arrays, facts = load_file(work / "subjects.safetensors"), json.loads((work / "subjects.json").read_bytes())
    names, sources = tuple(facts["names"]), tuple(facts["sources"])
    return Subjects(arrays["masks"].numpy(), names, sources, arrays["small"].numpy())


def _drawings(work: Path) -> Described:
    """The drawings and their mirror images, and the teacher's descriptions of them."""
    masks = torch.from_numpy(_subjects(work).masks)
    described = load_file(work / "described.safetensors")["described"]
    return Described(torch.cat([masks, masks.flip(-1)]), described)


def _photographs(work: Path) -> Described:
    return Described(**load_file(work / "photographs.safetensors"))


def _weights(module: Any) -> dict[str, Tensor]:
    """The module's tensors under the stock names, a tied one once."""
    return {n: t.detach().cpu().contiguous() for n, t in module.state_dict().items() if n != "lm_head.weight"}


if __name__ == "__main__":
    main()
