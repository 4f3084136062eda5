"""How long it takes from a command to the first step of training, new and resumed, beside a bare DeepSpeed script.

    python tools/benchmark_start.py --data data/digits-shards --json start.json

Ours is `deepspeed --module vir.train`; the peer, under the same launcher with the same model, ZeRO settings and ranks,
is vir/benchmarks/peer.py, which imports timm and DeepSpeed, builds the model and does a step on one batch in memory.
They take turns; prints a Markdown table of where the seconds go.
"""

import argparse
import sys
from pathlib import Path

from vir.benchmarks import program


def main(argv: list[str] | None = None) -> int:
    return program.run("benchmark_start.py", _parser(), argv, _measure)


def _measure(args: argparse.Namespace, command: str) -> str:
    from vir.benchmarks import start

    return start.benchmark(start.Settings(**vars(args)), command)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="SHARDS", help="folder with train shards")
    parser.add_argument("--model", default="vir_small_patch16_224", metavar="NAME",
                        help="timm's name (default vir_small_patch16_224)")
    parser.add_argument("--micro_batch_size", type=int, default=2, help="images of a rank's step (default 2)")
    parser.add_argument("--ranks", type=int, default=2, help="processes, each with one thread (default 2)")
    parser.add_argument("--deepspeed_config", default="zero2_fp32", metavar="FILE",
                        help="DeepSpeed JSON of both sides (default zero2_fp32)")
    parser.add_argument("--repeats", type=int, default=5, help="turns (default 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the raw numbers go")
    return parser


if __name__ == "__main__":
    sys.exit(main())
