"""Which intervals of metrics stand out."""

import math

import numpy as np
import pytest

from vir.errors import DataError
from vir.reports.spikes import find_spikes


def events(losses, every=10, size=8, **more):
    return [{"kind": "train", "step": every * number, "samples_seen": size * every * number, "loss": loss,
             "grad_norm": 1.0, **more} for number, loss in enumerate(losses, 1)]


def told(found):
    return [(spike.name, spike.first, spike.last) for spike in found]


def noisy(count, seed=0):
    return 3 + 0.1 * np.random.default_rng(seed).standard_normal(count)


def test_a_planted_spike_is_found_alone_with_its_interval():
    losses = noisy(60)
    losses[40] += 2
    (found,) = find_spikes(events(losses.tolist()))
    assert (found.name, found.first, found.last) == ("loss", 401, 410)
    before = losses[20:40]
    deviation = 1.4826 * np.median(abs(before - np.median(before)))
    assert found.times == pytest.approx((losses[40] - np.median(before)) / deviation)


def test_the_gradient_norm_counts_and_the_furthest_comes_first():
    lines = events(noisy(60).tolist())
    lines[30]["grad_norm"], lines[50]["loss"] = 40.0, 5.0
    assert told(find_spikes(lines)) == [("grad_norm", 301, 310), ("loss", 501, 510)]


@pytest.mark.parametrize("losses", [
    [7 * 0.9 ** n + 1 for n in range(100)], [1 + 0.1 * n for n in range(100)], [3.0] * 100,
    [3.0, 3.001] * 50, [9.0, 1.0, 9.0, 1.0]])
def test_trends_and_standstill_do_not_stand_out(losses):
    assert find_spikes(events(losses)) == []


def test_a_jump_that_stays_is_told_at_the_jump():
    assert told(find_spikes(events([*noisy(30), *noisy(30) + 4])))[0][0] == "loss"
    assert ("loss", 301, 310) in told(find_spikes(events([*noisy(30), *noisy(30) + 4])))


def test_an_interval_without_a_finite_loss_stands_out_anywhere():
    lines = events([None, *noisy(30)])
    (found,) = find_spikes(lines)
    assert (found.first, found.last) == (1, 10) and math.isinf(found.times)
    assert find_spikes(events(noisy(30).tolist(), grad_norm=None)) == []


def test_other_events_are_left_out_and_foreign_ones_refused():
    assert find_spikes([{"kind": "eval", "step": 1, "top1": 3.0}]) == []
    with pytest.raises(DataError, match="the train event of step 7 has no loss"):
        find_spikes([{"kind": "train", "step": 7, "samples_seen": 56}])
    with pytest.raises(DataError, match="the train event of step 7 has no samples_seen"):
        find_spikes([{"kind": "train", "step": 7, "loss": 2.0}])


@pytest.mark.parametrize("size, step, first", [(16, 42, 41), (4, 168, 161)])
def test_an_interval_after_a_change_of_the_batch_size_is_told_in_its_own_steps(size, step, first):
    """Of 8 samples up to step 80; then two steps of 16, or eight of 4."""
    changed = {"kind": "train", "step": step, "samples_seen": size * step, "loss": None}
    (found,) = find_spikes([*events([2.0] * 8), changed])
    assert (found.first, found.last, found.global_batch_size) == (first, step, size)
