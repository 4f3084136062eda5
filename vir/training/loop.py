"""The training loop: steps from where training stands to its end, evaluation, checkpoints, a stop on request."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Callable, Generator, Iterator

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vir import distributed
from vir.cluster.signals import StopRequest
from vir.config import RunConfig
from vir.data import transforms
from vir.data.loader import Batch
from vir.data.order import SampleOrder, generator
from vir.data.reader import ShardReader
from vir.data.transforms import InputConfig
from vir.distributed import World
from vir.engine.engine import Engine
from vir.errors import DataError, LossScaleError, NotFiniteError
from vir.log import log, shows_bars
from vir.reports.metrics import MetricsWriter
from vir.reports.throughput import Stopwatch, peak_memory, stragglers, utilisation
from vir.training.loss import training_loss
from vir.training.schedule import learning_rate, weight_decay

_NOT_FINITE_LIMIT = 3
_BAD_TOO_FEW_TO_JUDGE = 10
_DROPOUT_STREAM = 10
_PROFILE_AFTER = 10


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Numbers of a run that follow from its settings, the data and the world."""

    num_samples: int
    num_classes: int
    accumulation: int
    total_steps: int
    steps_per_epoch: float
    eval_steps: frozenset[int]
    checkpoint_steps: frozenset[int]
    forward_flops: int | None
    """Of one image; None where they cannot be counted."""
    peak_flops: float | None
    """Of one device; None where unknown."""


