"""Checkpoints during a run: what goes into one, and which of them is the best."""

from __future__ import annotations

import math
import time
from pathlib import Path

from vir import distributed
from vir.checkpoints import store
from vir.checkpoints.info import CheckpointInfo
from vir.checkpoints.local import LocalCopies
from vir.checkpoints.saving import Checkpointer, Saved
from vir.cluster.heartbeat import Heartbeat
from vir.config import RunConfig, to_dict
from vir.distributed import World
from vir.engine.engine import Engine
from vir.log import log
from vir.training.plan import Plan
from vir.weights.spec import ModelSpec

Results = dict[str, float]
"""top1, top5 and loss, and the same of the average with the prefix ema_."""

_SPARE = 1.25
"""Of the time that writing has taken, in the cadence that is advised: a disk that others use is not always as fast."""
_NOTED = 0.01
"""Share of the time between two checkpoints, waited for the first of them, that is worth a word."""


class Saver:
    """Makes checkpoints of a run in its folder, and remembers the best validation accuracy so far.

    Making one is collective. In the asynchronous way one is on its way while training goes on, and the next one waits
    for it.

    Args:
        first: steps done before this process began.
        teacher: fingerprint of the model that teaches; empty where none does.
        local: keeps each checkpoint on the nodes' own disks as well.
    """

    def __init__(self, config: RunConfig, plan: Plan, engine: Engine, spec: ModelSpec, data_fingerprint: str,
                 world: World, heartbeat: Heartbeat, first: int, teacher: str = "",
                 local: LocalCopies | None = None) -> None:
        self._config, self._plan, self._engine, self._spec = config, plan, engine, spec
        self._data_fingerprint, self._teacher = data_fingerprint, teacher
        self._world, self._heartbeat = world, heartbeat
        every = config.checkpoint.keep_every_epochs
        kept = store.Kept(config.checkpoint.keep, every and every * plan.num_samples,
                          plan.checkpoint_steps.__contains__)
        self._checkpoints = Checkpointer(Path(config.output), world, kept, config.checkpoint.asynchronous, local)
        self._best = distributed.broadcast(store.best_so_far(Path(config.output), config.checkpoint.best))
        self._results: Results = {}
        self._evaluated_at = -1
        self._first = first
        self._began = time.monotonic()
        self._has_warned = False
        self.last_step = first
        """Steps done at the newest checkpoint, which may be on its way."""
        self.waited = 0
        """Checkpoints that had to wait for the one before."""

    @property
    def saved(self) -> list[Saved]:
        """The checkpoints of these processes that are published."""
        return self._checkpoints.saved

    @property
    def last_published(self) -> int:
        """Steps done at the newest of them, or before these processes began."""
        return self.saved[-1].step if self.saved else self._first

    @property
    def is_due(self) -> bool:
        """Whether a checkpoint is due by rank 0's clock; never while one is on its way."""
        every = self._config.checkpoint.every_minutes
        return (self._world.is_main and every is not None and self._checkpoints.step is None
                and time.monotonic() - self._began >= 60 * every)

    @property
    def is_ready(self) -> bool:
        """Whether this rank waits for the others to go on with the one on its way."""
        return self._checkpoints.is_ready

    def evaluated(self, step: int, results: Results) -> bool:
        """Take the results of an evaluation; whether they are the best so far, which asks for a checkpoint."""
        self._results, self._evaluated_at = results, step
        return self._value(results) > self._best

    def save(self, step: int) -> None:
        """Make a checkpoint after `step` steps, or begin to. Collective.

        Raises:
            CheckpointError: it, or the one before it, could not be written; those before are as they were.
        """
        self._wait(step)
        self._heartbeat.at(f"saving after step {step}", counts=False)
        config, engine = self._config, self._engine
        results = self._results if self._evaluated_at == step else {}
        is_best = self._value(results) > self._best
        self._best = max(self._best, self._value(results))
        info = CheckpointInfo(
            samples_seen=self._plan.samples(step), step=step, updates=engine.updates, world_size=self._world.size,
            zero_stage=engine.zero_stage, precision=engine.precision, ema=engine.has_ema,
            loss_scaler=engine.loss_scale.state(), metrics=results, config=to_dict(config), model=self._spec,
            data_fingerprint=self._data_fingerprint, teacher=self._teacher)
        self._began = time.monotonic()
        self._checkpoints.begin(engine.save, info, is_best)
        self.last_step = step

    def advance(self) -> None:
        """Go on with the one on its way, where all ranks are ready. Collective. Raises CheckpointError as save()."""
        self._checkpoints.advance()
        every = self._config.checkpoint.every_minutes
        if self._checkpoints.step is None and every is not None and self.saved[-1].seconds > 60 * every:
            self._warn("the next one comes later than was asked for", None)

    def finish(self) -> None:
        """Wait until the one on its way is published. Collective. Raises CheckpointError as save()."""
        if self._checkpoints.step is not None:
            self._heartbeat.at(f"waiting for the checkpoint of step {self._checkpoints.step}", counts=False)
            self._checkpoints.finish()

    def stop(self, step: int, granted: float) -> None:
        """Leave the run after `step` steps as the newest checkpoint that can be had in so many seconds. Collective.

        One that is on its way is finished where it is of this step, and first where there is no time for twice what the
        one before it took (to give it up may take as long as to write it), or where none tells. Otherwise it is given
        up for a newer one, except for the best so far, for which no later one makes up.

        Raises:
            CheckpointError: as save().
        """
        older = self._checkpoints.step
        if older is not None and step != older:
            until = time.monotonic() + min(distributed.gather(granted))
            if self._is_too_late(2 * (self.saved[-1].seconds if self.saved else math.inf), until):
                self.finish()
                if self._is_too_late(self.saved[-1].seconds, until):
                    log.warning("the time that the launcher leaves may not be enough for a checkpoint of step %d, "
                                "which takes %.1f s: the one of step %d, which was on its way, was finished, and the "
                                "steps since will be done again", step, self.saved[-1].seconds, older)
                    return
            elif not self._checkpoints.is_best:
                self._checkpoints.give_up()
        if step != self.last_step:
            self.save(step)
        self.finish()

    def _is_too_late(self, seconds: float, until: float) -> bool:
        """Whether so many seconds from now are after that moment, by rank 0's clock. Collective."""
        return bool(distributed.broadcast(time.monotonic() + seconds > until))

    def close(self) -> None:
        """Write no more on this rank."""
        self._checkpoints.close()

    def _wait(self, step: int) -> None:
        """For the checkpoint before this one, after `step` steps."""
        before = self._checkpoints.step
        if before is None:
            return
        waits = time.monotonic()
        per_step = (waits - self._began) / max(1, step - before)
        self.finish()
        waited = time.monotonic() - waits
        if waited < _NOTED * (waits - self._began):
            return
        self.waited += 1
        log.info("the checkpoint of step %d has waited %.1f s for the one of step %d", step, waited, before)
        if self.saved[-1].seconds > waits - self._began:
            self._warn(f"training has waited {waited:.1f} s", per_step)

    def _warn(self, consequence: str, step_seconds: float | None) -> None:
        """Name the cadence that the disk holds, once."""
        if self._has_warned:
            return
        self._has_warned = True
        holds = _SPARE * self.saved[-1].seconds
        ways = [f"--checkpoint.every_minutes {math.ceil(holds / 6) / 10:g}"]
        if step_seconds:
            ways.append(f"--checkpoint.every_steps {math.ceil(holds / step_seconds)}")
        log.warning("writing a checkpoint takes %.1f s, longer than the time between two: %s; this disk holds %s",
                    self.saved[-1].seconds, consequence, " or ".join(ways))

    def _value(self, results: Results) -> float:
        metric = self._config.checkpoint.best
        return float("-inf") if metric is None else results.get(metric, float("-inf"))
