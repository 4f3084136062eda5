"""Brings the shards that a node will need next into its cache, ahead of its readers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np

from vir import launcher
from vir.data.cache import ChecksumError, NoRoomError, Outcome, Uses
from vir.data.order import InOrder, SampleOrder
from vir.data.reader import Reader, ShardReader
from vir.data.remote_shards import CachedShards
from vir.data.traffic import Needs, NextUse, fitting, node_shards
from vir.errors import DataError
from vir.log import log

AT_ONCE = 8
"""Downloads at the same time."""

_SPANS = 8
"""Of an epoch: so much of the order is computed at once; it looks ahead for at least an epoch."""

_PAUSE_S = 0.1
_POLL_S = 2.0
"""After this time it looks again for shards that another run was downloading."""
_PENALTY_S = 60.0
"""After a failure; meanwhile the shard is read in parts."""
_LOOK_S = 60.0
"""After this time it looks whether a shard is still in the cache, and notes there that it is wanted."""
_AGAIN_S = 3600.0
"""A shard that another run has removed from the cache is not downloaded again before that: both would go on for ever.
"""


class Prefetcher:
    """A thread that downloads what is needed soonest, as long as all that is needed before fits in the budget too.

    One process of a node has one. It begins with the first `advance`, in the process that calls it, ends with that
    process or by `close`, and never raises there: what fails is told once, and the readers read parts from the server.

    Args:
        uses: from two steps to what this node needs in [first, last); see traffic.node_shards.
        shard_sizes: samples of each shard.
        steps_per_epoch: rounded up.
        last_step: the run ends before it.
        spares_others: nothing goes that others have opened lately.
    """

    def __init__(self, cached: CachedShards, uses: Callable[[int, int], Needs], shard_sizes: tuple[int, ...], *,
                 global_batch_size: int, steps_per_epoch: int, last_step: int, spares_others: bool = False) -> None:
        self._cached, self._spares_others = cached, spares_others
        self._ahead = _Ahead(uses, len(shard_sizes), steps_per_epoch, last_step)
        self._sizes = np.asarray(shard_sizes)
        self._bytes = np.array([entry.size for entry in cached.entries], np.int64)
        self._global_batch_size = global_batch_size
        self._step = -1
        self._wake, self._closed = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._under_way: dict[int, threading.Thread] = {}
        self._numbers = {entry.name: shard for shard, entry in enumerate(cached.entries)}
        self._look_at: dict[int, float] = {}
        self._again_at: dict[int, float] = {}
        self._checksums: set[int] = set()
        self._told: set[str] = set()

    def advance(self, position: int) -> None:
        """The caller serves the sample at this position now, so nothing long before it is needed. Never waits."""
        step = position // self._global_batch_size
        if step <= self._step or self._closed.is_set():
            return
        self._step = step
        self._wake.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
            try:
                self._thread.start()
            except RuntimeError as error:
                self._tell("thread", f"nothing is downloaded ahead: {error}")
                self._closed.set()

    def close(self, patience_s: float = 0.0) -> None:
        """Begin no more downloads, and wait so long for those that are under way."""
        self._closed.set()
        self._wake.set()
        end = time.monotonic() + patience_s
        for thread in [self._thread, *list(self._under_way.values())]:
            if thread is not None and thread.is_alive():
                thread.join(max(0.0, end - time.monotonic()))

    def _run(self) -> None:
        while not self._closed.is_set():
            self._wake.clear()
            try:
                self._begin_downloads()
            except Exception as error:  # a defect in here slows a run down, but is no reason to end it
                self._tell("defect", f"nothing more is downloaded ahead: {type(error).__name__}: {error}")
                return
            self._wake.wait(_POLL_S)
            self._closed.wait(_PAUSE_S)  # a small batch takes a few milliseconds

    def _begin_downloads(self) -> None:
        # A process that lags behind may still read what this one was done with a step ago.
        step = max(0, self._step - 1)
        next_use = self._ahead.seen_from(step)
        needed = next_use.in_order(step)
        worth = next_use.worth_a_download(step, self._sizes)
        uses = Uses(self._numbers.keys(), [self._cached.entries[shard].name for shard in needed], self._spares_others)
        cache = self._cached.cache
        room = cache.room()
        # What is cached and no longer worth a download is still needed, and does not make room.
        fit = fitting(needed, self._bytes, room)
        if room < min(cache.budget_bytes, self._bytes.sum()):
            self._tell("small", f"the disk of the cache {cache.folder} has room for only {room} of the "
                                f"{cache.budget_bytes} bytes that the cache may have; make room there, or give another "
                                "--data.cache")
        elif worth.any() and not len(fit):
            self._tell("room", f"the cache {cache.folder} has {room} bytes, too few for one shard; all is read in "
                               "parts from the server; raise --data.cache_bytes")
        for shard in fit[worth[fit]].tolist():
            if len(self._under_way) >= AT_ONCE or self._closed.is_set():
                return
            if shard not in self._under_way and self._is_due(shard):
                thread = threading.Thread(target=self._download, args=(shard, uses), name="download", daemon=True)
                self._under_way[shard] = thread
                thread.start()

    def _is_due(self, shard: int) -> bool:
        now = time.monotonic()
        if self._look_at.get(shard, 0.0) > now:
            return False
        self._look_at[shard] = now + _LOOK_S  # before it is found, after which another thread may let it go
        if self._cached.cache.touch(self._cached.entries[shard]):
            return False
        self._look_at.pop(shard, None)
        return self._again_at.get(shard, 0.0) <= now

    def _download(self, shard: int, uses: Uses) -> None:
        self._again_at[shard] = time.monotonic() + _AGAIN_S  # before it is there, where another thread may let it go
        try:
            outcome = self._cached.download(shard, uses, self._let_go)
            wait = _POLL_S if outcome is Outcome.LOCKED else 0.0
        except Exception as error:
            outcome, wait = None, self._wait_after(shard, error)
        if outcome is not Outcome.DOWNLOADED:
            self._again_at.pop(shard, None)
        if wait:  # else it is looked at in the next round: what has come may have gone again by now
            self._look_at[shard] = time.monotonic() + wait
        del self._under_way[shard]
        self._wake.set()

    def _wait_after(self, shard: int, error: Exception) -> float:
        """Tell what has failed; the seconds after which the shard is tried again."""
        if isinstance(error, NoRoomError):  # until what is under way has its name, or other runs have let go
            return _POLL_S
        if isinstance(error, ChecksumError) and shard not in self._checksums:
            self._checksums.add(shard)
            return 0.0
        if isinstance(error, ChecksumError):  # what readers get is checked too, and told sample by sample
            self._tell("checksum", f"{error}; it is read in parts instead of being cached")
            return float("inf")
        if isinstance(error, DataError):  # readers will tell, if it lasts
            self._tell("store", f"{error}; it is not cached for {_PENALTY_S:.0f} s")
        elif isinstance(error, OSError):
            self._tell("disk", f"the cache {self._cached.cache.folder} takes no more: {error.strerror or error}; what "
                               "it has not is read in parts from the server; make room, or give another --data.cache")
        else:  # as in _run
            self._tell("defect", f"a shard was not downloaded ahead: {type(error).__name__}: {error}")
        return _PENALTY_S

    def _let_go(self, name: str) -> None:
        """What this run itself has removed may come back."""
        for times in (self._look_at, self._again_at):
            times.pop(self._numbers.get(name, -1), None)

    def _tell(self, kind: str, text: str) -> None:
        if kind not in self._told:
            self._told.add(kind)
            log.warning("%s", text)


def prefetcher_of(reader: Reader, order: SampleOrder | InOrder, *, last_step: int, global_batch_size: int, rank: int,
                  world_size: int) -> Prefetcher | None:
    """That of this machine, for the first of its processes, where the reader reads through a cache; else None.

    Args:
        rank: of this process; those after it are on the same machine.
        last_step: the batches end before it.
    """
    cached = reader.access if isinstance(reader, ShardReader) else None
    if not isinstance(cached, CachedShards) or launcher.local_rank() != 0:
        return None
    ranks = range(rank, min(rank + launcher.local_size(), world_size))

    def uses(first: int, last: int) -> Needs:
        return node_shards(order, reader.shard_sizes, first_step=first, last_step=last,
                           global_batch_size=global_batch_size, ranks=ranks, world_size=world_size)

    return Prefetcher(cached, uses, reader.shard_sizes, global_batch_size=global_batch_size,
                      steps_per_epoch=-(-order.num_samples // global_batch_size), last_step=last_step,
                      # An evaluation is short, and the training that it interrupts goes on with what is cached.
                      spares_others=isinstance(order, InOrder))


class _Ahead:
    """What is needed from a step on, for at least an epoch; computed in spans, as the run goes on."""

    def __init__(self, uses: Callable[[int, int], Needs], num_shards: int, steps_per_epoch: int,
                 last_step: int) -> None:
        self._uses, self._num_shards, self._last_step = uses, num_shards, last_step
        self._horizon, self._span = steps_per_epoch, -(-steps_per_epoch // _SPANS)
        self._needs: Needs | None = None
        self._next_use: NextUse | None = None

    def seen_from(self, step: int) -> NextUse:
        end = min(step + self._horizon, self._last_step)
        if self._needs is None or self._next_use is None or self._needs.last_step < end:
            self._needs = self._extended(step, max(end, step))
            self._next_use = NextUse(self._needs, self._num_shards)
        return self._next_use

    def _extended(self, step: int, end: int) -> Needs:
        last = max(step, min(end + self._span, self._last_step))
        if self._needs is None or self._needs.last_step < step:
            return self._uses(step, last)
        return self._needs.from_step(step).and_then(self._uses(self._needs.last_step, last))


if __name__ == "__main__":
    raise SystemExit("vir.data.prefetch is a part of the library; the program is vir-train")
