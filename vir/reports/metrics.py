"""metrics.jsonl and TensorBoard: one line per event, written by rank 0."""

from __future__ import annotations

import io
import json
import math
import os
import secrets
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from vir.errors import DataError, SettingsError
from vir.files import replace_text
from vir.log import log
from vir.run_folder import METRICS, TENSORBOARD, WANDB_ID


class MetricsWriter:
    """Appends events to RUN/metrics.jsonl and RUN/tensorboard.

    Events after `from_epoch`, written by a run that was killed before its next checkpoint, are dropped: each train and
    eval event stands once, each start stays. `from_step` is the same moment in steps of the present batch size. With
    `wandb`, the name of a project, they go to Weights & Biases as well.

    A disk that is full or fails costs no event and ends no run: both files are tried again with each event, and at the
    end. Only metrics.jsonl must be writable at the start.
    """

    def __init__(self, run: Path, from_epoch: float, from_step: int, wandb: str = "",
                 config: dict[str, Any] | None = None) -> None:
        path = run / METRICS
        kept = [event for event in read_metrics(run) if event["epoch"] <= from_epoch + 1e-9] if path.exists() else []
        replace_text(path, "".join(json.dumps(event) + "\n" for event in kept))
        self._lines = _Appended(path)
        self._board = _begin_board(run / TENSORBOARD, from_step + 1)
        self._wandb = None
        if wandb:
            import wandb as service

            try:
                self._wandb = service.init(project=wandb, name=run.name, id=_wandb_id(run), resume="allow", dir=run,
                                           config=config)
            except Exception as error:  # it has many kinds
                raise SettingsError(f"--train.wandb {wandb}: {error}; log in by `wandb login`, set WANDB_MODE=offline, "
                                    "or leave it out") from error

    def write(self, kind: str, step: int, **values: Any) -> None:
        """One event; `kind` is train, eval or start. Numbers also go to TensorBoard as kind/name."""
        plain = {name: None if isinstance(value, float) and not math.isfinite(value) else value
                 for name, value in values.items()}  # JSON has no NaN
        event = {"kind": kind, "step": step, "time": round(time.time(), 3), **plain}
        self._lines.append(f"{json.dumps(event)}\n".encode())
        self._board.append(_board_record(step=step, summary={"value": [
            {"tag": f"{kind}/{name}", "simple_value": float(value)}
            for name, value in values.items() if isinstance(value, (int, float))]}))
        if self._wandb is not None:
            try:
                self._wandb.log({f"{kind}/{name}": value for name, value in plain.items()}, step=step)
            except Exception as error:  # it has many kinds, and none is worth a run
                log.warning("Weights & Biases gets no more events: %s", error)
                self._wandb = None

    def close(self) -> None:
        self._lines.close()
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


class _Appended:
    """A file that grows by whole records. Those that the disk refuses are kept, and tried again before the next one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._pending: list[bytes] = []
        self._whole: int | None = None
        """Bytes before a write that did not succeed; what stands behind them is half a record."""
        self._error: OSError | None = None

    def append(self, record: bytes) -> None:
        self._pending.append(record)
        self._try()

    def close(self) -> None:
        """The last attempt; what it cannot write is lost."""
        if self._pending:
            self._try()
        if self._pending:
            log.warning("%s lacks the last %d records: %s", self._path, len(self._pending), self._error)

    def _try(self) -> None:
        try:
            self._write(b"".join(self._pending))
        except OSError as error:
            with suppress(OSError):
                self._cut()
            if self._error is None:
                log.warning("cannot write %s: %s; the run goes on, and each later event tries again", self._path,
                            error.strerror or error)
            self._error = error
            return
        if self._error is not None:
            log.info("%s can be written again, with all %d records that it lacked", self._path, len(self._pending))
        self._pending, self._error = [], None

    def _write(self, data: bytes) -> None:
        self._path.parent.mkdir(exist_ok=True)
        self._cut()
        # Opened each time: on network disks, a failed write may be told only when closing, and a new descriptor may
        # work where a stale one fails.
        with self._path.open("ab", buffering=0) as file:
            self._whole = file.tell()
            while data:
                data = data[file.write(data):]
        self._whole = None

    def _cut(self) -> None:
        if self._whole is not None and self._path.exists() and self._path.stat().st_size > self._whole:
            os.truncate(self._path, self._whole)


def _begin_board(folder: Path, purge_step: int) -> _Appended:
    """A new event file for TensorBoard, which hides what earlier ones have from `purge_step` on.

    Not by SummaryWriter: its thread ends at the first full disk, and what flush had called written may be lost.
    """
    board = _Appended(folder / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}")
    board.append(_board_record(file_version="brain.Event:2") +
                 _board_record(step=purge_step, session_log={"status": "START"}))
    return board


def _board_record(**fields: Any) -> bytes:
    """An event of TensorBoard, framed with its length and checksums."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    framed = io.BytesIO()
    RecordWriter(framed).write(Event(wall_time=time.time(), **fields).SerializeToString())
    return framed.getvalue()


def _wandb_id(run: Path) -> str:
    """The same for every start of a run folder, so that a continued run is one run there too."""
    path = run / WANDB_ID
    if not path.exists():
        replace_text(path, secrets.token_hex(6))
    return path.read_text()


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Every event of a run. A last line cut short by a kill is left out.

    Raises:
        DataError: no metrics.jsonl, one that cannot be read, or a broken line within it, or one whose step, samples,
            loss, gradient norm or rates are no such numbers.
    """
    path = run / METRICS
    if not path.is_file():
        raise DataError(f"{run} has no {METRICS}: it is not a run folder, or the run has not begun")
    try:
        lines = path.read_text().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    events = []
    for number, line in enumerate(lines[:-1], 1):  # what follows the last newline is not a whole line
        try:
            event = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(event, dict) or not event.keys() >= {"kind", "step"}:
            raise DataError(f"{path}, line {number} is no event with kind and step: {line[:80]}")
        if said := _wrong_number(event):
            raise DataError(f"{path}, line {number}: {said}; correct the line, or remove it")
        events.append(event)
    return events


def _wrong_number(event: dict[str, Any]) -> str | None:
    """What is wrong with one that a reader of events counts with, in words."""
    step, seen = event["step"], event.get("samples_seen")
    if type(step) is not int or step < 1:
        return f"step is {step!r}; it must be a whole number, 1 or more"
    if "samples_seen" in event and (type(seen) is not int or seen < step):
        return f"samples_seen is {seen!r}; it must be a whole number, at least that of the steps, {step}"
    for name in ("loss", "grad_norm", "images_per_second", "images_per_second_per_device"):
        value = event.get(name)
        if value is not None and (type(value) not in (int, float) or not math.isfinite(value)):
            return f"{name} is {value!r}; it must be a number, or null"
    return None
