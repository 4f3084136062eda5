"""What the nodes fetch from where the shards lie, in the order that training takes them, and how well it shuffles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from functools import cached_property

import numpy as np

from vir.data.order import SampleOrder, epoch_order
from vir.data.traffic import NodeCache, choose, shards_of_ranks, working_set
from vir.errors import SettingsError

MOST_DOWNLOADS = 1.15
"""Of each shard in an epoch, over all nodes, with a cache that is large enough."""

MOST_IN_PARTS = 0.01
"""Share of the samples that are read in parts, with a cache that is large enough."""

SIZES = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Of the caches in the table, in working sets."""

_ROWS, _ROWS_OF_ONE = 50_000, 400_000
"""Pairs of a step and a shard that are gone through one by one where a cache has no room for the shards in use: of all
nodes that are simulated, 0.1 s, and of one alone, 0.4 s."""


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """What nodes with one size of cache fetch in an epoch."""

    downloads_per_shard: float
    """Of whole shards, over all nodes."""
    in_parts: float
    """Share of the samples that are read from the server one by one."""
    bytes_per_node: float
    simulated_nodes: int
    """So many of the nodes, spread evenly among them; the others are taken to be like them."""

    @property
    def suffices(self) -> bool:
        """Whether the cache is large enough for MOST_DOWNLOADS and MOST_IN_PARTS."""
        return self.downloads_per_shard <= MOST_DOWNLOADS and self.in_parts <= MOST_IN_PARTS


