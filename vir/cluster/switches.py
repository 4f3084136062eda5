"""What asks a run to stop, save or evaluate beside a signal: files in its folder, and a launcher that has gone.

    touch runs/a/STOP        finish the step, save, end with exit code 75
    touch runs/a/SAVE        save after the step, and go on
    touch runs/a/EVALUATE    evaluate after the step, and go on

A file reaches the ranks of all nodes, whoever started them and however. It is removed when it is heeded. A launch
script that gets a signal leaves a file of its own, which no other run in the same folder takes for its own.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path

import psutil

from vir import launcher, status
from vir.cluster.signals import EVALUATE, LAUNCHER_GONE, SAVE, STOP_FILE, StopRequest
from vir.launcher import Place
from vir.log import log

STOP = "STOP"
_SECONDS = 1.0
"""Between two looks."""


class Switches:
    """From its making to close(), looks for the files on the ranks that answer for them, and for the launcher on all.

    Args:
        folder: of the run, which need not be there yet; None where its files are another's, as in an evaluation of what
            a training leaves.
    """

    def __init__(self, place: Place, folder: Path | None, stop: StopRequest) -> None:
        self._stop, self._closed = stop, threading.Event()
        self._folder = folder if place.rank == 0 else None
        awaited = os.environ.get(status.FILE) if place.local_rank == 0 else None
        self._script = Path(awaited) if awaited else None
        self._launchers = launcher.launchers()
        self._stay: set[str] = set()
        """Files that cannot be removed: they are heeded once."""
        threading.Thread(target=self._look, name="switches", daemon=True).start()

    def close(self, heeded_stop: bool = False) -> None:
        """Look no longer.

        Args:
            heeded_stop: whether the run has stopped; then the file that asked for it is removed, on rank 0.
        """
        self._closed.set()
        if heeded_stop and self._folder is not None:
            self._remove(STOP)

    def _look(self) -> None:
        while not self._closed.is_set():
            with suppress(OSError):  # no such folder yet, a disk that does not answer
                self._look_at_files()
            if not all(map(_is_there, self._launchers)):
                self._stop.ask(LAUNCHER_GONE)
            self._closed.wait(_SECONDS)

    def _look_at_files(self) -> None:
        if self._script is not None and (number := status.asked_to_stop(self._script)):
            self._stop.ask(number)
        if self._folder is None:
            return
        names = _names(self._folder)
        if STOP in names:
            self._stop.ask(STOP_FILE)
        for name in {SAVE, EVALUATE} & names - self._stay:
            self._stop.wish([name])
            self._remove(name)

    def _remove(self, name: str) -> None:
        assert self._folder is not None
        try:
            (self._folder / name).unlink(missing_ok=True)
        except OSError as error:  # a folder, or another user's
            self._stay.add(name)
            log.warning("%s was heeded, but cannot be removed: %s", self._folder / name, error.strerror)


def _is_there(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def _names(folder: Path) -> set[str]:
    """What a folder holds. Listed, not asked for by name: NFS remembers for a minute that a file was not there."""
    return set(os.listdir(folder))
