"""Draw loss, accuracy, learning rate and images/s of one or several runs.

    python tools/plot_run.py runs/a runs/b --output compare.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vir import cli
from vir.errors import VirError
from vir.run_folder import CURVES


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders")
    parser.add_argument("--output", type=Path, metavar="FILE.png", help="default: curves.png in the first run folder")
    args = parser.parse_args(argv)

    from vir.reports.curves import plot_runs

    output = args.output or args.runs[0] / CURVES
    try:
        plot_runs(args.runs, output)
    except VirError as error:
        return cli.tell(error, "plot_run")
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
