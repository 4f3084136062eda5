"""The random streams: one number per use, so that a new consumer of numbers never shifts another."""

from __future__ import annotations

import numpy as np

# Not 0: a seed sequence takes (seed, epoch, 0) for (seed, epoch), which is the key of an epoch's order.
ERASE, MIX, NOISE, SAMPLE, DROPOUT = 1, 2, 3, 4, 10


def generator(*key: int) -> np.random.Generator:
    """A counter-based generator that depends on `key` alone, e.g. (seed, position, ERASE)."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
