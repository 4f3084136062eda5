"""The learning rate and the steps at which something happens, against numbers worked out by hand."""

import math

import pytest

from vir.config import OptimConfig, ScheduleConfig, TrainConfig
from vir.errors import SettingsError
from vir.training.plan import steps_every
from vir.training.schedule import check_schedule, learning_rate, total_steps, warmup_steps, weight_decay

STEPS_PER_EPOCH = 2.5


def rate(step, total=30, warmup=10, lr=1.0, **settings):
    schedule = ScheduleConfig(warmup_lr=0.1, min_lr=0.2, warmup_epochs=warmup / STEPS_PER_EPOCH, **settings)
    return learning_rate(step, total, STEPS_PER_EPOCH, lr, schedule)


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


def test_the_line_falls_evenly_and_the_constant_not_at_all():
    assert [rate(step, name="linear") for step in (10, 15, 20, 30)] == pytest.approx([1.0, 0.8, 0.6, 0.2])
    assert {rate(step, name="constant") for step in range(10, 30)} == {1.0}


def test_steps_fall_by_the_rate_each_so_many_epochs_after_warm_up():
    found = [rate(step, total=40, name="step", decay_epochs=4, decay_rate=0.5) for step in (10, 19, 20, 29, 30, 39)]
    assert found == pytest.approx([1.0, 1.0, 0.5, 0.5, 0.25, 0.25])
    assert rate(39, total=40, name="step", decay_epochs=1, decay_rate=0.1) == 0.2  # not below min_lr


@pytest.mark.parametrize("name", ["cosine", "linear", "step", "constant"])
def test_the_cool_down_is_spent_at_min_lr_and_the_decay_ends_there(name):
    found = [rate(step, name=name, cooldown_epochs=2) for step in range(30)]
    assert found[25:] == [0.2] * 5 and found[24] > 0.2
    if name in ("cosine", "linear"):
        assert found[:25] == [rate(step, total=25, name=name) for step in range(25)]


def test_the_cosine_is_timms():
    from timm.scheduler import CosineLRScheduler
    from torch import zeros
    from torch.nn import Parameter
    from torch.optim import SGD

    optimizer = SGD([Parameter(zeros(1))], lr=1.0)
    theirs = CosineLRScheduler(optimizer, t_initial=30, lr_min=0.2, warmup_t=10, warmup_lr_init=0.1,
                               warmup_prefix=True, t_in_epochs=False)
    for step in range(40):
        theirs.step_update(step)
        assert rate(step, total=40) == pytest.approx(optimizer.param_groups[0]["lr"])


def test_weight_decay_is_constant_or_goes_along_a_cosine():
    assert {weight_decay(step, 10, OptimConfig(weight_decay=0.3)) for step in range(10)} == {0.3}
    optim = OptimConfig(weight_decay=0.04, weight_decay_end=0.4)
    assert [weight_decay(step, 10, optim) for step in (0, 5, 10)] == pytest.approx([0.04, 0.22, 0.4])


@pytest.mark.parametrize("epochs, samples, batch, steps", [
    (1, 10, 10, 1), (1, 11, 10, 2), (3, 10, 4, 8), (0.5, 10, 5, 1), (1, 3, 100, 1), (300, 1281167, 1024, 375342),
    (1.1, 10, 11, 1),  # 1.1 * 10 is more than 11 in floats
    (0.3, 1000, 100, 3), (1e-5, 10, 1, 1),
])
def test_a_run_has_ceil_of_epochs_times_samples_over_batch_steps(epochs, samples, batch, steps):
    assert total_steps(TrainConfig(epochs=epochs, global_batch_size=batch), samples) == steps


def test_a_run_of_so_many_steps_asks_no_epochs():
    assert total_steps(TrainConfig(epochs=300, steps=7, global_batch_size=4), 1000) == 7


@pytest.mark.parametrize("total, steps_per_epoch, warmup", [
    (375342, 1251.1, 25022),  # ImageNet for 300 epochs: 20 of them
    (37534, 1251.1, 2502),    # for 30: a fifteenth
    (1000000, 10, 200),       # at most 20 epochs
    (78, 78.1, 5), (15, 100, 1), (14, 100, 0), (1, 1, 0),
])
def test_the_warm_up_is_a_fifteenth_of_the_run_up_to_20_epochs_when_it_is_not_given(total, steps_per_epoch, warmup):
    assert warmup_steps(total, steps_per_epoch, ScheduleConfig()) == warmup
    check_schedule(total, steps_per_epoch, ScheduleConfig())  # never refused


@pytest.mark.parametrize("total, warmup, cooldown, holds", [
    (10, 2, 1.2, True), (10, 2.8, 0.8, True), (10, 4, 0, False), (10, 0, 4, False), (10, 2, 2, False), (1, 0, 0, True),
    (10, None, 4, False),
])
def test_a_run_with_no_step_between_warm_up_and_cool_down_is_refused(total, warmup, cooldown, holds):
    schedule = ScheduleConfig(warmup_epochs=warmup, cooldown_epochs=cooldown)
    if holds:
        check_schedule(total, STEPS_PER_EPOCH, schedule)
        assert max(learning_rate(step, total, STEPS_PER_EPOCH, 1.0, schedule) for step in range(total)) == 1.0
    else:
        with pytest.raises(SettingsError, match=r"a run of 10 steps \(4 epochs\) with \d+ steps of warm-up and \d+ of "
                                                "cool-down never trains at --optim.lr: lower --schedule.warmup_epochs"):
            check_schedule(total, STEPS_PER_EPOCH, schedule)


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
