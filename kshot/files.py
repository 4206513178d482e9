"""Files that are complete or not there: written to a temporary name in the same folder, then renamed.

Also text as other programs write it, the cache folder, fingerprints of files and the processor, for records.
"""

import codecs
import ctypes
import hashlib
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

WHOLE, BLOCKS, BLOCK = 16 << 20, 64, 4096  # bytes read whole; blocks read of more; bytes in a block
STALE = 3600  # seconds
HERE, EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux' renameat2
TEMPORARY = ".tmp"  # the end of every temporary name


def cache_folder() -> Path:
    """kshot's folder in the user's cache: KSHOT_CACHE, or kshot below XDG_CACHE_HOME or ~/.cache."""
    if chosen := os.environ.get("KSHOT_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kshot"


def decoded_text(content: bytes) -> str | None:
    """Text in UTF-8 or, where it begins with its mark, in UTF-16, as PowerShell writes it; None for what is no text."""
    encoding = "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError:
        return None
    return None if "\0" in text else text


def write_file(path: Path, content: bytes) -> Path:
    """Write a file whole, replacing one that is there; returns its path. Raises OSError."""
    temporary = _temporary(path)
    try:
        temporary.write_bytes(content)
        return temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_folder(target: Path, fill: Callable[[Path], None]) -> Path:
    """Make the folder `target` with what `fill` puts into it, unless it is there; returns it. Raises OSError.

    Processes may do this side by side: the first to finish wins, and all must write the same.
    """
    if target.is_dir():
        return target
    temporary = _temporary(target)
    temporary.mkdir(parents=True)
    try:
        fill(temporary)
        temporary.rename(target)
    except OSError:
        if not target.is_dir():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def replace_folder(target: Path, fill: Callable[[Path], None]) -> Path:
    """Make the folder `target` with what `fill` puts into it, in place of one that is there. Raises OSError; the old
    one then stays. On Linux there is no moment without either; elsewhere a process killed between two renames leaves
    both under temporary names."""
    new, old = _temporary(target), _temporary(target)
    new.mkdir(parents=True)
    try:
        fill(new)
        if target.exists() and _exchange(new, target):
            return target
        if target.exists():
            target.rename(old)
        try:
            new.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    return target


def _exchange(one: Path, other: Path) -> bool:
    """Let two files or folders change places at once, as renameat2 of Linux does; False where that is not offered."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    return rename is not None and rename(HERE, os.fsencode(one), HERE, os.fsencode(other), EXCHANGE) == 0


def set_aside(target: Path) -> Path:
    """Give a file or folder a temporary name, so that it is gone at once and can be deleted at leisure; returns it."""
    return target.rename(_temporary(target))


def remove_unfinished(folder: Path) -> None:
    """Take away what a killed writer left in `folder`; only its one writer may call this."""
    for path in folder.glob(f".*{TEMPORARY}"):
        path.unlink()


def remove_stale(target: Path) -> None:
    """Take away what killed makers of the folder `target` left beside it: what nobody has written to for an hour."""
    for path in target.parent.glob(f".{target.name}.*{TEMPORARY}"):
        try:
            newest = max(each.stat().st_mtime for each in (path, *path.rglob("*")))
        except OSError:  # its maker has just finished
            continue
        if time.time() - newest > STALE:
            shutil.rmtree(path, ignore_errors=True)


def facts_digest(facts: Mapping[str, Any]) -> str:
    """32 hex digits for facts that JSON can hold; what it cannot hold counts as its text."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def tensor_digest(tensors: Mapping[str, Any]) -> str:
    """SHA-256, in hex, over names, shapes, number formats and bytes of torch tensors, in the order of their names."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}\0{tuple(tensor.shape)}\0{tensor.dtype}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fingerprint(place: Path) -> str:
    """16 hex digits for a file, or for the files directly in a folder: their names, sizes and content.

    Of a file beyond 16 MB, 64 blocks of 4 KB spread over it stand for the content: reading all of a large model would
    take minutes. Weights of another training differ everywhere; an edit of a few tensors can go unseen.
    """
    digest = hashlib.sha256()
    inside = place.iterdir() if place.is_dir() else [place]
    for path in sorted(path for path in inside if path.is_file() and not path.name.startswith(".")):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            if size <= WHOLE:
                digest.update(file.read())
            for n in range(BLOCKS if size > WHOLE else 0):
                file.seek(n * (size - BLOCK) // (BLOCKS - 1))
                digest.update(file.read(BLOCK))
    return digest.hexdigest()[:16]


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid4().hex[:12]}{TEMPORARY}")


def processor() -> str:
    """The model of the processor where the system says it, else its family."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor())
