"""The original files of a data set as its authors published them: found, checked, read member by member.

Nothing is unpacked to disk, so no name in an archive can lead out of a folder. How many members an archive has, and how
large they are together, is bounded before they are read.
"""

import hashlib
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from data.dataset import SourceNames
from kshot.errors import DatasetError
from kshot.hub import translated
from kshot.untrusted import read_file

MEMBER = 256 << 20  # bytes; the largest file that is read from an archive
TARS = (".tar.gz", ".tgz", ".tar")
HEADER = 1 << 20  # bytes; likewise the longest name
MEMBERS = 1 << 20  # of an archive; the largest benchmark has 16,185 images
DIRECTORY = 46 * MEMBERS  # bytes of a zip's list of members, of which each takes 46 and its name
# Images are compressed already, so an archive of them is as large as they are: it may unpack to so many times its size,
# and to so many bytes besides, for the lists and labels of small ones.
TIMES, BESIDES = 10, 64 << 20


@dataclass(frozen=True)
class SourceFiles:
    """The original files of a data set in the folder root. Every method raises DatasetError where one is missing."""

    root: Path
    files: Mapping[str, SourceNames]
    url: str

    def path(self, key: str) -> Path:
        """Where the file is. Raises DatasetError where it is missing."""
        for name in self.files[key]:
            if (path := self.root / name).is_file() or path.is_dir():
                return path
            if path.exists():  # a pipe would be read for ever
                raise DatasetError(f"{path} is not a regular file; put the file of {self.url} there")
        wanted = " nor ".join(self.files[key])
        raise DatasetError(f"there is no {wanted} in {self.root}; --root names the folder of the files of {self.url}")

    def members(self, key: str) -> Iterator[tuple[str, bytes]]:
        """(name, content) of every file in it: "top/folder/file", whether it is an archive or unpacked."""
        path = self.path(key)
        with _readable(path):
            if path.is_dir():
                yield from _of_folder(path)
                return
            room = _Room(path, TIMES * path.stat().st_size + BESIDES, MEMBERS)
            if path.suffix == ".zip":
                yield from _of_zip(path, room)
            else:
                with path.open("rb") as file:
                    yield from _of_tar(file, room)

    def read(self, key: str, name: str) -> bytes:
        """The member of that name, in whatever folder of the archive; the file itself where that is its name."""
        if (path := self.path(key)).name == name and path.is_file():
            with _readable(path):
                return read_file(path, MEMBER)
        for member, content in self.members(key):
            if member.rpartition("/")[2] == name:
                return content
        raise DatasetError(f"{self.path(key)} has no {name}; it is not the file of {self.url}")

    def checksums(self) -> dict[str, str]:
        """File name → MD5, without what is an unpacked folder."""
        return {path.name: _md5(path) for key in self.files if (path := self.path(key)).is_file()}

    def identity(self) -> str:
        """16 hex digits that change when a file does: of names, sizes and times, since reading all takes minutes."""
        digest = hashlib.sha256()
        for path in map(self.path, self.files):
            for file in [path] if path.is_file() else sorted(path.rglob("*")):
                stat = file.lstat()
                digest.update(f"{file.relative_to(path.parent)}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()[:16]


def modified(files: Mapping[str, SourceNames], checksums: Mapping[str, str]) -> list[str]:
    """The names of the files whose MD5 is not that of the published ones."""
    known = {name: md5 for names in files.values() for name, md5 in names.items() if md5}
    return sorted(name for name, md5 in checksums.items() if known.get(name, md5) != md5)


def _readable(path: Path) -> AbstractContextManager[None]:
    """What is wrong with a file, as a DatasetError."""
    return translated(lambda error: DatasetError(f"{path} is broken ({error}); download it again"))


def _of_folder(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
            raise DatasetError(f"the link {path} leads out of {folder}; put the file itself there")
        if path.is_symlink() and not path.exists():
            raise DatasetError(f"the link {path} leads nowhere; remove it")
        if path.is_file():
            _check_size(path, path.stat().st_size)
            yield path.relative_to(folder.parent).as_posix(), read_file(path, MEMBER)


@dataclass
class _Room:
    """What is left to read of an archive. size: bytes."""

    path: Path
    size: int
    members: int

    def take(self, name: str, size: int) -> None:
        """Raises DatasetError for a member that is too large, or where all together are too large or too many."""
        _check_size(self.path / name, size)
        self.size, self.members = self.size - size, self.members - 1
        if self.size < 0 or self.members < 0:
            limit = f"{TIMES} times its own size and {BESIDES:,} bytes" if self.size < 0 else f"{MEMBERS:,} members"
            raise DatasetError(f"{self.path} unpacks to more than {limit}; get the original archive")


def _of_tar(file: IO[bytes], room: _Room) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(fileobj=file, mode="r|*", tarinfo=_Member) as archive:
        for member in archive:
            room.take(member.name, member.size)
            if member.issparse():  # holes cost an archive nothing
                raise DatasetError(f"{room.path / member.name} is a sparse file, not one of images; remove it")
            if member.isfile() and (opened := archive.extractfile(member)):
                yield member.name.removeprefix("./"), opened.read()


class _Member(tarfile.TarInfo):
    """A member whose long names are of a sane length: tarfile reads them whole, before anything else is known."""

    def _proc_member(self, archive: tarfile.TarFile) -> Any:
        if self.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) and self.size > HEADER:
            raise tarfile.ReadError(f"a header of {self.size:,} bytes")
        return super()._proc_member(archive)  # type: ignore[misc]


def _of_zip(path: Path, room: _Room) -> Iterator[tuple[str, bytes]]:
    """The members; those of an archive in the archive as well."""
    with path.open("rb") as file:
        end = zipfile._EndRecData(file)  # type: ignore[attr-defined]
    if end and end[5] > DIRECTORY:  # the size of the list, all of which zipfile reads first
        raise DatasetError(f"{path} has more than {MEMBERS:,} members; get the original archive")
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if not info.filename.endswith(TARS):
                room.take(info.filename, info.file_size)  # more than it says is never read of a member
        for info in archive.infolist():
            if info.filename.endswith(TARS):
                with archive.open(info) as inner:
                    yield from _of_tar(inner, room)
            elif not info.is_dir():
                yield info.filename, archive.read(info)


def _check_size(path: Path, size: int) -> None:
    if size > MEMBER:
        raise DatasetError(f"{path} has {size:,} bytes, more than the {MEMBER:,} of a file of images; remove it")


def _md5(path: Path) -> str:
    with _readable(path), path.open("rb") as file:
        # As the authors published it: against damage and mix-ups, not against an attacker.
        return hashlib.file_digest(file, partial(hashlib.md5, usedforsecurity=False)).hexdigest()
