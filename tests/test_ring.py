"""The memory in which loader processes hand images over: in turns, whole until the next one is asked for, no files."""

import pickle
import resource
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from vir.data import worker
from vir.data.batch import Batch
from vir.data.loader import Batches
from vir.data.ring import Ring, place_of
from vir.errors import SettingsError

SHAPE = (2, 3, 5, 7)
CPU = torch.device("cpu")


@pytest.fixture()
def in_a_loader_process(monkeypatch):
    monkeypatch.setattr(worker, "_here", worker.Worker(1, worker.board(2)))


@contextmanager
def files_of_at_most(size):
    """Of shared memory, too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def batch_of(images):
    size = len(images)
    return Batch(images=images, labels=torch.arange(size), positions=torch.arange(size), samples=[], bad=[],
                 valid=torch.ones(size, dtype=torch.bool), erase=torch.zeros(size, 4, dtype=torch.long),
                 noise=torch.zeros(size, dtype=torch.int32), lam=torch.ones(size),
                 cut=torch.zeros(size, 4, dtype=torch.long))


def test_a_slot_comes_again_when_a_process_cannot_be_further_ahead(in_a_loader_process):
    ring = Ring(2, 3, SHAPE)
    for number in range(4):
        ring.next(2).fill_(number + 1)
    last = ring.next(1)
    assert last.shape == (1, *SHAPE[1:]) and (last == 1).all()  # the first one's slot
    taken = ring.memory.view(2, 4, *SHAPE)
    assert [int(slot.max()) for slot in taken[1]] == [1, 2, 3, 4] and not taken[0].any()


def test_a_batch_travels_without_its_images(in_a_loader_process):
    ring = Ring(2, 3, SHAPE)
    Ring(2, 3, SHAPE)  # another one, for validation
    images = ring.next(2)
    images.copy_(torch.arange(images.numel()).view(images.shape))
    sent = pickle.dumps(batch_of(images))
    found = pickle.loads(sent)
    assert torch.equal(found.images, images) and found.images.data_ptr() == images.data_ptr()
    kept = found.kept().images
    images.zero_()
    assert not found.images.any() and kept.any()


def test_images_that_lie_elsewhere_travel_by_value():
    images = torch.arange(2 * 105, dtype=torch.uint8).view(SHAPE)
    assert place_of(images) is None
    assert torch.equal(pickle.loads(pickle.dumps(batch_of(images))).images, images)


@pytest.mark.parametrize("workers, ahead", [(1, 1), (2, 2), (3, 1)])
def test_batches_that_are_kept_for_later_stay_what_they_were_and_need_no_file(workers, ahead):
    """Batch `n` is full of n. There are no files of shared memory as large as a batch."""
    side, count = 256, 13
    ring = Ring(workers, ahead, (2, 3, side, side))

    def make(positions, samples):
        return batch_of(ring.next(2).fill_(int(positions[0])))

    def requests():
        for number in range(count):
            yield np.array([number, number]), np.array([number, number])

    with files_of_at_most(64 << 10):
        found = list(Batches(make, requests, workers, ahead, CPU, None))
    assert [batch.images.unique().tolist() for batch in found] == [[number] for number in range(count)]


@pytest.mark.parametrize("size", [1 << 31, 1 << 62])
def test_more_memory_than_the_system_gives_is_refused(size):
    with pytest.raises(SettingsError, match=r"^\d+ GB for the batches of 2 loader processes cannot be had: .*; "
                                            "lower the number of workers, the prefetch or the batch size$"):
        Ring(2, 3, (size, 3, 224, 224))
