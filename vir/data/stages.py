"""Where the time of a batch goes in its loader process."""

from __future__ import annotations

import time
from dataclasses import dataclass, fields


@dataclass
class Spent:
    """Sums over images; but for `cpu` and the counts in seconds of wall clock."""

    images: int = 0
    bytes: int = 0
    """Of the image files that were read."""
    read: float = 0.0
    """Bytes: waited for, or copied from the system's memory."""
    check: float = 0.0
    """Checksums, in CPU seconds. No stage of its own: within `read`, or in threads beside all stages."""
    decode: float = 0.0
    """Headers and pixels."""
    augment: float = 0.0
    """Crop, resize, flip and policy."""
    collate: float = 0.0
    """Into the memory that the trainer shares, and what is drawn for the device."""
    total: float = 0.0
    """From the request to the batch."""
    cpu: float = 0.0
    """CPU seconds of the process in that time."""

    def __add__(self, other: Spent) -> Spent:
        return Spent(**{field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(Spent)})


class Laps:
    """A stopwatch: the time since the end of one stage belongs to the next."""

    def __init__(self) -> None:
        self.spent = Spent()
        self._began = self._last = time.perf_counter()
        self._cpu_before = time.process_time()

    def end_of(self, stage: str) -> None:
        """What has passed since the last call went into this field of Spent."""
        now = time.perf_counter()
        setattr(self.spent, stage, getattr(self.spent, stage) + now - self._last)
        self._last = now

    def done(self) -> Spent:
        """All of it, with the total."""
        self.spent.total, self.spent.cpu = self._last - self._began, time.process_time() - self._cpu_before
        return self.spent
