"""Images per second of vir-evaluate beside a loop like that of timm's validate.py, on the same images and weights.

    python tools/benchmark_evaluation.py --folder /data --json evaluation.json

Writes JPEGs of 110 KB, their shards and weights files of random weights in a folder of its own, which it removes.
Prints a Markdown table.
"""

import argparse
import sys
from pathlib import Path

from vir.benchmarks import program


def main(argv: list[str] | None = None) -> int:
    return program.run("benchmark_evaluation.py", _parser(), argv, _measure)


def _measure(args: argparse.Namespace, command: str) -> str:
    from vir.benchmarks import evaluation

    return evaluation.benchmark(evaluation.Settings(**vars(args)), command)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(), help="where to write (default: this one)")
    parser.add_argument("--models", type=lambda text: text.split(","), default=["test_vit", "vir_small_patch16_224"],
                        metavar="NAME,...", help="as timm knows them (default test_vit,vir_small_patch16_224)")
    parser.add_argument("--images", type=int, default=384, help="default 384")
    parser.add_argument("--image_bytes", type=int, default=110_000, help="of each file, at least (default 110,000)")
    parser.add_argument("--workers", type=int, default=1, help="loader processes (default 1)")
    parser.add_argument("--batch_size", type=int, default=64, help="default 64")
    parser.add_argument("--rounds", type=int, default=3, help="default 3")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the numbers go")
    return parser


if __name__ == "__main__":
    sys.exit(main())