@dataclass(frozen=True, kw_only=True)
class CacheRow:
    """One size of cache."""

    cache_bytes: float
    """On each node."""
    working_sets: float | None
    """The size in working sets of a node; None: the whole data set."""
    fetched: Fetched
    """In the first epoch."""


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What the nodes fetch, from an empty cache; images on a disk that all nodes share are read as without a cache."""

    nodes: int
    lanes: int
    window: int
    recommended: tuple[int, int]
    """Lanes and window that a run takes on such nodes where it is not told."""
    cache_bytes: float | None
    """Of each node; None: without a cache every image is read from the server by itself."""
    whole_lanes: bool
    """Whether each node reads lanes of its own, the same in every step. If not, nodes download the same shards."""
    num_samples: int
    num_shards: int
    data_bytes: int
    shards_per_node: float
    """Of which a node reads samples in the first epoch, on average."""
    working_set: float
    """Shards that are in use at the same time on a node, on average at most."""
    working_set_bytes: float
    enough_bytes: int
    """Of all shards in use at once, on any node at any time: with such a cache each node downloads a shard once."""
    first_epoch: Fetched
    later_epoch: Fetched
    """The second epoch, in which the cache has what the first has left there. The shards are dealt anew: of n nodes
    that can keep all, a node has had one in n of the shards that it gets, and each epoch adds to them."""
    table: tuple[CacheRow, ...]
    """By the size of the cache, smallest first."""

    @property
    def needed_cache(self) -> float | None:
        """Bytes of the smallest cache in the table that suffices; None: none does."""
        return next((row.cache_bytes for row in self.table if row.fetched.suffices), None)

    @property
    def reads_per_image(self) -> float:
        """Requests to the server in the first epoch, of a whole shard or of one image; for each image, at most."""
        fetched = self.first_epoch
        return fetched.in_parts + fetched.downloads_per_shard * self.num_shards / self.num_samples

    @property
    def bytes_per_image(self) -> float:
        """That a node fetches in the first epoch for each image that it trains on."""
        return self.first_epoch.bytes_per_node * self.nodes / self.num_samples

    @property
    def later_bytes_per_image(self) -> float:
        """The same of the second epoch."""
        return self.later_epoch.bytes_per_node * self.nodes / self.num_samples


def simulate(shard_sizes: Sequence[int], shard_bytes: Sequence[int], *, nodes: int, global_batch_size: int,
             cache_bytes: float | None, lanes: int | None = None, window: int | None = None,
             seed: int = 0) -> Traffic:
    """The traffic of the first two epochs.

    Args:
        shard_sizes, shard_bytes: samples and bytes of each shard.
        cache_bytes: of the cache of each node; None without one.
        lanes, window: as the settings give them, else what a run would choose.

    Raises:
        SettingsError: nodes that do not divide the global batch, or numbers below 1.
    """
    _check(shard_sizes, shard_bytes, nodes, global_batch_size, cache_bytes, lanes, window)
    average = sum(shard_bytes) / len(shard_bytes)
    recommended = choose(shard_sizes, average, cache_bytes, nodes, global_batch_size)
    lanes, window = lanes or recommended[0], window or recommended[1]
    found = _Simulation(shard_sizes, shard_bytes, SampleOrder(seed, shard_sizes, lanes, window), nodes,
                        global_batch_size)
    in_use = working_set(lanes / nodes, window, shard_sizes)
    sizes: dict[float, float | None] = {share * in_use * average: share for share in SIZES}
    sizes = {size: share for size, share in sizes.items() if size < sum(shard_bytes)} | {sum(shard_bytes): None}
    return Traffic(
        nodes=nodes, lanes=lanes, window=window, recommended=recommended, cache_bytes=cache_bytes,
        whole_lanes=lanes % nodes == 0 and (nodes == 1 or global_batch_size % lanes == 0 or lanes == nodes),
        num_samples=sum(shard_sizes), num_shards=len(shard_sizes), data_bytes=sum(shard_bytes),
        shards_per_node=found.shards_per_node, working_set=in_use, working_set_bytes=in_use * average,
        enough_bytes=max(node.room for node in found.first),
        first_epoch=found.first_epoch(cache_bytes or 0), later_epoch=found.later_epoch(cache_bytes or 0),
        table=tuple(CacheRow(cache_bytes=size, working_sets=share, fetched=found.first_epoch(size))
                    for size, share in sizes.items()))


def _check(shard_sizes: Sequence[int], shard_bytes: Sequence[int], nodes: int, global_batch_size: int,
           cache_bytes: float | None, lanes: int | None, window: int | None) -> None:
    assert len(shard_sizes) == len(shard_bytes)
    if not len(shard_sizes) or min(*shard_sizes, *shard_bytes) < 1:
        raise SettingsError(f"{len(shard_sizes)} shards, of which one at least has no sample or no bytes: give shards "
                            "that each have both")
    for name, value in (("--nodes", nodes), ("--train.global_batch_size", global_batch_size),
                        ("the cache", 1 if cache_bytes is None else cache_bytes), ("--data.lanes", lanes or 1),
                        ("--data.window", window or 1)):
        if not 1 <= value < float("inf"):
            raise SettingsError(f"{name} must be at least 1 and finite, got {value:g}")
    if global_batch_size % nodes:
        near = sorted({max(1, global_batch_size // nodes) * nodes, (global_batch_size // nodes + 1) * nodes})
        raise SettingsError(f"a global batch of {global_batch_size} cannot be shared out among {nodes} nodes; the "
                            f"nearest that can: {' and '.join(map(str, near))}")


class _Simulation:
    """All nodes over two epochs; the caches are told when asked."""

    def __init__(self, shard_sizes: Sequence[int], shard_bytes: Sequence[int], order: SampleOrder, nodes: int,
                 global_batch_size: int) -> None:
        self._sizes, self._bytes, self._nodes, self._batch = shard_sizes, shard_bytes, nodes, global_batch_size
        # A step in which two epochs meet belongs to the later one, in which most of its shards are needed.
        self._steps = max(1, order.num_samples // global_batch_size)
        self._last_step = max(self._steps + 1, 2 * order.num_samples // global_batch_size)
        self._needs = shards_of_ranks(order, shard_sizes, first_step=0, last_step=self._last_step, world_size=nodes,
                                      global_batch_size=global_batch_size,
                                      groups=[range(node, node + 1) for node in range(nodes)])
        self.first = [NodeCache(needs.until_step(self._steps), shard_sizes, shard_bytes) for needs in self._needs]

    @cached_property
    def _both(self) -> list[NodeCache]:
        return [NodeCache(needs, self._sizes, self._bytes) for needs in self._needs]

    @property
    def shards_per_node(self) -> float:
        return sum(len(np.unique(node.needs.shards)) for node in self.first) / self._nodes

    def first_epoch(self, cache_bytes: float) -> Fetched:
        if self._is_long(self.first, cache_bytes, _ROWS_OF_ONE):
            first, _ = self._extrapolated(cache_bytes)
            return first
        return self._fetched(self.first, cache_bytes, 0, self._steps)

    def later_epoch(self, cache_bytes: float) -> Fetched:
        # A cache without room for what is in use has hardly anything left for the next epoch.
        if self._is_long(self.first, cache_bytes, _ROWS_OF_ONE) and self._is_long(self._both, cache_bytes, 0):
            _, later = self._extrapolated(cache_bytes)
            return later
        return self._fetched(self._both, cache_bytes, self._steps, self._last_step)

    def _is_tight(self, nodes: Sequence[NodeCache], cache_bytes: float) -> bool:
        return min(self._bytes) <= cache_bytes < max(node.room for node in nodes)

    def _is_long(self, nodes: Sequence[NodeCache], cache_bytes: float, rows: int) -> bool:
        return self._is_tight(nodes, cache_bytes) and len(nodes[0].needs.steps) > rows

    def _fetched(self, nodes: Sequence[NodeCache], cache_bytes: float, since: int, last_step: int) -> Fetched:
        """In steps [since, last_step)."""
        if cache_bytes < min(self._bytes):
            return Fetched(downloads_per_shard=0.0, in_parts=1.0, bytes_per_node=sum(self._bytes) / self._nodes,
                           simulated_nodes=self._nodes)
        count = len(nodes)
        if self._is_tight(nodes, cache_bytes):
            count = min(max(1, _ROWS // len(nodes[0].needs.steps)), count)
        chosen = [nodes[place * len(nodes) // count] for place in range(count)]
        found = np.sum([astuple(node.fetched(cache_bytes, since)) for node in chosen], axis=0) / count
        return self._of_node(found, last_step - since, count)

    def _extrapolated(self, cache_bytes: float) -> tuple[Fetched, Fetched]:
        """The first epoch and a later one, by one node in a part of the first: all after it is like its second half."""
        node = self.first[0]
        until = self._steps * _ROWS_OF_ONE // len(node.needs.steps)
        rows = node.rows(cache_bytes, until)
        part = np.array(astuple(node.counted(*rows)))
        per_step = np.array(astuple(node.counted(*rows, until // 2))) / (until - until // 2)
        return (self._of_node(part + (self._steps - until) * per_step, self._steps, 1),
                self._of_node(self._steps * per_step, self._steps, 1))

    def _of_node(self, found: np.ndarray, steps: int, simulated_nodes: int) -> Fetched:
        """From the downloads, samples and bytes that a node fetches in so many steps."""
        whole, in_parts, fetched = found.tolist()
        return Fetched(downloads_per_shard=whole * self._nodes / len(self._sizes),
                       in_parts=in_parts * self._nodes / (steps * self._batch), bytes_per_node=fetched,
                       simulated_nodes=simulated_nodes)


@dataclass(frozen=True, kw_only=True)
class ShuffleQuality:
    """How far the order of an epoch takes apart what lies together."""

    neighbours: float
    """Mean distance in training order of two samples that are neighbours in their shard, divided by that of a full
    shuffle: 1 is as good as one."""
    distance: float
    """That mean, in samples."""


def shuffle_quality(shard_sizes: Sequence[int], lanes: int, window: int, seed: int = 0) -> ShuffleQuality:
    """Of the first epoch's order.

    In a full shuffle of N samples two of them take two different places, all pairs of places being equally likely.
    N - d pairs of places are d apart, so that the mean distance is the sum of d (N - d) over d = 1 .. N - 1, which is
    (N - 1) N (N + 1) / 6, divided by the N (N - 1) / 2 pairs: (N + 1) / 3.

    Shards of one sample have no neighbours; where there are no others, a shuffle of shards is a full one.
    """
    total = sum(shard_sizes)
    places = np.empty(total, np.int64)
    places[epoch_order(seed, 0, shard_sizes, lanes, window)] = np.arange(total)
    apart = np.ones(max(0, total - 1), bool)
    apart[np.cumsum(shard_sizes)[:-1] - 1] = False  # the last of a shard, and the first of the next
    distances = np.abs(np.diff(places))[apart]
    full = (total + 1) / 3
    mean = float(distances.mean()) if len(distances) else full
    return ShuffleQuality(neighbours=mean / full, distance=mean)


if __name__ == "__main__":
    raise SystemExit("vir.planning.traffic is a part of the library; the program is vir-plan")
