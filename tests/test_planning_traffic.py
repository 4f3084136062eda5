"""Traffic of nodes and quality of the shuffle: beside the simulation of one epoch, loops, and of ImageNet."""

import itertools

import numpy as np
import pytest

from vir.data.order import SampleOrder, epoch_order
from vir.data.traffic import LANES, WINDOW, downloads
from vir.errors import SettingsError
from vir.planning.traffic import MOST_DOWNLOADS, MOST_IN_PARTS, shuffle_quality, simulate

IMAGENET = [1000] * 1281 + [167]
IMAGENET_BYTES = [size * 110_000 for size in IMAGENET]
SIZES = [50] * 40
BYTES = [5000] * 40
SMALL = {"nodes": 2, "global_batch_size": 40, "lanes": 4, "window": 60}


@pytest.mark.parametrize("nodes", [1, 2, 4])
@pytest.mark.parametrize("cache_bytes", [7_000, 20_000, 50_000, 10**9])
def test_the_first_epoch_is_as_data_traffic_simulates_it(nodes, cache_bytes):
    """50 steps are just an epoch, so that both count the same ones."""
    found = simulate(SIZES, BYTES, cache_bytes=cache_bytes, **SMALL | {"nodes": nodes})
    alone = downloads(SampleOrder(0, SIZES, 4, 60), SIZES, BYTES, nodes=nodes, global_batch_size=40,
                      budget_bytes=cache_bytes)
    first = found.first_epoch
    assert first.downloads_per_shard == pytest.approx(sum(node.shards for node in alone) / 40)
    assert first.in_parts == pytest.approx(sum(node.samples for node in alone) / 2000)
    assert first.bytes_per_node == pytest.approx(sum(node.bytes for node in alone) / nodes)
    assert first.simulated_nodes == nodes


def shards_of(epoch, node, nodes=2, batch=40):
    """Which a node reads in an epoch, sample by sample."""
    order = SampleOrder(0, SIZES, 4, 60)
    per_node = batch // nodes
    return {int(sample) // 50 for step in range(50 * epoch, 50 * (epoch + 1))
            for sample in order.samples(order.global_batch(step * batch, batch)[node * per_node:(node + 1) * per_node])}


def test_a_second_epoch_brings_the_shards_that_the_node_has_not_had():
    found = simulate(SIZES, BYTES, cache_bytes=10**9, **SMALL)
    new = [len(shards_of(1, node) - shards_of(0, node)) for node in (0, 1)]
    assert found.later_epoch.downloads_per_shard == pytest.approx(sum(new) / 40, abs=0.05)  # some are read in parts
    assert 0.3 < found.later_epoch.downloads_per_shard < 0.7
    assert found.shards_per_node == np.mean([len(shards_of(0, node)) for node in (0, 1)])
    alone = simulate(SIZES, BYTES, cache_bytes=sum(BYTES), **SMALL | {"nodes": 1})
    assert alone.later_epoch.bytes_per_node == 0 and alone.later_epoch.in_parts == 0
    assert alone.first_epoch.bytes_per_node == sum(BYTES)


@pytest.mark.parametrize("cache_bytes", [None, 4_999])
def test_without_a_cache_or_with_one_smaller_than_a_shard_each_image_is_a_read(cache_bytes):
    found = simulate(SIZES, BYTES, cache_bytes=cache_bytes, **SMALL)
    for epoch in (found.first_epoch, found.later_epoch):
        assert (epoch.downloads_per_shard, epoch.in_parts, epoch.bytes_per_node) == (0, 1, sum(BYTES) / 2)
    assert found.reads_per_image == 1 and found.bytes_per_image == 100


def test_a_larger_cache_in_the_table_is_better_and_the_first_that_suffices_is_named():
    found = simulate(SIZES, BYTES, cache_bytes=None, **SMALL)
    sizes = [row.cache_bytes for row in found.table]
    assert sizes == sorted(sizes) and found.table[-1].cache_bytes == sum(BYTES)
    assert found.working_set_bytes == found.working_set * 5000
    assert [row.cache_bytes for row in found.table if row.working_sets == 1] == [found.working_set_bytes]
    enough = [row for row in found.table if row.cache_bytes >= found.enough_bytes]
    assert enough and len({row.fetched for row in enough}) == 1
    named = next(row for row in found.table if row.cache_bytes == found.needed_cache)
    assert named.fetched.downloads_per_shard <= MOST_DOWNLOADS and named.fetched.in_parts <= MOST_IN_PARTS
    assert not any(row.fetched.suffices for row in found.table if row.cache_bytes < found.needed_cache)


