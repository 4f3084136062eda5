"""What checkpoints cost, and how often to write them where machines fail.

Failures come at random at a constant rate, one in `mtbf_seconds` of the whole cluster on average; after each the run
restarts from its newest published checkpoint. Training stalls while the state is copied into host memory and goes on
while that is written; with --checkpoint.asynchronous false it stalls while the state is written.
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

COPY_RATE = 10e9
"""Bytes per second at which each GPU is assumed to copy its state into page-locked memory of its node, all of a node at
once: not measured. PCIe 4.0 x16 carries 31.5 GB/s by its specification, and two GPUs often share that."""

RESTART_S = 300.0
"""From a failure to the first step after it, as it is assumed: to notice it, to start again, to read a checkpoint."""

HOPELESS = 0.25
"""Goodput at the best cadence below which a plan is hopeless: it is less wherever a checkpoint takes as long as the
machines last, where 0.16 of the time is of use, 0.21 where the checkpoint is written beside training."""

_MOST = 700.0
"""The largest exponent that is computed."""
_ROUNDING = 1e-9
"""Of a step, by which a quotient may be too large."""


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


def goodput(interval_seconds: float, stall: float, mtbf_seconds: float, restart_seconds: float,
            writing: float = 0.0) -> float:
    """Share of the time that is of use, with a checkpoint after each t seconds of work.

    t / (M e^((R + w)/M) (e^((t + c)/M) - 1)): exact for failures that may also come during checkpoints and restarts.

    With w = 0, a synchronous checkpoint of C = c seconds, it is Daly's (2006). An asynchronous one stalls for c and is
    published w later: from one failure to the next, which takes M on average, the k-th is there with the probability
    e^(-(R + k (t + c) + w)/M) and saves t; their sum over k is the above. So the latency costs what a restart that is
    longer by w would, and leaves Daly's best t as it is.
    The next one waits for the one before: where t < w, one follows the other after w + c, the first as before.

    Args:
        stall: c, seconds for which training waits for a checkpoint.
        writing: w, seconds from there until it is published.
    """
    period, beside = max(interval_seconds, writing) + stall, restart_seconds + min(interval_seconds, writing)
    if (period + beside) / mtbf_seconds > _MOST:
        return 0.0
    return interval_seconds / (mtbf_seconds * math.exp(beside / mtbf_seconds) * math.expm1(period / mtbf_seconds))


@dataclass(frozen=True, kw_only=True)
class Cadence:
    """A checkpoint after so much work, and what becomes of the time."""

    interval_seconds: float
    """Of work between two checkpoints."""
    goodput: float
    """Share of the time that is of use."""
    stall: float
    """Share of the time in which training waits for checkpoints that are of use."""
    lost: float
    """Share of the time that failures cost: work done again, unfinished checkpoints, restarts."""


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Of checkpoints on a cluster that fails."""

    bytes: int
    disk_rate: float
    """Bytes per second that all ranks together write."""
    seconds: float
    """To write a checkpoint."""
    copying: float | None
    """Seconds to copy the state into host memory; None where it is not copied and training waits for the disk."""
    mtbf_seconds: float
    """Between failures of the whole cluster, on average."""
    restart_seconds: float
    """From a failure to the first step after it, without the work that is lost."""

    @property
    def stall(self) -> float:
        """Seconds for which training waits for each."""
        return self.seconds if self.copying is None else self.copying

    @property
    def writing(self) -> float:
        """Seconds beside training until it is published."""
        return 0.0 if self.copying is None else self.seconds

    def goodput(self, interval_seconds: float) -> float:
        """Share of the time that is of use, with a checkpoint after so many seconds of work."""
        return goodput(interval_seconds, self.stall, self.mtbf_seconds, self.restart_seconds, self.writing)

    def cadence(self, interval_seconds: float) -> Cadence:
        useful = self.goodput(interval_seconds)
        stalled = useful * (self.stall + max(0.0, self.writing - interval_seconds)) / interval_seconds
        return Cadence(interval_seconds=interval_seconds, goodput=useful, stall=stalled,
                       lost=max(0.0, 1 - useful - stalled))


@dataclass(frozen=True, kw_only=True)
class CheckpointPlan(Costs):
    best: Cadence
    """By Daly's formula, in whole steps, and no shorter than what is written beside training takes."""
    best_steps: int
    """The same as checkpoint.every_steps."""
    best_minutes: float
    """The same as checkpoint.every_minutes."""
    as_set: Cadence

    @property
    def advice(self) -> str:
        """What to do where the cadence does not help; empty where it does."""
        if self.best.goodput >= HOPELESS:
            return ""
        return (f"the nodes fail every {self.mtbf_seconds:,.3g} s on average, a checkpoint takes {self.seconds:,.3g} s "
                f"and a restart {self.restart_seconds:,.3g} s: at no cadence more than {100 * self.best.goodput:.1f} % "
                "of the time is of use; take a faster disk, fewer nodes or better ones")


def plan_checkpoints(size: int, *, copied: int | None, disk_rate: float, mtbf_seconds: float, step_seconds: float,
                     total_steps: int, every_seconds: float, every_minutes: float | None,
                     restart_seconds: float) -> CheckpointPlan:
    """The cadence that minimises lost work and stall, beside the one that is set.

    Args:
        size: bytes of a checkpoint of all ranks, which write it to one disk that they share.
        copied: bytes that the rank with most of them copies into host memory; None where training waits for the disk.
        disk_rate: bytes per second that the disk takes of all of them together.
        mtbf_seconds: between failures of the whole cluster; that of a node divided by the nodes.
        step_seconds: of work, without checkpoints.
        total_steps: of the run, whose end is saved at any cadence.
        every_seconds: of work between checkpoints as every_steps or every_epochs have it.
        every_minutes: from the beginning of one checkpoint to that of the next, where that is sooner.
        restart_seconds: from a failure to the first step after it.

    Raises:
        SettingsError: a number that is not positive and finite.
    """
    check_positive({"a checkpoint's bytes": size, "--disk": disk_rate, "--mtbf": mtbf_seconds,
                    "seconds per step": step_seconds, "the time between checkpoints": every_seconds})
    if not 0 <= restart_seconds < float("inf"):
        raise SettingsError(f"the time of a restart must be at least 0 s and finite, got {restart_seconds:g}")
    costs = Costs(bytes=size, disk_rate=disk_rate, seconds=size / disk_rate, mtbf_seconds=mtbf_seconds,
                  copying=None if copied is None else copied / COPY_RATE, restart_seconds=restart_seconds)

    def whole(interval: float) -> int:
        """Steps after which so much work is done, and the one before is written."""
        return min(max(1, math.ceil(max(interval, costs.writing) / step_seconds - _ROUNDING)), total_steps)

    steps = max(min(round(daly(costs.stall, mtbf_seconds) / step_seconds), total_steps), whole(0.0))
    if every_minutes is not None:
        every_seconds = min(every_seconds, step_seconds * whole(60 * every_minutes - costs.stall))
    return CheckpointPlan(
        **vars(costs), best=costs.cadence(steps * step_seconds), best_steps=steps,
        best_minutes=(steps * step_seconds + costs.stall) / 60, as_set=costs.cadence(every_seconds))


if __name__ == "__main__":
    raise SystemExit("vir.planning.checkpoints is a part of the library; the program is vir-plan")
