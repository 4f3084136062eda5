"""What a run tells of itself: the line of metrics per interval, the progress bar, the summary at its end."""

from __future__ import annotations

import socket
import time
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Iterator, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from vir import distributed
from vir.checkpoints.saving import Saved
from vir.cluster.heartbeat import Heartbeat
from vir.config import RunConfig
from vir.data.diagnosis import Figures, diagnose
from vir.data.stages import Spent
from vir.distributed import World
from vir.engine.engine import Engine, Update
from vir.log import log, shows_bars
from vir.reports.metrics import MetricsWriter
from vir.reports.throughput import Stopwatch, far_away, latecomers, peak_memory, stragglers, utilisation
from vir.startup import StartupTimer
from vir.training.guard import check_bad_samples
from vir.training.plan import Plan
from vir.training.saver import Results

_WAITS = 0.05
"""The share of an interval, waited for data, that deserves a word."""
_TELLS_EVERY = 20
"""Intervals."""


@dataclass
class StepRecord:
    """What one global batch was on this rank, by micro-batch."""

    update: Update
    losses: list[Tensor]
    positions: list[Tensor]
    """Of the samples in the training sequence."""
    bad: list[str]
    """Samples that were replaced, and why."""
    waited: float
    """Seconds for data."""
    spent: Spent = field(default_factory=Spent)
    """In the loader processes, by this rank's batches."""


@dataclass
class _Interval:
    """What has happened since the last line of metrics."""

    began: float = field(default_factory=time.monotonic)
    paused: float = 0.0
    waited: float = 0.0
    met: float = 0.0
    """Seconds for the other ranks, before each step."""
    losses: list[Tensor] = field(default_factory=list)
    steps: int = 0
    skipped: int = 0
    bad: list[str] = field(default_factory=list)
    spent: Spent = field(default_factory=Spent)
    cpu_before: float = field(default_factory=time.process_time)
    """CPU seconds of this process that are none of the interval's."""

    def seconds(self) -> float:
        """In steps, until now."""
        return time.monotonic() - self.began - self.paused


@dataclass
class _Summary:
    """Of the part of a run that these processes have done."""

    images: int = 0
    seconds: float = 0.0
    """In steps, without evaluation and checkpoints."""
    waited: float = 0.0
    """For data, mean over the ranks."""
    paused: float = 0.0
    """In evaluation and checkpoints."""
    bad: int = 0
    results: Results = field(default_factory=dict)
    """Of the last evaluation."""


@dataclass(frozen=True)
class _Totals:
    """An interval over all ranks."""

    seconds: float
    waited: float
    """Mean over the ranks."""
    loss: float
    bad: int
    memory: int
    """Of the rank with the most."""
    slowest: int
    """The rank that has waited longest."""
    figures: Figures
    """Its."""
    trainer_cpu: float
    """CPU seconds of the process that trains, mean over the ranks."""
    loader_cpu: float
    """Of the loader processes of a rank, for the batches of the interval."""
    stragglers: list[str]
    """Which ranks hold the others up, and by what."""


