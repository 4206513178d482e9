"""The SDK's `RestClient` over the state folder of this process: the runs that saved something, and their checkpoints.

What only a service with accounts has, sessions, projects, billing, publishing, is not there.
"""

import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tinker import RestClient, types
from tinker.lib.public_interfaces.api_future import AwaitableConcurrentFuture as Future
from tinker.types.checkpoint import Checkpoint, CheckpointType
from tinker.types.cursor import Cursor

from kshot.checks import KINDS, folder_of, path_in
from kshot.errors import ModelError, RequestError
from kshot.files import remove_stale, set_aside
from kshot.untrusted import parse_json, read_file
from vlm.local.checkpoint import RECORD, expires_at, is_expired, set_ttl
from vlm.local.twins import with_async_twins, with_refusals
from vlm.models import MODELS

log = logging.getLogger(__name__)
TYPES: dict[str, CheckpointType] = dict(zip(KINDS, ("training", "sampler", "external"), strict=True))
Submit = Callable[..., Future[Any]]


@dataclass(frozen=True)
class _Saved:
    """A checkpoint on disk, its record read."""

    path: str
    folder: Path
    record: dict[str, Any]

    @property
    def parts(self) -> tuple[str, str, str]:
        """Run, kind and name."""
        run, kind, name = self.path.removeprefix("tinker://").split("/")
        return run, kind, name

    @property
    def listed(self) -> Checkpoint:
        _, kind, name = self.parts
        ends = expires_at(self.record)
        return Checkpoint(
            checkpoint_id=f"{kind}/{name}",
            checkpoint_type=TYPES[kind],
            time=datetime.fromtimestamp(self.folder.stat().st_mtime, UTC),
            tinker_path=self.path,
            size_bytes=sum(file.stat().st_size for file in self.folder.iterdir()),
            user_metadata=self.record["user_metadata"],
            expires_at=None if ends is None else datetime.fromtimestamp(ends, UTC),
        )


