"""An average of the weights that lives in the optimizer state, so DeepSpeed shards and saves it."""

from __future__ import annotations

from typing import Any, Callable

import torch
from torch import Tensor
from torch.optim import Optimizer

from vir.checkpoints.partitions import EMA


def decay_at(update: int, decay: float, warmup: bool) -> float:
    """The decay at applied update number `update`, from 1.

    With warm-up it starts at 2/11, as in TensorFlow's and timm's EMA.
    """
    return min(decay, (1 + update) / (10 + update)) if warmup else decay


def attach(optimizer: Optimizer, decay: Callable[[], float]) -> None:
    """Keep optimizer.state[p]["ema"] = d ema + (1 - d) p in float32 after each real step, from the initial weights.

    `optimizer` is the one that owns the float32 master weights: under ZeRO its parameters are this rank's flat
    shards. DeepSpeed steps it once per parameter group, so a hook sees only the groups in hand, and never a step
    that was skipped.

    Args:
        decay: returns the d of the present update.
    """
    initial: dict[Tensor, Tensor] = {}

    def remember(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for parameter in _stepped(optimizer):
            if EMA not in optimizer.state[parameter]:  # Adam fills only an empty state, so nothing may be put in yet
                initial[parameter] = parameter.detach().float().clone()

    @torch.no_grad()
    def average(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        share = 1 - decay()
        for parameter in _stepped(optimizer):
            state = optimizer.state[parameter]
            if EMA not in state:
                state[EMA] = initial.pop(parameter)
            state[EMA].lerp_(parameter.detach().float(), share)

    optimizer.register_step_pre_hook(remember)
    optimizer.register_step_post_hook(average)


def _stepped(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]
            if parameter.grad is not None]
