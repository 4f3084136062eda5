"""How long the order of an epoch takes to make, and what of that a training thread sees."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

from torch.utils.data import DistributedSampler

from vir.benchmarks.feeds import LANES, WINDOW
from vir.data.deal import SAMPLES_PER_SHARD
from vir.data.order import SampleOrder, epoch_order, settle

COLUMNS = ("samples", "order of an epoch, s (least to most)", "torch's DistributedSampler, s",
           "first batch of the next epoch, ms", "longest pause of the trainer meanwhile, ms")
_BATCH = 1024


def measure(num_samples: int, epoch: int) -> list[float]:
    """What COLUMNS say, after the samples, in seconds."""
    full, rest = divmod(num_samples, SAMPLES_PER_SHARD)
    shard_sizes = [SAMPLES_PER_SHARD] * full + [rest] * bool(rest)
    began = time.perf_counter()
    epoch_order(0, epoch, shard_sizes, LANES, WINDOW)
    ours = time.perf_counter() - began
    began = time.perf_counter()
    iter(DistributedSampler(range(num_samples), num_replicas=1, rank=0, seed=epoch))  # type: ignore[arg-type]
    return [ours, time.perf_counter() - began, *_seen(shard_sizes, ours)]


def row(num_samples: int, rounds: Sequence[Sequence[float]]) -> list[str]:
    ours, torchs, first, pause = zip(*rounds)
    return [f"{num_samples:,}", f"{statistics.median(ours):.3g} ({min(ours):.3g}–{max(ours):.3g})",
            f"{statistics.median(torchs):.3g}", *(f"{1000 * statistics.median(part):.3g}" for part in (first, pause))]


def _seen(shard_sizes: Sequence[int], seconds: float) -> tuple[float, float]:
    """Seconds for the first batch of an epoch whose order was made beside, and the longest time in which a thread that
    computes did not get on while it was."""
    order, num_samples = SampleOrder(0, shard_sizes, LANES, WINDOW), sum(shard_sizes)
    order.samples(order.global_batch(num_samples - 1, 1))
    order.prepare(num_samples - 1, 2 * num_samples)
    longest, began = 0.0, time.perf_counter()
    last = began
    while last < began + 1.5 * seconds:
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    settle()
    began = time.perf_counter()
    order.samples(order.global_batch(num_samples, min(_BATCH, num_samples)))
    return time.perf_counter() - began, longest