def test_lanes_that_nodes_must_share_make_them_download_the_same_shards():
    whole = simulate(SIZES, BYTES, cache_bytes=10**9, **SMALL)
    shared = simulate(SIZES, BYTES, cache_bytes=10**9, **SMALL | {"lanes": 1})
    assert whole.whole_lanes and whole.first_epoch.downloads_per_shard < 1.2 and whole.needed_cache
    assert not shared.whole_lanes and shared.first_epoch.downloads_per_shard > 1.9 and shared.needed_cache is None
    uneven = simulate(SIZES, BYTES, cache_bytes=10**9, **SMALL | {"lanes": 6})  # 40 is no multiple
    assert not uneven.whole_lanes


@pytest.mark.parametrize("sizes, batch", [([7], 14), ([1, 2, 3], 2), ([5] * 3, 40)])
def test_fewer_shards_than_lanes_and_batches_larger_than_an_epoch(sizes, batch):
    found = simulate(sizes, [size * 10 for size in sizes], nodes=2, global_batch_size=batch, cache_bytes=1000)
    assert (found.lanes, found.window) == found.recommended
    assert found.first_epoch.in_parts <= 1 and found.first_epoch.bytes_per_node > 0
    assert found.shards_per_node <= len(sizes) and found.working_set <= len(sizes)
    assert found.table[-1].cache_bytes == 10 * sum(sizes)


@pytest.mark.parametrize("nodes, global_batch_size, lanes", [
    (1, 1024, LANES), (8, 4096, LANES), (128, 8192, 128)])
def test_imagenet_at_the_recommended_lanes(nodes, global_batch_size, lanes):
    found = simulate(IMAGENET, IMAGENET_BYTES, nodes=nodes, global_batch_size=global_batch_size, cache_bytes=200e9)
    assert found.recommended == (found.lanes, found.window) == (lanes, WINDOW) and found.whole_lanes
    assert found.first_epoch.simulated_nodes == nodes
    assert found.first_epoch.suffices and found.later_epoch.suffices
    assert found.needed_cache <= 2.01 * found.working_set_bytes
    assert found.later_epoch.downloads_per_shard <= found.first_epoch.downloads_per_shard
    if nodes <= 8:  # of what is dealt to a node in the second epoch it has had one in `nodes`
        assert found.later_epoch.downloads_per_shard == pytest.approx(1 - 1 / nodes, abs=0.03)


def test_nodes_that_are_left_out_are_like_those_that_are_simulated(monkeypatch):
    arguments = {"nodes": 16, "global_batch_size": 160, "lanes": 16, "window": 100}
    sizes, shard_bytes = [50] * 800, [5000] * 800
    monkeypatch.setattr("vir.planning.traffic._ROWS", 10**9)
    all_nodes = simulate(sizes, shard_bytes, cache_bytes=15_000, **arguments).first_epoch
    monkeypatch.setattr("vir.planning.traffic._ROWS", 5_000)
    some = simulate(sizes, shard_bytes, cache_bytes=15_000, **arguments).first_epoch
    assert all_nodes.simulated_nodes == 16 and 1 < some.simulated_nodes < 8
    assert some.downloads_per_shard == pytest.approx(all_nodes.downloads_per_shard, rel=0.05)
    assert some.bytes_per_node == pytest.approx(all_nodes.bytes_per_node, rel=0.05)


