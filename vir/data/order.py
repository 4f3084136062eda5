"""Which sample comes when: a pure function of (seed, epoch, shard sizes, lanes, window).

Training is one endless sequence of positions 0, 1, 2, ...; position P is place P mod N of epoch P div N. An epoch
re-deals the shards, cuts their concatenation into lanes at exact sample boundaries, shuffles each lane within a window
and interleaves the lanes. A reader at any moment touches only a few shards per lane, every sample comes exactly once
per epoch, and nothing depends on the number of ranks or workers, so resuming is one integer.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Sequence

import numpy as np


def generator(*key: int) -> np.random.Generator:
    """A counter-based generator that depends on `key` alone."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def epoch_order(seed: int, epoch: int, shard_sizes: Sequence[int], lanes: int, window: int) -> np.ndarray:
    """The samples of one epoch in the order they are trained on.

    Args:
        shard_sizes: samples per shard; sample i is counted through the shards in their own order.
        lanes: shards read side by side.
        window: samples over which a lane is shuffled.

    Returns:
        [N] int64, a permutation of 0 .. N-1.
    """
    # Raw bits: numpy promises their stream across its versions, but not what its distributions make of it.
    bits = np.random.Philox(np.random.SeedSequence((seed, epoch)))
    sizes = np.asarray(shard_sizes, dtype=np.int64)
    starts = np.cumsum(sizes) - sizes
    dealt = np.argsort(bits.random_raw(len(sizes)), kind="stable")
    ends_before = np.cumsum(sizes[dealt]) - sizes[dealt]
    total = int(sizes.sum())
    sequence = np.repeat(starts[dealt] - ends_before, sizes[dealt]) + np.arange(total)  # dealt shards end to end
    keys = np.arange(total) + (bits.random_raw(total) >> np.uint64(11)) * 2.0**-53 * window

    order = np.empty(total, dtype=np.int64)
    first = 0
    for lane in range(min(lanes, total)):
        length = (total - lane + lanes - 1) // lanes  # places lane, lane + lanes, ... of the epoch
        part = slice(first, first + length)
        order[lane::lanes] = sequence[part][np.argsort(keys[part], kind="stable")]
        first += length
    return order


class SampleOrder:
    """Positions to samples, with the orders of the epochs in use kept at hand."""

    def __init__(self, seed: int, shard_sizes: Sequence[int], lanes: int, window: int) -> None:
        self.num_samples = int(sum(shard_sizes))
        self.lanes = lanes
        sizes = tuple(shard_sizes)
        self._epoch = lru_cache(maxsize=2)(lambda epoch: epoch_order(seed, epoch, sizes, lanes, window))

    def global_batch(self, first: int, size: int) -> np.ndarray:
        """Positions [first, first + size), sorted by lane.

        Ranks take consecutive slices, so that each reads few shards; every world size cuts the same sequence.
        """
        positions = np.arange(first, first + size, dtype=np.int64)
        return positions[np.argsort(positions % self.num_samples % self.lanes, kind="stable")]

    def samples(self, positions: np.ndarray) -> np.ndarray:
        """Sample index at each position."""
        epochs, places = np.divmod(positions, self.num_samples)
        found = np.empty(len(positions), dtype=np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            found[here] = self._epoch(int(epoch))[places[here]]
        return found
