"""How often to write checkpoints: Daly's own figures, a search for the minimum, and failures drawn by chance."""

import dataclasses

import numpy as np
import pytest

from vir.errors import SettingsError
from vir.planning.checkpoints import COPY_RATE, HOPELESS, daly, default_mtbf, goodput, plan_checkpoints, young

HOUR = 3600.0
USUAL = {"copied": None, "every_minutes": None, "disk_rate": 5e9, "mtbf_seconds": 24 * HOUR,
         "step_seconds": 2.0, "every_seconds": 1800.0, "restart_seconds": 600.0, "total_steps": 1_000_000}
ASYNCHRONOUS = USUAL | {"copied": 5 * COPY_RATE}  # 5 s


@pytest.mark.parametrize("mtbf_minutes, interval_minutes", [(24 * 60, 117), (6 * 60, 57), (15, 9.1)])
def test_daly_is_as_in_figures_3_to_5_of_his_paper(mtbf_minutes, interval_minutes):
    """The captions: restart dumps of 5 minutes, and what the model predicts."""
    assert daly(5, mtbf_minutes) == pytest.approx(interval_minutes, rel=0.006)


@pytest.mark.parametrize("seconds, mtbf_seconds", [(1, 1e6), (60, 24 * HOUR), (300, HOUR), (900, HOUR), (3000, HOUR)])
def test_no_interval_has_more_goodput_than_dalys(seconds, mtbf_seconds):
    intervals = np.geomspace(1e-3, 30, 20_000) * mtbf_seconds
    most = max(goodput(interval, seconds, mtbf_seconds, 60.0) for interval in intervals.tolist())
    at_daly = goodput(daly(seconds, mtbf_seconds), seconds, mtbf_seconds, 60.0)
    assert at_daly == pytest.approx(most, rel=1e-3)
    assert goodput(young(seconds, mtbf_seconds), seconds, mtbf_seconds, 60.0) <= at_daly


def test_beyond_twice_the_mtbf_the_interval_is_the_mtbf():
    assert daly(2.0, 1.0) == daly(50.0, 1.0) == 1.0
    assert goodput(1.0, 50.0, 1.0, 0.0) < goodput(1.0, 2.0, 1.0, 0.0) < HOPELESS


@pytest.mark.parametrize("interval, seconds, mtbf_seconds, restart", [
    (100.0, 10.0, 400.0, 20.0), (50.0, 30.0, 60.0, 0.0), (10.0, 1.0, 5.0, 15.0)])
def test_goodput_is_that_of_failures_drawn_by_chance(interval, seconds, mtbf_seconds, restart):
    """One event after the other. Failures also come in restarts and checkpoints."""
    generator, segments, time = np.random.default_rng(0), 4000, 0.0
    for _ in range(segments):
        needed = interval + seconds
        while (failure := generator.exponential(mtbf_seconds)) < needed:
            time += failure
            needed = restart + interval + seconds
        time += needed
    assert goodput(interval, seconds, mtbf_seconds, restart) == pytest.approx(segments * interval / time, rel=0.05)


@pytest.mark.parametrize("interval, stall, writing, mtbf_seconds, restart", [
    (100.0, 2.0, 60.0, 400.0, 20.0), (50.0, 1.0, 50.0, 60.0, 0.0), (20.0, 5.0, 45.0, 200.0, 30.0),  # it waits for 25 s
    (100.0, 10.0, 0.0, 400.0, 20.0)])
def test_goodput_beside_writing_is_that_of_failures_drawn_by_chance(interval, stall, writing, mtbf_seconds, restart):
    """A clock, the work that is done and the work that is published; a failure takes all of it back to the last."""
    generator, time, useful, end = np.random.default_rng(0), 0.0, 0.0, 20_000 * mtbf_seconds / 4
    while time < end:
        failure = generator.exponential(mtbf_seconds)
        clock, done, published = restart, 0.0, 0.0
        is_free, is_there = 0.0, 0.0                        # when the disk is, when the newest checkpoint is
        while True:
            clock, done = clock + interval, done + interval
            begins = max(clock, is_free)                    # the one before is being written
            clock = begins + stall
            is_there = is_free = clock + writing
            if is_there > failure:
                break
            published = done
        time, useful = time + failure, useful + published
    assert goodput(interval, stall, mtbf_seconds, restart, writing) == pytest.approx(useful / time, rel=0.05)


