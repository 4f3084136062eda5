"""When a run stops for its own good: on real shards, with the names of the samples."""

import numpy as np
import pytest
import torch

from vir.data.order import SampleOrder
from vir.data.reader import ShardReader
from vir.data.shards import ShardSample, write_shard, write_split
from vir.errors import DataError, NotFiniteError
from vir.training.guard import FiniteGuard, check_bad_samples

NAN, INF, GOOD = (torch.tensor(value) for value in (float("nan"), float("inf"), 1.0))


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("split")
    samples = [ShardSample(f"k{i}", b"x", "jpg", 1, 1, 0, f"{i}.jpg") for i in range(20)]
    shards = [write_shard(folder / f"s-{i}.tar", part) for i, part in enumerate((samples[:9], samples[9:]))]
    write_split(folder, shards, name="s", split="train", classes=["a"], seed=0, samples_per_shard=11, skipped=[])
    reader = ShardReader(folder)
    return SampleOrder(3, reader.shard_sizes, lanes=2, window=4), reader


@pytest.fixture
def guard(parts):
    return FiniteGuard(*parts)


def keys(parts, positions):
    order, _ = parts
    return ", ".join(f"k{i}" for i in order.samples(np.array(positions)))


def test_three_skipped_steps_in_a_row_end_the_run_and_name_the_samples(guard, parts, caplog):
    with caplog.at_level("INFO", logger="vir"):
        for step in (5, 6):
            guard.skipped(step, [GOOD, NAN], [torch.tensor([0, 1]), torch.tensor([2, 3])])
    where = f"rank 0: loss not finite in the micro-batches of {keys(parts, [2, 3])}"
    assert caplog.messages == [f"step {step}: update not applied, the gradient is not finite ({where})"
                               for step in (6, 7)]
    with pytest.raises(NotFiniteError) as error:  # from the second epoch of 20 samples
        guard.skipped(7, [INF, GOOD], [torch.tensor([25, 39]), torch.tensor([2, 3])])
    assert str(error.value).startswith("step 8: update not applied, the gradient is not finite (rank 0: loss not "
                                       f"finite in the micro-batches of {keys(parts, [25, 39])}); 3 steps in a row: ")
    assert "--optim.lr" in str(error.value)


def test_one_applied_step_starts_the_count_again(guard):
    for _ in range(3):
        guard.skipped(0, [NAN], [torch.tensor([0])])
        guard.skipped(1, [NAN], [torch.tensor([0])])
        guard.applied()
    guard.skipped(2, [NAN], [torch.tensor([0])])
    guard.skipped(3, [NAN], [torch.tensor([0])])
    with pytest.raises(NotFiniteError):
        guard.skipped(4, [NAN], [torch.tensor([0])])


def test_of_many_samples_the_first_eight_are_named(guard, parts, caplog):
    with caplog.at_level("INFO", logger="vir"):
        guard.skipped(0, [NAN, NAN], [torch.arange(5), torch.arange(5, 10)])
    assert caplog.messages[0].endswith(f"of {keys(parts, range(8))} and 2 more)")


def test_a_gradient_that_overflows_although_losses_are_finite_is_told_as_such(guard, caplog):
    with caplog.at_level("INFO", logger="vir"):
        guard.skipped(0, [GOOD], [torch.tensor([0])])
    assert caplog.messages == ["step 1: update not applied, the gradient is not finite (every loss is finite)"]


@pytest.mark.parametrize("bad, samples, limit, stops", [
    (0, 0, 0.0, False), (10, 20, 0.0, False), (11, 20, 0.0, True),         # ten never stop a run
    (20, 20_000, 0.001, False), (21, 20_000, 0.001, True), (20, 20, 1.0, False)])
def test_too_many_bad_samples_stop_a_run(bad, samples, limit, stops):
    if not stops:
        check_bad_samples(bad, samples, limit)
        return
    with pytest.raises(DataError, match=f"{bad} of {samples} samples could not be decoded, more than "
                                        f"--data.max_bad_fraction {limit};"):
        check_bad_samples(bad, samples, limit)
