"""How often a shard is downloaded in an epoch, measured on one node and simulated for up to 128.

    python tools/benchmark_traffic.py --folder /data --json traffic.json

Writes shards of 6,000 files of 110 KB, serves them on this machine and counts what is sent while loader processes read
an epoch of them. The folder needs about three times their space and is left as it was. Prints a Markdown table.
"""

import argparse
import sys
from pathlib import Path

from vir.benchmarks import program


def main(argv: list[str] | None = None) -> int:
    return program.run("benchmark_traffic.py", _parser(), argv, _measure)


def _measure(args: argparse.Namespace, command: str) -> str:
    from vir.benchmarks import traffic

    return traffic.benchmark(traffic.Settings(**vars(args)), command)


def counts(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(), help="where to write (default: this one)")
    parser.add_argument("--images", type=int, default=6_000, help="default 6,000")
    parser.add_argument("--image_bytes", type=int, default=110_000, help="of each file (default 110,000)")
    parser.add_argument("--samples_per_shard", type=int, default=50, help="default 50")
    parser.add_argument("--step_ms", type=float, default=300.0, help="of a batch of 48, at least (default 300)")
    parser.add_argument("--nodes", type=counts, default=[1, 2, 3, 4, 8, 16, 24, 32, 64, 128], metavar="N,...",
                        help="simulated (default 1,2,3,4,8,16,24,32,64,128)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the numbers go")
    return parser


if __name__ == "__main__":
    sys.exit(main())