@with_refusals(RestClient)
@with_async_twins(
    awaited=(
        *("list_training_runs", "get_training_run", "get_training_run_by_tinker_path", "list_checkpoints"),
        *("list_user_checkpoints", "delete_checkpoint", "delete_checkpoint_from_tinker_path"),
        "set_checkpoint_ttl_from_tinker_path",
    )
)
class LocalRestClient:
    """Lists and deletes what is saved below `state`. submit: makes calls on the scheduler's thread."""

    def __init__(self, state: Path, submit: Submit) -> None:
        self._state, self._submit = state, submit

    def get_telemetry(self) -> None:
        """Nothing is reported to anybody."""

    def get_server_capabilities(self) -> Future[types.GetServerCapabilitiesResponse]:
        """The models with names of their own; any folder or hub id of a known family works besides."""
        return self._submit(capabilities)

    def list_training_runs(
        self, limit: int = 20, offset: int = 0, access_scope: str = "owned", project_id: str | None = None
    ) -> Future[types.TrainingRunsResponse]:
        """The runs that saved a checkpoint, the newest first."""

        _check_page(limit, offset)

        def runs() -> types.TrainingRunsResponse:
            every = sorted(self._runs(), key=lambda run: run.last_request_time, reverse=True)
            cursor = Cursor(offset=offset, limit=limit, total_count=len(every))
            return types.TrainingRunsResponse(training_runs=every[offset : offset + limit], cursor=cursor)

        return self._submit(runs)

    def get_training_run(self, training_run_id: str, access_scope: str = "owned") -> Future[types.TrainingRun]:
        """One of them. Raises ModelError where it saved nothing."""
        return self._submit(self._run, training_run_id)

    def get_training_run_by_tinker_path(
        self, tinker_path: str, access_scope: str = "owned"
    ) -> Future[types.TrainingRun]:
        """The run that saved a checkpoint."""
        return self._submit(lambda: self._run(self._one(tinker_path).parts[0]))

    def list_checkpoints(self, training_run_id: str) -> Future[types.CheckpointsListResponse]:
        """The checkpoints of a run, the newest first."""
        return self._submit(lambda: types.CheckpointsListResponse(checkpoints=self._listed(training_run_id)))

    def list_user_checkpoints(self, limit: int = 100, offset: int = 0) -> Future[types.CheckpointsListResponse]:
        """The checkpoints of all runs, the newest first."""

        _check_page(limit, offset)

        def checkpoints() -> types.CheckpointsListResponse:
            every = self._listed()
            cursor = Cursor(offset=offset, limit=limit, total_count=len(every))
            return types.CheckpointsListResponse(checkpoints=every[offset : offset + limit], cursor=cursor)

        return self._submit(checkpoints)

    def get_weights_info_by_tinker_path(self, tinker_path: str) -> Future[types.WeightsInfoResponse]:
        """Base model and LoRA of a checkpoint."""
        return self._submit(lambda: _weights_info(self._one(tinker_path)))

    def delete_checkpoint(self, training_run_id: str, checkpoint_id: str) -> Future[None]:
        """Delete a checkpoint by its run and `<kind>/<name>`."""
        return self.delete_checkpoint_from_tinker_path(f"tinker://{training_run_id}/{checkpoint_id}")

    def delete_checkpoint_from_tinker_path(self, tinker_path: str) -> Future[None]:
        """Delete a checkpoint. Raises ModelError where there is none."""
        return self._submit(self._delete, tinker_path)

    def set_checkpoint_ttl_from_tinker_path(self, tinker_path: str, ttl_seconds: int | None) -> Future[None]:
        """Let a checkpoint expire in so many seconds, or never. Raises RequestError for a time out of range."""
        return self._submit(lambda: set_ttl(self._one(tinker_path).folder, ttl_seconds))

    def _saved(self) -> Iterator[_Saved]:
        """All that is there; what has expired is deleted."""
        for kind in KINDS:
            for parent in self._state.glob(f"*/{kind}"):
                remove_stale(parent / "*")
                for folder in sorted(parent.iterdir()):
                    path = path_in(self._state, folder)
                    if path is None or not (folder / RECORD).is_file():
                        continue
                    if is_expired(folder):
                        _delete(folder)
                    elif saved := _read(path, folder):
                        yield saved

    def _one(self, path: str) -> _Saved:
        folder_of(self._state, path)  # which says what is no path
        found = next((saved for saved in self._saved() if saved.path == path), None)
        if found is None:
            raise _missing(path)
        return found

    def _delete(self, path: str) -> None:
        folder = folder_of(self._state, path)
        if not folder.is_dir():  # a damaged one is deleted too
            raise _missing(path)
        _delete(folder)

    def _listed(self, run: str | None = None) -> list[Checkpoint]:
        rows = [saved.listed for saved in self._saved() if run in (None, saved.parts[0])]
        return sorted(rows, key=lambda row: row.time, reverse=True)

    def _run(self, run: str) -> types.TrainingRun:
        found = next((each for each in self._runs() if each.training_run_id == run), None)
        if found is None:
            raise ModelError(f"training run {run} saved nothing in the state folder of this service")
        return found

    def _runs(self) -> Iterator[types.TrainingRun]:
        by_run: dict[str, list[_Saved]] = {}
        for saved in self._saved():
            by_run.setdefault(saved.parts[0], []).append(saved)
        for run, all_saved in by_run.items():
            rows = sorted((saved.listed for saved in all_saved), key=lambda row: row.time)
            last = {row.checkpoint_type: row for row in rows}
            yield types.TrainingRun(
                training_run_id=run,
                base_model=all_saved[0].record["base_model"],
                model_owner="local",
                is_lora=True,
                lora_rank=all_saved[0].record["lora"]["rank"],
                last_request_time=rows[-1].time,
                last_checkpoint=last.get("training"),
                last_sampler_checkpoint=last.get("sampler"),
                user_metadata=all_saved[0].record.get("run_metadata", all_saved[0].record["user_metadata"]),
            )


def _read(path: str, folder: Path) -> _Saved | None:
    """None for a checkpoint that is damaged, which is logged."""
    try:
        saved = _Saved(path, folder, parse_json(read_file(folder / RECORD)))
        _ = saved.listed, _weights_info(saved)
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("checkpoint %s is damaged (%s) and left out of the list", path, error)
        return None
    return saved


def capabilities() -> types.GetServerCapabilitiesResponse:
    """The models with names of their own."""
    return types.GetServerCapabilitiesResponse(supported_models=[types.SupportedModel(model_name=n) for n in MODELS])


def _check_page(limit: int, offset: int) -> None:
    if limit < 1 or offset < 0:
        raise RequestError(f"limit {limit} must be 1 or more, and offset {offset} 0 or more")


def _missing(path: str) -> ModelError:
    return ModelError(f"checkpoint {path} does not exist in the state folder of this service")


def _weights_info(saved: _Saved) -> types.WeightsInfoResponse:
    lora = saved.record["lora"]
    trained = {name: lora[name] for name in ("train_unembed", "train_mlp", "train_attn")}
    return types.WeightsInfoResponse(
        base_model=saved.record["base_model"], is_lora=True, lora_rank=lora["rank"], **trained
    )


def _delete(folder: Path) -> None:
    shutil.rmtree(set_aside(folder))
