"""The learning rate and the steps at which something happens, against numbers worked out by hand."""

import math

import pytest

from vir.config import ScheduleConfig
from vir.training.loop import steps_every
from vir.training.schedule import learning_rate, total_steps

SCHEDULE = ScheduleConfig(warmup_lr=0.1, min_lr=0.2)


def rate(step, total=30, warmup=10, lr=1.0):
    return learning_rate(step, total, warmup, lr, SCHEDULE)


def test_warm_up_is_linear_from_warmup_lr_to_the_peak():
    assert [rate(step) for step in range(11)] == pytest.approx([0.1 + 0.09 * step for step in range(11)])


def test_the_peak_is_reached_once_right_after_warm_up():
    rates = [rate(step) for step in range(30)]
    assert rates[10] == 1.0 and sorted(rates)[-2] < 1.0


def test_the_cosine_goes_through_its_middle_and_ends_at_min_lr():
    assert rate(20) == pytest.approx((1.0 + 0.2) / 2)
    assert rate(15) == pytest.approx(0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2)
    assert rate(30) == pytest.approx(0.2) and rate(99) == pytest.approx(0.2)
    falling = [rate(step) for step in range(10, 31)]
    assert falling == sorted(falling, reverse=True)


def test_without_warm_up_the_first_step_is_the_peak():
    assert rate(0, warmup=0) == 1.0


def test_a_run_that_ends_inside_its_warm_up_only_rises():
    assert [rate(step, total=3, warmup=10) for step in range(3)] == pytest.approx([0.1, 0.19, 0.28])
    assert rate(10, total=10, warmup=10) == 1.0  # no step is left to fall in, and nothing is divided by zero


@pytest.mark.parametrize("epochs, samples, batch, steps", [
    (1, 10, 10, 1), (1, 11, 10, 2), (3, 10, 4, 8), (0.5, 10, 5, 1), (1, 3, 100, 1), (300, 1281167, 1024, 375342),
    (1.1, 10, 11, 1),  # 1.1 * 10 is more than 11 in floats
    (0.3, 1000, 100, 3), (1e-5, 10, 1, 1),
])
def test_a_run_has_ceil_of_epochs_times_samples_over_batch_steps(epochs, samples, batch, steps):
    assert total_steps(epochs, samples, batch) == steps


@pytest.mark.parametrize("epochs, samples, batch, total, steps", [
    (1, 10, 5, 6, {2, 4, 6}),
    (1, 10, 4, 8, {3, 5, 8}),         # 10, 20 and 30 samples are complete after 2.5, 5 and 7.5 steps
    (2, 10, 5, 6, {4, 6}),            # the end is always among them
    (0.5, 10, 5, 4, {1, 2, 3, 4}),
    (0.1, 10, 5, 2, {1, 2}),          # more often than once a step
    (5, 10, 5, 3, {3}),               # a run shorter than the distance
    (1, 3, 10, 1, {1}),               # a batch larger than the data set
])
def test_steps_every_so_many_epochs(epochs, samples, batch, total, steps):
    assert steps_every(epochs, samples, batch, total) == steps
