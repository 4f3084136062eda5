"""Which shards a node needs and when, against loops over samples; the choice of lanes and window, by simulation."""

import numpy as np
import pytest

from vir.data.order import SampleOrder
from vir.data.traffic import (
    LANES,
    NEVER,
    WINDOW,
    Needs,
    NextUse,
    NodeCache,
    choose,
    downloads,
    fitting,
    node_shards,
    working_set,
)

IMAGENET = [1251] * 1024 + [143]
SHARD_BYTES = 141_000_000


def random_sizes(seed, shards=17, most=90):
    return np.random.default_rng(seed).integers(1, most, shards).tolist()


def needs_by_loop(order, sizes, first_step, last_step, global_batch_size, ranks, world_size):
    """(step, shard): samples, one sample at a time."""
    shard_of = [shard for shard, size in enumerate(sizes) for _ in range(size)]
    per_rank = global_batch_size // world_size
    found = {}
    for step in range(first_step, last_step):
        batch = order.global_batch(step * global_batch_size, global_batch_size)
        for rank in ranks:
            for sample in order.samples(batch[rank * per_rank:(rank + 1) * per_rank]):
                key = step, shard_of[sample]
                found[key] = found.get(key, 0) + 1
    return found


def as_dict(needs):
    return {(step, shard): count for step, shard, count in zip(needs.steps.tolist(), needs.shards.tolist(),
                                                               needs.counts.tolist())}


@pytest.mark.parametrize("seed, world_size, ranks, lanes, window, first_step, last_step", [
    (0, 1, range(0, 1), 4, 10, 0, 40),
    (1, 4, range(0, 2), 8, 25, 3, 60),  # a node of two ranks; over the ends of epochs
    (2, 4, range(2, 4), 5, 1, 70, 75),  # lanes that do not divide the batch
    (3, 2, range(1, 2), 64, 5000, 9, 10),  # more lanes than samples in a batch
    (4, 1, range(0, 1), 1, 1, 5, 5)])  # no step
def test_needs_are_those_of_a_loop_over_samples(seed, world_size, ranks, lanes, window, first_step, last_step):
    sizes = random_sizes(seed)
    order = SampleOrder(seed, sizes, lanes, window)
    needs = node_shards(order, sizes, first_step=first_step, last_step=last_step, global_batch_size=24, ranks=ranks,
                        world_size=world_size)
    assert as_dict(needs) == needs_by_loop(order, sizes, first_step, last_step, 24, ranks, world_size)
    assert (np.diff(needs.steps) >= 0).all()
    assert (needs.first_step, needs.last_step) == (first_step, last_step)


def test_needs_are_the_same_in_spans(monkeypatch):
    sizes = random_sizes(5)
    order = SampleOrder(5, sizes, 4, 30)
    arguments = {"global_batch_size": 24, "ranks": range(1), "world_size": 2}
    whole = node_shards(order, sizes, first_step=2, last_step=50, **arguments)
    monkeypatch.setattr("vir.data.traffic._SAMPLES_AT_ONCE", 100)
    in_spans = node_shards(order, sizes, first_step=2, last_step=30, **arguments).and_then(
        node_shards(order, sizes, first_step=30, last_step=50, **arguments))
    assert as_dict(in_spans) == as_dict(whole)
    assert as_dict(whole.from_step(20)) == {key: count for key, count in as_dict(whole).items() if key[0] >= 20}


@pytest.mark.parametrize("seed", range(4))
def test_next_use_is_that_of_a_loop(seed):
    sizes = random_sizes(seed)
    order = SampleOrder(seed, sizes, 4, 20)
    needs = node_shards(order, sizes, first_step=10, last_step=60, global_batch_size=12, ranks=range(1), world_size=2)
    uses = NextUse(needs, len(sizes))
    rows = as_dict(needs)
    for step in (0, 10, 11, 37, 59, 60, 99):
        nexts = [min((at for at, shard in rows if shard == one and at >= step), default=NEVER)
                 for one in range(len(sizes))]
        assert uses.steps(step).tolist() == nexts
        assert uses.samples(step).tolist() == [sum(count for (at, shard), count in rows.items()
                                                   if shard == one and at >= step) for one in range(len(sizes))]
        assert uses.in_order(step).tolist() == sorted((one for one in range(len(sizes)) if nexts[one] != NEVER),
                                                      key=lambda one: (nexts[one], one))


def test_a_shard_of_which_little_is_needed_is_not_worth_a_download():
    rows = np.array([0, 1, 2])
    uses = NextUse(Needs(0, 3, rows, rows, np.array([1, 10, 6])), 4)
    assert uses.worth_a_download(0, np.array([100, 100, 90, 100])).tolist() == [False, True, True, False]
    assert uses.worth_a_download(2, np.array([100, 100, 90, 100])).tolist() == [False, False, True, False]


