"""What a store is: objects on a server, named by URL, read in parts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

from vir.addresses import shown
from vir.errors import DataError

MAX_BLOCK = 8 << 20
"""Bytes of a block of a whole download."""
MAX_CONNECTIONS = 64
"""Per process and server, kept open between reads: as many as threads may read at once."""


class StoreError(DataError):
    """A server that does not answer, refuses, or sends something else than it said. Names URL and way out."""


class MissingError(StoreError):
    """There is no such object."""


class Identity(NamedTuple):
    """Which bytes an object has, as far as its server tells without sending them."""

    size: int
    """In bytes."""
    tag: str
    """The ETag, else the time of the last change, else "": another one means other bytes."""
    ranged: bool = True
    """Whether parts of it can be read."""


class Store(Protocol):
    """One kind of server. Threads may share a store; a forked process may continue to use it.

    All reads retry what may pass, for `timeout` seconds in all without an answer, and go on from the byte at which an
    answer broke. All raise StoreError; MissingError where there is no such object. No message holds a secret.
    """

    def stat(self, url: str) -> Identity:
        """Size and tag of an object."""

    def read(self, url: str, offset: int, size: int, identity: Identity) -> bytes:
        """Exactly these bytes of the object that has this identity; StoreError where it has another one by now, or
        cannot be read in parts."""

    def blocks(self, url: str, identity: Identity) -> Iterator[bytes]:
        """All bytes of that object in order, in blocks of at most 8 MB, also where it cannot be read in parts."""

    def names(self, url: str) -> list[str] | None:
        """The sorted names of the objects right in this folder; None where the server does not tell."""


def check_part(url: str, offset: int, size: int, identity: Identity) -> None:
    """Raises StoreError where an object has no such bytes."""
    if not 0 <= offset <= offset + size <= identity.size:
        raise StoreError(f"{shown(url)} has {identity.size} bytes, so none at {offset} to {offset + size}: the index "
                         "is not of this file; make it anew")


def changed(url: str) -> StoreError:
    return StoreError(f"{shown(url)} has changed on the server since it was first seen; make its index anew, and leave "
                      "the files of a run as they are while it lasts")
