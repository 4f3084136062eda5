"""Shards on a server, read in parts, or from a cache of whole shards where they are in it."""

from __future__ import annotations

import functools
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path

from vir.addresses import shown
from vir.data.access import Descriptor, most_open
from vir.data.cache import Cache, Entry, NoRoomError, Outcome, Uses, cache_name
from vir.data.stores.choose import open_store
from vir.data.stores.store import Identity, Store, StoreError
from vir.errors import DataError
from vir.files import pread

_JOINS = 1 << 17
_POLL_S = 0.05

_counters: weakref.WeakSet[Traffic] = weakref.WeakSet()


@dataclass(eq=False)
class Traffic:
    """What this process has fetched, and what it has removed from a cache. Threads may count at the same time."""

    downloads: int = 0
    """Of whole shards."""
    downloaded_bytes: int = 0
    ranged_reads: int = 0
    ranged_bytes: int = 0
    evictions: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __post_init__(self) -> None:
        _counters.add(self)

    def add(self, **counts: int) -> None:
        with self._lock:
            for name, count in counts.items():
                setattr(self, name, getattr(self, name) + count)

    def __reduce__(self) -> tuple[type[Traffic], tuple[int, ...]]:
        return Traffic, tuple(getattr(self, item.name) for item in fields(self) if item.name != "_lock")


def _new_locks() -> None:
    """After a fork, during which a thread of the parent may have been counting."""
    for traffic in _counters:
        traffic._lock = threading.Lock()


os.register_at_fork(after_in_child=_new_locks)


class RemoteShards:
    """An Access to shards on servers: each read asks for just these bytes.

    Args:
        urls, identities: of each shard.
        timeout: see Store, in seconds.
        open_store: from URL and timeout to the store that has it; called in each process that reads.
    """

    joins = _JOINS
    budget_bytes: int | None = None

    def __init__(self, urls: Sequence[str], identities: Sequence[Identity], timeout: float,
                 open_store: Callable[[str, float], Store] = open_store) -> None:
        self.urls, self.identities, self.timeout = tuple(urls), tuple(identities), timeout
        self.traffic = Traffic()
        self._open_store = open_store

    def read(self, shard: int, offset: int, size: int) -> bytes:
        data = self._store(shard).read(self.urls[shard], offset, size, self.identities[shard])
        self.traffic.add(ranged_reads=1, ranged_bytes=size)
        return data

    def blocks(self, shard: int) -> Iterator[bytes]:
        """All bytes of a shard; see Store.blocks."""
        return self._store(shard).blocks(self.urls[shard], self.identities[shard])

    def read_at_hand(self, shard: int, offset: int, size: int) -> bytes | None:
        return None

    def expect(self, shard: int, offset: int, size: int) -> None:
        """Nothing: a server has no read-ahead."""

    def forget(self) -> None:
        """Nothing: a store opens new connections by itself."""

    def where(self, shard: int) -> str:
        return shown(self.urls[shard])

    def _store(self, shard: int) -> Store:
        return self._open_store(self.urls[shard], self.timeout)


