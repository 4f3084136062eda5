"""Learning rate and weight decay as pure functions of the step."""

from __future__ import annotations

import math
from fractions import Fraction

from vir.config import OptimConfig, ScheduleConfig, TrainConfig
from vir.errors import SettingsError


def total_steps(train: TrainConfig, num_samples: int) -> int:
    """Steps of a run: train.steps, or ceil(E N / G). Batches straddle epoch ends; nothing is dropped or padded."""
    if train.steps is not None:
        return train.steps
    exactly = Fraction(str(train.epochs))  # as written: 1.1 epochs of 10 samples are 11, in floats they are more
    return math.ceil(exactly * num_samples / train.global_batch_size)


def warmup_steps(total: int, steps_per_epoch: float, schedule: ScheduleConfig) -> int:
    """Steps of warm-up: ceil(warmup_epochs steps_per_epoch); when not given a fifteenth of all, at most 20 epochs."""
    if schedule.warmup_epochs is None:
        return min(total // 15, math.ceil(20 * steps_per_epoch - 1e-6))
    return math.ceil(schedule.warmup_epochs * steps_per_epoch - 1e-6)


def cooldown_steps(steps_per_epoch: float, schedule: ScheduleConfig) -> int:
    """Steps at the end of the run that are spent at min_lr."""
    return math.ceil(schedule.cooldown_epochs * steps_per_epoch - 1e-6)


def check_schedule(total: int, steps_per_epoch: float, schedule: ScheduleConfig) -> None:
    """Refuse a run in which no step is left between warm-up and cool-down: its lr would never be the one given.

    Raises:
        SettingsError: with the numbers.
    """
    warmup, cooldown = warmup_steps(total, steps_per_epoch, schedule), cooldown_steps(steps_per_epoch, schedule)
    if warmup + cooldown >= total:
        raise SettingsError(
            f"a run of {total} steps ({total / steps_per_epoch:.3g} epochs) with {warmup} steps of warm-up and "
            f"{cooldown} of cool-down never trains at --optim.lr: lower --schedule.warmup_epochs (null: a fifteenth of "
            "the run) or --schedule.cooldown_epochs, or lengthen --train.epochs")


def learning_rate(step: int, total: int, steps_per_epoch: float, lr: float, schedule: ScheduleConfig) -> float:
    """The rate of global batch `step` (from 0) of `total`: warm-up, decay, cool-down.

    Linear from warmup_lr to lr; then to min_lr along a cosine (SGDR, arXiv:1608.03983, one cycle) or a line, by
    decay_rate each decay_epochs, or constant; min_lr in the cool-down.
    """
    warmup = warmup_steps(total, steps_per_epoch, schedule)
    end = max(warmup, total - cooldown_steps(steps_per_epoch, schedule))
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
