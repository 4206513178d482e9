"""Train one model exactly as a cell of a sweep does, and write its folder: an adapter of the VLM, or a head on DINOv2.
Images, their order and flips, settings and number of threads are the cell's: on a CPU it is the cell's own, bit for
bit. Nothing is tested, so settings that only a test depends on are refused."""

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from data.dataset import Access, Dataset
from experiments.adapters.folder import ADAPTER, HEAD, Card, check_target, readme, write
from experiments.sweep import run
from experiments.sweep.cells import Job
from experiments.sweep.config import MODELS, Settings, load
from experiments.sweep.grid import plan
from experiments.sweep.methods import METHODS, Task, fit_dinov2_head, fit_lora, fit_lora_head, lora_head_client
from experiments.sweep.provenance import local_model, notes
from experiments.sweep.workers import one_thread_on_a_cpu
from kshot.checks import folder_of
from kshot.errors import InputError, UnknownNameError
from kshot.files import remove_stale

DEFAULT = "vlm-lora"
# settings that methods read for their tests alone: no training depends on them
TEST_SETTINGS = ("limit_test", "shuffle_test", "calibration", "answer_tokens", "thoughts")


@dataclass(frozen=True)
class Step:
    """One optimizer step of several. loss: of its batch, a training image on average."""

    number: int
    steps: int
    loss: float

    @property
    def left(self) -> int:
        """Steps after this one."""
        return self.steps - self.number


def plan_training(
    dataset: str,
    shots: int,
    seed: int,
    settings: Mapping[str, Any],
    method: str = DEFAULT,
    *,
    device: str = "cpu",
    access: Access | None = None,
) -> tuple[Job, Dataset]:
    """The cell of a sweep that is trained, checked as the sweep checks it, and its data set. method: a row of TRAINERS.
    settings: put over the demo's, as `kshot sweep` does. Raises UnknownNameError for another method, InputError for a
    setting that training does not depend on."""
    if method not in TRAINERS:
        raise UnknownNameError("method that can be trained and kept", method, TRAINERS)
    read = METHODS[method].settings
    if tested := [name for name in settings if name in TEST_SETTINGS]:
        raise InputError(f"{tested[0]} is for sweeps, which test; training does not depend on it: leave it out")
    if unused := [name for name in settings if name in Settings.model_fields and name not in read]:
        raise InputError(f"{unused[0]} is no setting of {method}, which would not depend on it: leave it out")
    values = dict(settings)
    for kind in MODELS:
        if (name := settings.get(kind)) is not None and (path := local_model(kind, name)):
            values[kind] = str(path.resolve())  # wherever the folder is used
    grid = {"name": "train", "datasets": (dataset,), "methods": (method,), "shots": (shots,), "seeds": (seed,)}
    planned = plan(load("demo", grid, values), device=device, access=access)
    (data,) = planned.datasets.values()
    return replace(planned.jobs[0], device=device), data


def train(job: Job, dataset: Dataset, target: Path, *, force: bool = False) -> Iterator[Step]:
    """Train and write the folder `target`, yielding each step when it is done (a frozen head has none); nothing is
    written before the last one. Raises InputError, before anything is computed, where the folder holds other things."""
    target = target.resolve()
    check_target(target, force=force)
    with _temporary_folder(target) as state, one_thread_on_a_cpu(job.device):
        task, method = run.task_of(job, dataset, []), METHODS[job.cell.method]
        training, number = TRAINERS[job.cell.method](task, state), 0
        while True:
            try:
                loss = next(training)
            except StopIteration as ended:
                weights: Path = ended.value
                break
            number += 1
            yield Step(number, task.steps, loss)
        check_target(target, force=force)  # it may have been filled meanwhile
        trained = {**job.cell.identity, "data": dict(dataset.facts), "versions": run.versions(job)}
        s = job.settings
        card = Card(
            kind=ADAPTER if method.uses_vlm else HEAD,
            classes=dataset.classes,
            prompt=prompt_text(s) if method.uses_vlm else "",
            max_side=s.max_side,
            base_model=s.model if method.uses_vlm else s.backbone,
            trained=trained,
        )
        write(target, weights, card, readme(card, notes(s, set(method.settings))))


def prompt_text(settings: Settings) -> str:
    """The prompt as a template, in full."""
    from vlm.prompts import template

    return str(template(settings.prompt))


# The methods: each yields the loss of a step, a training image on average, and returns the folder of its weights.

Trainer = Callable[[Task, Path], Generator[float, None, Path]]


def _vlm_lora(task: Task, state: Path) -> Generator[float, None, Path]:
    from vlm.service import connect

    service: Any = connect("local", state_dir=state, device=task.device)
    try:
        s = task.settings
        client = service.create_lora_training_client(s.model, rank=s.rank, seed=task.seed).result()
        yield from fit_lora(client, task)
        path = client.save_weights_for_sampler("adapter").result().path
    finally:
        service.close()
    return folder_of(state, path)


def _dinov2_lora(task: Task, state: Path) -> Generator[float, None, Path]:
    client = lora_head_client(task)
    yield from fit_lora_head(client, task)
    client.save(state / "head")
    return state / "head"


def _dinov2_head(head: str, task: Task, state: Path) -> Generator[float, None, Path]:
    from baselines.classifier import save_linear

    linear, s = fit_dinov2_head(head, task).linear, task.settings
    assert linear is not None, head  # noqa: S101  # the rows below are linear
    save_linear(state / "head", linear, model=s.backbone, readout=s.readout, size=s.image_size)
    yield from ()
    return state / "head"


TRAINERS: dict[str, Trainer] = {
    DEFAULT: _vlm_lora,
    "dinov2-lora": _dinov2_lora,
    "dinov2-logreg": partial(_dinov2_head, "logreg"),
    "dinov2-ridge": partial(_dinov2_head, "ridge"),
}


@contextmanager
def _temporary_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside the target: where it cannot be made, the target could not either."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(target)
        folder = TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    except OSError as error:
        raise InputError(f"cannot write to {target} ({error.strerror}); give another folder with --out") from error
    with folder as path:
        yield Path(path)
