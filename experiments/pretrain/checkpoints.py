"""How a stage goes on after an interruption: all that its loop needs is on disk every few hundred steps."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from kshot.files import write_file


class Checkpoint:
    """The state of a training loop: weights, what optimizers remember of them, random generators. path: its file; None
    keeps nothing."""

    def __init__(
        self,
        path: Path | None,
        parameters: Sequence[nn.Parameter],
        optimizers: Sequence[torch.optim.Optimizer],
        generators: Sequence[torch.Generator],
    ) -> None:
        self._path, self._parameters = path, parameters
        self.optimizers, self._generators = optimizers, generators

    def save(self, step: int, seconds: float) -> None:
        """After `step` steps, which took that long. A file of before is replaced at once, never half."""
        if self._path is None:
            return
        state = {f"weight.{n}": parameter.detach().contiguous() for n, parameter in enumerate(self._parameters)}
        state |= {f"generator.{n}": each.get_state() for n, each in enumerate(self._generators)}
        for n, optimizer in enumerate(self.optimizers):
            for row, remembered in optimizer.state_dict()["state"].items():
                state |= {f"optimizer.{n}.{row}.{key}": tensor.contiguous() for key, tensor in remembered.items()}
        write_file(self._path, save(state, {"step": str(step), "seconds": str(seconds)}))

    def load(self) -> tuple[int, float]:
        """Put everything where it was; the step and the seconds then, or zeros where there is no file."""
        if self._path is None or not self._path.exists():
            return 0, 0.0
        state = load_file(self._path)
        with torch.no_grad():
            for n, parameter in enumerate(self._parameters):
                parameter.copy_(state[f"weight.{n}"])
        for n, generator in enumerate(self._generators):
            generator.set_state(state[f"generator.{n}"])
        for n, optimizer in enumerate(self.optimizers):
            whole = optimizer.state_dict()
            optimizer.load_state_dict(whole | {"state": _remembered(state, f"optimizer.{n}.")})
        return progress(self._path)


def progress(path: Path) -> tuple[int, float]:
    """The steps that a checkpoint is after, and the seconds they took; zeros where there is none."""
    if not path.exists():
        return 0, 0.0
    with safe_open(path, "pt") as file:
        facts = file.metadata()
    return int(facts["step"]), float(facts["seconds"])


def _remembered(state: dict[str, Tensor], prefix: str) -> dict[int, dict[str, Tensor]]:
    """Row of the parameter → what is remembered of it, as `Optimizer.state_dict` has it."""
    rows: dict[int, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        if name.startswith(prefix):
            row, key = name.removeprefix(prefix).split(".")
            rows.setdefault(int(row), {})[key] = tensor
    return rows
