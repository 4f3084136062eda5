"""What checkpoints cost, and how often to write them where machines fail.

Failures come at random at a constant rate, one in `mtbf_seconds` of the whole cluster on average; after each the run
restarts from its newest checkpoint. The trainer waits while one is written.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from vir.config import check_positive
from vir.errors import SettingsError

INTERRUPTIONS, DAYS, GPUS = 419, 54, 16_384
"""Unexpected interruptions of the pre-training of Llama 3 405B on H100s, 8 on a node (arXiv:2407.21783, section 3.3.4:
"419 unexpected interruptions" in "a 54-day snapshot period"; 16,384 GPUs, table 4)."""

DISK_RATE = 2e9
"""Bytes per second that a disk which all machines share is assumed to take of them together."""

RESTART_S = 300.0
"""From a failure to the first step after it, as it is assumed: to notice it, to start again, to read a checkpoint."""

HOPELESS = 0.2
"""Goodput at the best cadence below which a plan is hopeless: it is less wherever a checkpoint takes as long as the
machines last, where 0.16 of the time is of use."""

_MOST = 700.0
"""The largest exponent that is computed."""


def default_mtbf(gpus: int) -> float:
    """Seconds between failures of a cluster of so many GPUs, if each fails as often as those of Llama 3's training.

    That is once in 50,700 hours of a GPU, 6,330 hours of a node of 8, or 2.1 days of 1,024 GPUs.
    """
    return DAYS * 86_400 * GPUS / INTERRUPTIONS / gpus


def young(seconds: float, mtbf_seconds: float) -> float:
    """Seconds of work between checkpoints, to first order: sqrt(2 C M) (Young 1974, CACM 17(9))."""
    return math.sqrt(2 * seconds * mtbf_seconds)


def daly(seconds: float, mtbf_seconds: float) -> float:
    """Seconds of work between checkpoints, to higher order (Daly 2006, FGCS 22(3), 303-312).

    sqrt(2 C M) (1 + sqrt(C / 2M) / 3 + (C / 2M) / 9) - C, and M where a checkpoint takes 2M or longer.
    """
    if seconds >= 2 * mtbf_seconds:
        return mtbf_seconds
    half = seconds / (2 * mtbf_seconds)
    return young(seconds, mtbf_seconds) * (1 + math.sqrt(half) / 3 + half / 9) - seconds


def goodput(interval_seconds: float, seconds: float, mtbf_seconds: float, restart_seconds: float) -> float:
    """Share of the time that is of use, with a checkpoint after so many seconds of work.

    t / (M e^(R/M) (e^((t + C)/M) - 1)): the exact expectation for failures that may also come during checkpoints and
    restarts (Daly 2006).
    """
    exponent = (interval_seconds + seconds) / mtbf_seconds
    if exponent + restart_seconds / mtbf_seconds > _MOST:
        return 0.0
    return interval_seconds / (mtbf_seconds * math.exp(restart_seconds / mtbf_seconds) * math.expm1(exponent))


@dataclass(frozen=True, kw_only=True)
class Cadence:
    """A checkpoint after so much work, and what becomes of the time."""

    interval_seconds: float
    """Of work between two checkpoints."""
    goodput: float
    """Share of the time that is of use."""
    stall: float
    """Share of the time in which the trainer waits for checkpoints that are of use."""
    lost: float
    """Share of the time that failures cost: work done again, unfinished checkpoints, restarts."""


@dataclass(frozen=True, kw_only=True)
class CheckpointPlan:
    bytes: int
    disk_rate: float
    """Bytes per second that all ranks together write."""
    seconds: float
    """To write a checkpoint."""
    mtbf_seconds: float
    """Between failures of the whole cluster, on average."""
    restart_seconds: float
    """From a failure to the first step after it, without the work that is lost."""
    best: Cadence
    """By Daly's formula, in whole steps."""
    best_steps: int
    """The same as checkpoint.every_steps."""
    as_set: Cadence

    @property
    def advice(self) -> str:
        """What to do where the cadence does not help; empty where it does."""
        if self.best.goodput >= HOPELESS:
            return ""
        return (f"the nodes fail every {self.mtbf_seconds:,.3g} s on average, a checkpoint takes {self.seconds:,.3g} s "
                f"and a restart {self.restart_seconds:,.3g} s: at no cadence more than {100 * self.best.goodput:.1f} % "
                "of the time is of use; take a faster disk, fewer nodes or better ones")


def plan_checkpoints(size: int, *, disk_rate: float, mtbf_seconds: float, step_seconds: float, total_steps: int,
                     every_seconds: float, restart_seconds: float) -> CheckpointPlan:
    """The cadence that minimises lost work and stall, beside the one that is set.

    Args:
        size: bytes of a checkpoint of all ranks, which write it to one disk that they share.
        disk_rate: bytes per second that the disk takes of all of them together.
        mtbf_seconds: between failures of the whole cluster; that of a node divided by the nodes.
        step_seconds: of work, without checkpoints.
        total_steps: of the run, whose end is saved at any cadence.
        every_seconds: of work between checkpoints as the settings have it.
        restart_seconds: from a failure to the first step after it.

    Raises:
        SettingsError: a number that is not positive and finite.
    """
    check_positive({"a checkpoint's bytes": size, "--disk": disk_rate, "--mtbf": mtbf_seconds,
                    "seconds per step": step_seconds, "the time between checkpoints": every_seconds})
    if not 0 <= restart_seconds < float("inf"):
        raise SettingsError(f"the time of a restart must be at least 0 s and finite, got {restart_seconds:g}")
    seconds = size / disk_rate

    def cadence(interval: float) -> Cadence:
        useful = goodput(interval, seconds, mtbf_seconds, restart_seconds)
        stall = useful * seconds / interval
        return Cadence(interval_seconds=interval, goodput=useful, stall=stall, lost=max(0.0, 1 - useful - stall))

    steps = min(max(1, round(daly(seconds, mtbf_seconds) / step_seconds)), total_steps)
    return CheckpointPlan(
        bytes=size, disk_rate=disk_rate, seconds=seconds, mtbf_seconds=mtbf_seconds, restart_seconds=restart_seconds,
        best=cadence(steps * step_seconds), best_steps=steps, as_set=cadence(every_seconds))


if __name__ == "__main__":
    raise SystemExit("vir.planning.checkpoints is a part of the library; the program is vir-plan")
