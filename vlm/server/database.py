"""One SQLite file in a folder that one process holds. Knows no tables: a schema is given to it.

Rows whose call has returned outlive the process, however it ends; a machine that loses power may lose the last ones
(WAL, synchronous=NORMAL), never the file.
"""

import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

from filelock import FileLock, Timeout

from kshot_errors import InputError, KshotError, RequestError

FILE = "server.sqlite3"
OLDEST = (3, 37, 0)  # of SQLite: strict tables and RETURNING
SETTINGS = (
    "journal_mode = WAL",
    "synchronous = NORMAL",
    "foreign_keys = ON",
    "wal_autocheckpoint = 4000",  # pages: 16 MB are written to disk at once, in some 40 ms
    "busy_timeout = 5000",
)


class Database:
    """The file in `folder`, made with `schema` where it is not there. From any thread; one statement at a time.

    Raises InputError where another process holds the folder or it cannot be written to, KshotError where the file is
    of another schema version or no database.
    """

    def __init__(self, folder: Path, schema: str, version: int) -> None:
        if sqlite3.sqlite_version_info < OLDEST:
            needed = ".".join(map(str, OLDEST))
            raise KshotError(f"this Python has SQLite {sqlite3.sqlite_version}; the server needs {needed} or later")
        self.path, self._mutex, self._lock = folder / FILE, Lock(), _held(folder)
        try:
            self._connection = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
            self._connection.row_factory = sqlite3.Row
            try:
                self._prepare(schema, version)
            except BaseException:
                self._connection.close()
                raise
        except sqlite3.Error as error:
            self._lock.release()
            raise KshotError(f"{self.path} cannot be used: {error}; move it away, or choose another --state") from error
        except BaseException:
            self._lock.release()
            raise

    def run(self, statement: str, values: Sequence[Any] | Mapping[str, Any] = ()) -> list[sqlite3.Row]:
        """The rows of one statement, which is a transaction of its own.

        Raises RequestError for a text or a number that SQLite cannot hold, KshotError where it fails: a full disk, a
        key that is there already, one that is missing.
        """
        try:
            with self._mutex:
                return self._connection.execute(statement, values).fetchall()
        except (UnicodeEncodeError, OverflowError) as error:
            raise RequestError(f"a value cannot be stored: {error}") from error
        except sqlite3.Error as error:
            raise KshotError(f"{self.path} did not take {' '.join(statement.split()[:3])}: {error}") from error

    def close(self) -> None:
        """Let go of the file and the folder."""
        with self._mutex:
            self._connection.close()
        self._lock.release()

    def _prepare(self, schema: str, version: int) -> None:
        for setting in SETTINGS:
            self._connection.execute(f"PRAGMA {setting}")
        found = self._connection.execute("PRAGMA user_version").fetchone()[0]
        if found == 0 and not self._connection.execute("SELECT 1 FROM sqlite_schema").fetchone():
            self._connection.executescript(f"BEGIN; {schema}; PRAGMA user_version = {version}; COMMIT;")
        elif found != version:
            raise KshotError(
                f"{self.path} has schema version {found} and this kshot reads {version}; use the kshot that wrote it, "
                "or choose another --state"
            )


def _held(folder: Path) -> FileLock:
    """The lock of a folder, which ends with its process."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".server.lock", blocking=False, thread_local=False)
        lock.acquire()
    except Timeout as error:
        raise InputError(f"another server uses the folder {folder}; stop it, or choose another --state") from error
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}; choose another --state") from error
    return lock
