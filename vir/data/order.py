"""The order of the samples: a pure function of (seed, epoch, shard sizes, lanes, window).

Training is one endless sequence of positions 0, 1, 2, ... With N samples, position P is place P mod N of epoch P div N.
Each epoch puts the shards in a new random order and joins them end to end. It cuts this sequence of samples into lanes,
shuffles each lane within a window, and interleaves the lanes. At any moment a reader uses only a few shards per lane.
Every sample comes exactly once per epoch; in the place of one that is excluded comes another. Nothing depends on the
number of ranks or workers, so one integer, the position, is enough to resume.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial

import numpy as np

from vir.data.exclusion import NOTHING, Exclusion


def epoch_order(seed: int, epoch: int, shard_sizes: Sequence[int], lanes: int, window: int) -> np.ndarray:
    """The samples of one epoch in training order.

    Args:
        shard_sizes: samples per shard; samples are numbered through the shards in the given order.
        lanes: the number of shards that are read side by side.
        window: the number of samples among which a lane is shuffled.

    Returns:
        [N] int32 or int64, a permutation of 0 .. N-1.
    """
    # Raw bits, because numpy promises the same bits in all versions, but not the same results of its distributions.
    bits = np.random.Philox(np.random.SeedSequence((seed, epoch)))
    sizes = np.asarray(shard_sizes, dtype=np.int64)
    starts = np.cumsum(sizes) - sizes
    dealt = np.argsort(bits.random_raw(len(sizes)), kind="stable")
    ends_before = np.cumsum(sizes[dealt]) - sizes[dealt]
    total = int(sizes.sum())
    sequence = np.repeat(starts[dealt] - ends_before, sizes[dealt]) + np.arange(total)  # dealt shards end to end
    keys = np.arange(total) + (bits.random_raw(total) >> np.uint64(11)) * 2.0**-53 * window

    order = np.empty(total, dtype=np.int32 if total < 2**31 else np.int64)
    first = 0
    for lane in range(min(lanes, total)):
        length = (total - lane + lanes - 1) // lanes  # places lane, lane + lanes, ... of the epoch
        part = slice(first, first + length)
        order[lane::lanes] = sequence[part][np.argsort(keys[part], kind="stable")]
        first += length
    return order


_making: list[threading.Thread] = []


def _start(make: Callable[[], np.ndarray]) -> Future[np.ndarray]:
    """Its result, from a thread that keeps no process from ending."""
    result: Future[np.ndarray] = Future()

    def run() -> None:
        try:
            result.set_result(make())
        except BaseException as error:
            result.set_exception(error)

    thread = threading.Thread(target=run, daemon=True)
    _making[:] = [*filter(threading.Thread.is_alive, _making), thread]
    thread.start()
    return result


def settle() -> None:
    """Wait until no order is being made. Before a fork: the child would have no thread that goes on with it."""
    for thread in _making:
        thread.join()


class SampleOrder:
    """The samples at given positions; the orders of the last two epochs are kept in memory."""

    def __init__(self, seed: int, shard_sizes: Sequence[int], lanes: int, window: int,
                 exclusion: Exclusion = NOTHING) -> None:
        self.num_samples = int(sum(shard_sizes))
        self.lanes, self.exclusion = lanes, exclusion
        self._make = partial(epoch_order, seed, shard_sizes=tuple(shard_sizes), lanes=lanes, window=window)
        self._made: dict[int, Future[np.ndarray]] = {}

    def prepare(self, position: int, end: int) -> None:
        """Begin to make the next epoch's order, where half of the epoch that the position is in lies before it.

        No step is to wait for it. An epoch that begins at position `end` or later is not made.
        """
        epoch, place = divmod(position, self.num_samples)
        begins = (epoch + 1) * self.num_samples
        if 2 * place >= self.num_samples and begins < end and epoch + 1 not in self._made:
            self._keep(epoch + 1, _start(partial(self._make, epoch + 1)))

    def _epoch(self, epoch: int) -> np.ndarray:
        if epoch not in self._made:
            made: Future[np.ndarray] = Future()
            made.set_result(self._make(epoch))
            self._keep(epoch, made)
        return self._made[epoch].result()

    def _keep(self, epoch: int, order: Future[np.ndarray]) -> None:
        self._made = {known: self._made[known] for known in sorted(self._made)[-1:]} | {epoch: order}

    def global_batch(self, first: int, size: int) -> np.ndarray:
        """Positions [first, first + size), sorted by lane.

        Ranks take consecutive slices, so each reads few shards. The sequence is the same for every number of ranks.
        """
        positions = np.arange(first, first + size, dtype=np.int64)
        return positions[np.argsort(positions % self.num_samples % self.lanes, kind="stable")]

    def samples(self, positions: np.ndarray) -> np.ndarray:
        """Sample index at each position."""
        return self.exclusion.applied(self.before_exclusion(positions))

    def before_exclusion(self, positions: np.ndarray) -> np.ndarray:
        """Sample index at each position, as if none were excluded."""
        epochs, places = np.divmod(positions, self.num_samples)
        indices = np.empty(len(positions), dtype=np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            indices[here] = self._epoch(int(epoch))[places[here]]
        return indices


class InOrder:
    """Some samples one after another, each once, as an evaluation takes them.

    Args:
        chosen: [N] int64, ascending.
    """

    def __init__(self, chosen: np.ndarray) -> None:
        self._chosen, self.num_samples = chosen, len(chosen)

    def global_batch(self, first: int, size: int) -> np.ndarray:
        """Positions [first, first + size)."""
        return np.arange(first, first + size, dtype=np.int64)

    def samples(self, positions: np.ndarray) -> np.ndarray:
        """Sample index at each position; the last one beyond the end."""
        return self._chosen[np.minimum(positions, self.num_samples - 1)]
