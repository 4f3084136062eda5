"""The training loop: steps from where training stands to its end, evaluation, checkpoints, a stop on request."""

from __future__ import annotations

import time
from enum import Enum
from typing import Any, Callable, Sequence

import torch
from torch import Tensor

from vir.cluster.heartbeat import Heartbeat
from vir.cluster.signals import EVALUATE, SAVE, LauncherGrace, StopRequest
from vir.config import TrainConfig
from vir.data.batch import Batch
from vir.data.loader import Batches
from vir.engine.engine import Engine, Update
from vir.errors import CheckpointError, LossScaleError, NotFiniteError
from vir.log import log
from vir.reports.throughput import Stopwatch
from vir.startup import StartupTimer
from vir.streams import DROPOUT, generator
from vir.training.distill import Teacher
from vir.training.features import FeatureBatch, FeatureBatches
from vir.training.guard import FiniteGuard
from vir.training.loss import distillation_loss, training_loss
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
        prepare: from a batch to what the engine takes, pixels or features, and targets.
        forward_clock: runs during each forward pass.
        teacher: None where the targets alone teach.
    """

    def __init__(self, train: TrainConfig, plan: Plan, engine: Engine, prepare: Callable[[Any], tuple[Tensor, Tensor]],
                 guard: FiniteGuard, forward_clock: Stopwatch, rank: int, teacher: Teacher | None = None) -> None:
        self._train, self._plan, self._engine, self._prepare = train, plan, engine, prepare
        self._guard, self._forward_clock, self._rank, self._teacher = guard, forward_clock, rank, teacher

    def __call__(self, batches: Sequence[Batch | FeatureBatch], waited: float, step: int) -> StepRecord:
        """Do global batch `step`, from 0, of which `batches` are this rank's micro-batches. Collective.

        Args:
            waited: seconds that it took until they were there.

        Raises:
            NotFiniteError: the third step in a row whose gradient was not finite.
            LossScaleError: a gradient that is not finite at the floor of the loss scale.
        """
        record = StepRecord(update=Update.ACCUMULATING, losses=[], positions=[], bad=[], waited=waited)
        rates = self._plan.learning_rate(step), self._plan.weight_decay(step)
        for micro, batch in enumerate(batches):
            self._seed_dropout(step, micro)
            images, targets = self._prepare(batch)
            taught = None if self._teacher is None else self._teacher(images)
            with self._forward_clock:
                loss = self._loss(self._engine(images), targets, taught)
            self._engine.backward(loss)
            record.update = self._update(step, *rates)
            record.losses.append(loss.detach())
            record.positions.append(batch.positions)
            record.bad += batch.bad
            record.spent += batch.spent
        assert record.update is not Update.ACCUMULATING, "the accumulation of the plan and of DeepSpeed differ"
        if record.update is Update.APPLIED:
            self._guard.applied()
        elif not self._engine.loss_scale.is_dynamic:  # there it is how the loss scale finds its place
            self._guard.skipped(step, record.losses, record.positions)
        return record

    def _loss(self, logits: Tensor | tuple[Tensor, Tensor], targets: Tensor, taught: Tensor | None) -> Tensor:
        if self._teacher is None:
            assert isinstance(logits, Tensor), "heads are taught apart by a teacher alone"
            return training_loss(logits, targets, self._train)
        assert taught is not None
        return distillation_loss(logits, targets, taught, self._train, self._teacher.settings)

    def _seed_dropout(self, step: int, micro: int) -> None:
        key = (self._train.seed, self._plan.samples(step), self._rank, micro, DROPOUT)
        seed_devices(int(generator(*key).integers(2**63)))

    def _update(self, step: int, lr: float, weight_decay: float) -> Update:
        try:
            # Waits for the device once in a global batch: whether to apply it is decided here, by the gradient's norm.
            return self._engine.step(lr, weight_decay)
        except LossScaleError as error:
            raise LossScaleError(f"step {step + 1}: {error}: lower --optim.lr, lengthen --schedule.warmup_epochs "
                                 "or use a bf16 --deepspeed_config") from error


def seed_devices(seed: int) -> None:
    """What torch.manual_seed does for the devices in use.

    That also keeps its caller's stack for each kind of device that is not: 2.5 ms of each micro-batch.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)