class CachedShards:
    """An Access to the same shards that reads those which are whole in a cache from there.

    A process that reads never waits for a download, except of a shard that its server does not send in parts: that one
    it downloads itself, or waits for the process that does.

    Args:
        folder, budget_bytes: of the Cache.
        sha256s: of each shard, where the manifest has it; none: of no shard.
    """

    joins = _JOINS

    def __init__(self, remote: RemoteShards, folder: Path, budget_bytes: int,
                 sha256s: Sequence[str | None] = ()) -> None:
        self.remote, self.cache = remote, Cache(folder, budget_bytes)
        self.traffic = remote.traffic
        self.entries = tuple(
            Entry(cache_name(url, identity, sha256), remote.where(shard), identity.size, sha256)
            for shard, (url, identity, sha256) in enumerate(zip(remote.urls, remote.identities,
                                                                sha256s or [None] * len(remote.urls))))
        self._names = frozenset(entry.name for entry in self.entries)
        self._open()

    @property
    def budget_bytes(self) -> int:
        return self.cache.budget_bytes

    def _open(self) -> None:
        self._descriptors: dict[int, Descriptor] = {}
        self._doubt = threading.local()
        self._renewed: set[int] = set()

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name not in ("_descriptors", "_doubt", "_renewed")}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._open()

    def read(self, shard: int, offset: int, size: int) -> bytes:
        if not self.remote.identities[shard].ranged:
            return self._read_whole(shard, offset, size)
        data = None if self._take_doubt() else self._cached(shard, offset, size)
        return self.remote.read(shard, offset, size) if data is None else data

    def read_at_hand(self, shard: int, offset: int, size: int) -> bytes | None:
        return None

    def expect(self, shard: int, offset: int, size: int) -> None:
        if (descriptor := self._descriptors.get(shard)) is not None:
            descriptor.expect(offset, size)

    def forget(self) -> None:
        """Close what is open. The next read of this thread goes to the server, for a disk may have changed bytes."""
        self._descriptors.clear()
        self._doubt.here = True

    def _take_doubt(self) -> bool:
        """Whether this thread has forgotten since its last read."""
        doubts, self._doubt.here = getattr(self._doubt, "here", False), False
        return doubts

    def where(self, shard: int) -> str:
        return self.entries[shard].where

    def download(self, shard: int, uses: Uses = Uses(), evicted: Callable[[str], None] = lambda name: None) -> Outcome:
        """Bring a shard into the cache; see Cache.fill."""
        def gone(name: str) -> None:
            self.traffic.add(evictions=1)
            evicted(name)

        outcome = self.cache.fill(self.entries[shard], functools.partial(self.remote.blocks, shard), uses, gone)
        if outcome is Outcome.DOWNLOADED:
            self.traffic.add(downloads=1, downloaded_bytes=self.entries[shard].size)
        return outcome

    def _cached(self, shard: int, offset: int, size: int) -> bytes | None:
        """These bytes from the cache; None where it has them not, or its disk fails."""
        with suppress(OSError):
            return self._from_cache(shard, offset, size)
        return None

    def _from_cache(self, shard: int, offset: int, size: int) -> bytes | None:
        """These bytes; None where the shard is not there. Raises OSError."""
        try:
            # Kept in a variable while reading: another thread may forget it, which would close it.
            descriptor = self._descriptors.get(shard) or self._opened(shard)
            return None if descriptor is None else pread(descriptor.number, size, offset)
        except OSError:
            self._descriptors.pop(shard, None)
            raise

    def _opened(self, shard: int) -> Descriptor | None:
        number = self.cache.open(self.entries[shard])
        if number is None:
            return None
        most = most_open()
        for other, descriptor in list(self._descriptors.items()):
            if len(self._descriptors) >= most or descriptor.is_gone():
                self._descriptors.pop(other, None)
        return self._descriptors.setdefault(shard, Descriptor(number))

    def _read_whole(self, shard: int, offset: int, size: int) -> bytes:
        """From a shard that comes whole or not at all."""
        entry, progress = self.entries[shard], time.time()
        if self._take_doubt():
            self._renew(shard)
        while True:
            try:
                if (data := self._from_cache(shard, offset, size)) is not None:
                    return data
            except OSError as error:
                if not self._renew(shard):
                    raise self._unkept(shard, error) from error
            if time.time() > progress + self.remote.timeout:
                raise StoreError(f"{entry.where} cannot be read in parts, and was not in the cache {self.cache.folder} "
                                 f"after {self.remote.timeout:g} s; raise --data.timeout or --data.cache_bytes")
            progress = max(progress, self._brought(shard))

    def _brought(self, shard: int) -> float:
        """Bring a shard into the cache, or wait a moment where others download; when bytes came, in seconds since 1970.
        """
        entry, awaited = self.entries[shard], None
        try:
            outcome = self.download(shard, Uses(self._names))
            if outcome is not Outcome.LOCKED:
                return time.time() if outcome is Outcome.DOWNLOADED else 0.0
            awaited = entry
        except NoRoomError:
            if entry.size > self.cache.room():  # whoever ends
                raise
        except OSError as error:
            raise self._unkept(shard, error) from error
        time.sleep(_POLL_S)
        return self.cache.progress(awaited)

    def _renew(self, shard: int) -> bool:
        """Whether a shard whose bytes are in doubt, or cannot be had, will come again: once in a process."""
        if shard in self._renewed:
            return False
        self._renewed.add(shard)
        self._descriptors.pop(shard, None)
        with suppress(OSError):  # the next read will tell
            self.cache.remove(self.entries[shard])
        return True

    def _unkept(self, shard: int, error: OSError) -> DataError:
        return DataError(f"{self.entries[shard].where} cannot be read in parts, and not be kept in the cache "
                         f"{self.cache.folder} either: {error.strerror or error}; make room there or give another "
                         "folder to --data.cache")


if __name__ == "__main__":
    raise SystemExit("vir.data.remote_shards is a part of the library; the program is vir-train")
