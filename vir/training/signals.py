"""Stopping on request: SIGTERM and SIGUSR1 (SLURM's preemption warning) let the step in hand finish on every rank."""

from __future__ import annotations

import signal
from typing import Any

import torch
import torch.distributed as dist

from vir.distributed import World


class StopRequest:
    """Remembers a signal on this rank; `agreed` tells whether any rank has got one."""

    def __init__(self, world: World) -> None:
        self._asked = False
        # A group of its own on CPU: under NCCL the flag would cost a synchronisation of the device.
        self._group = dist.new_group(backend="gloo") if world.size > 1 else None
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGUSR1)}

    def _ask(self, number: int, frame: Any) -> None:
        self._asked = True

    def agreed(self) -> bool:
        """Whether to stop: the same answer on every rank. Collective, once a step."""
        if self._group is None:
            return self._asked
        flag = torch.tensor([int(self._asked)])
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        return bool(flag.item())

    def close(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