def steps_every(epochs: float, num_samples: int, global_batch_size: int, total: int) -> frozenset[int]:
    """The numbers of steps done at which each further `epochs` epochs are complete, and the last step."""
    every = max(epochs * num_samples, global_batch_size)  # not more often than each step
    count = int(total * global_batch_size / every)
    ends = (-(-int(round(k * every)) // global_batch_size) for k in range(1, count + 1))
    return frozenset(step for step in (*ends, total) if 0 < step <= total)


@dataclass
class _Interval:
    """What has happened since the last line of metrics."""

    began: float = field(default_factory=time.monotonic)
    paused: float = 0.0
    waited: float = 0.0
    losses: list[Tensor] = field(default_factory=list)
    images: int = 0
    skipped: int = 0
    bad: list[str] = field(default_factory=list)


@dataclass
class Summary:
    """Of the part of a run that these processes have done."""

    images: int = 0
    seconds: float = 0.0
    """In steps, without evaluation and checkpoints."""
    waited: float = 0.0
    """For data, mean over the ranks."""
    paused: float = 0.0
    """In evaluation and checkpoints."""
    bad: int = 0


class Trainer:
    """Runs the steps of one plan. `evaluate` and `save` are called between steps, on every rank.

    Args:
        evaluate: of the number of steps done; whether the result asks for a checkpoint, None when a stop cut it short.
        save: of the number of steps done.
        trace: where this rank's profiler trace goes.
    """

    def __init__(self, config: RunConfig, plan: Plan, engine: Engine, world: World, reader: ShardReader,
                 order: SampleOrder, model_input: InputConfig, metrics: MetricsWriter | None, stop: StopRequest,
                 evaluate: Callable[[int], bool | None], save: Callable[[int], None], trace: Path) -> None:
        self.config, self.plan, self.engine, self.world = config, plan, engine, world
        self.reader, self.order, self.model_input, self.metrics, self.stop = reader, order, model_input, metrics, stop
        self._evaluate, self._save, self._trace = evaluate, save, trace
        self._lr = config.optim.peak_lr(config.train.global_batch_size)
        self._mixes = config.augment.mixup > 0 or config.augment.cutmix > 0
        self._forward = Stopwatch(world.device)
        self._not_finite_in_a_row = 0
        self.summary = Summary()

    def fit(self, batches: Generator[Batch, None, None], first: int, evaluate_first: bool) -> bool:
        """Train from step `first` to the end of the plan; True when done, False when a signal ended it, after saving.

        Args:
            evaluate_first: the evaluation due at `first` was cut short.

        Raises:
            NotFiniteError: three steps in a row whose gradients were not finite.
            LossScaleError: a gradient that is not finite at the floor of the loss scale.
            DataError: too many samples that cannot be decoded, or one that cannot be read.
        """
        terminal = shows_bars()
        bar = tqdm(total=self.plan.total_steps, initial=first, unit="step", dynamic_ncols=True,
                   disable=not (self.world.is_main and terminal))
        self._began_at = first
        interval, saved_at, profiler = _Interval(), first, None
        traced = self._traced(first)
        try:
            if self.stop.agreed():
                return first == self.plan.total_steps and not evaluate_first
            if evaluate_first:
                wants_save = self._evaluate(first)
                if wants_save is None:
                    return False
                if wants_save:
                    self._save(first)
            interval = _Interval()
            for step in range(first, self.plan.total_steps):
                done = step + 1
                if step in traced and profiler is None:
                    profiler = _start_profiler(self.world)
                self._step(batches, step, interval)
                if profiler is not None and done not in traced:
                    profiler = self._end_profiler(profiler)
                bar.update()
                stopping, ending = self.stop.agreed(), done == self.plan.total_steps
                if done % self.config.train.log_every == 0 or ending or stopping:
                    interval = self._report(done, interval, bar, terminal)
                paused, wants_save = time.monotonic(), False
                if done in self.plan.eval_steps and not stopping:
                    result = self._evaluate(done)
                    stopping, wants_save = result is None, bool(result)
                if wants_save or stopping or done in self.plan.checkpoint_steps:
                    self._save(done)
                    saved_at = done
                interval.paused += time.monotonic() - paused
                self.summary.paused += time.monotonic() - paused
                if stopping:  # also after the last step, when its evaluation has yet to come
                    return False
        except (NotFiniteError, LossScaleError) as error:
            raise type(error)(f"{error}; last checkpoint: " + (
                f"step {saved_at}" if saved_at else "none was written yet")) from error
        finally:
            if profiler is not None:
                self._end_profiler(profiler)
            batches.close()
            bar.close()
        return True

    def _traced(self, first: int) -> range:
        """The steps that --train.profile records: not the first ones, unless no others are left."""
        steps = self.config.train.profile
        begin = max(first, min(first + _PROFILE_AFTER, self.plan.total_steps - steps))
        return range(begin, begin + steps)

    def _end_profiler(self, profiler: torch.profiler.profile) -> None:
        profiler.stop()
        self._trace.parent.mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(self._trace))
        log.info("profiler trace of each rank: %s (open in ui.perfetto.dev)", self._trace.parent)

    def _step(self, batches: Iterator[Batch], step: int, interval: _Interval) -> None:
        """One global batch."""
        size, optim = self.config.train.global_batch_size, self.config.optim
        lr = learning_rate(step, self.plan.total_steps, self.plan.steps_per_epoch, self._lr, self.config.schedule)
        decay = weight_decay(step, self.plan.total_steps, optim)
        applied: bool | None = None
        losses, positions = [], []
        for micro in range(self.plan.accumulation):
            asked = time.monotonic()
            batch = next(batches)
            interval.waited += time.monotonic() - asked
            seed = generator(self.config.train.seed, step * size, self.world.rank, micro,
                             _DROPOUT_STREAM).integers(2**63)
            torch.manual_seed(int(seed))
            images, targets = self._prepare(batch)
            with self._forward:
                loss = training_loss(self.engine(images), targets, self.config.train)
            self.engine.backward(loss)
            try:
                applied = self.engine.step(lr, decay)
            except LossScaleError as error:
                raise LossScaleError(f"step {step + 1}: {error}: lower --optim.lr, lengthen --schedule.warmup_epochs "
                                     "or use a bf16 --deepspeed_config") from error
            losses.append(loss.detach())
            positions.append(batch.positions)
            interval.bad += batch.bad
        assert applied is not None, "the accumulation of the plan and of DeepSpeed differ"
        interval.images += size
        if applied:
            self._not_finite_in_a_row = 0
            interval.losses += losses
        else:
            interval.skipped += 1
            if not self.engine.has_dynamic_scale:  # there it is how the loss scale finds its place
                self._not_finite(step, losses, positions)

    def _prepare(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Pixels [B, C, H, W] float32, normalised, erased and mixed, and soft targets [B, K]."""
        augment = self.config.augment
        images = transforms.normalize(batch.images, self.model_input)
        if augment.reprob:
            transforms.erase(images, batch.erase, batch.positions, self.config.train.seed, augment.remode)
        if self._mixes:
            images = transforms.mix(images, batch.lam, batch.cut)
        return images, transforms.soft_targets(batch.labels, batch.lam, self.plan.num_classes,
                                               self.config.train.smoothing)

    def _not_finite(self, step: int, losses: list[Tensor], positions: list[Tensor]) -> None:
        """Say which ranks and samples gave a loss that is not finite; stop after three such steps in a row."""
        self._not_finite_in_a_row += 1
        wrong = [int(position) for loss, part in zip(losses, positions) if not torch.isfinite(loss)
                 for position in part]
        samples = self.order.samples(np.array(wrong, dtype=np.int64))
        keys = [self.reader.key(int(sample)) for sample in samples]
        found = {rank: keys for rank, keys in enumerate(distributed.gather(keys)) if keys}
        where = "; ".join(f"rank {rank}: loss not finite in the micro-batches of {', '.join(keys[:8])}"
                          + (f" and {len(keys) - 8} more" if len(keys) > 8 else "") for rank, keys in found.items())
        said = f"step {step + 1}: update not applied, the gradient is not finite ({where or 'every loss is finite'})"
        if self._not_finite_in_a_row >= _NOT_FINITE_LIMIT:
            raise NotFiniteError(f"{said}; {_NOT_FINITE_LIMIT} steps in a row: lower --optim.lr, lengthen "
                                 "--schedule.warmup_epochs or use an fp32 --deepspeed_config")
        log.info(said)

    def _report(self, done: int, interval: _Interval, bar: tqdm, terminal: bool) -> _Interval:
        """Write a line of metrics, once per interval: the only place where this loop waits for the device."""
        losses = torch.stack(interval.losses).double() if interval.losses else torch.zeros(0)
        mine = [losses.sum().item(), len(losses), len(interval.bad), interval.waited, self._forward.total(),
                peak_memory(self.world.device)]
        sums, counts, bad, waits, forwards, memory = zip(*distributed.gather(mine))
        seconds = time.monotonic() - interval.began - interval.paused
        mean = sum(sums) / sum(counts) if sum(counts) else float("nan")
        rate, waited = interval.images / seconds, sum(waits) / self.world.size
        for said in interval.bad:
            log.warning("bad sample replaced: %s", said)
        for said in stragglers(waits, forwards, seconds):
            log.info("straggler: %s", said)
        self.summary.images += interval.images
        self.summary.seconds += seconds
        self.summary.waited += waited
        self.summary.bad += sum(bad)
        self._check_bad((done - self._began_at) * self.config.train.global_batch_size)
        mfu = utilisation(rate, self.plan.forward_flops, self.world.size, self.plan.peak_flops)
        samples = done * self.config.train.global_batch_size
        lr = learning_rate(done - 1, self.plan.total_steps, self.plan.steps_per_epoch, self._lr, self.config.schedule)
        if self.metrics is not None:
            self.metrics.write(
                "train", done, samples_seen=samples, epoch=samples / self.plan.num_samples, loss=mean, lr=lr,
                weight_decay=weight_decay(done - 1, self.plan.total_steps, self.config.optim),
                grad_norm=self.engine.grad_norm(), loss_scale=self.engine.loss_scale(), updates=self.engine.updates,
                skipped=interval.skipped, bad_samples=self.summary.bad, images_per_second=rate,
                images_per_second_per_device=rate / self.world.size, data_wait=waited / seconds,
                data_wait_seconds=waited, mfu=mfu, peak_memory_gb=max(memory) / 1e9)
        said = (f"loss {mean:.3f} lr {lr:.2e} {rate:.0f} images/s data wait {100 * waited / seconds:.0f} %" +
                ("" if mfu is None else f" MFU {100 * mfu:.1f} %") + f" {max(memory) / 1e9:.1f} GB")
        if terminal:
            bar.set_postfix_str(said)
        else:
            left = (self.plan.total_steps - done) * self.summary.seconds / (done - self._began_at)
            log.info("step %d/%d %s, %s left", done, self.plan.total_steps, said, timedelta(seconds=round(left)))
        return _Interval()

    def _check_bad(self, samples: int) -> None:
        limit, bad = self.config.data.max_bad_fraction, self.summary.bad
        if bad > max(_BAD_TOO_FEW_TO_JUDGE, limit * samples):
            raise DataError(f"{bad} of {samples} samples could not be decoded, more than --data.max_bad_fraction "
                            f"{limit}; log.txt and the ranks' output name them. Convert the split again")


def _start_profiler(world: World) -> torch.profiler.profile:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if world.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    profiler = torch.profiler.profile(activities=activities)
    profiler.start()
    return profiler
