"""From an error to a line and an exit code: the same for every entry module and tool."""

from __future__ import annotations

import multiprocessing
import os
import sys
from typing import NoReturn

from vir.errors import VirError
from vir.launcher import local_rank


def tell(error: VirError, program: str, every_rank: bool = True) -> int:
    """Print the error without a traceback and return its exit code.

    Args:
        program: the first word of the line.
        every_rank: False where all ranks have met the error: then only the first rank of each machine prints it.
    """
    if every_rank or local_rank() == 0:
        print(f"{program}: {error}", file=sys.stderr)
    return error.exit_code


def end_now(exit_code: int) -> NoReturn:
    """End this process without waiting for its threads, for its children or for other ranks."""
    for child in multiprocessing.active_children():
        child.kill()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # a pipe that nobody reads, a disk that is full
            pass
    os._exit(exit_code)
