"""Where the seconds of a start go: from the beginning of a process to its first step of training."""

from __future__ import annotations

import os
import time
from pathlib import Path


class StartupTimer:
    """The phases of a start, one after the other.

    Args:
        age: seconds since the first of them began.
    """

    def __init__(self, age: float = 0.0) -> None:
        self.seconds: dict[str, float] = {}
        """Of each phase that has ended, in the order in which they first did."""
        self._last = time.monotonic() - age

    def ended(self, phase: str) -> None:
        """The time since the last call was that of `phase`, which may have several parts."""
        now = time.monotonic()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now

    def __str__(self) -> str:
        return (f"{sum(self.seconds.values()):.1f} s to the end of the first step: " +
                ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in self.seconds.items()))


def process_age() -> float:
    """Seconds since this process began, to a hundredth; 0 where no /proc tells.

    The kernel counts from the boot of the machine. Moments of a calendar, as psutil makes them of that, are up to a
    second too early, and move with the clock.
    """
    try:
        stat = Path("/proc/self/stat").read_text()
    except OSError:
        return 0.0
    began = int(stat.rpartition(")")[2].split()[19])  # field 22 of proc(5), in ticks
    return time.clock_gettime(time.CLOCK_BOOTTIME) - began / os.sysconf("SC_CLK_TCK")
