"""Numbers that follow from predictions: accuracy, calibration, what each class is taken for. Pure functions."""

# Dimension key: N images, K classes.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vir.evaluation.predictions import Predictions

BINS = 15
"""Of the expected calibration error, as in arXiv:1706.04599."""


@dataclass(frozen=True)
class Summary:
    """Over all images; percentages from 0 to 100."""

    images: int
    top1: float
    top5: float
    """With fewer than five classes the whole list counts, so it is 100."""
    loss: float
    """Mean cross-entropy."""
    ece: float
    """Expected calibration error, see calibration_error."""
    not_finite: int
    """Images with logits that are not."""


def summary(predictions: Predictions) -> Summary:
    right = predictions.top == predictions.labels[:, None]
    return Summary(images=len(right), top1=_percent(right[:, 0]), top5=_percent(right.any(axis=1)),
                   loss=float(predictions.losses.mean(dtype=np.float64)),
                   ece=calibration_error(predictions.probabilities[:, 0], right[:, 0]),
                   not_finite=int(np.count_nonzero(~np.isfinite(predictions.losses))))


def calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """The mean, over the images, of |accuracy - mean confidence| of their bin, in percent.

    Args:
        confidence: [N], the probability of the class that was chosen.
        right: [N] bool.

    Returns:
        NaN where a confidence is.

    Source: arXiv:1706.04599, section 2, with BINS bins of equal width, each without its lower end.
    """
    if not np.isfinite(confidence).all():
        return float("nan")
    bins = np.clip(np.ceil(confidence.astype(np.float64) * BINS).astype(np.int64) - 1, 0, BINS - 1)
    surplus = np.bincount(bins, right.astype(np.float64) - confidence, minlength=BINS)
    return 100 * float(np.abs(surplus).sum()) / len(right)


@dataclass(frozen=True)
class OfClass:
    """What became of the images of one class; percentages from 0 to 100."""

    name: str
    images: int
    top1: float
    top5: float
    loss: float
    confidence: float
    """Mean probability of the class that was chosen."""
    taken_for: str
    """The other class that was chosen most often; empty where none was."""
    taken_for_images: int


def per_class(predictions: Predictions, names: Sequence[str]) -> list[OfClass]:
    """A row for each class that has images, in the order of `names`."""
    labels, size = predictions.labels, len(names)
    right = predictions.top == labels[:, None]
    images, right1, right5, losses, confidences = (np.bincount(labels, weights, size) for weights in (
        None, right[:, 0], right.any(axis=1), predictions.losses, predictions.probabilities[:, 0]))
    taken_for: dict[int, tuple[str, int]] = {}
    for label, other, count in zip(*_confused(predictions, size)):  # the worst first
        taken_for.setdefault(int(label), (names[other], int(count)))
    rows = []
    for label in np.flatnonzero(images).tolist():
        top1, top5, loss, confidence = (float(total[label] / images[label]) for total in (
            100 * right1, 100 * right5, losses, 100 * confidences))
        other, count = taken_for.get(label, ("", 0))
        rows.append(OfClass(names[label], int(images[label]), top1, top5, loss, confidence, other, count))
    return rows


def _confused(predictions: Predictions, num_classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each pair of a class and another one that it was taken for, and of how many images; the most first."""
    labels, chosen = predictions.labels, predictions.top[:, 0]
    wrong = labels != chosen
    pairs, counts = np.unique(labels[wrong] * num_classes + chosen[wrong], return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return pairs[order] // num_classes, pairs[order] % num_classes, counts[order]


@dataclass(frozen=True)
class Confusion:
    """The classes of the worst pairs, and how often each was taken for each."""

    labels: np.ndarray
    """[M] int64, in the order of the classes."""
    counts: np.ndarray
    """[M, M] int64: row: the class, column: what it was taken for."""
    images: np.ndarray
    """[M] int64, of each of these classes."""


def worst_pairs(predictions: Predictions, num_classes: int, at_most: int = 20) -> Confusion:
    """The classes of the pairs that are confused most often, to at most so many classes.

    All where they are no more; the first that have images where none is confused.
    """
    found = dict.fromkeys(range(num_classes) if num_classes <= at_most else ())
    for label, other, _ in zip(*_confused(predictions, num_classes)):
        if len(both := {**found, int(label): None, int(other): None}) > at_most:
            break
        found = both
    labels = np.array(sorted(found), dtype=np.int64) if found else np.unique(predictions.labels)[:at_most]
    place = np.full(num_classes, -1)
    place[labels] = np.arange(len(labels))
    row, column = place[predictions.labels], place[predictions.top[:, 0]]
    is_shown = (row >= 0) & (column >= 0)
    counts = np.zeros((len(labels), len(labels)), dtype=np.int64)
    np.add.at(counts, (row[is_shown], column[is_shown]), 1)
    return Confusion(labels, counts, np.bincount(predictions.labels, minlength=num_classes)[labels])


def _percent(right: np.ndarray) -> float:
    return 100 * int(right.sum()) / len(right)
