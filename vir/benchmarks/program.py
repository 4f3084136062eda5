"""What the programs tools/benchmark_*.py have in common."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from vir import cli
from vir.errors import DataError, VirError


def run(tool: str, parser: argparse.ArgumentParser, argv: list[str] | None,
        measure: Callable[[argparse.Namespace, str], str]) -> int:
    """Read the flags, measure, print what came out; the exit code.

    Args:
        tool: its file in tools/.
        measure: from the flags, and the command that repeats it, to a text. What it needs it imports itself: --help
            and a wrong flag are answered before.
    """
    args = parser.parse_args(argv)
    try:
        with cli.interruptible():
            print(measure(args, f"python tools/{tool} {shlex.join(sys.argv[1:] if argv is None else argv)}"))
    except cli.Interrupted as end:
        print(f"{tool}: interrupted", file=sys.stderr)
        return end.exit_code
    except VirError as error:
        return cli.tell(error, "error")
    return 0


def check_folder(folder: Path) -> None:
    """Raises DataError where the folder to write in is none: to ask before long work."""
    if not folder.is_dir():
        raise DataError(f"--folder {folder} is no folder; make it, or name another")
