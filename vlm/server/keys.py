"""Who may ask: API keys, kept as SHA-256 and compared in constant time. Knows no HTTP.

A key file has one key a line, as it is or as `sha256:` and the 64 hex digits of its SHA-256; lines that begin with #
are left out. A key is printable ASCII without spaces, as HTTP headers carry it; the SDK insists on keys that begin
with tml-.
"""

import hashlib
import hmac
import re
from dataclasses import dataclass
from pathlib import Path

from kshot_errors import InputError

SHORTEST = 16  # characters; what is shorter can be guessed
HASHED = "sha256:"


@dataclass(frozen=True)
class Keys:
    """digests: of the keys that are accepted; None accepts any key, but not none."""

    digests: tuple[bytes, ...] | None = None

    @classmethod
    def read(cls, path: Path) -> "Keys":
        """The keys of a file. Raises InputError where it cannot be read, has none, or has one that is too short."""
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"key file {path} cannot be read ({error}); give one with a key a line") from error
        written = [(number, line.strip()) for number, line in enumerate(lines, 1)]
        digests = [_digest(path, number, line) for number, line in written if line and not line.startswith("#")]
        if not digests:
            raise InputError(f"key file {path} has no key; write one a line, of {SHORTEST} characters or more")
        return cls(tuple(digests))

    def accept(self, key: str) -> bool:
        """Whether a client with this key may ask. Takes as long for a wrong key as for a right one."""
        if self.digests is None:
            return bool(key)
        given = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
        return sum(hmac.compare_digest(given, digest) for digest in self.digests) > 0  # not any(): all are compared


def _digest(path: Path, number: int, line: str) -> bytes:
    if line.startswith(HASHED):
        digits = line.removeprefix(HASHED)
        if not re.fullmatch(r"[0-9a-fA-F]{64}", digits):
            raise InputError(f"key file {path}, line {number}: after {HASHED} come 64 hex digits, as sha256sum prints")
        return bytes.fromhex(digits)
    if not re.fullmatch(r"[!-~]*", line):
        raise InputError(f"key file {path}, line {number}: a key is printable ASCII without spaces")
    if len(line) < SHORTEST:
        raise InputError(
            f"key file {path}, line {number}: a key has {SHORTEST} characters or more, this has {len(line)}"
        )
    return hashlib.sha256(line.encode()).digest()
