"""The training loop: steps from where training stands to its end, evaluation, checkpoints, a stop on request."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Callable, Generator, Iterator

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vir import distributed
from vir.config import RunConfig
from vir.data import transforms
from vir.data.loader import Batch
from vir.data.order import SampleOrder, generator
from vir.data.reader import ShardReader
from vir.data.transforms import InputConfig
from vir.distributed import World
from vir.errors import DataError, NotFiniteError
from vir.log import log
from vir.training.engine import Engine
from vir.training.loss import soft_cross_entropy
from vir.training.metrics import MetricsWriter
from vir.training.schedule import learning_rate
from vir.training.signals import StopRequest

_NOT_FINITE_LIMIT = 3
_BAD_TOO_FEW_TO_JUDGE = 10
_DROPOUT_STREAM = 10


@dataclass
class Progress:
    """Where training stands. Everything but `samples_seen` and `updates` follows from them and the plan."""

    samples_seen: int
    updates: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Numbers of a run that follow from its settings, the data and the world."""

    num_samples: int
    num_classes: int
    accumulation: int
    total_steps: int
    warmup_steps: int
    eval_steps: frozenset[int]
    checkpoint_steps: frozenset[int]


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


class Trainer:
    """Runs the steps of one plan. `evaluate` and `save` are called between steps, on every rank."""

    def __init__(self, config: RunConfig, plan: Plan, engine: Engine, world: World, reader: ShardReader,
                 order: SampleOrder, model_input: InputConfig, metrics: MetricsWriter | None,
                 evaluate: Callable[[int], None], save: Callable[[Progress], None]) -> None:
        self.config, self.plan, self.engine, self.world = config, plan, engine, world
        self.reader, self.order, self.model_input, self.metrics = reader, order, model_input, metrics
        self._evaluate, self._save = evaluate, save
        self._mixes = config.augment.mixup > 0 or config.augment.cutmix > 0
        self._not_finite_in_a_row = 0
        self._began_at = 0
        self._bad = 0

    def fit(self, batches: Generator[Batch, None, None], progress: Progress) -> bool:
        """Train to the end of the plan; True when done, False when a signal ended it early, after saving.

        Raises:
            NotFiniteError: three steps in a row whose gradients were not finite.
            DataError: too many samples that cannot be decoded, or one that cannot be read.
        """
        size = self.config.train.global_batch_size
        first = progress.samples_seen // size
        self._began_at = progress.samples_seen
        stop = StopRequest(self.world)
        bar = tqdm(total=self.plan.total_steps, initial=first, unit="step", disable=not self.world.is_main,
                   dynamic_ncols=True)
        interval = _Interval()
        saved_at = first
        try:
            for step in range(first, self.plan.total_steps):
                lr = learning_rate(step, self.plan.total_steps, self.plan.warmup_steps, self.config.optim.lr,
                                   self.config.schedule)
                applied = self._step(batches, step, lr, interval)
                done = step + 1
                progress.samples_seen, progress.updates = done * size, progress.updates + applied
                bar.update()
                stopping = stop.agreed()
                if done % self.config.train.log_every == 0 or done == self.plan.total_steps or stopping:
                    interval = self._report(done, progress, lr, interval, bar)
                paused = time.monotonic()
                if done in self.plan.eval_steps and (not stopping or done == self.plan.total_steps):
                    self._evaluate(done)
                if done in self.plan.checkpoint_steps or stopping:
                    self._save(progress)
                    saved_at = done
                interval.paused += time.monotonic() - paused
                if stopping and done < self.plan.total_steps:
                    return False
        except NotFiniteError as error:
            raise NotFiniteError(f"{error}; last checkpoint: " + (
                f"step {saved_at}" if saved_at else "none was written yet")) from error
        finally:
            batches.close()
            bar.close()
            stop.close()
        return True

    def _step(self, batches: Iterator[Batch], step: int, lr: float, interval: _Interval) -> bool:
        """One global batch. Whether its update was applied."""
        applied: bool | None = None
        losses, positions = [], []
        for micro in range(self.plan.accumulation):
            asked = time.monotonic()
            batch = next(batches)
            interval.waited += time.monotonic() - asked
            seed = generator(self.config.train.seed, step * self.config.train.global_batch_size, self.world.rank,
                             micro, _DROPOUT_STREAM).integers(2**63)
            torch.manual_seed(int(seed))
            images, targets = self._prepare(batch)
            loss = soft_cross_entropy(self.engine(images), targets)
            self.engine.backward(loss)
            applied = self.engine.step(lr)
            losses.append(loss.detach())
            positions.append(batch.positions)
            interval.bad += batch.bad
        assert applied is not None, "the accumulation of the plan and of DeepSpeed differ"
        interval.images += self.config.train.global_batch_size
        if applied:
            self._not_finite_in_a_row = 0
            interval.losses += losses
        else:
            interval.skipped += 1
            if self.engine.precision != "fp16":  # there it is how the loss scale finds its place
                self._not_finite(step, losses, positions)
        return applied

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

    def _report(self, done: int, progress: Progress, lr: float, interval: _Interval, bar: tqdm) -> _Interval:
        """Write a line of metrics, once per interval: the only place where this loop waits for the device."""
        losses = torch.stack(interval.losses).double() if interval.losses else torch.zeros(0)
        loss, count, bad, waited = distributed.sum_over_ranks(
            [losses.sum().item(), len(losses), len(interval.bad), interval.waited], self.world.device)
        seconds = time.monotonic() - interval.began - interval.paused
        mean = loss / count if count else float("nan")
        rate = interval.images / seconds
        for said in interval.bad:
            log.warning("bad sample replaced: %s", said)
        self._bad += int(bad)
        self._check_bad(progress.samples_seen - self._began_at)
        if self.metrics is not None:
            self.metrics.write("train", done, samples_seen=progress.samples_seen,
                               epoch=progress.samples_seen / self.plan.num_samples, loss=mean, lr=lr,
                               grad_norm=self.engine.grad_norm(), updates=progress.updates, skipped=interval.skipped,
                               bad_samples=self._bad, images_per_second=rate,
                               data_wait=waited / self.world.size / seconds)
        bar.set_postfix_str(f"loss {mean:.3f} lr {lr:.2e} {rate:.0f} images/s")
        return _Interval()

    def _check_bad(self, samples: int) -> None:
        limit = self.config.data.max_bad_fraction
        if self._bad > max(_BAD_TOO_FEW_TO_JUDGE, limit * samples):
            raise DataError(f"{self._bad} of {samples} samples could not be decoded, more than --data.max_bad_fraction "
                            f"{limit}; log.txt and the ranks' output name them. Convert the split again")
