"""Shows where a run stands, in one line that moves, until Ctrl-C or until the program that started this one is gone.

    python tools/follow_run.py runs/a
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
    began, parent = time.time(), os.getppid()
    progress = Progress(sys.stderr, moves=shows_bars())
    try:
        with cli.interruptible():
            while os.getppid() == parent:
                _show(run, began, progress)
                time.sleep(_POLL_S)
    except cli.Interrupted:
        _show(run, began, progress)  # what came since the last look
    except VirError as error:
        return cli.tell(error, "follow_run")
    finally:
        progress.close()
    return 0


def _show(run: Path, began: float, progress: Progress) -> None:
    """What an earlier start of the run has written is none of this one's pace."""
    if (run / METRICS).is_file():
        progress.show([event for event in read_metrics(run) if event.get("time", 0) >= began])


if __name__ == "__main__":
    sys.exit(main())
