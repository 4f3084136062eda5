"""How long vir-consolidate takes, and how much memory, beside DeepSpeed's zero_to_fp32 on the same checkpoints.

    for stage in 2 3; do
      deepspeed --num_accelerators 2 --module vir.train --model.name vir_large_patch16_224 --model.img_size 32 \\
        --data.train SHARDS/train --data.val SHARDS/val --output big/zero$stage --deepspeed_config zero${stage}_bf16 \\
        --train.epochs 0.001 --train.global_batch_size 4 --train.micro_batch_size 2 --ema.decay 0.99
    done
    python tools/benchmark_consolidation.py big/zero2 big/zero3 --folder /data --json consolidation.json

makes two checkpoints of 5.4 GB in one step each, with shards such as those of launch/quickstart.sh, and then the table.
Files are in the page cache and imports do not count. The weights of both are compared bit for bit, and ours are made
once more where the system grants no more than a limit of memory. Prints a Markdown table.
"""

import argparse
import sys
from pathlib import Path

from vir.benchmarks import program


def main(argv: list[str] | None = None) -> int:
    return program.run("benchmark_consolidation.py", _parser(), argv, _measure)


def _measure(args: argparse.Namespace, command: str) -> str:
    from vir.benchmarks import consolidation

    return consolidation.benchmark(consolidation.Settings(**vars(args)), command)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder of ZeRO 1, 2 or 3")
    parser.add_argument("--folder", type=Path, default=Path(), help="on the disk to write to (default: this one)")
    parser.add_argument("--rounds", type=int, default=5, help="default 5")
    parser.add_argument("--limit_mb", type=int, default=2000, help="of the memory of the last row (default 2000)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the numbers go")
    return parser


if __name__ == "__main__":
    sys.exit(main())
