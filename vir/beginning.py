"""Where the seconds of a start go: from the beginning of a process to its first step of training."""

from __future__ import annotations

import time


class Beginning:
    """The phases of a start, one after the other.

    Args:
        since: when the first of them began, in seconds since the epoch.
    """

    def __init__(self, since: float) -> None:
        self.seconds: dict[str, float] = {}
        """Of each phase that has ended, in the order in which they first did."""
        self._last = since

    def ended(self, phase: str) -> None:
        """The time since the last call was that of `phase`, which may have several parts."""
        now = time.time()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now

    def __str__(self) -> str:
        return (f"{sum(self.seconds.values()):.1f} s to the end of the first step: " +
                ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in self.seconds.items()))
