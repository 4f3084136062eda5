"""What our training loop costs beside bare DeepSpeed and bare PyTorch, what checkpoints cost, and what the EMA weighs.

    python tools/benchmark_training.py --data data/digits-shards --ema --json training.json
    python tools/benchmark_training.py --data SHARDS --model vir_small_patch16_224 --ranks 1 2 4 \\
        --steps 20 --log_every 5 -- --train.global_batch_size 16 --train.micro_batch_size 16

Ours is `deepspeed --module vir.train` with vir/recipes/quickstart.yaml, mixup and cutmix on, and what follows `--`. The
peers are the loop of DeepSpeed's tutorial (vir/benchmarks/peer.py), with the same ZeRO settings, and that of PyTorch's
(vir/benchmarks/peer_torch.py: DistributedDataParallel under torchrun), with the same model, batches, ranks and threads,
on one batch that lies in memory. All take turns; prints Markdown tables.
"""

import argparse
import sys
from pathlib import Path

from vir.benchmarks import program


def main(argv: list[str] | None = None) -> int:
    return program.run("benchmark_training.py", _parser(), argv, _measure)


def _measure(args: argparse.Namespace, command: str) -> str:
    from vir.benchmarks import training

    return training.benchmark(training.Settings(**vars(args)), command)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="SHARDS", help="folder with train and val shards")
    parser.add_argument("--model", metavar="NAME", help="timm's name, at its own size (default: the recipe's model)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2], metavar="N",
                        help="processes, each with one thread (default 2); of several numbers each is measured, with "
                             "as large a batch per rank as on the first")
    parser.add_argument("--deepspeed_config", default="zero2_fp32", metavar="FILE",
                        help="DeepSpeed JSON of ours and of bare DeepSpeed; bare PyTorch has its precision "
                             "(default zero2_fp32)")
    parser.add_argument("--steps", type=int, default=60, help="of each loop and turn (default 60)")
    parser.add_argument("--log_every", type=int, default=10, metavar="STEPS",
                        help="of a timed interval; the first one warms up (default 10)")
    parser.add_argument("--repeats", type=int, default=10, help="turns of all loops (default 10)")
    parser.add_argument("--loading", action="store_true",
                        help="also bare PyTorch that reads the shards by torch's DataLoader, with timm's transforms "
                             "and as many loader processes")
    parser.add_argument("--adam", choices=("deepspeed", "torch"), default="deepspeed",
                        help="bare DeepSpeed's AdamW: DeepSpeed's fused one, which a DeepSpeed config gets, or "
                             "PyTorch's, which ours is (default deepspeed)")
    parser.add_argument("--ema", nargs="*", metavar="FILE",
                        help="also measure the EMA on each rank, under these DeepSpeed JSONs (default: one of each "
                             "ZeRO stage)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the raw numbers go")
    parser.add_argument("options", nargs="*", metavar="-- OPTIONS", help="further options of vir.train")
    return parser


if __name__ == "__main__":
    sys.exit(main())