def test_fitting_is_as_many_from_the_first_on():
    sizes = np.array([5, 10, 20, 1])
    assert fitting(np.array([2, 0, 1, 3]), sizes, 25).tolist() == [2, 0]
    assert fitting(np.array([2, 0]), sizes, 19).tolist() == []
    assert fitting(np.array([2, 0]), sizes, 100).tolist() == [2, 0]


@pytest.mark.parametrize("lanes, window, shards", [(64, 2500, 192), (1, 0, 1), (1, 1250, 2), (64, 10**6, 1000)])
def test_working_set(lanes, window, shards):
    assert working_set(lanes, window, [1250] * 1000) == shards


def test_working_set_is_what_an_epoch_uses_at_a_time():
    """Shards between their first and their last use, counted step by step."""
    sizes = [50] * 200
    order = SampleOrder(0, sizes, 8, 100)
    needs = node_shards(order, sizes, first_step=0, last_step=156, global_batch_size=64, ranks=range(1), world_size=1)
    spans = [(steps.min(), steps.max()) for steps in (needs.steps[needs.shards == shard] for shard in range(200))]
    middle = [sum(first <= step <= last for first, last in spans) for step in range(30, 120)]
    assert np.mean(middle) == pytest.approx(working_set(8, 100, sizes), rel=0.1)


def test_downloads_of_a_cache_for_all_and_of_none():
    sizes = [50] * 40
    order = SampleOrder(0, sizes, 4, 60)
    arguments = {"nodes": 1, "global_batch_size": 20}
    assert [node.shards for node in downloads(order, sizes, [1000] * 40, budget_bytes=None, **arguments)] == [40]
    none, = downloads(order, sizes, [1000] * 40, budget_bytes=999, **arguments)
    assert (none.shards, none.samples) == (0, 2000)
    some, = downloads(order, sizes, [1000] * 40, budget_bytes=4000, **arguments)  # half of the working set
    assert some.shards > 0 and 200 < some.samples < 1800


def test_the_one_that_goes_is_that_with_the_farthest_next_use():
    """One lane without shuffling: shards in turn, so room for one is enough, also over two epochs."""
    sizes = [32] * 10
    order = SampleOrder(0, sizes, 1, 1)
    for epoch in (0, 1):
        node, = downloads(order, sizes, [7] * 10, nodes=1, global_batch_size=32, budget_bytes=7, epoch=epoch)
        assert (node.shards, node.samples) == (10, 0)


def downloads_by_rule(needs, sizes, shard_bytes, budget):
    """Step by step: of what is there and what is needed and worth it, what is needed soonest stays."""
    uses, cached = NextUse(needs, len(sizes)), np.zeros(len(sizes), bool)
    whole, samples = [], 0
    for step in range(needs.first_step, needs.last_step):
        next_steps = uses.steps(step)
        now = next_steps == step
        wanted = cached | (now & uses.worth_a_download(step, sizes))
        order = np.lexsort((~cached, next_steps))
        kept = np.zeros(len(sizes), bool)
        kept[fitting(order[wanted[order]], shard_bytes, budget)] = True
        whole += [(step, shard) for shard in np.flatnonzero(kept & ~cached & now)]
        samples += int((uses.samples(step) - uses.samples(step + 1))[now & ~kept].sum())
        cached = kept
    return whole, samples


def room_by_loop(needs, sizes, shard_bytes):
    """The most bytes of shards that are worth a download, in a step between their first and their last use."""
    rows = as_dict(needs)
    spans = []
    for shard, size in enumerate(sizes.tolist()):
        steps = [step for step, needed in rows if needed == shard]
        samples = sum(count for (_, needed), count in rows.items() if needed == shard)
        if steps and 16 * samples >= size:
            spans.append((min(steps), max(steps), int(shard_bytes[shard])))
    return max(sum(size for first, last, size in spans if first <= step <= last)
               for step in range(needs.first_step, needs.last_step))


