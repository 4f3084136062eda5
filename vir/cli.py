"""From an error to a line and an exit code: the same for every entry module and tool."""

from __future__ import annotations

import os
import sys

from vir.errors import VirError


def local_rank() -> int:
    """This process's number on its machine, as the launcher says; 0 without a launcher."""
    return int(os.environ.get("LOCAL_RANK") or 0)


def tell(error: VirError, program: str, every_rank: bool = True) -> int:
    """Print the error without a traceback and return its exit code.

    Args:
        program: the first word of the line.
        every_rank: False where all ranks have met the error: then only the first rank of each machine prints it.
    """
    if every_rank or local_rank() == 0:
        print(f"{program}: {error}", file=sys.stderr)
    return error.exit_code