@pytest.mark.parametrize("share", [0.6, 1.0])
def test_a_part_of_a_long_epoch_tells_of_all_of_it(share, monkeypatch):
    arguments = {"nodes": 1, "global_batch_size": 40, "lanes": 8, "window": 100}
    sizes, shard_bytes = [50] * 800, [5000] * 800
    cache_bytes = share * simulate(sizes, shard_bytes, cache_bytes=None, **arguments).working_set_bytes
    exact = simulate(sizes, shard_bytes, cache_bytes=cache_bytes, **arguments)
    monkeypatch.setattr("vir.planning.traffic._ROWS_OF_ONE", 8_000)  # of 14,000
    part = simulate(sizes, shard_bytes, cache_bytes=cache_bytes, **arguments)
    assert part != exact
    for told, known in ((part.first_epoch, exact.first_epoch), (part.later_epoch, exact.later_epoch)):
        assert told.downloads_per_shard == pytest.approx(known.downloads_per_shard, rel=0.1)
        assert told.in_parts == pytest.approx(known.in_parts, abs=0.01)
        assert told.bytes_per_node == pytest.approx(known.bytes_per_node, rel=0.1)


@pytest.mark.parametrize("change, message", [
    ({"nodes": 3}, "a global batch of 40 cannot be shared out among 3 nodes; the nearest that can: 39 and 42"),
    ({"nodes": 64}, "cannot be shared out among 64 nodes; the nearest that can: 64"),
    ({"nodes": 0}, "--nodes must be at least 1 and finite, got 0"),
    ({"cache_bytes": 0}, "the cache must be at least 1 and finite, got 0"),
    ({"window": -1}, "--data.window must be at least 1 and finite, got -1")])
def test_numbers_that_cannot_be_are_told(change, message):
    with pytest.raises(SettingsError, match=message):
        simulate(SIZES, BYTES, **{"cache_bytes": None} | SMALL | change)


@pytest.mark.parametrize("sizes, shard_bytes", [([], []), ([3, 0], [5, 5]), ([3, 3], [5, 0])])
def test_shards_without_samples_are_told(sizes, shard_bytes):
    with pytest.raises(SettingsError, match="no sample or no bytes"):
        simulate(sizes, shard_bytes, cache_bytes=None, **SMALL)


# ---- the shuffle


def distance_by_loop(sizes, lanes, window):
    order = epoch_order(0, 0, sizes, lanes, window).tolist()
    place = {sample: at for at, sample in enumerate(order)}
    found, first = [], 0
    for size in sizes:
        found += [abs(place[sample] - place[sample + 1]) for sample in range(first, first + size - 1)]
        first += size
    return sum(found) / len(found)


@pytest.mark.parametrize("sizes, lanes, window", [
    ([20] * 30, 4, 30), ([1, 7, 40, 3, 1, 90], 3, 10), ([33] * 7, 64, 1), ([5, 5], 1, 10**6)])
def test_distance_of_neighbours_is_that_of_a_loop(sizes, lanes, window):
    found = shuffle_quality(sizes, lanes, window)
    assert found.distance == pytest.approx(distance_by_loop(sizes, lanes, window))
    assert found.neighbours == pytest.approx(found.distance / ((sum(sizes) + 1) / 3))


def test_of_all_permutations_the_mean_distance_is_a_third_of_one_more_than_their_length():
    for total in (2, 3, 6):
        distances = [abs(order.index(0) - order.index(1)) for order in itertools.permutations(range(total))]
        assert np.mean(distances) == pytest.approx((total + 1) / 3)


def test_quality_at_its_ends():
    assert shuffle_quality([100] * 100, 1, 10**7).neighbours == pytest.approx(1, abs=0.03)  # a full shuffle
    assert shuffle_quality([100] * 100, 1, 1).distance == 1  # none
    assert shuffle_quality([1] * 50, 4, 10).neighbours == shuffle_quality([1], 64, 2500).neighbours == 1


def test_quality_grows_with_lanes_and_window():
    usual = shuffle_quality(IMAGENET, LANES, WINDOW).neighbours
    # Two samples of a lane lie a third of its window apart at least, other lanes' between them.
    assert usual * (sum(IMAGENET) + 1) / 3 >= LANES * WINDOW / 3 * 0.9
    assert shuffle_quality(IMAGENET, LANES // 2, WINDOW).neighbours < usual < shuffle_quality(
        IMAGENET, LANES, 4 * WINDOW).neighbours
