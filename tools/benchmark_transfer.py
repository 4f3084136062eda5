"""Accuracy with what was learned before, beside the same training without it: fine-tuning, a linear probe, a teacher.

    apt-get install dataset-fashion-mnist
    python tools/make_demo_dataset.py --output data/digits
    python tools/make_demo_dataset.py --dataset fashion-mnist --output data/fashion
    python tools/benchmark_transfer.py --digits data/digits --fashion data/fashion --json transfer.json

Each training is `python -m vir.train` with vir/recipes/quickstart.yaml. Prints a Markdown table.
"""

import argparse
import sys
from pathlib import Path

from vir.benchmarks import program


def main(argv: list[str] | None = None) -> int:
    return program.run("benchmark_transfer.py", _parser(), argv, _measure)


def _measure(args: argparse.Namespace, command: str) -> str:
    from vir.benchmarks import transfer

    return transfer.benchmark(transfer.Settings(**vars(args)), command)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, title in (("digits", "where training begins"), ("fashion", "what is learned then")):
        parser.add_argument(f"--{name}", type=Path, required=True, metavar="FOLDER",
                            help=f"{title}: folder with train and val, of make_demo_dataset.py")
    parser.add_argument("--folder", type=Path, default=Path(), help="where to write, and remove (default: this one)")
    parser.add_argument("--parts", nargs="+", choices=("all", "few", "distilled"), default=(),
                        help="what to measure: training on all images, on 20 of each class, with a teacher (default: "
                             "all three)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each row (default 3)")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the steps to be done (default 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the numbers go")
    return parser


if __name__ == "__main__":
    sys.exit(main())
