"""The rate of vir-convert beside `tar cf` and `sha256sum` on the same files, and of vir-verify and vir-index.

    python tools/benchmark_convert.py --folder /data --json convert.json

Writes an image folder of 10,000 JPEGs of 110 KB and works on it in rounds; start-up counts. The folder needs about four
times the space of the images and is left as it was. Prints a Markdown table.
"""

import argparse
import sys
from pathlib import Path

from vir.benchmarks import program


def main(argv: list[str] | None = None) -> int:
    return program.run("benchmark_convert.py", _parser(), argv, _measure)


def _measure(args: argparse.Namespace, command: str) -> str:
    from vir.benchmarks import conversion

    return conversion.benchmark(conversion.Settings(**vars(args)), command)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(), help="on the disk to measure (default: this one)")
    parser.add_argument("--images", type=int, default=10_000, help="default 10,000")
    parser.add_argument("--image_bytes", type=int, default=110_000, help="of each file, at least (default 110,000)")
    parser.add_argument("--workers", type=int, default=2, help="of vir-convert; jobs of the others (default 2)")
    parser.add_argument("--rounds", type=int, default=3, help="default 3")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the numbers go")
    return parser


if __name__ == "__main__":
    sys.exit(main())
