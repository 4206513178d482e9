"""Checkpoints that are encrypted for those who fetch them, as age does (https://age-encryption.org), by pyrage."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kshot.errors import RequestError

ENCRYPTED = ".age"  # the end of an encrypted file's name
MOST = 10  # recipients


def recipients(keys: Sequence[str]) -> list[Any]:
    """Those of age's own keys (age1...) and of SSH's public ones. Raises RequestError for what is none, for more than
    MOST, and where pyrage is not installed."""
    if not keys:
        return []
    try:
        import pyrage
    except ImportError as error:
        way_out = "install it with: pip install pyrage, or leave them out"
        raise RequestError(f"age_encryption_recipients need pyrage here; {way_out}") from error
    if len(keys) > MOST:
        raise RequestError(f"age_encryption_recipients has {len(keys)} keys; at most {MOST} may be given")
    kinds = {False: pyrage.x25519.Recipient, True: pyrage.ssh.Recipient}
    try:
        return [kinds[key.startswith("ssh-")].from_str(key) for key in keys]
    except pyrage.RecipientError as error:
        raise RequestError(f"age_encryption_recipients: a key is none of age's nor of SSH's ({error})") from error


def encrypt(folder: Path, to: Sequence[Any], kept: str) -> None:
    """Put FILE.age in place of each file, and beside the file `kept`."""
    import pyrage

    for file in sorted(folder.iterdir()):
        pyrage.encrypt_file(str(file), f"{file}{ENCRYPTED}", list(to))
        if file.name != kept:
            file.unlink()
