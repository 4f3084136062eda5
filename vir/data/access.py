"""How the bytes of a split's shards are reached."""

from __future__ import annotations

import functools
import os
import resource
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from vir.files import open_regular, pread


class Access(Protocol):
    """The bytes of numbered shards. Threads may share it, a forked process may continue to use it, and it can be
    pickled."""

    joins: int
    """Parts of a shard that lie at most so many bytes apart are worth one read; 0: each is read by itself."""

    @property
    def budget_bytes(self) -> int | None:
        """Of the cache that shards are kept in; None without one."""

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Exactly these bytes.

        Raises:
            OSError: this failed; another attempt may succeed.
            DataError: what can be tried was tried.
        """

    def read_at_hand(self, shard: int, offset: int, size: int) -> bytes | None:
        """The bytes, where the system has them in memory; else None. Never raises; waits at most for the opening."""

    def expect(self, shard: int, offset: int, size: int) -> None:
        """A hint that these bytes will be read soon. Never raises."""

    def forget(self) -> None:
        """Close what is open: after a failure, a new descriptor may work where a stale one fails."""

    def where(self, shard: int) -> str:
        """The place of a shard, for messages, without secrets."""


_NO_WAIT = getattr(os, "RWF_NOWAIT", 0)
"""Of Linux."""


class LocalShards:
    """Files. Those read last stay open, as many as half of the files that the process may open."""

    joins = 0
    budget_bytes: int | None = None

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)

    @functools.cached_property
    def _descriptor(self) -> Callable[[int], Descriptor]:
        # A descriptor that leaves the cache is closed when the last thread has read from it. The cached function does
        # not refer to `self`: such a cycle would keep all files open until the garbage collector runs.
        paths = self.paths
        return functools.lru_cache(maxsize=most_open())(lambda shard: Descriptor(open_regular(paths[shard])))

    def __getstate__(self) -> dict[str, tuple[Path, ...]]:
        return {"paths": self.paths}

    def read(self, shard: int, offset: int, size: int) -> bytes:
        # Kept in a variable while reading: another thread may remove it from the cache, which would close it.
        descriptor = self._descriptor(shard)
        return pread(descriptor.number, size, offset)

    def read_at_hand(self, shard: int, offset: int, size: int) -> bytes | None:
        if not _NO_WAIT:
            return None
        try:
            descriptor, found = self._descriptor(shard), bytearray(size)
            count = os.preadv(descriptor.number, [found], offset, _NO_WAIT)
        except OSError:  # EAGAIN: it would have to be waited for; EOPNOTSUPP: this file system cannot tell
            return None
        return bytes(found) if count == size else None

    def expect(self, shard: int, offset: int, size: int) -> None:
        with suppress(OSError):  # the read itself will tell
            self._descriptor(shard).expect(offset, size)

    def forget(self) -> None:
        self.__dict__.pop("_descriptor", None)

    def where(self, shard: int) -> str:
        return str(self.paths[shard])


def most_open() -> int:
    """The most shards that are kept open: the rest of the process's files have as much room again."""
    return max(1, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)


class Descriptor:
    """Of an open file; it is closed when there is no reference to this object any more."""

    def __init__(self, number: int) -> None:
        self.number = number

    def expect(self, offset: int, size: int) -> None:
        """A hint that these bytes will be read soon. Never raises."""
        with suppress(OSError):
            os.posix_fadvise(self.number, offset, size, os.POSIX_FADV_WILLNEED)

    def is_gone(self) -> bool:
        """Whether the file has no name any more: it takes room on the disk until it is closed."""
        return os.fstat(self.number).st_nlink == 0

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        close(self.number)


if __name__ == "__main__":
    raise SystemExit("vir.data.access is a part of the library; the program is vir-train")
