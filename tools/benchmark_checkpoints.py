"""What a checkpoint costs that is written beside training: a step that it holds, the steps beside it, a whole run.

    python tools/benchmark_checkpoints.py --folder /data --json checkpoints.json

stall: for how long the end of a step is held, beside a copy of the same state of the rank into memory that was
allocated before; how long until the checkpoint is published, beside a write and fsync of as many bytes; both also in
the synchronous way, and by torch.distributed.checkpoint.async_save of the same state. writing: a step beside writing,
and one without; each rank should have a core to spare. throughput: 20 steps with a checkpoint, in both ways, and
without. All take turns in the same processes on CPU, of one thread each, with batches that lie in memory. Prints a
Markdown table.
"""

import argparse
import sys
from pathlib import Path

from vir.benchmarks import program


def main(argv: list[str] | None = None) -> int:
    return program.run("benchmark_checkpoints.py", _parser(), argv, _measure)


def _measure(args: argparse.Namespace, command: str) -> str:
    from vir.benchmarks import checkpoints

    return checkpoints.benchmark(checkpoints.Settings(**vars(args)), command)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(), help="on the disk to write to (default: this one)")
    parts = ("stall", "writing", "throughput")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts, help="default: all")
    configs = ("zero0_fp32", "zero2_fp32", "zero3_fp32", "zero2_bf16")
    parser.add_argument("--deepspeed_configs", nargs="+", default=configs, metavar="FILE",
                        help=f"of stall, each in a launch of its own (default {' '.join(configs)}, without those in "
                             "which the processor is slow)")
    parser.add_argument("--ranks", type=int, default=2, help="processes (default %(default)s)")
    parser.add_argument("--writing_ranks", type=int, default=1, metavar="RANKS",
                        help="of writing: at most half as many as cores (default %(default)s)")
    parser.add_argument("--turns", type=int, default=8, help="of stall and writing (default %(default)s)")
    parser.add_argument("--written", type=int, default=2, metavar="TURNS",
                        help="of stall, in which all is written (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of throughput (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="at the smallest size, whose times say nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the raw numbers go")
    return parser


if __name__ == "__main__":
    sys.exit(main())
