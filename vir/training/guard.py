"""When a run must stop for its own good: numbers that are not finite, samples that cannot be decoded."""

from __future__ import annotations

from typing import Sequence

import numpy as np
import torch
from torch import Tensor

from vir import distributed
from vir.data.order import SampleOrder
from vir.data.reader import Reader
from vir.errors import DataError, NotFiniteError
from vir.log import log

_LIMIT = 3
"""Steps in a row without a finite gradient after which the run stops."""
_TOO_FEW_TO_JUDGE = 10
"""Up to this many bad samples never stop a run."""


class FiniteGuard:
    """Counts steps that were skipped because their gradient was not finite, and says which samples they had."""

    def __init__(self, order: SampleOrder, reader: Reader) -> None:
        self._order, self._reader = order, reader
        self._in_a_row = 0

    def applied(self) -> None:
        """To be called after a step that was applied."""
        self._in_a_row = 0

    def skipped(self, step: int, losses: Sequence[Tensor], positions: Sequence[Tensor]) -> None:
        """To be called after a skipped step with this rank's losses and positions by micro-batch. Collective.

        Raises:
            NotFiniteError: three such steps in a row.
        """
        self._in_a_row += 1
        # The losses are read, which waits for the device: in a step that is lost anyway, and in none that is applied.
        keys = self._keys([int(position) for loss, part in zip(losses, positions) if not torch.isfinite(loss)
                           for position in part])
        keys_of_rank = {rank: keys for rank, keys in enumerate(distributed.gather(keys)) if keys}
        where = "; ".join(f"rank {rank}: loss not finite in the micro-batches of {', '.join(keys[:8])}"
                          + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")
                          for rank, keys in keys_of_rank.items())
        said = f"step {step + 1}: update not applied, the gradient is not finite ({where or 'every loss is finite'})"
        if self._in_a_row >= _LIMIT:
            raise NotFiniteError(f"{said}; {_LIMIT} steps in a row: lower --optim.lr, lengthen "
                                 "--schedule.warmup_epochs or use an fp32 --deepspeed_config")
        log.info(said)

    def _keys(self, positions: list[int]) -> list[str]:
        return [self._reader.key(int(sample)) for sample in self._order.samples(np.array(positions, dtype=np.int64))]


def check_bad_samples(bad: int, samples: int, limit: float) -> None:
    """Raises DataError where more than the share `limit` of the samples could not be decoded."""
    if bad > max(_TOO_FEW_TO_JUDGE, limit * samples):
        raise DataError(f"{bad} of {samples} samples could not be decoded, more than --data.max_bad_fraction "
                        f"{limit}; log.txt and the ranks' output name them. Convert the split again")
