"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math
from fractions import Fraction

from vir.config import ScheduleConfig


def total_steps(epochs: float, num_samples: int, global_batch_size: int) -> int:
    """Steps of a run: ceil(E N / G). Batches straddle epoch ends; nothing is dropped or padded."""
    exactly = Fraction(str(epochs))  # as written: 1.1 epochs of 10 samples are 11 samples, in floats they are more
    return math.ceil(exactly * num_samples / global_batch_size)


def learning_rate(step: int, total: int, warmup: int, lr: float, schedule: ScheduleConfig) -> float:
    """The rate of global batch `step` (from 0): linear from warmup_lr over `warmup` steps, then a cosine to min_lr.

    Source of the cosine: SGDR (arXiv:1608.03983), one cycle.
    """
    if step < warmup:
        return schedule.warmup_lr + (lr - schedule.warmup_lr) * step / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return schedule.min_lr + (lr - schedule.min_lr) * (1 + math.cos(math.pi * min(1.0, progress))) / 2
