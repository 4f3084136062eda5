"""Plans of ViRs from 22 million to ten billion parameters on 8 to 1,024 GPUs, each made and timed by vir-plan.

    python tools/benchmark_planning.py --json docs/results/DAY-planning.json --picture docs/planning.png

Prints a Markdown table with the command of each row. Nothing is trained and no GPU is needed.
"""

import argparse
import sys
from pathlib import Path

from vir.benchmarks import program


def main(argv: list[str] | None = None) -> int:
    return program.run("benchmark_planning.py", _parser(), argv, _measure)


def _measure(args: argparse.Namespace, command: str) -> str:
    from vir.benchmarks import planning

    return planning.benchmark(planning.Settings(**vars(args)), command)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", default="h100-80gb", help="as vir-plan takes it (default %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the numbers go")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="where they are drawn")
    return parser


if __name__ == "__main__":
    sys.exit(main())
