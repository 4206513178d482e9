"""What a caller of `experiments.sweep.grid.run_sweep` may do while a sweep runs."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from experiments.sweep.cells import EncodingJob, Job
    from experiments.sweep.grid import Plan
    from experiments.sweep.store import Results
    from experiments.sweep.workers import Failure


class Observer:
    """Called at each stage of a sweep. This one does nothing."""

    def planning(self) -> AbstractContextManager[Any]:
        """Around the reading of the data and the checks."""
        return nullcontext()

    def running(self, planned: "Plan", results: "Results", jobs: "Sequence[Job]") -> AbstractContextManager[Any]:
        """Around the run of these jobs: none, where the folder has all cells."""
        return nullcontext()

    def finished(self, job: "Job | EncodingJob", failure: "Failure | None", done: int, total: int) -> None:
        """After each job. done: cells of the sweep that are stored, of `total`."""

    def complete(self, planned: "Plan", results: "Results", content: dict[str, Any]) -> None:
        """After the last job, while the folder is still held for writing. content: of sweep.json."""
