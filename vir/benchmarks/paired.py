"""Paired tests of two classifiers on the same images, and of the same training with several seeds. Pure, no library."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided p of McNemar's exact test: how likely so uneven a split is where both are right equally often.

    Args:
        only_first, only_second: images that one of the two has right and the other wrong.
    """
    images, fewer = only_first + only_second, min(only_first, only_second)
    return min(1.0, 2 * sum(math.comb(images, right) for right in range(fewer + 1)) / 2 ** images)


def interval(differences: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Of their mean, by Student's t: at least two. With three it is wide: 2.5 standard deviations on each side."""
    if len(differences) < 2:
        raise ValueError("one difference has no spread")
    freedom = len(differences) - 1
    half = quantile(confidence, freedom) * statistics.stdev(differences) / math.sqrt(len(differences))
    middle = statistics.mean(differences)
    return middle - half, middle + half


def quantile(confidence: float, freedom: int) -> float:
    """The t within whose positive and negative value this share of Student's distribution lies."""
    low, high = 0.0, 1.0
    while within(high, freedom) < confidence:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle, freedom) < confidence else (low, middle)
    return high


def within(t: float, freedom: int) -> float:
    """The share of Student's distribution from -t to t, for whole degrees of freedom (Abramowitz and Stegun 26.7.3 and
    26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    odd = freedom % 2
    term = total = math.cos(angle) if odd else 1.0
    for number in range(2 + odd, freedom - 1, 2):
        term *= math.cos(angle) ** 2 * (number - 1) / number
        total += term
    if not odd:
        return math.sin(angle) * total
    return 2 / math.pi * (angle + (math.sin(angle) * total if freedom > 1 else 0))
