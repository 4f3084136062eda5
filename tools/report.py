"""Make a page of one or several runs, which any browser opens without a server or a network.

    python tools/report.py runs/a --output a.html --watch
    python tools/report.py runs/a runs/b --evaluation b.json b-classes.csv --output compare.html

With --watch it is written anew as the runs go on, and loads itself again in the browser, until all of them are done.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from vir import cli, explain
from vir.errors import SettingsError, VirError
from vir.output_folder import check_file


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.html")
    parser.add_argument("--evaluation", type=Path, nargs="+", default=[], metavar="FILE",
                        help="of vir-evaluate: --json, --per-class; those in the run folders are found without it")
    parser.add_argument("--watch", type=float, nargs="?", const=10.0, metavar="SECONDS", help="look so often (10)")
    args = parser.parse_args(argv)

    from vir.reports import run_page

    what = args.runs, args.evaluation, args.output
    try:
        if args.watch is not None and not (0.1 <= args.watch < math.inf):
            raise SettingsError(f"--watch is {args.watch}; it must be at least 0.1 seconds")
        if missing := [str(path) for path in args.evaluation if not path.is_file()]:
            raise SettingsError(f"--evaluation {missing[0]}: there is no such file; give one that vir-evaluate has "
                                "written as --json or --per-class")
        check_file("--output", args.output)
        try:
            with cli.interruptible():
                if args.watch is None:
                    run_page.write(*what, _explained)
                else:
                    run_page.watch(*what, _explained, args.watch)
        except cli.Interrupted as interrupted:
            if args.watch is not None:
                run_page.write(*what, _explained)  # no longer one that waits for another
            return interrupted.exit_code
    except VirError as error:
        return cli.tell(error, "report")
    print(args.output)
    return 0


def _explained(run: Path) -> tuple[list[dict[str, Any]], str]:
    told, beside = io.StringIO(), io.StringIO()
    with redirect_stdout(told), redirect_stderr(beside):
        explain.main([str(run), "--spikes", "--json"])
    return json.loads(told.getvalue() or "[]"), beside.getvalue().strip()


if __name__ == "__main__":
    sys.exit(main())
