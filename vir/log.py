"""One logger for a run: rank 0 writes to the terminal and to a file, other ranks only warn."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from tqdm import tqdm

log = logging.getLogger("vir")


def shows_bars() -> bool:
    """Whether standard error is a terminal with a width; that of a container may have none, and show no bar."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (OSError, ValueError):  # no terminal
        return False


class _PastTheBar(logging.Handler):
    """Writes above a progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def start(rank: int, file: Path | None = None) -> None:
    """Send `log` to the terminal and, on rank 0, to `file` as well."""
    layout = logging.Formatter("%(asctime)s %(message)s" if rank == 0 else f"%(asctime)s [rank {rank}] %(message)s",
                               datefmt="%H:%M:%S")
    handlers: list[logging.Handler] = [_PastTheBar()]
    if file is not None and rank == 0:
        handlers.append(logging.FileHandler(file))
    for handler in handlers:
        handler.setFormatter(layout)
    for old in log.handlers:
        old.close()
    log.handlers[:] = handlers
    log.propagate = False
    log.setLevel(logging.INFO if rank == 0 else logging.WARNING)
