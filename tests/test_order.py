"""The order: every sample once per epoch, the same for every world size and resume point."""

import threading
import time

import numpy as np
import pytest
import torch

import vir.data.order as order_module
from vir.data.loader import Batches, Patience
from vir.data.order import SampleOrder, epoch_order, settle

CASES = [  # shard sizes, lanes, window
    ([1], 1, 1),
    ([1], 64, 2500),
    ([5], 8, 3),              # lanes > samples
    ([3, 1, 4], 2, 1),        # window 1: a lane keeps its order
    ([3, 1, 4, 1, 5], 3, 10**9),
    ([7, 7, 7], 4, 5),        # lanes cut shards
    ([1] * 13, 5, 2),
    ([2, 0, 3], 2, 2),        # an empty shard
    ([100, 1, 63], 64, 20),
]


def expected_epoch(seed, epoch, sizes, lanes, window):
    """The rule of order.py's docstring, sample by sample in lists; only the random numbers are drawn alike."""
    bits = np.random.Philox(np.random.SeedSequence((seed, epoch)))
    drawn = bits.random_raw(len(sizes)).tolist()
    shards, first = [], 0
    for size in sizes:
        shards.append(list(range(first, first + size)))
        first += size
    dealt = [sample for shard in sorted(range(len(sizes)), key=drawn.__getitem__) for sample in shards[shard]]
    raw = bits.random_raw(len(dealt)).tolist()
    keys = [place + (number >> 11) / 2**53 * window for place, number in enumerate(raw)]

    places_of_lane = [list(range(lane, len(dealt), lanes)) for lane in range(lanes)]
    order, first = [None] * len(dealt), 0
    for places in places_of_lane:
        cut = range(first, first + len(places))
        first += len(places)
        for place, i in zip(places, sorted(cut, key=lambda i: keys[i])):
            order[place] = dealt[i]
    return order


@pytest.mark.parametrize("sizes, lanes, window", CASES)
def test_an_epoch_is_a_permutation_and_equals_the_rule_in_plain_python(sizes, lanes, window):
    for epoch in range(3):
        found = epoch_order(7, epoch, sizes, lanes, window)
        assert found.dtype == np.int32 and sorted(found.tolist()) == list(range(sum(sizes)))
        assert found.tolist() == expected_epoch(7, epoch, sizes, lanes, window)


def test_a_small_order_is_pinned():
    """Checkpoints of earlier versions continue only while these numbers stay."""
    assert epoch_order(42, 1, [4, 3, 5], 3, 9).tolist() == [7, 11, 4, 8, 0, 3, 9, 1, 5, 10, 2, 6]


def test_a_lane_mixes_within_its_window_and_no_further():
    """With one shard and one lane, the sample at place p comes from within a window of p; a wide window mixes more."""
    moved = {window: np.abs(epoch_order(0, 0, [1000], 1, window) - np.arange(1000)) for window in (1, 20, 10**9)}
    assert moved[1].max() == 0
    assert 0 < moved[20].mean() and moved[20].max() < 20
    assert 200 < moved[10**9].mean() < 470  # a full shuffle moves by 333 on average


def test_epochs_seeds_lanes_and_windows_give_different_orders():
    orders = [epoch_order(*rule).tolist() for rule in (
        (0, 0, [50, 50], 4, 10), (0, 1, [50, 50], 4, 10), (1, 0, [50, 50], 4, 10), (0, 0, [50, 50], 5, 10),
        (0, 0, [50, 50], 4, 11))]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


def test_the_order_is_a_pure_function():
    """No state: neither the calls before it nor numpy's global generator change it."""
    before = epoch_order(1, 2, [9, 8], 3, 4)
    np.random.seed(0)
    epoch_order(5, 6, [9, 8], 3, 4)
    assert np.array_equal(before, epoch_order(1, 2, (9, 8), 3, 4))


def endless(order, count, size):
    """The samples of positions 0 .. count * size, batch by batch, each batch sorted by position."""
    return np.concatenate([order.samples(np.sort(order.global_batch(step * size, size))) for step in range(count)])


