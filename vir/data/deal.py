"""Which samples of a source go into which shard: a pure function of seed, counts and sizes."""

from __future__ import annotations

import numpy as np

from vir.data.tar import BLOCK, padded

SEED = 0
"""Of the shuffle over a whole split, where none is given."""

SAMPLES_PER_SHARD = 1000
"""The most samples in a shard, where nothing else is given."""

_TAR_BYTES = 5 * BLOCK
"""Of a sample beside its image: three headers, label and json."""


def deal(total: int, sizes: np.ndarray | None = None, *, seed: int = SEED, samples_per_shard: int = SAMPLES_PER_SHARD,
         bytes_per_shard: int | None = None) -> list[np.ndarray]:
    """Shuffles the samples 0 .. total - 1 and cuts them into shards whose lengths, or sizes, are about equal.

    Args:
        sizes: [total] int64, of the images in bytes; needed with bytes_per_shard alone.
        samples_per_shard: the most samples in a shard.
        bytes_per_shard: if given, it takes the place of samples_per_shard: shards of about this size.

    Returns:
        For each shard its samples, [n] int64, in their order in it.
    """
    # Sorts Philox's raw output, because numpy promises the same raw output in all versions, but not the same results of
    # Generator methods.
    order = np.argsort(np.random.Philox(key=seed).random_raw(total), kind="stable")
    if bytes_per_shard is None:
        count = -(-total // samples_per_shard)
        return np.split(order, [total * number // count for number in range(1, count)])
    assert sizes is not None
    ends = np.cumsum(padded(sizes[order]) + _TAR_BYTES)
    count = min(-(-int(ends[-1]) // bytes_per_shard), total)
    cuts = np.searchsorted(ends, [int(ends[-1]) * number // count for number in range(1, count)], side="left")
    return [part for part in np.split(order, cuts) if len(part)]


if __name__ == "__main__":
    raise SystemExit("vir.data.deal is a part of the library; the program is vir-convert")
