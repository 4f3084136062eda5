"""ReaL accuracy against timm's own evaluator of it."""

import random

import numpy as np
import pytest
import torch
from timm.data import ImageNetInfo, RealLabelsImagenet

from vir.evaluation.predictions import Predictions
from vir.evaluation.real_labels import real_accuracy

WNIDS = ImageNetInfo().label_names()
NUMBERS = random.Random(0).sample(range(1, 50001), 2000)
NAMES = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in NUMBERS]


def predictions(top):
    none = np.zeros(len(top))
    return Predictions(none.astype(np.int64), top, np.ones(top.shape, np.float32), none.astype(np.float32))


@pytest.fixture(scope="module")
def evaluator():
    """timm's, and logits that it has seen: of half of the images a right class is the best or the second."""
    judge = RealLabelsImagenet(NAMES + [""] * (50000 - len(NAMES)))
    logits = torch.rand(len(NAMES), 1000, generator=torch.Generator().manual_seed(0))
    for i, name in enumerate(NAMES[::2]):
        if right := judge.real_labels[name]:
            logits[2 * i, right[-1]] = 0.9999 if i % 2 else 1.5
    judge.add_result(logits)
    return judge, logits.topk(5).indices.numpy()


def test_it_is_what_timm_finds(evaluator):
    judge, top = evaluator
    found = real_accuracy(predictions(top), [f"n01440764/{name.removesuffix('.JPEG')}" for name in NAMES], WNIDS)
    assert (found["real_top1"], found["real_top5"]) == (
        pytest.approx(judge.get_accuracy(1)), pytest.approx(judge.get_accuracy(5)))
    assert found["real_images"] == len(judge.is_correct[1]) < 2000  # some images have no such label
    assert 20 < found["real_top1"] < found["real_top5"]


def test_classes_are_found_by_name_whatever_their_order(evaluator):
    judge, top = evaluator
    order = random.Random(1).sample(range(1000), 1000)
    place = np.argsort(order)
    found = real_accuracy(predictions(place[top]), NAMES, [WNIDS[i] for i in order])
    assert found["real_top1"] == pytest.approx(judge.get_accuracy(1))


def test_of_fewer_classes_images_whose_labels_are_all_others_do_not_count():
    judge = RealLabelsImagenet(NAMES + [""] * (50000 - len(NAMES)))
    few, top = WNIDS[:100], np.tile(np.arange(5), (2000, 1))
    found = real_accuracy(predictions(top), NAMES, few)
    own = [labels for name in NAMES if min(labels := judge.real_labels[name], default=1000) < 100]
    assert found["real_images"] == len(own)
    assert found["real_top1"] == pytest.approx(100 * sum(0 in labels for labels in own) / len(own))


@pytest.mark.parametrize("keys, names", [
    (["n01440764/n01440764_10026"], WNIDS), (["ILSVRC2012_val_00000000"], WNIDS), (["ILSVRC2012_val_00050001"], WNIDS),
    (["ILSVRC2012_val_00000001"], ["cat", "dog"])])
def test_other_images_and_other_classes_have_none(keys, names):
    assert real_accuracy(predictions(np.zeros((1, 5), np.int64)), keys, names) is None
