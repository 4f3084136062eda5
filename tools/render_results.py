"""Make the tables of pages anew from the files in docs/results/, or check that they are what those files give.

    python tools/render_results.py              # writes docs/benchmarks.md and docs/planning.md
    python tools/render_results.py --check      # writes nothing; ends with 1 where a table differs
"""

import argparse
import sys
from pathlib import Path

from vir import cli
from vir.errors import VirError

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGES = [DOCS / "benchmarks.md", DOCS / "planning.md"]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", type=Path, nargs="*", default=PAGES, metavar="PAGE",
                        help="Markdown files (default docs/benchmarks.md and docs/planning.md)")
    parser.add_argument("--check", action="store_true", help="write nothing; end with 1 where a table differs")
    args = parser.parse_args(argv)

    from vir.benchmarks.tables import stale_files, write_tables

    stale = []
    try:
        for page in args.pages:
            if args.check:
                stale += [(page, file) for file in stale_files(page)]
            else:
                write_tables(page)
    except VirError as error:
        return cli.tell(error, "error")
    for page, file in stale:
        print(f"{page}: the table of {file} is not what the file gives; run python tools/render_results.py",
              file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
