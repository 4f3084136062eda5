"""Batches of an evaluation, made by hand."""

import torch

from vir.data.batch import Batch
from vir.weights.spec import InputSpec

INPUT = InputSpec(size=(3, 4, 4), mean=(0.5,) * 3, std=(0.25,) * 3, interpolation="bilinear", crop_pct=1.0)


class Given(list):
    """Batches that are there already."""

    closed = False

    def close(self):
        self.closed = True


def batches(sizes=(4, 4, 3), classes=7):
    """Of each the first three samples are valid."""
    numbers, first, found = torch.Generator().manual_seed(0), 0, Given()
    for size in sizes:
        none = torch.zeros(size, 4, dtype=torch.long)
        found.append(Batch(
            images=torch.randint(256, (size, *INPUT.size), dtype=torch.uint8, generator=numbers),
            labels=torch.randint(classes, (size,), generator=numbers), positions=torch.arange(first, first + size),
            valid=torch.arange(size) < 3, erase=none, noise=none[:, 0].int(), lam=torch.ones(size), cut=none,
            samples=[], bad=[]))
        first += size
    return found