@pytest.mark.parametrize("sizes, lanes, window", CASES)
@pytest.mark.parametrize("size", [1, 4, 6])
def test_global_batches_partition_the_endless_sequence(sizes, lanes, window, size):
    """Batches straddle epoch ends; a batch larger than the data set spans several epochs."""
    total = sum(sizes)
    order, steps = SampleOrder(3, sizes, min(lanes, total), window), -(-3 * total // size)
    for step in range(steps):
        positions = order.global_batch(step * size, size)
        assert sorted(positions.tolist()) == list(range(step * size, (step + 1) * size))
    sequence = endless(order, steps, size)
    for epoch in range(3):
        part = sequence[epoch * total:(epoch + 1) * total]
        assert sorted(part.tolist()) == list(range(total))
        assert part.tolist() == epoch_order(3, epoch, sizes, min(lanes, total), window).tolist()


def test_a_global_batch_is_sorted_by_lane_so_that_a_rank_reads_few_shards():
    order = SampleOrder(0, [9, 9], 4, 3)
    positions = order.global_batch(14, 8)  # places 14 to 17 of one epoch are in lanes 2, 3, 0, 1; the next begins at 0
    assert positions.tolist() == [16, 18, 17, 19, 14, 20, 15, 21]


def test_samples_of_positions_in_any_order_and_far_ahead():
    order = SampleOrder(0, [3, 4], 2, 3)
    positions = np.array([7 * 10**6 + 2, 0, 13, 2, 7])
    expected = [epoch_order(0, position // 7, [3, 4], 2, 3)[position % 7] for position in positions.tolist()]
    assert order.samples(positions).tolist() == expected
    assert order.samples(np.array([], dtype=np.int64)).tolist() == []


@pytest.mark.parametrize("first", [0, 6, 24, 30])  # steps of 6 in epochs of 13
def test_resuming_at_any_position_continues_the_uninterrupted_sequence(first):
    rule = (5, [6, 7], 3, 4)
    whole = SampleOrder(*rule)
    everything = [whole.samples(whole.global_batch(position, 6)).tolist() for position in range(0, 60, 6)]
    resumed = SampleOrder(*rule)
    assert [resumed.samples(resumed.global_batch(position, 6)).tolist()
            for position in range(first, 60, 6)] == everything[first // 6:]


def test_the_next_epoch_is_made_beside_the_second_half_of_this_one(monkeypatch):
    made, end = [], 52

    def making(seed, epoch, **rule):
        made.append((epoch, threading.current_thread() is threading.main_thread()))
        return epoch_order(seed, epoch, **rule)

    monkeypatch.setattr(order_module, "epoch_order", making)
    order, expected = SampleOrder(5, [6, 7], 3, 4), SampleOrder(5, [6, 7], 3, 4)
    for position in range(end):
        assert order.samples(np.array([position])) == epoch_order(5, position // 13, [6, 7], 3, 4)[position % 13]
        order.prepare(position + 1, end)
        settle()
        assert made[-1][0] == min((position + 1 + 6) // 13, 3)
    assert made == [(0, True), (1, False), (2, False), (3, False)]
    assert expected.samples(np.arange(end)).tolist() == order.samples(np.arange(end)).tolist()


def test_what_fails_while_an_order_is_made_is_told_where_it_is_needed(monkeypatch):
    order = SampleOrder(5, [6, 7], 3, 4)
    order.samples(np.array([0]))

    def failing(*rule, **names):
        raise MemoryError("no room for an order")

    monkeypatch.setattr(order, "_make", failing)
    order.prepare(12, 26)
    settle()
    assert len(order.samples(np.arange(13))) == 13
    with pytest.raises(MemoryError, match="no room for an order"):
        order.samples(np.array([13]))


def test_a_fork_waits_for_the_order_that_is_being_made(monkeypatch):
    """Loader processes would wait for ever for a thread that they do not have."""
    order = SampleOrder(5, [6, 7], 3, 4)
    make = order._make
    monkeypatch.setattr(order, "_make", lambda epoch: (time.sleep(0.2), make(epoch))[1])
    order.prepare(7, 26)
    until = time.monotonic() + 60
    patience = Patience(seconds=60, tell=lambda what: None, give_up=lambda: time.monotonic() > until)
    positions = np.arange(13, 26)
    batches = Batches(lambda positions, samples: order.samples(positions), lambda: iter([(positions, positions)]), 1, 1,
                      torch.device("cpu"), patience)
    assert next(batches).tolist() == epoch_order(5, 1, [6, 7], 3, 4).tolist()
    batches.close()
