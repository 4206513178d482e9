"""Train one adapter exactly as a `vlm-lora` cell of a sweep does, and write its folder. Images, their order and flips,
settings and number of threads are the cell's: on a CPU the adapter is the cell's own, bit for bit. Nothing is tested,
so settings that only a test depends on are refused."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from data.dataset import Access, Dataset
from experiments.adapters.folder import Card, check_target, readme, write
from experiments.sweep import run
from experiments.sweep.cells import Job
from experiments.sweep.config import load
from experiments.sweep.grid import plan
from experiments.sweep.methods import METHODS, fit_lora, prompt_of
from experiments.sweep.provenance import notes
from experiments.sweep.workers import one_thread_on_a_cpu
from kshot.checks import folder_of
from kshot.errors import InputError
from kshot.files import remove_stale

METHOD = "vlm-lora"
# settings that no training depends on
TEST_SETTINGS = (
    *("backbone", "readout", "image_size", "vlm_features"),
    *("limit_test", "shuffle_test", "calibration", "answer_tokens"),
)


@dataclass(frozen=True)
class Step:
    """One optimizer step of several. loss: of its batch, a training image on average."""

    number: int
    steps: int
    loss: float


def plan_training(
    dataset: str,
    shots: int,
    seed: int,
    settings: Mapping[str, Any],
    *,
    device: str = "cpu",
    access: Access | None = None,
) -> tuple[Job, Dataset]:
    """The cell of a sweep that is trained, checked as the sweep checks it, and its data set. settings: put over the
    demo's, as `kshot sweep` does. Raises InputError for one that training does not depend on."""
    if unused := [name for name in TEST_SETTINGS if name in settings]:
        raise InputError(f"{unused[0]} is for sweeps, which test; training does not depend on it: leave it out")
    values, model = dict(settings), settings.get("model")
    if model is not None and (Path(model) / "config.json").is_file():
        values["model"] = str(Path(model).resolve())  # wherever the adapter is used
    grid = {"name": "train", "datasets": (dataset,), "methods": (METHOD,), "shots": (shots,), "seeds": (seed,)}
    planned = plan(load("demo", grid, values), device=device, access=access)
    return replace(planned.jobs[0], device=device), planned.datasets[dataset]


def train(job: Job, dataset: Dataset, target: Path, *, force: bool = False) -> Iterator[Step]:
    """Train and write the adapter folder `target`, yielding each step when it is done; nothing is written before the
    last one. Raises InputError, before anything is computed, where the folder holds other things."""
    target = target.resolve()
    check_target(target, force=force)
    from vlm.service import connect

    with _temporary_folder(target) as state, one_thread_on_a_cpu(job.device):
        service: Any = connect("local", state_dir=state, device=job.device)
        try:
            task = run.task_of(job, dataset, [])
            s = job.settings
            client = service.create_lora_training_client(s.model, rank=s.rank, seed=task.seed).result()
            for number, loss in enumerate(fit_lora(client, task), 1):
                yield Step(number, task.steps, loss)
            prompt = prompt_of(client, task)
            path = client.save_weights_for_sampler("adapter").result().path
        finally:
            service.close()
        check_target(target, force=force)  # it may have been filled meanwhile
        trained = {**job.cell.identity, "data": dict(dataset.facts), "versions": run.versions(job)}
        card = Card(
            classes=dataset.classes,
            prompt=str(prompt.template),
            max_side=s.max_side,
            base_model=s.model,
            trained=trained,
        )
        text = readme(card, notes(s, set(METHODS[METHOD].settings)))
        write(target, folder_of(state, path), card, text)


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