def test_a_stall_costs_more_than_the_latency_of_a_checkpoint():
    """What is written beside training is the better for it, and to first order loses its latency per failure."""
    month = 30 * 24 * HOUR
    waits, beside = goodput(1000.0, 30.0, month, 600.0), goodput(1000.0, 0.0, month, 600.0, 30.0)
    assert waits == pytest.approx(1000 / 1030, rel=1e-3)
    assert beside == pytest.approx(1 - (500 + 600 + 30) / month, rel=1e-5)
    assert goodput(1000.0, 30.0, month, 600.0, 0.0) == waits


@pytest.mark.parametrize("stall, writing, mtbf_seconds", [(1, 30, 1e5), (5, 60, 1e5), (1, 900, HOUR), (9, 9, 1e6)])
def test_no_cadence_has_more_goodput_than_the_best_one_beside_writing(stall, writing, mtbf_seconds):
    plan = plan_checkpoints(int(1e6 * writing), **ASYNCHRONOUS | {
        "copied": stall * COPY_RATE, "disk_rate": 1e6, "mtbf_seconds": mtbf_seconds, "step_seconds": 0.1})
    most = max(map(plan.goodput, (np.geomspace(1e-4, 30, 20_000) * mtbf_seconds).tolist()))
    assert plan.best.goodput == pytest.approx(most, rel=1e-3)
    assert plan.best.interval_seconds >= writing


def test_a_plan_beside_the_cadence_of_the_settings():
    plan = plan_checkpoints(150_000_000_000, **USUAL)  # 30 s
    assert plan.seconds == 30.0
    assert plan.best.interval_seconds == 2.0 * plan.best_steps == pytest.approx(daly(30, 24 * HOUR), abs=1)
    assert plan.as_set.interval_seconds == 1800.0 and plan.as_set.goodput < plan.best.goodput
    for cadence in (plan.best, plan.as_set):
        assert cadence.goodput + cadence.stall + cadence.lost == pytest.approx(1)
        assert cadence.stall == pytest.approx(30 / cadence.interval_seconds, rel=0.05)
        # to first order half of the interval, the checkpoint's, and the restart are lost per failure
        assert cadence.lost == pytest.approx((cadence.interval_seconds / 2 + 600) / (24 * HOUR), rel=0.1)
    assert plan.advice == ""


def test_a_plan_of_copies_beside_the_cadence_of_the_settings():
    plan, waits = plan_checkpoints(150_000_000_000, **ASYNCHRONOUS), plan_checkpoints(150_000_000_000, **USUAL)
    assert (plan.seconds, plan.copying, plan.stall, plan.writing) == (30.0, 5.0, 5.0, 30.0)
    assert (waits.seconds, waits.copying, waits.stall, waits.writing) == (30.0, None, 30.0, 0.0)
    assert plan.best.interval_seconds == pytest.approx(daly(5, 24 * HOUR), abs=1)
    assert waits.best.goodput < plan.best.goodput < 1
    for cadence in (plan.best, plan.as_set):
        assert cadence.goodput == plan.goodput(cadence.interval_seconds)
        assert cadence.goodput + cadence.stall + cadence.lost == pytest.approx(1)
        assert cadence.stall == pytest.approx(5 / cadence.interval_seconds, rel=0.05)
        assert cadence.lost == pytest.approx((cadence.interval_seconds / 2 + 30 + 600) / (24 * HOUR), rel=0.1)


