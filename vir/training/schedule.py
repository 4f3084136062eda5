"""Learning rate and weight decay as pure functions of the step."""

from __future__ import annotations

import math
from fractions import Fraction

from vir.config import OptimConfig, ScheduleConfig


def total_steps(epochs: float, num_samples: int, global_batch_size: int) -> int:
    """Steps of a run: ceil(E N / G). Batches straddle epoch ends; nothing is dropped or padded."""
    exactly = Fraction(str(epochs))  # as written: 1.1 epochs of 10 samples are 11 samples, in floats they are more
    return math.ceil(exactly * num_samples / global_batch_size)


def learning_rate(step: int, total: int, steps_per_epoch: float, lr: float, schedule: ScheduleConfig) -> float:
    """The rate of global batch `step` (from 0) of `total`: warm-up, decay, cool-down.

    Linear from warmup_lr to lr over ceil(warmup_epochs steps_per_epoch) steps; then to min_lr along a cosine (SGDR,
    arXiv:1608.03983, one cycle) or a line, by decay_rate each decay_epochs, or constant; min_lr in the cool-down.
    """
    warmup = math.ceil(schedule.warmup_epochs * steps_per_epoch - 1e-6)
    end = max(warmup, total - math.ceil(schedule.cooldown_epochs * steps_per_epoch - 1e-6))
    if step < warmup:
        return schedule.warmup_lr + (lr - schedule.warmup_lr) * step / warmup
    if step >= end and end < total:
        return schedule.min_lr
    if schedule.name == "constant":
        return lr
    if schedule.name == "step":
        drops = math.floor((step - warmup) / (schedule.decay_epochs * steps_per_epoch) + 1e-6)
        return max(schedule.min_lr, lr * schedule.decay_rate ** drops)
    progress = min(1.0, (step - warmup) / max(1, end - warmup))
    share = (1 + math.cos(math.pi * progress)) / 2 if schedule.name == "cosine" else 1 - progress
    return schedule.min_lr + (lr - schedule.min_lr) * share


def weight_decay(step: int, total: int, optim: OptimConfig) -> float:
    """The decay of global batch `step` (from 0): constant, or along a cosine to weight_decay_end (DINO)."""
    if optim.weight_decay_end is None:
        return optim.weight_decay
    share = (1 + math.cos(math.pi * min(1.0, step / max(1, total)))) / 2
    return optim.weight_decay_end + (optim.weight_decay - optim.weight_decay_end) * share
