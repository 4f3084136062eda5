"""Checkpoints during a run: what goes into one, and which of them is the best."""

from __future__ import annotations

from pathlib import Path

from vir import distributed
from vir.checkpoints import store
from vir.checkpoints.info import CheckpointInfo
from vir.cluster.heartbeat import Heartbeat
from vir.config import RunConfig, to_dict
from vir.distributed import World
from vir.engine.engine import Engine
from vir.training.plan import Plan
from vir.training.validator import Results
from vir.weights.spec import ModelSpec


class Saver:
    """Writes checkpoints of a run into its folder, and remembers the best validation accuracy so far.

    Making one is collective.

    Args:
        first: steps done before this process began.
        teacher: fingerprint of the model that teaches; empty where none does.
    """

    def __init__(self, config: RunConfig, plan: Plan, engine: Engine, spec: ModelSpec, data_fingerprint: str,
                 world: World, heartbeat: Heartbeat, first: int, teacher: str = "") -> None:
        self._config, self._plan, self._engine, self._spec = config, plan, engine, spec
        self._data_fingerprint, self._teacher = data_fingerprint, teacher
        self._world, self._heartbeat = world, heartbeat
        self._folder = Path(config.output)
        self._best = distributed.broadcast(store.best_so_far(self._folder, config.checkpoint.best))
        self._results: Results = {}
        self._evaluated_at = -1
        self.last_step = first
        """Steps done at the newest checkpoint."""
        self.seconds: list[float] = []
        """That each checkpoint has taken."""

    def evaluated(self, step: int, results: Results) -> bool:
        """Take the results of an evaluation; whether they are the best so far, which asks for a checkpoint."""
        self._results, self._evaluated_at = results, step
        return self._value(results) > self._best

    def save(self, step: int) -> None:
        """Write a checkpoint after `step` steps. Collective.

        Raises:
            CheckpointError: it could not be written; those before it are as they were.
        """
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
        every = config.checkpoint.keep_every_epochs
        kept = store.Kept(config.checkpoint.keep, every and every * self._plan.num_samples)
        self.seconds.append(store.save(engine.save, self._folder, info, self._world, kept, is_best))
        self.last_step = step

    def _value(self, results: Results) -> float:
        metric = self._config.checkpoint.best
        return float("-inf") if metric is None else results.get(metric, float("-inf"))
