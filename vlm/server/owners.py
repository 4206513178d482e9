"""Whose a request is, and which rows it reaches: with a key file, those that were made with the same key.

The guard puts the owner into the request's scope, endpoints take it as `Owned`, and whatever looks something up is
given it: what an owner does not reach is answered as what is not there, so that ids cannot be probed.
"""

import hashlib
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request


@dataclass(frozen=True)
class Owner:
    """The owner of a request. name: what the rows get that it makes: a digest of the key, None without a key file.
    everything: whether it reaches the rows of all: without a key file, with `--shared`, and at a signed address."""

    name: str | None = None
    everything: bool = True

    def reaches(self, name: str | None) -> bool:
        """Whether what has this owner may be seen and changed. What has none is everybody's: it was made before there
        was a key file, or put into the state folder by hand."""
        return self.everything or name in (None, self.name)


EVERYBODY = Owner()
NOBODY = Owner("", everything=False)  # whoever has no key that is accepted, at paths that need none


def owner_name(digest: bytes) -> str:
    """16 hex digits for a key's SHA-256, from which nobody gets that digest back."""
    return hashlib.sha256(b"owner " + digest).hexdigest()[:16]


async def owner_of(request: Request) -> Owner:
    """The owner that the guard has found; no request comes here without."""
    owner: Owner = request.scope["owner"]
    return owner


Owned = Annotated[Owner, Depends(owner_of)]
