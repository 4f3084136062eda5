"""Shows where a run stands, in one line that moves, from what its last start has written.

    python tools/follow_run.py runs/a

It ends by Ctrl-C, or when the program that started it is gone.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from vir import cli
from vir.errors import VirError
from vir.log import shows_bars
from vir.reports.metrics import read_metrics
from vir.reports.progress import Progress
from vir.run_folder import METRICS

_POLL_S = 0.5


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder, maybe of a run that has not begun yet")
    run = parser.parse_args(argv).run
    parent = os.getppid()
    progress = Progress(sys.stderr, moves=shows_bars())
    try:
        try:
            with cli.interruptible():
                while os.getppid() == parent:
                    _show(run, progress)
                    time.sleep(_POLL_S)
        except cli.Interrupted:
            _show(run, progress)  # what came since the last look
    except VirError as error:
        return cli.tell(error, "follow_run")
    finally:
        progress.close()
    return 0


def _show(run: Path, progress: Progress) -> None:
    """What the processes before the last start have written is none of its pace."""
    if (run / METRICS).is_file():
        events = read_metrics(run)
        last = max((at for at, event in enumerate(events) if event["kind"] == "start"), default=0)
        progress.show(events[last:])


if __name__ == "__main__":
    sys.exit(main())
