"""What bare loops share: their model, and the clocks that they read beside their steps."""

from __future__ import annotations

import time
from typing import Any

import psutil
import torch.distributed as dist
from torch import nn

from vir.models import VisionRetention
from vir.models.build import create


def bare_model(settings: dict[str, Any]) -> tuple[nn.Module, tuple[int, int, int], int]:
    """timm's `model` with `model_args`, (C, H, W) of an image, and how many trainable numbers there are."""
    model = create(settings["model"], settings["model_args"])
    if isinstance(model, VisionRetention):
        model.set_retention_mode(settings["retention_mode"], settings["chunk_size"])
    described: Any = model.pretrained_cfg
    channels, height, width = settings["input_size"] or described["input_size"]
    return (model, (channels, height, width),
            sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad))


class Marks:
    """Marks of the wall clock, of this process's CPU time and of its loaders', one after each interval of steps.

    Made before the loader processes are started.
    """

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