@pytest.mark.parametrize("seed", range(12))
def test_downloads_are_those_of_the_rule(seed):
    """With all budgets, of shards of all sizes, also from a later step on and up to one."""
    draw = np.random.default_rng(seed)
    sizes = draw.integers(1, 90, draw.integers(1, 30))
    shard_bytes = sizes * draw.integers(1, 20, len(sizes)) + 7
    nodes = int(draw.integers(1, 4))
    batch = nodes * int(draw.integers(1, 12))
    order = SampleOrder(seed, sizes.tolist(), int(draw.integers(1, 12)), int(draw.integers(1, 120)))
    epoch = seed % 2
    first, last = epoch * order.num_samples // batch, -(-(epoch + 1) * order.num_samples // batch)
    for share in (0, 0.05, 0.2, 0.5, 0.9, 1.5):
        budget = share * shard_bytes.sum()
        found = downloads(order, sizes.tolist(), shard_bytes.tolist(), nodes=nodes, global_batch_size=batch,
                          budget_bytes=budget, epoch=epoch)
        for node in range(nodes):
            needs = node_shards(order, sizes.tolist(), first_step=first, last_step=last, global_batch_size=batch,
                                ranks=range(node, node + 1), world_size=nodes)
            whole, samples = downloads_by_rule(needs, sizes, shard_bytes, budget)
            assert (found[node].shards, found[node].samples) == (len(whole), samples)
            cache, middle = NodeCache(needs, sizes, shard_bytes), (first + last) // 2
            assert cache.room == room_by_loop(needs, sizes, shard_bytes)
            later = cache.fetched(budget, middle)
            assert later.shards == sum(step >= middle for step, _ in whole)
            assert len(cache.rows(budget, middle)[0]) == len(whole) - later.shards
            if budget == 0:
                assert found[node].bytes == pytest.approx((needs.counts * (shard_bytes / sizes)[needs.shards]).sum())
            elif not samples:
                assert found[node].bytes == sum(shard_bytes[shard] for _, shard in whole)


def test_room_is_the_smallest_budget_with_which_no_shard_comes_twice():
    sizes = [50] * 40
    order = SampleOrder(3, sizes, 4, 60)
    needs = node_shards(order, sizes, first_step=0, last_step=100, global_batch_size=20, ranks=range(1), world_size=1)
    cache = NodeCache(needs, sizes, [10] * 40)
    enough, less = cache.fetched(cache.room), cache.fetched(cache.room - 1)
    assert (enough.shards, enough.samples) == (40, 0) and 60 < cache.room < 200
    assert less.shards + less.samples > 40


def test_a_cut_of_needs_is_what_needs_up_to_there_are():
    sizes = random_sizes(6)
    order = SampleOrder(6, sizes, 4, 30)
    arguments = {"global_batch_size": 24, "ranks": range(1), "world_size": 2}
    cut = node_shards(order, sizes, first_step=2, last_step=50, **arguments).until_step(30)
    whole = node_shards(order, sizes, first_step=2, last_step=30, **arguments)
    assert as_dict(cut) == as_dict(whole) and (cut.first_step, cut.last_step) == (2, 30)


@pytest.mark.parametrize("nodes, global_batch_size", [
    (1, 4096), (3, 3072), (24, 6144), (128, 8192)])
def test_nodes_share_the_downloads_of_an_epoch(nodes, global_batch_size):
    """ImageNet's shards, and a cache that has just room for the working set: at most 1.15 downloads per shard."""
    budget = working_set(max(LANES, nodes) / nodes, WINDOW, IMAGENET) * SHARD_BYTES / 0.8 + 1
    lanes, window = choose(IMAGENET, SHARD_BYTES, budget, nodes, global_batch_size)
    assert lanes % nodes == 0 and (nodes == 1 or global_batch_size % lanes == 0) and window == WINDOW
    order = SampleOrder(0, IMAGENET, lanes, window)
    found = downloads(order, IMAGENET, [SHARD_BYTES] * len(IMAGENET), nodes=nodes, budget_bytes=budget,
                      global_batch_size=global_batch_size)
    assert sum(node.shards for node in found) <= 1.15 * len(IMAGENET)
    assert sum(node.samples for node in found) <= 0.01 * sum(IMAGENET)


def test_choice_without_a_cache_and_with_room_for_all():
    assert choose(IMAGENET, SHARD_BYTES, None, 8, 1024) == (LANES, WINDOW)
    assert choose([100] * 10, 1e6, 13e6, 1, 96) == (LANES, WINDOW)


@pytest.mark.parametrize("budget_bytes", [1e9, 4e9, 10e9, 30e9])
@pytest.mark.parametrize("nodes", [1, 4])
def test_choice_from_a_budget_fits_and_nothing_larger_would(budget_bytes, nodes):
    lanes, window = choose(IMAGENET, SHARD_BYTES, budget_bytes, nodes, 1024)
    room = 0.8 * budget_bytes / SHARD_BYTES
    assert working_set(lanes / nodes, window, IMAGENET) <= room
    for more in (more for more in (1, 2, 4, 8, 16, 32, 64) if more % nodes == 0 and more * window > lanes * window):
        assert working_set(more / nodes, window, IMAGENET) > room


def test_choice_for_too_small_a_budget_is_the_smallest():
    lanes, window = choose(IMAGENET, SHARD_BYTES, SHARD_BYTES, 2, 1024)
    assert (lanes, window) == (2, 39)
    assert working_set(lanes / 2, window, IMAGENET) * SHARD_BYTES > 0.8 * SHARD_BYTES
