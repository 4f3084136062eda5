"""Keys that come more than once among millions, found by their hashes: a set of all keys would take gigabytes.

Equal keys have equal hashes. Those whose hash comes only once are done with; the caller compares the few others.
"""

from __future__ import annotations

import numpy as np


def repeated(hashes: np.ndarray) -> np.ndarray:
    """The values that come more than once, in order. Takes 8 bytes a hash meanwhile."""
    ordered = np.sort(hashes)
    return np.unique(ordered[1:][ordered[1:] == ordered[:-1]])


def among(hashes: np.ndarray, values: np.ndarray) -> np.ndarray:
    """[n] bool: which hashes are among the values, which are in order. numpy's isin takes 40 bytes a hash for it."""
    if not len(values):
        return np.zeros(len(hashes), bool)
    return values[np.searchsorted(values, hashes).clip(max=len(values) - 1)] == hashes
