"""Validation during a run."""

from __future__ import annotations

from typing import Callable

import numpy as np
from torch import Tensor
from tqdm import tqdm

from vir.cluster.heartbeat import Heartbeat
from vir.cluster.signals import StopRequest
from vir.config import RunConfig
from vir.data.loader import Patience, eval_batches
from vir.data.reader import Reader
from vir.distributed import World
from vir.engine.engine import Engine
from vir.evaluation.classify import Accuracy, classify
from vir.log import log, shows_bars
from vir.training.saver import Results, Saver
from vir.weights.spec import InputSpec

_DEV_BATCHES = 10
"""That fast_dev_run evaluates."""


class Validator:
    """Accuracy of the weights and of their average on data.val, in the training precision.

    Args:
        saver: whose checkpoint on its way goes on meanwhile; None where nothing is saved.
    """

    def __init__(self, config: RunConfig, engine: Engine, reader: Reader, model_input: InputSpec, world: World,
                 stop: StopRequest, patience: Patience, heartbeat: Heartbeat, saver: Saver | None = None) -> None:
        self._config, self._engine, self._reader = config, engine, reader
        self._input, self._world, self._stop = model_input, world, stop
        self._patience, self._heartbeat, self._saver = patience, heartbeat, saver
        self._first = (_DEV_BATCHES * config.eval.batch_size * world.size if config.train.fast_dev_run else None)

    @property
    def images(self) -> int:
        """Of one evaluation."""
        return min(len(self._reader), self._first or len(self._reader))

    def evaluate(self, step: int) -> Results | None:
        """The results after `step` steps; None where a signal cut the evaluation short. Collective."""
        results: Results = {}
        for prefix, averaged in (("", False), ("ema_", True)) if self._engine.has_ema else (("", False),):
            with self._engine.evaluating(averaged) as forward:
                accuracy = self._classify(forward, f"{prefix}eval", step)
            if accuracy is None:
                return None
            results |= {f"{prefix}top1": accuracy.top1, f"{prefix}top5": accuracy.top5, f"{prefix}loss": accuracy.loss}
        log.info("step %d: %s, on %d images", step, ", ".join(f"{name} {value:.3f}" for name, value in results.items()),
                 self.images)
        return results

    def _classify(self, forward: Callable[[Tensor], Tensor], title: str, step: int) -> Accuracy | None:
        batches = eval_batches(
            self._reader, self._input, batch_size=self._config.eval.batch_size, rank=self._world.rank,
            world_size=self._world.size, workers=self._config.data.workers, device=self._world.device,
            patience=self._patience, chosen=np.arange(self.images))

        def stop() -> bool:
            self._heartbeat.at(f"evaluating after step {step}")
            stops = self._stop.agree(self._saver is not None and self._saver.is_ready)
            if self._saver is not None and self._stop.all_ready:
                self._saver.advance()
            return stops

        with tqdm(total=self.images, desc=title, leave=False, unit="image",
                  disable=not (self._world.is_main and shows_bars())) as bar:
            return classify(forward, batches, self._input, self._world.device, bar, stop)
