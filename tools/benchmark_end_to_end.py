"""Our engine beside timm's own training script, from the same shards: rate, first step, memory, waiting for data.

    git clone --depth 1 --branch v1.0.31 https://github.com/huggingface/pytorch-image-models timm-source
    python tools/benchmark_end_to_end.py --timm_script timm-source/train.py --folder /data --json end_to_end.json

train.py is no part of the timm that pip installs: clone it at the tag of the version that is installed, v1.0.31 above
(`pip show timm`). It is started with the timm that is installed, under torchrun, as ours is; on CPU with device_ids
left out of DistributedDataParallel, which the script gives and PyTorch refuses there.

Writes JPEGs of 500 x 375 pixels and 71 KB and their shards in a folder of its own, which it removes. A ViR is trained
by our engine alone, every other model by both, in turns; with RandAugment, erasing, mixup, CutMix, smoothing, AdamW, a
cosine, clipping, no EMA. Steps are timed from one line of the log to the next, memory is watched before the timed ones:
that of all processes, pages of several counted once, without files. Prints a Markdown table.
"""

import argparse
import sys
from pathlib import Path

from vir.benchmarks import program

_MODELS = "vir_small_patch16_224,vit_small_patch16_224,resnet50"


def main(argv: list[str] | None = None) -> int:
    return program.run("benchmark_end_to_end.py", _parser(), argv, _measure)


def _measure(args: argparse.Namespace, command: str) -> str:
    from vir.benchmarks import end_to_end

    return end_to_end.benchmark(end_to_end.Settings(**vars(args)), command)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timm_script", type=Path, required=True, metavar="PATH", help="train.py of timm's repository")
    parser.add_argument("--folder", type=Path, default=Path(), help="where to write (default: this one)")
    parser.add_argument("--models", type=lambda text: text.split(","), default=_MODELS.split(","), metavar="NAME,...",
                        help=f"as timm knows them, at their own size (default {_MODELS})")
    parser.add_argument("--ranks", type=int, default=2, help="processes, each with one thread on CPU (default 2)")
    parser.add_argument("--workers", type=int, default=1, help="loader processes of each rank (default 1)")
    parser.add_argument("--batch", type=int, default=8, help="images of a rank's step (default 8)")
    parser.add_argument("--steps", type=int, default=12, help="of each run (default 12)")
    parser.add_argument("--warmup", type=int, default=3, help="steps that are not timed (default 3)")
    parser.add_argument("--images", type=int, default=2_000, help="default 2,000")
    parser.add_argument("--image_bytes", type=int, default=71_000, help="of each file, about (default 71,000)")
    parser.add_argument("--deepspeed_config", default="zero0_fp32", metavar="FILE",
                        help="of ours; of bf16 or fp16, timm's script computes under autocast (default zero0_fp32)")
    parser.add_argument("--repeats", type=int, default=3, help="turns of all sides (default 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the raw numbers go")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="a picture of the figures")
    return parser


if __name__ == "__main__":
    sys.exit(main())
