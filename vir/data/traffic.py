"""Which shards a node reads, and when: a pure function of the order, and with it what a cache of shards has to hold.

Only numbers go in and out. With lanes that are a multiple of the nodes and divide the global batch, each node reads
whole lanes, so an epoch's shards are shared out among the nodes and cut only where a lane ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Iterator, Sequence

import numpy as np

from vir.data.order import InOrder, SampleOrder

LANES, WINDOW = 64, 2500
"""Without a cache, or with one that has room for them."""

NEVER = np.iinfo(np.int64).max
"""The next use of a shard that is not needed any more."""

WORTH = 1 / 16
"""A shard of which a node needs a smaller part is read in parts. Where one epoch ends and the next begins in one step,
each node needs a few samples of its neighbours' lanes."""

_SHARE = 0.8
"""Of the budget may be the working set; the rest is room for what is downloaded ahead."""

_SHARDS_PER_LANE = 12
"""At least, where the nodes are not too many for it: each lane cuts a shard, which two nodes may then download."""

_HALVINGS = 6
"""Of the window, where the budget is small: to 39 samples."""

_SAMPLES_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Needs:
    """The shards that a node needs in steps [first_step, last_step): one row per step and shard, in order of step."""

    first_step: int
    last_step: int
    steps: np.ndarray  # [rows] int64
    shards: np.ndarray  # [rows] int64
    counts: np.ndarray  # [rows] int64, samples of that shard in that step

    def from_step(self, step: int) -> Needs:
        """Without the steps before this one."""
        first = int(np.searchsorted(self.steps, step))
        return Needs(max(step, self.first_step), self.last_step, self.steps[first:], self.shards[first:],
                     self.counts[first:])

    def until_step(self, step: int) -> Needs:
        """Without this step and those after it."""
        end = int(np.searchsorted(self.steps, step))
        return Needs(self.first_step, min(step, self.last_step), self.steps[:end], self.shards[:end], self.counts[:end])

    def and_then(self, later: Needs) -> Needs:
        """Those, and those of the steps that follow them."""
        assert later.first_step == self.last_step
        return Needs(self.first_step, later.last_step, np.concatenate([self.steps, later.steps]),
                     np.concatenate([self.shards, later.shards]), np.concatenate([self.counts, later.counts]))


def working_set(lanes: float, window: int, shard_sizes: Sequence[int]) -> float:
    """Shards that are in use at the same time, on average at most; `lanes` are those of a node for a node's."""
    return min(len(shard_sizes), lanes * (window / (sum(shard_sizes) / len(shard_sizes)) + 1))


def node_shards(order: SampleOrder | InOrder, shard_sizes: Sequence[int], *, first_step: int, last_step: int,
                global_batch_size: int, ranks: range, world_size: int) -> Needs:
    """What these ranks, those of one node, read in steps [first_step, last_step)."""
    needs, = shards_of_ranks(order, shard_sizes, first_step=first_step, last_step=last_step,
                             global_batch_size=global_batch_size, groups=[ranks], world_size=world_size)
    return needs


def shards_of_ranks(order: SampleOrder | InOrder, shard_sizes: Sequence[int], *, first_step: int, last_step: int,
                    global_batch_size: int, groups: Sequence[range], world_size: int) -> list[Needs]:
    """What each of these groups of ranks, a group for a node, reads in steps [first_step, last_step)."""
    per_rank = global_batch_size // world_size
    begin, end = per_rank * min(ranks.start for ranks in groups), per_rank * max(ranks.stop for ranks in groups)
    rows = [[_no_rows()] for _ in groups]
    for first, last in _spans(first_step, last_step, global_batch_size):
        shards = _shards_read(order, shard_sizes, first, last, global_batch_size, slice(begin, end))
        for found, ranks in zip(rows, groups):
            columns = slice(per_rank * ranks.start - begin, per_rank * ranks.stop - begin)
            found.append(_rows(first, shards[:, columns], len(shard_sizes)))
    return [Needs(first_step, last_step, *(np.concatenate(column) for column in zip(*found))) for found in rows]


