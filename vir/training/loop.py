"""The training loop: steps from where training stands to its end, evaluation, checkpoints, a stop on request."""

from __future__ import annotations

import time
from enum import Enum
from typing import Generator, Iterator

import torch

from vir.cluster.signals import StopRequest
from vir.config import TrainConfig
from vir.data.device import Preparation
from vir.data.loader import Batch
from vir.engine.engine import Engine, Update
from vir.errors import LossScaleError, NotFiniteError
from vir.reports.throughput import Stopwatch
from vir.streams import DROPOUT, generator
from vir.training.guard import FiniteGuard
from vir.training.loss import training_loss
from vir.training.meter import Meter, StepRecord
from vir.training.plan import Plan
from vir.training.profiler import Profiler
from vir.training.saver import Saver
from vir.training.validator import Validator


class Ending(Enum):
    """How training came to its end."""

    DONE = "the plan is fulfilled"
    STOPPED = "a signal asked for it; what was done is in a checkpoint"


class Verdict(Enum):
    """What an evaluation came to."""

    CUT_SHORT = "a signal ended it before its end"
    BEST = "better than every evaluation before it"
    NOT_BEST = "not better than the best one"


class GlobalStep:
    """Forward, backward and update of one global batch on this rank.

    Args:
        prepare: from a batch of the loader to pixels and targets.
        forward_clock: runs during each forward pass.
    """

    def __init__(self, train: TrainConfig, plan: Plan, engine: Engine, prepare: Preparation, guard: FiniteGuard,
                 forward_clock: Stopwatch, rank: int) -> None:
        self._train, self._plan, self._engine, self._prepare = train, plan, engine, prepare
        self._guard, self._forward_clock, self._rank = guard, forward_clock, rank

    def __call__(self, batches: Iterator[Batch], step: int) -> StepRecord:
        """Do global batch `step`, from 0. Collective.

        Raises:
            NotFiniteError: the third step in a row whose gradient was not finite.
            LossScaleError: a gradient that is not finite at the floor of the loss scale.
        """
        record = StepRecord(update=Update.ACCUMULATING, losses=[], positions=[], bad=[], waited=0.0)
        rates = self._plan.learning_rate(step), self._plan.weight_decay(step)
        for micro in range(self._plan.accumulation):
            asked = time.monotonic()
            batch = next(batches)
            record.waited += time.monotonic() - asked
            self._seed_dropout(step, micro)
            images, targets = self._prepare(batch)
            with self._forward_clock:
                loss = training_loss(self._engine(images), targets, self._train)
            self._engine.backward(loss)
            record.update = self._update(step, *rates)
            record.losses.append(loss.detach())
            record.positions.append(batch.positions)
            record.bad += batch.bad
        assert record.update is not Update.ACCUMULATING, "the accumulation of the plan and of DeepSpeed differ"
        if record.update is Update.APPLIED:
            self._guard.applied()
        elif not self._engine.loss_scale.is_dynamic:  # there it is how the loss scale finds its place
            self._guard.skipped(step, record.losses, record.positions)
        return record

    def _seed_dropout(self, step: int, micro: int) -> None:
        key = (self._train.seed, self._plan.samples(step), self._rank, micro, DROPOUT)
        torch.manual_seed(int(generator(*key).integers(2**63)))

    def _update(self, step: int, lr: float, weight_decay: float) -> Update:
        try:
            return self._engine.step(lr, weight_decay)
        except LossScaleError as error:
            raise LossScaleError(f"step {step + 1}: {error}: lower --optim.lr, lengthen --schedule.warmup_epochs "
                                 "or use a bf16 --deepspeed_config") from error


class Trainer:
    """Runs the steps of a plan; between them it evaluates, saves, and asks whether to stop."""

    def __init__(self, plan: Plan, global_step: GlobalStep, meter: Meter, validator: Validator, saver: Saver,
                 profiler: Profiler, stop: StopRequest) -> None:
        self._plan, self._global_step, self._meter = plan, global_step, meter
        self._validator, self._saver, self._profiler, self._stop = validator, saver, profiler, stop

    def fit(self, batches: Generator[Batch, None, None], first: int, evaluate_first: bool) -> Ending:
        """Train from step `first` to the end of the plan.

        Args:
            evaluate_first: the evaluation due at `first` was cut short.

        Raises:
            NotFiniteError: three steps in a row whose gradients were not finite.
            LossScaleError: a gradient that is not finite at the floor of the loss scale.
            DataError: too many samples that cannot be decoded, one that cannot be read, a checkpoint not written.
        """
        total = self._plan.total_steps
        try:
            if self._stop.agree():
                return Ending.DONE if first == total and not evaluate_first else Ending.STOPPED
            if evaluate_first:
                verdict = self._evaluate(first)
                if verdict is Verdict.CUT_SHORT:
                    return Ending.STOPPED
                if verdict is Verdict.BEST:
                    self._saver.save(first)
            self._meter.begin()
            for step in range(first, total):
                self._profiler.before(step)
                record = self._global_step(batches, step)
                self._profiler.after(step)
                stopping = self._stop.agree()
                self._meter.stepped(step + 1, record, stopping)
                with self._meter.pause():
                    stopping = self._between_steps(step + 1, stopping)
                if stopping:  # also after the last step, when its evaluation has yet to come
                    return Ending.STOPPED
        except (NotFiniteError, LossScaleError) as error:
            saved = self._saver.last_step
            raise type(error)(f"{error}; last checkpoint: " + (
                f"step {saved}" if saved else "none was written yet")) from error
        finally:
            self._profiler.close()
            batches.close()
            self._meter.close()
        return Ending.DONE

    def _between_steps(self, done: int, stopping: bool) -> bool:
        """Evaluate and save as the plan says, save when stopping; whether the run must stop. Collective."""
        asks_for_checkpoint = done in self._plan.checkpoint_steps
        if done in self._plan.eval_steps and not stopping:
            verdict = self._evaluate(done)
            stopping = verdict is Verdict.CUT_SHORT
            asks_for_checkpoint |= verdict is Verdict.BEST
        if asks_for_checkpoint or stopping:
            self._saver.save(done)
        return stopping

    def _evaluate(self, done: int) -> Verdict:
        """Evaluate after `done` steps and write the results. Collective."""
        results = self._validator.evaluate(done)
        if results is None:
            return Verdict.CUT_SHORT
        self._meter.evaluated(done, results, self._validator.images)
        return Verdict.BEST if self._saver.evaluated(done, results) else Verdict.NOT_BEST
