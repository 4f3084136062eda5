"""Memory in which loader processes hand images to the trainer: the same pages again and again, and no files.

Fresh pages would cost a tenth of what a sample costs. Files of shared memory need room in /dev/shm, of which a
container has 64 MB, and a connection for each batch, over which they are handed.
"""

# Dimension key: B micro-batch, C channels, H height, W width.

from __future__ import annotations

import itertools
import math
import mmap
from collections.abc import Sequence
from typing import NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from vir.data import worker
from vir.errors import SettingsError

_numbers = itertools.count()
_rings: WeakValueDictionary[int, Ring] = WeakValueDictionary()


class Place(NamedTuple):
    """Where a tensor lies in a ring; it means the same to the trainer and to the processes that it has forked."""

    ring: int
    offset: int
    shape: tuple[int, ...]

    def tensor(self) -> Tensor:
        """What lies there, without a copy."""
        return _rings[self.ring].memory[self.offset:self.offset + math.prod(self.shape)].view(self.shape)


class Ring:
    """Slots for images, some for each loader process, which fills its own in turn. Made before they are forked.

    A process has one slot more than it may be batches ahead: what was taken stays until the next batch is asked for.

    Args:
        ahead: batches of a process that were not taken yet, at most.
        shape: [B, C, H, W] of a whole micro-batch.

    Raises:
        SettingsError: the system does not give so much memory.
    """

    def __init__(self, workers: int, ahead: int, shape: Sequence[int]) -> None:
        slots = workers, ahead + 1, *shape
        size = math.prod(slots)
        try:
            memory = mmap.mmap(-1, size)
        except (OSError, OverflowError) as error:
            raise SettingsError(f"{size / 1e9:.0f} GB for the batches of {workers} loader processes cannot be had: "
                                f"{error}; lower the number of workers, the prefetch or the batch size") from error
        self.memory = torch.frombuffer(memory, dtype=torch.uint8)
        self._slots, self._turns, self._number = self.memory.view(slots), 0, next(_numbers)
        _rings[self._number] = self

    def next(self, size: int) -> Tensor:
        """[size, C, H, W] uint8 to write into, in a loader process: its next slot."""
        slot = self._slots[worker.here().number, self._turns % self._slots.shape[1]]
        self._turns += 1
        return slot[:size]

    def place_of(self, tensor: Tensor) -> Place | None:
        """None: it lies elsewhere."""
        offset = tensor.data_ptr() - self.memory.data_ptr()
        return Place(self._number, offset, tuple(tensor.shape)) if 0 <= offset < len(self.memory) else None


def place_of(tensor: Tensor) -> Place | None:
    """In one of the rings, of a tensor that has come from its next(); None: in none."""
    return next(filter(None, (ring.place_of(tensor) for ring in _rings.values())), None)


if __name__ == "__main__":
    raise SystemExit("vir.data.ring is a part of the library; the program is vir-train")
