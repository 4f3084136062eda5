"""Accuracy of a split: what a batch adds to it, and the sum over batches, against plain loops."""

import math

import pytest
import torch
from tqdm import tqdm

from support.batches import INPUT, batches
from vir.data.device import normalize
from vir.evaluation.classify import classify, tally


def expected(logits, labels, valid):
    right1 = right5 = count = loss = 0
    for of_sample, label, counts in zip(logits.tolist(), labels.tolist(), valid.tolist()):
        if counts:
            order = sorted(range(len(of_sample)), key=lambda k: -of_sample[k])
            right1 += order[0] == label
            right5 += label in order[:5]
            count += 1
            loss += math.log(sum(map(math.exp, of_sample))) - of_sample[label]
    return [right1, right5, count, loss]


@pytest.mark.parametrize("size, classes", [(1, 2), (7, 3), (33, 11)])
def test_a_batch_against_a_loop(size, classes):
    numbers = torch.Generator().manual_seed(size)
    logits = torch.randn(size, classes, generator=numbers)
    labels = torch.randint(classes, (size,), generator=numbers)
    for valid in (torch.ones(size, dtype=torch.bool), torch.arange(size) % 3 > 0):
        assert tally(logits, labels, valid).tolist() == pytest.approx(expected(logits, labels, valid), rel=1e-6)


def test_padding_counts_for_nothing_whatever_its_logits_are():
    logits = torch.tensor([[2.0, 1.0], [float("nan"), float("inf")]])
    assert tally(logits, torch.tensor([0, 1]), torch.tensor([True, False])).tolist() == pytest.approx(
        [1, 1, 1, math.log(1 + math.exp(-1))])


def forward(images):
    return images.flatten(1)[:, :7] * 3


def test_a_split_is_the_sum_of_its_batches_and_the_loader_is_closed():
    given, bar = batches(), tqdm(total=11, disable=True)
    found = classify(forward, given, INPUT, torch.device("cpu"), bar)
    right1, right5, images, loss = (sum(of_batch) for of_batch in zip(*(
        expected(forward(normalize(batch.images, INPUT)), batch.labels, batch.valid) for batch in given)))
    assert (found.images, found.top1, found.top5) == (9, 100 * right1 / 9, 100 * right5 / 9) == (images, *(
        100 * right / images for right in (right1, right5)))
    assert found.loss == pytest.approx(loss / images, rel=1e-6) and given.closed


def test_it_stops_before_a_batch_and_closes_the_loader():
    given, asked = batches(), []
    assert classify(forward, given, INPUT, torch.device("cpu"), tqdm(disable=True),
                    stop=lambda: asked.append(1) or len(asked) == 2) is None
    assert len(asked) == 2 and given.closed
