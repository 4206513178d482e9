"""The list of saved checkpoints: registered when they are saved, found, deleted at once or when they expire.

The folders are written and read by the local service; the list is a table of the store.
"""

import json
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

from kshot.checks import KINDS, folder_of, path_in
from kshot.errors import DeniedError, MissingError
from kshot.files import remove_stale, set_aside
from kshot.untrusted import parse_json, read_file
from vlm.local.registry import OPTIMIZER, RECORD, expires_at, is_expired, set_ttl
from vlm.server.owners import Owner
from vlm.server.store import Store
from vlm.server.tables import Checkpoint, Run

log = logging.getLogger("kshot.server")


@contextmanager
def logged(what: str) -> Iterator[None]:
    """Around one part of the housekeeping: it may fail, and the others are done all the same."""
    try:
        yield
    except Exception:
        log.exception("housekeeping of %s failed; it is tried again", what)


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints below the state folder `root`."""

    root: Path
    store: Store

    def existing(self, path: str, owner: Owner, *, change: bool = False) -> Checkpoint:
        """The row of a checkpoint of this owner, or of a published one, which others read and do not change. Raises
        RequestError for what is no path, MissingError where there is none, DeniedError for a change of another's."""
        folder_of(self.root, path)
        row = self.store.get(Checkpoint, path)
        own = row is not None and owner.reaches(row.owner)
        if row is None or _expired(row) or not (own or row.public):
            raise MissingError(f"checkpoint {path} does not exist on this server, or not any more")
        if change and not own:
            raise DeniedError(f"checkpoint {path} was published with another key, and only that changes it")
        return row

    def last(self, run: str) -> str | None:
        """The path of the last checkpoint with which a run can go on."""
        rows = self.store.checkpoints(run, kind=KINDS[0])
        return next((row.path for row in rows if not _expired(row)), None)

    def register(self, path: str, metadata: dict[str, str] | None, owner: str | None) -> None:
        """Add a checkpoint that was saved."""
        self._add(path, folder_of(self.root, path), time.time(), metadata, owner)

    def set_ttl(self, path: str, ttl: int | None) -> None:
        """Delete a checkpoint in so many seconds, or never. Raises as `folder_of`, and RequestError for a time that is
        out of range."""
        set_ttl(folder_of(self.root, path), ttl)  # its record, which a service without a server reads
        self.store.update(Checkpoint, path, expires=None if ttl is None else time.time() + ttl)

    def remove_if_expired(self, path: str) -> None:
        """Delete an expired checkpoint, whose name is to be used again."""
        row = self.store.get(Checkpoint, path)
        if row is not None and _expired(row):
            self.remove(path)

    def remove(self, path: str) -> None:
        """Delete a checkpoint, from the list and from the disk. Raises as `folder_of`."""
        folder = folder_of(self.root, path)
        self.store.remove(Checkpoint, path)
        if folder.is_dir():  # it is renamed at once; deleting the files may take long
            Thread(target=shutil.rmtree, args=(set_aside(folder), True), daemon=True).start()

    def remove_expired(self, now: float) -> None:
        """Delete all that have expired."""
        for path in self.store.expired(now):
            with logged(f"checkpoint {path}, which has expired,"):
                folder = folder_of(self.root, path)
                if is_expired(folder, now) or not folder.is_dir():
                    self.remove(path)
                else:  # somebody else gave it more time
                    self.store.update(Checkpoint, path, expires=expires_at(parse_json(read_file(folder / RECORD))))

    def reconcile(self) -> None:
        """Make the list agree with the disk: a server may have been killed between the two writes."""
        folders = dict(self._folders())
        for row in self.store.checkpoints():
            if row.path not in folders:
                self.store.remove(Checkpoint, row.path)
        for path, folder in folders.items():
            if self.store.get(Checkpoint, path) is None:
                try:
                    run = self.store.get(Run, path.removeprefix("tinker://").partition("/")[0])
                    created = min(max(0.0, folder.stat().st_mtime), time.time())
                    self._add(path, folder, created, None, run.owner if run else None)
                except (OSError, ValueError, KeyError, TypeError) as error:
                    log.warning("checkpoint %s is damaged (%s) and left out of the list", path, error)

    def _folders(self) -> Iterator[tuple[str, Path]]:
        for kind in KINDS:
            for parent in self.root.glob(f"*/{kind}"):
                remove_stale(parent / "*")
                for folder in parent.iterdir():
                    path = path_in(self.root, folder)
                    if path is not None and (folder / RECORD).is_file():
                        yield path, folder

    def _add(
        self,
        path: str,
        folder: Path,
        created: float,
        metadata: dict[str, str] | None,
        owner: str | None,
    ) -> None:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        run, kind, name = path.removeprefix("tinker://").split("/")
        self.store.put_checkpoint(
            Checkpoint(
                path=path,
                run=run,
                kind=kind,
                name=name,
                created=created,
                size_bytes=sum(file.stat().st_size for file in folder.iterdir()),
                user_metadata=metadata if metadata is not None else record["user_metadata"],
                expires=expires_at(record),
                public=False,
                base_model=record["base_model"],
                lora=record["lora"],
                has_optimizer=(folder / OPTIMIZER).is_file(),
                owner=owner,
            )
        )


def _expired(row: Checkpoint) -> bool:
    return row.expires is not None and row.expires <= time.time()
