"""The files that one rank writes of a checkpoint: at once, or from copies of its state while training goes on."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import IO, Any, Callable, NamedTuple, TypeVar

import torch

from vir.checkpoints.info import Files
from vir.checkpoints.staging import Staging

T = TypeVar("T")

_CHUNK = 1 << 24
"""Bytes that are written at a time, between which a file can be given up."""


class Written(NamedTuple):
    """What has become of the files of one rank."""

    problems: list[str]
    files: Files


class GivenUp(Exception):
    """The file is no longer wanted."""


class Writer:
    """Writes this rank's files of one checkpoint after another.

    Args:
        device: where the state lies.
        asynchronous: copy what is handed over, and write in a thread; otherwise it is written as it is handed over.
    """

    def __init__(self, device: torch.device, asynchronous: bool) -> None:
        self._staging = Staging(device) if asynchronous else None
        self.begin()

    def begin(self) -> None:
        """Take the files of another checkpoint. What was handed over of the one before is overwritten."""
        self._taken: list[tuple[str, Callable[[], Any]]] = []
        self._problems: list[str] = []
        self._files: Files = {}
        self._given_up = threading.Event()

    def take(self, state: Any, path: Path) -> None:
        """Take the content of a file. A failure is remembered, because the other ranks wait for this one further on."""
        try:
            if self._staging is None:
                self._files[path.name] = write_file(state, path, self._given_up)
            else:
                self._taken.append((path.name, self._staging.copy(path.name, state)))
        except _MEMORY_OR_DISK as error:
            self._problems.append(self._problem(path, error))

    def write(self, folder: Path) -> Work[Written]:
        """Write what was taken, in a thread; where it is written already, only tell of it."""
        if self._staging is None or self._problems:
            return done(Written(self._problems, self._files))
        wait_for_copies, taken = self._staging.copied(), self._taken

        def work() -> Written:
            wait_for_copies()
            files, problems = {}, []
            for name, copy in taken:
                try:
                    files[name] = write_file(copy(), folder / name, self._given_up)
                except _MEMORY_OR_DISK as error:
                    problems.append(f"{folder / name}: {_reason(error)}")
            return Written(problems, files)

        return do(work, in_background=True)

    def give_up(self) -> None:
        """Write no further: what `write` has returned is done soon, with a problem."""
        self._given_up.set()

    def close(self) -> None:
        """Give the memory of the copies back, when none is being written."""
        if self._staging is not None:
            self._staging.close()

    def _problem(self, path: Path, error: BaseException) -> str:
        reason = _reason(error)
        lacks_memory = isinstance(reason, MemoryError) or getattr(reason, "errno", None) == errno.ENOMEM
        if self._staging is None or not lacks_memory:
            return f"{path}: {reason}"
        return (f"{path}: the copy of this rank's state does not fit into host memory ({error}); give "
                "--checkpoint.asynchronous false, with which training waits for the disk")


_MEMORY_OR_DISK = (OSError, RuntimeError, MemoryError, GivenUp)
"""What writing may meet: torch has errors of its own for a disk that is full and for memory that is not there."""


def write_file(state: Any, path: Path, given_up: threading.Event) -> dict[str, Any]:
    """Write a file as torch.save does, flushed; its bytes and sha256.

    Into a file of Python's: where torch opens it itself, a full disk is an "unexpected pos" or an "iostream error".

    Raises:
        OSError, RuntimeError: it cannot be written.
        GivenUp, RuntimeError: given_up was set meanwhile.
    """
    with open(path, "wb") as file:
        sink = _Hashing(file, given_up)
        torch.save(state, sink)  # type: ignore[arg-type]  # it writes front to back, and asks for no more than that
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": sink.bytes, "sha256": sink.digest.hexdigest()}


class _Hashing:
    """Passes on to a file what is written, and hashes it on the way. Both let other threads run."""

    def __init__(self, file: IO[bytes], given_up: threading.Event) -> None:
        self._file, self._given_up = file, given_up
        self.digest, self.bytes = hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        whole = memoryview(data).cast("B")
        for start in range(0, len(whole), _CHUNK):
            if self._given_up.is_set():
                raise GivenUp("it was given up")
            part = whole[start:start + _CHUNK]
            self.digest.update(part)
            self._file.write(part)
        self.bytes += len(whole)
        return len(whole)

    def flush(self) -> None:
        self._file.flush()


def _reason(error: BaseException) -> BaseException:
    """What the system said, where torch has put an error of its own on top of it."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, OSError):
        found = found.__context__
    return found or error


class Work(Future[T]):
    """What a rank does by itself."""

    seconds: float = 0.0
    """That it took."""


def do(work: Callable[[], T], in_background: bool) -> Work[T]:
    """Do this now, or in a thread that holds up no end of the process."""
    doing: Work[T] = Work()

    def run() -> None:
        began = time.monotonic()
        try:
            result = work()
        except BaseException as error:
            doing.set_exception(error)
        else:
            doing.seconds = time.monotonic() - began
            doing.set_result(result)

    if in_background:
        threading.Thread(target=run, name="checkpoint", daemon=True).start()
    else:
        run()
    return doing


def done(value: T) -> Work[T]:
    """What is there already."""
    return do(lambda: value, in_background=False)
