"""Lines of metrics.jsonl that stand out."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from vir.errors import DataError

BEFORE = 20
"""Intervals that one is compared with."""
LEAST = 5
"""Fewer are too few to judge by."""
TIMES = 6.0
"""Robust standard deviations above which an interval stands out."""
_FLOOR = 0.01
"""Of the median: the least that counts as such a deviation; or the last digits of a run that stands still stand out."""


@dataclass(frozen=True, kw_only=True)
class Spike:
    """An interval of training whose loss or gradient norm stands out."""

    name: str
    """loss or grad_norm."""
    first: int
    """The interval's first step, from 1."""
    last: int
    global_batch_size: int
    """Samples of a step then: a run may have been taken up with others."""
    value: float
    """NaN: no finite one."""
    median: float
    """Of the intervals before."""
    times: float
    """Robust standard deviations above it; infinite where the value is not finite."""


def find_spikes(events: Sequence[dict[str, Any]]) -> list[Spike]:
    """The intervals that stand out, the furthest first.

    The rule: `loss` or `grad_norm` lies more than TIMES robust standard deviations above the median of up to BEFORE
    intervals before it, of which LEAST must be there. Such a deviation is 1.4826 times the median distance of those
    from their median, and at least a hundredth of it. What comes after is not asked: a run that jumps and stays there
    is told at the jump. An interval without a finite loss stands out in any case.

    Raises:
        DataError: an event without a loss or its samples, of another version.
    """
    train = [event for event in events if event["kind"] == "train"]
    for name in ("loss", "samples_seen"):
        if broken := [event["step"] for event in train if name not in event]:
            raise DataError(f"the train event of step {broken[0]} has no {name}; it is not of a run of this version")
    spikes = []
    for name in ("loss", "grad_norm"):
        values = np.array([math.nan if event.get(name) is None else event[name] for event in train], float)
        is_finite = np.isfinite(values)
        # Of all intervals at once: one by one takes half a minute for 100,000.
        before = sliding_window_view(np.concatenate([np.full(BEFORE, math.nan), np.where(is_finite, values, math.nan)]),
                                     BEFORE)[:len(values)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # none before the first
            medians = np.nanmedian(before, axis=1)
            distances = np.nanmedian(abs(before - medians[:, None]), axis=1)
        times = (values - medians) / np.maximum(1.4826 * distances, np.maximum(_FLOOR * abs(medians), 1e-12))
        times[np.isfinite(before).sum(axis=1) < LEAST] = 0.0
        times[~is_finite] = math.inf if name == "loss" else 0.0  # some engines tell no norm
        for place in np.flatnonzero(times > TIMES).tolist():
            last = train[place]["step"]
            size = train[place]["samples_seen"] // last
            first = train[place - 1]["samples_seen"] // size + 1 if place else 1
            spikes.append(Spike(name=name, first=min(first, last), last=last, global_batch_size=size,
                                value=float(values[place]), median=float(medians[place]), times=float(times[place])))
    return sorted(spikes, key=lambda spike: (-spike.times, spike.last))


if __name__ == "__main__":
    raise SystemExit("vir.reports.spikes is a part of the library; the program is vir-explain")
