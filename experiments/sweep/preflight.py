"""What is checked once before the first cell: keys, and that the weights of every model can be had. A model that is
nowhere is one line in seconds, not an error in each cell. (Data sets are read by the plan; room is checked by
`experiments.plan`.)"""

from collections.abc import Sequence

from baselines import hub as hub_backbones
from experiments.sweep.cells import Job
from experiments.sweep.methods import METHODS
from kshot.errors import InputError
from vlm import models


def check_key(service: str) -> None:
    """Raise InputError for the hosted service without a key: its SDK would go on asking."""
    if service != "tinker":
        return
    from tinker import auth

    if not auth.tinker_has_credentials():
        raise InputError(
            "the service tinker needs a key; set TINKER_API_KEY, or run `kshot serve` and give its address"
        )


def check_weights(jobs: Sequence[Job]) -> None:
    """Raise ModelError where the weights that these jobs load on this machine are neither here nor, as far as it says,
    on the hub. Nothing is fetched but what is small."""
    for name in _vlms(jobs):
        models.check_weights(name)
    for name in _backbones(jobs):
        hub_backbones.check_weights(name)


def fetch_weights(jobs: Sequence[Job]) -> None:
    """Fetch what these jobs load on this machine, once for all workers. Raises ModelError."""
    for name in _vlms(jobs):
        models.weights(name)
    for name in _backbones(jobs):
        hub_backbones.fetch(name)


def _vlms(jobs: Sequence[Job]) -> list[str]:
    used = (job for job in jobs if job.service == "local" and METHODS[job.cell.method].uses_vlm)
    return [*dict.fromkeys(job.settings.model for job in used)]


def _backbones(jobs: Sequence[Job]) -> list[str]:
    return [*dict.fromkeys(job.settings.backbone for job in jobs if METHODS[job.cell.method].uses_backbone)]
