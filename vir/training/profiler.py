"""--train.profile: a PyTorch profiler trace of some steps, one file per rank."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch

from vir.distributed import World
from vir.log import log

_AFTER = 10
"""Steps of a process before the first one that is recorded, if there are enough."""


class Profiler:
    """Records `steps` steps of those from `first` to `total`: not the first ones, unless no others are left.

    Args:
        folder: where each rank's trace goes.
    """

    def __init__(self, steps: int, first: int, total: int, folder: Path, world: World) -> None:
        begin = max(first, min(first + _AFTER, total - steps))
        self._steps = range(begin, begin + steps)
        self._trace = folder / f"rank{world.rank:05d}.json"
        self._world = world
        self._running: torch.profiler.profile | None = None

    def before(self, step: int) -> None:
        """To be called before each step, counted from 0."""
        if step in self._steps and self._running is None:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if self._world.device.type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._running = torch.profiler.profile(activities=activities)
            self._running.start()

    def after(self, step: int) -> None:
        """To be called after each step."""
        if step + 1 not in self._steps:
            self.close()

    def close(self) -> None:
        """Write the trace of what was recorded so far; where that fails, only warn."""
        running, self._running = self._running, None
        if running is None:
            return
        try:
            running.stop()
            self._trace.parent.mkdir(exist_ok=True)
            self._trace.unlink(missing_ok=True)  # of an earlier start of this run
            running.export_chrome_trace(str(self._trace))
            if not self._trace.exists():  # a full disk: kineto prints to stderr, raises nothing, renames nothing
                raise OSError("the profiler could not write it; is there space on the disk?")
        except (OSError, RuntimeError) as error:
            with suppress(OSError):
                self._trace.with_suffix(".json.tmp").unlink()  # kineto's half: the next checkpoint may need its space
            log.warning("no profiler trace %s: %s", self._trace, error)
            return
        log.info("profiler trace of each rank: %s (open in ui.perfetto.dev)", self._trace.parent)
