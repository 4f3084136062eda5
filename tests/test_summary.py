"""Accuracy, calibration and confusion against plain loops over the images."""

import numpy as np
import pytest

from vir.evaluation.predictions import Predictions
from vir.evaluation.summary import calibration_error, per_class, summary, worst_pairs


def predictions(images=200, classes=7, seed=0, top=5):
    draw = np.random.default_rng(seed)
    logits = draw.normal(size=(images, classes)) * 2
    share = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    order = np.argsort(-logits, axis=1)[:, :top]
    labels = draw.integers(classes - 1, size=images)  # the last class has none
    return Predictions(labels, order, np.take_along_axis(share, order, 1).astype(np.float32),
                       -np.log(share[np.arange(images), labels]).astype(np.float32))


def test_the_whole_split_against_a_loop():
    given = predictions()
    right1 = sum(label == top[0] for label, top in zip(given.labels, given.top))
    right5 = sum(label in top for label, top in zip(given.labels, given.top))
    found = summary(given)
    assert (found.images, found.top1, found.top5) == (200, 100 * right1 / 200, 100 * right5 / 200)
    assert found.loss == pytest.approx(sum(map(float, given.losses)) / 200, rel=1e-12)


def test_calibration_against_a_loop_over_the_bins_of_the_paper():
    draw = np.random.default_rng(1)
    confidence, right = draw.random(500).astype(np.float32), draw.random(500) < 0.3
    right &= confidence > 1 / 15  # or the first two bins might be one
    expected = 0.0
    for m in range(15):
        inside = [i for i in range(500) if m / 15 < float(confidence[i]) <= (m + 1) / 15]
        if inside:
            accuracy = sum(bool(right[i]) for i in inside) / len(inside)
            expected += len(inside) / 500 * abs(accuracy - sum(float(confidence[i]) for i in inside) / len(inside))
    assert calibration_error(confidence, right) == pytest.approx(100 * expected, rel=1e-9)


@pytest.mark.parametrize("confidence, right, expected", [
    ([1.0] * 4, [True] * 4, 0), ([1.0] * 4, [False] * 4, 100), ([0.5] * 4, [True, False] * 2, 0),
    ([0.75] * 4, [True] * 4, 25), ([0.0] * 2, [False] * 2, 0), ([0.5, float("nan")], [True, False], float("nan"))])
def test_calibration_at_its_ends(confidence, right, expected):
    found = calibration_error(np.array(confidence, np.float32), np.array(right))
    assert found == pytest.approx(expected, abs=1e-6, nan_ok=True)


def test_each_class_against_a_loop():
    given, names = predictions(), list("abcdefg")
    rows = per_class(given, names)
    assert [row.name for row in rows] == names[:-1]  # a class without images has no row
    for label, row in enumerate(rows):
        own = [i for i in range(200) if given.labels[i] == label]
        chosen = [int(given.top[i, 0]) for i in own]
        assert row.images == len(own)
        assert row.top1 == pytest.approx(100 * chosen.count(label) / len(own))
        assert row.top5 == pytest.approx(100 * sum(label in given.top[i] for i in own) / len(own))
        assert row.loss == pytest.approx(sum(float(given.losses[i]) for i in own) / len(own))
        assert row.confidence == pytest.approx(100 * sum(float(given.probabilities[i, 0]) for i in own) / len(own))
        wrong = [other for other in chosen if other != label]
        assert row.taken_for_images == max(map(wrong.count, wrong)) == wrong.count(names.index(row.taken_for))


def test_a_class_that_is_always_right_is_taken_for_nothing():
    given = Predictions(np.array([1, 1]), np.array([[1, 0], [1, 0]]), np.ones((2, 2), np.float32),
                        np.zeros(2, np.float32))
    (row,) = per_class(given, "ab")
    assert (row.name, row.top1, row.taken_for, row.taken_for_images) == ("b", 100, "", 0)


def test_few_classes_are_all_in_the_picture():
    given = predictions()
    found = worst_pairs(given, 7)
    expected = np.zeros((7, 7), int)
    for label, chosen in zip(given.labels, given.top[:, 0]):
        expected[label, chosen] += 1
    assert found.labels.tolist() == list(range(7)) and np.array_equal(found.counts, expected)
    assert found.images.tolist() == expected.sum(axis=1).tolist()


def test_of_many_classes_those_of_the_worst_pairs_are():
    """Class 30 is taken for 7 three times, 5 for 40 twice, 1 for 2 once; 9 is right."""
    labels, chosen = zip(*[(30, 7)] * 3, *[(5, 40)] * 2, (1, 2), *[(9, 9)] * 8, (30, 30), (30, 11))
    given = Predictions(np.array(labels), np.array(chosen)[:, None], np.ones((len(labels), 1), np.float32),
                        np.zeros(len(labels), np.float32))
    found = worst_pairs(given, 50, at_most=4)
    assert found.labels.tolist() == [5, 7, 30, 40] and found.images.tolist() == [2, 0, 5, 0]
    assert found.counts.tolist() == [[0, 0, 0, 2], [0, 0, 0, 0], [0, 3, 1, 0], [0, 0, 0, 0]]
    none = Predictions(given.labels[6:14], given.top[6:14], given.probabilities[6:14], given.losses[6:14])
    assert worst_pairs(none, 50).labels.tolist() == [9]