def _spans(first_step: int, last_step: int, global_batch_size: int) -> Iterator[tuple[int, int]]:
    """[first, last) of spans of steps whose samples fit in memory."""
    length = max(1, _SAMPLES_AT_ONCE // global_batch_size)
    for first in range(first_step, last_step, length):
        yield first, min(first + length, last_step)


def _shards_read(order: SampleOrder | InOrder, shard_sizes: Sequence[int], first_step: int, last_step: int,
                 global_batch_size: int, columns: slice) -> np.ndarray:
    """[steps, columns] int64, the shard of each sample of each global batch, in the order in which ranks take them."""
    positions = np.stack([order.global_batch(step * global_batch_size, global_batch_size)[columns]
                          for step in range(first_step, last_step)])
    samples = order.samples(positions.reshape(-1)).reshape(positions.shape)
    return np.searchsorted(np.cumsum(shard_sizes), samples, side="right")


def _rows(first_step: int, shards: np.ndarray, num_shards: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps, shards and counts of the pairs that occur in [steps, samples] `shards`."""
    pairs = np.arange(len(shards), dtype=np.int64)[:, None] * num_shards + shards
    found, counts = np.unique(pairs, return_counts=True)
    steps, needed = np.divmod(found, num_shards)
    return first_step + steps, needed, counts.astype(np.int64)


def _no_rows() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.int64)


class NextUse:
    """When each shard is needed next, as seen from any of the steps of `needs`."""

    def __init__(self, needs: Needs, num_shards: int) -> None:
        self._first, self._span = needs.first_step, needs.last_step - needs.first_step + 1
        self._shards = np.arange(num_shards, dtype=np.int64)
        by_shard = np.lexsort((needs.steps, needs.shards))
        self._keys = (needs.shards * self._span + needs.steps - self._first)[by_shard]
        self._steps = np.append(needs.steps[by_shard], NEVER)
        self._before = np.concatenate([[0], np.cumsum(needs.counts[by_shard])])  # samples of the rows before each row
        self._ends = np.searchsorted(self._keys, (self._shards + 1) * self._span)

    def _rows(self, step: int) -> np.ndarray:
        """[shards] the first row of each shard from this step on; that of the next shard where it has none."""
        return np.searchsorted(self._keys, self._shards * self._span + min(max(step - self._first, 0), self._span - 1))

    def steps(self, step: int) -> np.ndarray:
        """[shards] int64, the first step from this one on that needs the shard, or NEVER."""
        rows = self._rows(step)
        return np.where(rows < self._ends, self._steps[rows], NEVER)

    def samples(self, step: int) -> np.ndarray:
        """[shards] int64, how many samples of the shard the steps from this one on need."""
        return self._before[self._ends] - self._before[self._rows(step)]

    def in_order(self, step: int) -> np.ndarray:
        """The shards that are still needed, those that are needed next first."""
        steps = self.steps(step)
        ordered = np.argsort(steps, kind="stable")
        return ordered[:np.count_nonzero(steps != NEVER)]

    def worth_a_download(self, step: int, shard_sizes: np.ndarray) -> np.ndarray:
        """[shards] bool: enough of it is still needed."""
        samples = self.samples(step)
        return (samples > 0) & (samples >= WORTH * shard_sizes)


def fitting(shards: np.ndarray, shard_bytes: np.ndarray, budget_bytes: float) -> np.ndarray:
    """As many of these shards, from the first on, as fit in the budget together."""
    return shards[:np.searchsorted(np.cumsum(shard_bytes[shards]), budget_bytes, side="right")]


@dataclass(frozen=True)
class Downloads:
    """What one node fetches in one epoch."""

    shards: int
    """Downloads of whole shards."""

    samples: int
    """Samples that are read in parts, because their shard is not worth a download or there is no room for it."""

    bytes: float
    """Of both; a sample has its share of its shard."""


def downloads(order: SampleOrder | InOrder, shard_sizes: Sequence[int], shard_bytes: Sequence[int], *, nodes: int,
              global_batch_size: int, budget_bytes: float | None, epoch: int = 0) -> list[Downloads]:
    """What each node fetches in the steps of one epoch, beginning with an empty cache.

    A shard is downloaded when it is needed and worth it; for room, the one goes whose next use is farthest.
    """
    first_step = epoch * order.num_samples // global_batch_size
    last_step = -(-(epoch + 1) * order.num_samples // global_batch_size)
    return [NodeCache(needs, shard_sizes, shard_bytes).fetched(budget_bytes)
            for needs in shards_of_ranks(order, shard_sizes, first_step=first_step, last_step=last_step,
                                         global_batch_size=global_batch_size, world_size=nodes,
                                         groups=[range(node, node + 1) for node in range(nodes)])]


class NodeCache:
    """What a node with these needs fetches, if its cache is empty before their first step."""

    def __init__(self, needs: Needs, shard_sizes: Sequence[int], shard_bytes: Sequence[int]) -> None:
        self.needs, self._sizes, self._bytes = needs, np.asarray(shard_sizes), np.asarray(shard_bytes)
        by_shard = np.argsort(needs.shards.astype(np.min_scalar_type(len(self._sizes))), kind="stable")
        shards, steps, counts = needs.shards[by_shard], needs.steps[by_shard], needs.counts[by_shard]
        ends = np.searchsorted(shards, shards, side="right")
        samples = np.concatenate([[0], np.cumsum(counts)])
        is_first = np.append(True, shards[1:] != shards[:-1])[:len(shards)]

        # Of each row: the next step that needs its shard, or NEVER; whether enough of it is needed from this step on.
        self._next_steps, self._worth = np.empty_like(steps), np.empty(len(steps), bool)
        self._next_steps[by_shard] = np.where(np.arange(len(steps)) + 1 < ends, np.append(steps, NEVER)[1:], NEVER)
        self._worth[by_shard] = samples[ends] - samples[:-1] >= WORTH * self._sizes[shards]

        self._firsts = by_shard[is_first & self._worth[by_shard]]
        lasts = by_shard[ends[is_first & self._worth[by_shard]] - 1]
        change = np.zeros(needs.last_step - needs.first_step + 1, np.int64)
        np.add.at(change, needs.steps[self._firsts] - needs.first_step, self._bytes[needs.shards[self._firsts]])
        np.add.at(change, needs.steps[lasts] - needs.first_step + 1, -self._bytes[needs.shards[lasts]])
        self.room = int(np.cumsum(change).max())
        """Bytes of the shards in use at once, at most: with a cache of as many each shard is downloaded once."""

    def fetched(self, budget_bytes: float | None, since: int = 0) -> Downloads:
        """From step `since` on."""
        return self.counted(*self.rows(budget_bytes), since)

    def rows(self, budget_bytes: float | None, until: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The rows of needs, of the steps before `until`, whose shards are downloaded, and those read in parts."""
        if budget_bytes is None or budget_bytes >= self.room:
            found = self._with_room()
        elif budget_bytes < self._bytes.min():
            found = np.empty(0, np.int64), np.arange(len(self.needs.steps))
        else:
            return self._without_room(budget_bytes, self.needs.last_step if until is None else until)
        steps = self.needs.steps
        return found if until is None else (found[0][steps[found[0]] < until], found[1][steps[found[1]] < until])

    def counted(self, whole: np.ndarray, in_parts: np.ndarray, since: int = 0) -> Downloads:
        """What these rows of step `since` and later ones come to."""
        steps, shards, counts = self.needs.steps, self.needs.shards, self.needs.counts
        whole, in_parts = whole[steps[whole] >= since], in_parts[steps[in_parts] >= since]
        per_sample = self._bytes[shards[in_parts]] / self._sizes[shards[in_parts]]
        return Downloads(len(whole), int(counts[in_parts].sum()),
                         float(self._bytes[shards[whole]].sum() + (counts[in_parts] * per_sample).sum()))

    def _with_room(self) -> tuple[np.ndarray, np.ndarray]:
        """As rows."""
        cached = np.zeros(len(self._sizes), bool)
        cached[self.needs.shards[self._firsts]] = True
        return self._firsts, np.flatnonzero(~cached[self.needs.shards])

    def _without_room(self, budget: float, until: int) -> tuple[np.ndarray, np.ndarray]:
        """The same where shards have to go that are still needed: row by row, for a step has few of them."""
        size_of, shards, worth = self._bytes.tolist(), self.needs.shards.tolist(), self._worth.tolist()
        # Those with the lowest ranks stay: that are needed soonest, of those in one step the ones that are there.
        width = 2 * len(size_of)
        arrival = (self.needs.steps * width + len(size_of) + self.needs.shards).tolist()
        ranks = np.where(self._next_steps == NEVER, -1, self._next_steps % NEVER * width + self.needs.shards).tolist()
        cached: dict[int, int] = {}
        used = 0
        whole: list[int] = []
        in_parts: list[int] = []
        end_row = np.searchsorted(self.needs.steps, until)
        bounds = np.flatnonzero(np.diff(self.needs.steps[:end_row], prepend=-1, append=-1)).tolist()
        for first, end in zip(bounds, bounds[1:]):
            missing = [row for row in range(first, end) if shards[row] not in cached]
            for row in missing:
                if worth[row]:
                    cached[shards[row]] = arrival[row]
                    used += size_of[shards[row]]
            if used > budget:
                by_rank = sorted(cached, key=cached.__getitem__)
                while used > budget:
                    used -= size_of[by_rank[-1]]
                    del cached[by_rank.pop()]
            for row in missing:
                (whole if shards[row] in cached else in_parts).append(row)
            for row in range(first, end):
                if shards[row] in cached:
                    cached[shards[row]] = ranks[row]
                    if ranks[row] < 0:
                        used -= size_of[shards[row]]
                        del cached[shards[row]]
        return np.array(whole, np.int64), np.array(in_parts, np.int64)


def choose(shard_sizes: Sequence[int], shard_bytes: float, budget_bytes: float | None, nodes: int,
           global_batch_size: int) -> tuple[int, int]:
    """Lanes and window for a new run: LANES and WINDOW, or less where a node's cache has no room for them.

    Of the pairs whose working set on one node fits in its share of the budget, the one with the largest
    lanes x window, and of those the one with most lanes; the smallest pair where none fits, so compare working_set.

    Args:
        shard_bytes: bytes of a shard on average.
        budget_bytes: of the cache of each node; None without one.
    """
    room = float("inf") if budget_bytes is None else _SHARE * budget_bytes / shard_bytes
    if budget_bytes is None or (nodes == 1 and len(shard_sizes) <= room):
        return LANES, WINDOW
    pairs = [(lanes, WINDOW >> halving) for lanes in _lane_counts(len(shard_sizes), nodes, global_batch_size)
             for halving in range(_HALVINGS + 1)]
    fit = [(lanes, window) for lanes, window in pairs if working_set(lanes / nodes, window, shard_sizes) <= room]
    return max(fit, key=lambda pair: (pair[0] * pair[1], pair[0])) if fit else min(pairs)


def _lane_counts(num_shards: int, nodes: int, global_batch_size: int) -> list[int]:
    """Numbers of lanes that give each node whole lanes, in every step the same ones."""
    most = max(nodes, min(LANES, num_shards // _SHARDS_PER_LANE))
    return [lanes for lanes in range(nodes, most + 1, nodes)
            if nodes == 1 or global_batch_size % lanes == 0 or lanes == nodes]


if __name__ == "__main__":
    raise SystemExit("vir.data.traffic is a part of the library; the program is vir-train")