@pytest.mark.parametrize("given, interval", [
    ({}, 1800), ({"every_minutes": 100.0}, 1800), ({"every_minutes": 10.0}, 596),         # 5 of the 600 s are a stall
    ({"every_minutes": 0.1}, 30), ({"every_minutes": 0.1, "step_seconds": 7.0}, 35),      # it waits for the one before
    ({"every_minutes": 0.1, "copied": None}, 2), ({"every_minutes": 1.0, "copied": None}, 30),
    ({"every_minutes": 10.0, "step_seconds": 100.0}, 600), ({"every_minutes": 10.0, "total_steps": 100}, 200)])
def test_as_set_is_the_sooner_of_steps_and_minutes_at_the_end_of_a_step(given, interval):
    assert plan_checkpoints(150_000_000_000, **ASYNCHRONOUS | given).as_set.interval_seconds == interval


def test_steps_that_are_sooner_than_the_disk_make_training_wait_for_the_checkpoint_before():
    plan = plan_checkpoints(150_000_000_000, **ASYNCHRONOUS | {"every_seconds": 10.0})
    assert plan.as_set.stall / plan.as_set.goodput == pytest.approx((5 + 30 - 10) / 10)
    assert plan.best.interval_seconds >= 30


@pytest.mark.parametrize("given", [ASYNCHRONOUS, USUAL])
def test_the_best_minutes_are_the_best_cadence(given):
    plan = plan_checkpoints(150_000_000_000, **given | {"every_seconds": 1e6})
    set_so = plan_checkpoints(150_000_000_000, **given | {"every_seconds": 1e6, "every_minutes": plan.best_minutes})
    assert set_so.as_set == plan.best


def test_the_best_cadence_is_no_longer_than_the_run():
    plan = plan_checkpoints(150_000_000_000, **USUAL | {"total_steps": 100})
    assert plan.best_steps == 100 and plan.best.interval_seconds == 200.0


def test_a_step_longer_than_the_best_interval_is_one_step():
    plan = plan_checkpoints(1_000_000, **USUAL | {"mtbf_seconds": 1000.0, "step_seconds": 60.0, "every_seconds": 60.0})
    assert plan.best_steps == 1 and plan.best == plan.as_set


@pytest.mark.parametrize("mtbf_seconds", [1e-3, 1.0, 30.0])
def test_machines_that_fail_before_a_checkpoint_is_written_are_hopeless_in_words(mtbf_seconds):
    plan = plan_checkpoints(150_000_000_000, **USUAL | {"mtbf_seconds": mtbf_seconds, "restart_seconds": 0.0})
    assert 0 <= plan.best.goodput < HOPELESS
    beside = plan_checkpoints(150_000_000_000, **ASYNCHRONOUS | {"mtbf_seconds": mtbf_seconds, "restart_seconds": 0.0})
    assert 0 <= beside.best.goodput < HOPELESS and beside.advice
    assert "a checkpoint takes 30 s" in plan.advice and "faster disk" in plan.advice
    assert all(np.isfinite(dataclasses.astuple(plan.best))) and all(np.isfinite(dataclasses.astuple(plan.as_set)))


def test_the_usual_rate_of_failures_is_that_of_llama_3():
    assert 54 * 24 * HOUR / default_mtbf(16_384) == pytest.approx(419)
    assert default_mtbf(8) / default_mtbf(1024) == pytest.approx(128)
    assert default_mtbf(1) / HOUR == pytest.approx(50_700, rel=1e-3)
    assert default_mtbf(8) / HOUR == pytest.approx(6330, rel=1e-3)
    assert default_mtbf(1024) / (24 * HOUR) == pytest.approx(2.1, rel=0.03)


@pytest.mark.parametrize("change, message", [
    ({"disk_rate": 0.0}, "--disk must be positive and finite, got 0"),
    ({"mtbf_seconds": float("inf")}, "--mtbf must be positive and finite, got inf"),
    ({"every_seconds": -1.0}, "time between checkpoints must be positive and finite, got -1"),
    ({"restart_seconds": float("nan")}, "restart must be at least 0 s and finite, got nan")])
def test_numbers_that_cannot_be_are_told(change, message):
    with pytest.raises(SettingsError, match=message):
        plan_checkpoints(10, **USUAL | change)
