"""One logger for a run: rank 0 writes to the terminal and to a file, other ranks only warn."""

from __future__ import annotations

import logging
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

log = logging.getLogger("vir")


def shows_bars() -> bool:
    """Whether standard error is a terminal with a width; that of a container may have none, and show no bar."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (OSError, ValueError):  # no terminal
        return False


def progress_bar(total: int, unit: str, **options: Any) -> tqdm[Any]:
    """The bar of a program: drawn anew twice a second on a terminal, a line each half minute in a file."""
    return tqdm(total=total, unit=unit, mininterval=0.5 if sys.stderr.isatty() else 30, **options)


class _PastTheBar(logging.Handler):
    """Writes above a progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError, ValueError):  # a terminal that is gone, a file on a full disk: nowhere to tell it
            tqdm.write(self.format(record), file=sys.stderr)


class _LogFile(logging.Handler):
    """Appends lines to a file. One that the disk refuses is left out: told once, and each later one is tried."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._told = False

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._append(f"{self.format(record)}\n".encode(errors="backslashreplace"))  # names that are no UTF-8
        except OSError as error:
            if not self._told:
                self._told = True  # first: the warning comes here too
                log.warning("cannot write %s: %s; the run goes on, and each later line is tried", self._path,
                            error.strerror or error)

    def _append(self, line: bytes) -> None:
        with self._path.open("ab", buffering=0) as file:
            begin = file.tell()
            try:
                while line:
                    line = line[file.write(line):]
            except OSError:
                with suppress(OSError):
                    file.truncate(begin)  # no half line
                raise


def start(rank: int, file: Path | None = None) -> None:
    """Send `log` to the terminal and, on rank 0, to `file` as well."""
    line = "%(asctime)s %(message)s" if rank == 0 else f"%(asctime)s [rank {rank}] %(message)s"
    terminal = _PastTheBar()
    terminal.setFormatter(logging.Formatter(line, datefmt="%H:%M:%S"))
    handlers: list[logging.Handler] = [terminal]
    if file is not None and rank == 0:
        handlers.append(_LogFile(file))
        handlers[-1].setFormatter(logging.Formatter(line, datefmt="%Y-%m-%d %H:%M:%S"))  # a run may take weeks
    for old in log.handlers:
        old.close()
    log.handlers[:] = handlers
    log.propagate = False
    log.setLevel(logging.INFO if rank == 0 else logging.WARNING)
