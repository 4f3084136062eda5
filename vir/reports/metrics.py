"""metrics.jsonl and TensorBoard: one line per event, written by rank 0."""

from __future__ import annotations

import json
import math
import secrets
import time
from pathlib import Path
from typing import Any

from vir.errors import DataError
from vir.files import replace_text
from vir.run_folder import METRICS, TENSORBOARD, WANDB_ID


class MetricsWriter:
    """Appends events to RUN/metrics.jsonl and RUN/tensorboard.

    Events after `from_epoch`, written by a run that was killed before its next checkpoint, are dropped: each step
    stands once. `from_step` is the same moment in steps of the present batch size. With `wandb`, the name of a project,
    they go to Weights & Biases as well.
    """

    def __init__(self, run: Path, from_epoch: float, from_step: int, wandb: str = "",
                 config: dict[str, Any] | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        path = run / METRICS
        kept = [event for event in read_metrics(run) if event["epoch"] <= from_epoch + 1e-9] if path.exists() else []
        replace_text(path, "".join(json.dumps(event) + "\n" for event in kept))
        self._file = path.open("a", buffering=1)
        self._board = SummaryWriter(run / TENSORBOARD, purge_step=from_step + 1)
        self._wandb = None
        if wandb:
            import wandb as service

            self._wandb = service.init(project=wandb, name=run.name, id=_wandb_id(run), resume="allow", dir=run,
                                       config=config)

    def write(self, kind: str, step: int, **values: Any) -> None:
        """One event; `kind` is train or eval. Numbers also go to TensorBoard as kind/name."""
        plain = {name: None if isinstance(value, float) and not math.isfinite(value) else value
                 for name, value in values.items()}  # JSON has no NaN
        self._file.write(json.dumps({"kind": kind, "step": step, "time": round(time.time(), 3), **plain}) + "\n")
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self._board.add_scalar(f"{kind}/{name}", value, step)
        self._board.flush()
        if self._wandb is not None:
            self._wandb.log({f"{kind}/{name}": value for name, value in plain.items()}, step=step)

    def close(self) -> None:
        self._file.close()
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def _wandb_id(run: Path) -> str:
    """The same for every start of a run folder, so that a continued run is one run there too."""
    path = run / WANDB_ID
    if not path.exists():
        replace_text(path, secrets.token_hex(6))
    return path.read_text()


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Every event of a run. A last line cut short by a kill is left out.

    Raises:
        DataError: no metrics.jsonl, or a broken line within it.
    """
    path = run / METRICS
    if not path.is_file():
        raise DataError(f"{run} has no {METRICS}: it is not a run folder, or the run has not begun")
    lines = path.read_text().split("\n")
    events = []
    for number, line in enumerate(lines[:-1], 1):  # what follows the last newline is not a whole line
        try:
            event = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(event, dict) or not event.keys() >= {"kind", "step"}:
            raise DataError(f"{path}, line {number} is no event with kind and step: {line[:80]}")
        events.append(event)
    return events
