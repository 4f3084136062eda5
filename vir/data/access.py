"""How the bytes of a split's shards are reached."""

from __future__ import annotations

import functools
import os
import resource
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from vir.files import open_regular, pread


class Access(Protocol):
    """The bytes of numbered shards. Threads may share it, a forked process may continue to use it, and it can be
    pickled."""

    joins: int
    """Parts of a shard that lie at most so many bytes apart are worth one read; 0: each is read by itself."""

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Exactly these bytes.

        Raises:
            OSError: this failed; another attempt may succeed.
            DataError: what can be tried was tried.
        """

    def expect(self, shard: int, offset: int, size: int) -> None:
        """A hint that these bytes will be read soon. Never raises."""

    def forget(self) -> None:
        """Close what is open: after a failure, a new descriptor may work where a stale one fails."""

    def where(self, shard: int) -> str:
        """The place of a shard, for messages, without secrets."""