class Trainer:
    """Runs the steps of a plan; between them it evaluates, saves, and asks whether to stop.

    Args:
        validator: None where the plan has no evaluations.
    """

    def __init__(self, plan: Plan, global_step: GlobalStep, meter: Meter, validator: Validator | None, saver: Saver,
                 profiler: Profiler, stop: StopRequest, heartbeat: Heartbeat, startup: StartupTimer) -> None:
        self._plan, self._global_step, self._meter = plan, global_step, meter
        self._validator, self._saver, self._profiler, self._stop = validator, saver, profiler, stop
        self._heartbeat, self._startup = heartbeat, startup
        self._grace = LauncherGrace()

    def fit(self, batches: Batches | FeatureBatches, first: int, evaluate_first: bool) -> Ending:
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
            if evaluate_first:
                verdict = self._evaluate(first)
                if verdict is Verdict.CUT_SHORT:
                    return Ending.STOPPED
                if verdict is Verdict.BEST:
                    self._saver.save(first)
                self._startup.ended("evaluation")
            self._meter.begin()
            for step in range(first, total):
                began = time.monotonic()
                fetched = self._fetch(batches, step)
                waited = time.monotonic() - began
                if step == first:
                    self._startup.ended("first batch")
                # Asked after the wait for data: a rank to whom none comes takes part as soon as a signal does, so the
                # answer is needed before anything collective. It takes 0.3 ms between two ranks on one machine, in
                # which the device is at the optimizer's kernels; asked asynchronously it took no less.
                came = time.monotonic()
                if self._saver.is_due:
                    self._stop.wish([SAVE])
                stops = self._stop.agree(self._saver.is_ready)
                self._meter.met(time.monotonic() - came)
                if self._stop.all_ready:
                    with self._meter.pause():
                        self._saver.advance()
                if stops:
                    self._meter.cut(step)
                    self._saver.stop(step, self._grace.left(self._stop))
                    return Ending.STOPPED
                if wishes := self._stop.agreed_wishes:
                    with self._meter.pause():
                        if self._between_steps(step, EVALUATE in wishes, SAVE in wishes) is Ending.STOPPED:
                            return Ending.STOPPED
                self._say_step(step, first)
                self._profiler.before(step)
                record = self._global_step(fetched, waited, step)
                self._profiler.after(step)
                if step == first:
                    self._startup.ended("first step")
                    self._meter.began(self._startup)
                else:  # the first one compiles
                    self._grace.stepped(time.monotonic() - began)
                self._meter.stepped(step + 1, record)
                done = step + 1
                with self._meter.pause():
                    if self._between_steps(done, done in self._plan.eval_steps,
                                           done in self._plan.checkpoint_steps) is Ending.STOPPED:
                        return Ending.STOPPED
            with self._meter.pause():
                self._saver.finish()
        except (NotFiniteError, LossScaleError) as error:
            try:
                self._saver.finish()
            except CheckpointError as other:
                log.warning(other)
            saved = self._saver.last_published
            raise type(error)(f"{error}; last checkpoint: " + (
                f"step {saved}" if saved else "none was written yet")) from error
        finally:
            self._saver.close()
            self._profiler.close()
            batches.close()
            self._meter.close()
        return Ending.DONE

    def _fetch(self, batches: Batches | FeatureBatches, step: int) -> list[Batch | FeatureBatch]:
        """This rank's micro-batches of a step; fewer where a signal came before they did."""
        self._heartbeat.at(lambda: f"at step {step + 1}, waiting for {batches.awaited()}")
        fetched: list[Batch | FeatureBatch] = []
        for _ in range(self._plan.accumulation):
            if (batch := next(batches)) is None:
                break
            fetched.append(batch)
        return fetched

    def _say_step(self, step: int, first: int) -> None:
        positions = f"positions {self._plan.samples(step)} to {self._plan.samples(step + 1) - 1}"
        begins = step == first  # then kernels are compiled, and memory is reserved
        self._heartbeat.at(f"at step {step + 1}, {positions}{', compiling' if begins else ''}", counts=not begins)

    def _between_steps(self, done: int, evaluates: bool, saves: bool) -> Ending | None:
        """Evaluate and save, as the plan or somebody says; STOPPED where a signal came meanwhile. Collective."""
        if evaluates and self._validator is None:
            log.warning("there is nothing to evaluate on: --data.val was not given")
            evaluates = False
        verdict = self._evaluate(done) if evaluates else Verdict.NOT_BEST
        if verdict is Verdict.CUT_SHORT:
            self._saver.stop(done, self._grace.left(self._stop))
            return Ending.STOPPED
        if verdict is Verdict.BEST or saves and done != self._saver.last_step:
            self._saver.save(done)
        if self._saver.saved and (said := self._grace.saved(self._saver.saved[-1].seconds)):
            log.warning(said)
        return None

    def _evaluate(self, done: int) -> Verdict:
        """Evaluate after `done` steps and write the results. Collective."""
        assert self._validator is not None, "without one the plan has no evaluations"
        results = self._validator.evaluate(done)
        if results is None:
            return Verdict.CUT_SHORT
        self._meter.evaluated(done, results, self._validator.images)
        return Verdict.BEST if self._saver.evaluated(done, results) else Verdict.NOT_BEST
