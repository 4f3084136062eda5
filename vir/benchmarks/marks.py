"""Clocks that a bare loop reads beside its steps: of the wall, of its own CPU time and of its loader processes'."""

from __future__ import annotations

import time

import psutil
import torch.distributed as dist


class Marks:
    """Take a mark after each interval of steps. Made before the loader processes are started."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._marks: list[tuple[float, float, float]] = []

    def take(self) -> None:
        """To be called when the device has done what it was given."""
        loaders = [child.cpu_times() for child in self._process.children()]
        self._marks.append((time.perf_counter(), time.process_time(), sum(one.user + one.system for one in loaders)))

    def over_ranks(self) -> dict[str, list[float]]:
        """Seconds at each mark, the CPU's as means over the ranks: `times`, `trainer_cpu`, `loader_cpu`. Collective."""
        of_ranks: list[list[tuple[float, float, float]]] = [self._marks] * dist.get_world_size()
        dist.all_gather_object(of_ranks, self._marks)
        names = ("times", "trainer_cpu", "loader_cpu")
        return {name: [sum(clocks) / len(clocks) for clocks in zip(*([mark[number] for mark in marks]
                                                                     for marks in of_ranks))]
                for number, name in enumerate(names)}
