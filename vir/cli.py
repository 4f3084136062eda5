"""From an error to a line and an exit code: the same for every entry module and tool."""

from __future__ import annotations

import atexit
import gc
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Callable, Iterator, NoReturn

from vir.errors import VirError
from vir.launcher import local_rank


def tell(error: VirError, program: str, every_rank: bool = True) -> int:
    """Print the error without a traceback and return its exit code.

    Args:
        program: the first word of the line.
        every_rank: False where all ranks have met the error: then only the first rank of each machine prints it.
    """
    if every_rank or local_rank() == 0:
        with suppress(OSError):  # a terminal that is gone
            print(f"{program}: {error}", file=sys.stderr)
    report(f"{program}: {error}")
    return error.exit_code


def report(said: str) -> None:
    """Let torchrun's report, which comes after all that the ranks print, say why this one has ended.

    The file is as torch.distributed.elastic.multiprocessing.errors.record leaves it, with the line in the traceback's
    place. Only torchrun and accelerate ask for it.
    """
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        more = {"py_callstack": said, "timestamp": str(int(time.time()))}
        with suppress(OSError):
            Path(path).write_text(json.dumps({"message": {"message": said, "extraInfo": more}}))


@contextmanager
def stop_requests() -> Iterator[list[signal.Signals]]:
    """The signals that ask to stop, Ctrl-C, SIGTERM and a closed terminal, as they come; none interrupts the block.

    A second one ends the process at once, if it comes a second after the first. What was ignored before, as nohup does
    with a closed terminal, stays so. For programs that a kill leaves in order.
    """
    received: list[signal.Signals] = []
    began = 0.0

    def note(number: int, frame: object) -> None:
        nonlocal began
        if received and time.monotonic() - began > 1:
            end_now(128 + number)
        began = began or time.monotonic()
        received.append(signal.Signals(number))

    with _calling(note):
        yield received


class Interrupted(BaseException):
    """A signal has asked this program to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = 128 + number


@contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C, SIGTERM and a closed terminal raise Interrupted in the block, which can so take away what it has begun.

    For programs that have nothing to go on from. What was ignored before stays so.
    """
    def interrupt(number: int, frame: object) -> NoReturn:
        for again in _ENDS:  # a second one would come between what the first is to take away
            signal.signal(again, signal.SIG_IGN)
        raise Interrupted(number)

    with _calling(interrupt):
        yield


_ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C, what other programs send, and a closed terminal."""


@contextmanager
def _calling(handler: Callable[[int, object], None]) -> Iterator[None]:
    """These signals call it in the block, but for those that were ignored before."""
    before = {number: signal.signal(number, handler) for number in _ENDS
              if signal.getsignal(number) is not signal.SIG_IGN}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


@contextmanager
def importing() -> Iterator[None]:
    """Import much in the block: no garbage is looked for there nor, in a process with a QuickEnd, ever after in what is
    there at its end.

    That takes a second off the start of a run, and pauses out of its steps. What is kept so Python would not take apart
    at its end, of which some libraries complain.
    """
    gc.disable()
    try:
        yield
    finally:
        if QuickEnd.is_there:
            gc.freeze()
        gc.enable()


class QuickEnd:
    """Once `code` is set, with that this process ends as soon as all functions are called that atexit was given after
    this one: Python would still take apart all that was imported, which takes torch over a second."""

    is_there = False

    def __init__(self) -> None:
        QuickEnd.is_there = True
        self.code: int | None = None
        atexit.register(self._end)

    def _end(self) -> None:
        if self.code is not None:
            _flush()
            os._exit(self.code)


def end_now(exit_code: int) -> NoReturn:
    """End this process without waiting for its threads, for its children or for other ranks."""
    try:
        for child in multiprocessing.active_children():
            child.kill()
        # Another thread may wait within a write, to a pipe that nobody reads, and keep the stream to itself.
        flushing = threading.Thread(target=_flush, daemon=True)
        flushing.start()
        flushing.join(1)
    finally:
        os._exit(exit_code)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # a full disk, a closed stream, none at all
            stream.flush()