class Meter:
    """Adds up steps and writes a line of metrics for each `train.log_every` of them.

    Args:
        writer: on rank 0, else None.
        first: steps done before this process began.
    """

    def __init__(self, config: RunConfig, plan: Plan, engine: Engine, world: World, writer: MetricsWriter | None,
                 heartbeat: Heartbeat, first: int) -> None:
        self._config, self._plan, self._engine, self._world = config, plan, engine, world
        self._heartbeat = heartbeat
        self._writer, self._first = writer, first
        self.forward_clock = Stopwatch(world.device)
        """To be run during each forward pass."""
        self._terminal = shows_bars()
        self._bar = tqdm(total=plan.total_steps, initial=first, unit="step", dynamic_ncols=True,
                         disable=not (world.is_main and self._terminal))
        self._summary = _Summary()
        self._intervals, self._told_at = 0, -_TELLS_EVERY
        self._figures = Figures.of_run(config)
        self.begin()

    def begin(self) -> None:
        """Start the clock of an interval."""
        self._interval = _Interval()

    def began(self, startup: StartupTimer) -> None:
        """Tell how long it took to the end of the first step of this process, and where a run goes on."""
        log.info("%s", startup)
        if self._writer is not None:
            self._writer.write("start", self._first + 1, epoch=self._plan.epoch(self._first), ranks=self._world.size,
                               **{f"{phase.replace(' ', '_')}_seconds": round(seconds, 3)
                                  for phase, seconds in startup.seconds.items()})

    def stepped(self, done: int, record: StepRecord) -> None:
        """Take up a step. At the end of an interval or of the run, report. Collective.

        Raises:
            DataError: too many samples that cannot be decoded.
        """
        interval = self._interval
        interval.steps += 1
        interval.waited += record.waited
        interval.bad += record.bad
        interval.spent += record.spent
        if record.update is Update.APPLIED:
            interval.losses += record.losses
        else:
            interval.skipped += 1
        self._bar.update()
        if done % self._config.train.log_every == 0 or done == self._plan.total_steps:
            self.cut(done)

    def met(self, seconds: float) -> None:
        """Take up how long this rank has waited for the others before a step."""
        self._interval.met += seconds

    def cut(self, done: int) -> None:
        """Report the interval so far, where it has a step, and begin another. Collective."""
        if self._interval.steps:
            self._report(done)
        self.begin()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Count the time of the block as evaluation and checkpoints, not as steps."""
        began, cpu_before = time.monotonic(), time.process_time()
        yield
        self._interval.cpu_before += time.process_time() - cpu_before
        self._interval.paused += time.monotonic() - began
        self._summary.paused += time.monotonic() - began

    def evaluated(self, step: int, results: Results, images: int) -> None:
        """Write the results of an evaluation of so many images."""
        self._summary.results = results
        if self._writer is not None:
            self._writer.write("eval", step, epoch=self._plan.epoch(step), images=images, **results)

    def close(self) -> None:
        self._bar.close()

    def _totals(self) -> _Totals:
        """The interval over all ranks. Waits for the device, so it is called once per interval. Collective."""
        interval = self._interval
        losses = torch.stack(interval.losses).double() if interval.losses else torch.zeros(0)
        mine = [losses.sum().item(), len(losses), len(interval.bad), interval.waited, self.forward_clock.total(),
                interval.met, self._heartbeat.round_trip, peak_memory(self._world.device), socket.gethostname(),
                self._of_loading()]
        sums, counts, bad, waits, forwards, meets, trips, memory, hosts, figures = zip(*distributed.gather(mine))
        seconds, slowest = interval.seconds(), waits.index(max(waits))
        return _Totals(seconds=seconds, waited=sum(waits) / self._world.size, bad=sum(bad), memory=max(memory),
                       loss=sum(sums) / sum(counts) if sum(counts) else float("nan"),
                       slowest=slowest, figures=figures[slowest],
                       trainer_cpu=seconds * sum(one.trainer for one in figures) / self._world.size,
                       loader_cpu=sum(one.spent.cpu for one in figures) / self._world.size,
                       stragglers=[*stragglers(waits, forwards, hosts, seconds),
                                   *latecomers(meets, waits, hosts, interval.steps, seconds),
                                   *far_away(trips, hosts)])

    def _report(self, done: int) -> None:
        totals, plan, summary = self._totals(), self._plan, self._summary
        for said in self._interval.bad:
            log.warning("bad sample replaced: %s", said)
        for said in totals.stragglers:
            log.info("straggler: %s", said)
        images = plan.samples(self._interval.steps)
        summary.images += images
        summary.seconds += totals.seconds
        summary.waited += totals.waited
        summary.bad += totals.bad
        check_bad_samples(summary.bad, plan.samples(done - self._first), self._config.data.max_bad_fraction)
        rate = images / totals.seconds
        mfu = utilisation(rate, plan.forward_flops, self._world.size, plan.peak_flops)
        self._write(done, totals, rate, mfu)
        said = (f"loss {totals.loss:.3f} lr {plan.learning_rate(done - 1):.2e} {rate:.0f} images/s data wait "
                f"{100 * totals.waited / totals.seconds:.0f} %" + ("" if mfu is None else f" MFU {100 * mfu:.1f} %") +
                f" {totals.memory / 1e9:.1f} GB")
        if self._world.is_main and (why := self._waits(totals)):
            log.info("data wait %s", why)
        if self._terminal:
            self._bar.set_postfix_str(said)
        else:
            left = (plan.total_steps - done) * summary.seconds / (done - self._first)
            log.info("step %d/%d %s, %s left", done, plan.total_steps, said, timedelta(seconds=round(left)))

    def _of_loading(self) -> Figures:
        """This rank's figures of the interval."""
        interval = self._interval
        seconds = interval.seconds()
        return replace(self._figures, spent=interval.spent, rate=interval.spent.images / seconds,
                       needed=interval.spent.images / max(seconds - interval.waited, 0.01 * seconds),
                       trainer=(time.process_time() - interval.cpu_before) / seconds)

    def _waits(self, totals: _Totals) -> str:
        """Why the rank that has waited longest has, and what to change; empty where all ranks' wait needs no word.

        The first interval has the start of the loader processes in it, and the same is not said over and over.
        """
        self._intervals += 1
        waited = totals.waited / totals.seconds
        if not totals.figures.spent.images:  # a linear probe's features, of which no loader has made any
            return ""
        if waited <= _WAITS or self._intervals == 1 or self._intervals - self._told_at < _TELLS_EVERY:
            return ""
        self._told_at = self._intervals
        who = f", most of all on rank {totals.slowest}, by" if self._world.size > 1 else ", by"
        return f"{100 * waited:.0f} %{who} {diagnose(totals.figures)} (more: tools/benchmark_loader.py --diagnose)"

    def _write(self, done: int, totals: _Totals, rate: float, mfu: float | None) -> None:
        if self._writer is None:
            return
        plan, engine = self._plan, self._engine
        self._writer.write(
            "train", done, total_steps=plan.total_steps, samples_seen=plan.samples(done), epoch=plan.epoch(done),
            loss=totals.loss, lr=plan.learning_rate(done - 1), weight_decay=plan.weight_decay(done - 1),
            grad_norm=engine.grad_norm(), loss_scale=engine.loss_scale.value, updates=engine.updates,
            skipped=self._interval.skipped, bad_samples=self._summary.bad, images_per_second=rate,
            images_per_second_per_device=rate / self._world.size, data_wait=totals.waited / totals.seconds,
            data_wait_seconds=totals.waited, trainer_cpu_seconds=totals.trainer_cpu,
            loader_cpu_seconds=totals.loader_cpu, mfu=mfu, peak_memory_gb=totals.memory / 1e9)

    def summarise(self, saved: Sequence[Saved], waited: int) -> None:
        """Log what these processes have done.

        Args:
            saved: their checkpoints.
            waited: how many of these had to wait for the one before.
        """
        did = self._summary
        if not did.images:
            return
        log.info("%d images in %s of steps: %.0f images/s, %.1f %% of the time waiting for data; evaluation and "
                 "checkpoints %s%s; %d updates in all, %d bad samples replaced%s", did.images,
                 timedelta(seconds=round(did.seconds)), did.images / did.seconds, 100 * did.waited / did.seconds,
                 timedelta(seconds=round(did.paused)), _of_checkpoints(saved, waited) if saved else "",
                 self._engine.updates, did.bad,
                 "".join(f"; {name} {value:.2f}" for name, value in did.results.items() if "top1" in name))


def _of_checkpoints(saved: Sequence[Saved], waited: int) -> str:
    seconds, stalled = (sum(of_each) / len(saved) for of_each in zip(*((it.seconds, it.stalled) for it in saved)))
    return (f" (a checkpoint {seconds:.1f} s, for which training waited {stalled:.2f} s"
            + (f"; {waited} had to wait for the one before" if waited else "") + ")")
