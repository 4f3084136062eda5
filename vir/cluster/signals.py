"""Stopping on request: SIGTERM and SIGUSR1 (SLURM's preemption warning) let the step in hand finish on every rank."""

from __future__ import annotations

import signal
from typing import Any


class StopRequest:
    """Remembers a signal on this rank from its making on; `agree` asks all ranks whether any has got one.

    Made before torch is imported, so that a signal during start-up is not lost.
    """

    def __init__(self) -> None:
        self._asked = False
        self._group: Any = None
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGUSR1)}

    def _ask(self, number: int, frame: Any) -> None:
        self._asked = True

    @property
    def asked(self) -> bool:
        """Whether this rank has got a signal."""
        return self._asked

    def join(self, world_size: int) -> None:
        """Ask the other ranks from now on. Collective, after the process group is there."""
        import torch.distributed as dist

        from vir.distributed import TIMEOUT

        # A group of its own on CPU: under NCCL the flag would cost a synchronisation of the device.
        self._group = dist.new_group(backend="gloo", timeout=TIMEOUT) if world_size > 1 else None

    def agree(self) -> bool:
        """Whether to stop: the same answer on every rank. Collective, once a step."""
        if self._group is None:
            return self._asked
        import torch
        import torch.distributed as dist

        flag = torch.tensor([int(self._asked)])
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        return bool(flag.item())

    def close(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
