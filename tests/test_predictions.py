"""What is recorded of each image, against plain loops; each way of computing on the same batches."""

import math

import numpy as np
import pytest
import torch
from tqdm import tqdm

from support.batches import INPUT, batches
from vir.data.device import normalize
from vir.evaluation.classes import shared_classes
from vir.evaluation.predictions import of_shared, predict, with_mirror_images

NAMES = tuple("abcdefg")
CPU = torch.device("cpu")


def forward(images):
    return images.flatten(1)[:, :7] * 0.7 + torch.arange(7) * 1e-3  # no two are equal


def run(forwards, given, of_data=NAMES, **options):
    return predict(forwards, given, INPUT, shared_classes(NAMES, 7, of_data), CPU, tqdm(disable=True), **options)


def test_each_image_against_a_loop_in_the_order_of_the_split():
    """Samples that are not valid are left out, and batches may come from any rank."""
    given = batches()
    order = [given[2], given[0], given[1]]
    found = run({"": forward}, type(given)(order))[""].predictions
    place = 0
    for batch in given:
        for logits, label, counts in zip(forward(normalize(batch.images, INPUT)).tolist(), batch.labels, batch.valid):
            if not counts:
                continue
            total = sum(map(math.exp, logits))
            best = sorted(range(7), key=lambda k: -logits[k])[:5]
            assert (found.labels[place], found.top[place].tolist()) == (label, best)
            assert found.probabilities[place].tolist() == pytest.approx([math.exp(logits[k]) / total for k in best])
            assert found.losses[place] == pytest.approx(math.log(total) - logits[label], rel=1e-5, abs=1e-6)
            place += 1
    assert place == len(found.labels) == 9 and found.top.dtype == found.labels.dtype == np.int64


def test_of_fewer_classes_the_others_logits_count_for_nothing():
    of_data = ("f", "b")  # labels 0 and 1 of the data, columns 5 and 1 of the model
    shared, given = shared_classes(NAMES, 7, of_data), batches(classes=2)
    measured = predict({"": of_shared(forward, shared, CPU)}, given, INPUT, shared, CPU, tqdm(disable=True))
    found = measured[""].predictions
    first = forward(normalize(given[0].images, INPUT))[0, [1, 5]].double()
    label = {0: 1, 1: 0}[int(given[0].labels[0])]  # in the order of the model: b, f
    assert found.labels[0] == label and found.top.shape == (9, 2)
    assert found.losses[0] == pytest.approx(-float(first.log_softmax(0)[label]), rel=1e-5, abs=1e-6)


def test_a_mirror_image_has_half_of_the_say():
    images = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    found = with_mirror_images(forward)(images).exp()
    expected = (forward(images).softmax(1) + forward(torch.flip(images, [3])).softmax(1)) / 2
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, forward(images).softmax(1))
    mirrored = with_mirror_images(forward)(images.flip(3)).exp()
    torch.testing.assert_close(mirrored, found)


def test_several_ways_are_compared_on_every_batch():
    def other(images):
        logits = forward(images)
        logits[-1, 2] += 0.25  # of the last image of each batch alone
        return logits

    found = run({"parallel": forward, "recurrent": other}, batches())
    assert list(found) == ["parallel", "recurrent"]
    assert found["parallel"].difference == 0 and found["recurrent"].difference == pytest.approx(0.25, rel=1e-4)
    assert np.array_equal(found["parallel"].predictions.losses, run({"": forward}, batches())[""].predictions.losses)
    assert all(way.seconds > 0 for way in found.values())


def test_a_difference_that_is_no_number_is_told_as_such():
    found = run({"a": forward, "b": lambda images: forward(images) * float("nan")}, batches())
    assert math.isnan(found["b"].difference) and np.isnan(found["b"].predictions.losses).all()
    assert np.isfinite(found["a"].predictions.losses).all()


def test_each_of_several_ways_runs_once_before_its_time_is_taken():
    calls = []
    run({name: lambda images, name=name: calls.append(name) or forward(images) for name in "ab"}, batches())
    assert calls == ["a", "b"] * 4  # three batches


def test_images_have_the_type_that_the_weights_have():
    seen = []

    def half(images):
        seen.append(images.dtype)
        return forward(images)

    found = run({"": half}, batches(), dtype=torch.bfloat16)[""].predictions
    assert set(seen) == {torch.bfloat16} and found.losses.dtype == np.float32


def test_the_loader_is_closed_and_the_bar_is_full():
    given, bar = batches(), tqdm(total=9, disable=False, file=open("/dev/null", "w"))
    predict({"": forward}, given, INPUT, shared_classes(NAMES, 7, NAMES), CPU, bar)
    assert given.closed and bar.n == 9
