"""Speed of the loader beside timm's reader of shards, webdataset and torchvision's ImageFolder, on the same images.

    python tools/benchmark_loader.py pixels --folder /data --json pixels.json --plot x.png # decoded and augmented
    python tools/benchmark_loader.py reading --folder /data --json reading.json            # samples read, not decoded
    python tools/benchmark_loader.py latency --folder /data --json latency.json            # by the latency of a read
    python tools/benchmark_loader.py order --json order.json                               # the order of an epoch
    python tools/benchmark_loader.py --diagnose --config vir/recipes/vir_small_in1k.yaml --data.train SHARDS/train

The last one tells what bounds the images per second of a run, and what to change: its flags are those of vir-train, and
--seconds, --loader_only and --json FILE. It leaves nothing behind. Under a launcher each rank measures.

Writes an image folder of 2,000 JPEGs of 500 x 375 pixels and 71 KB and its shards; they stay in the system's memory, so
--latency alone tells what a disk would add. The folder is left as it was. Prints a Markdown table. All rows take turns
in each round; CPU seconds are those of the loader processes and of the one that takes their batches.
"""

import argparse
import shlex
import sys
from pathlib import Path

from vir import cli
from vir.benchmarks import program
from vir.errors import VirError

_KINDS = ("pixels", "reading", "latency", "order")


def main(argv: list[str] | None = None) -> int:
    if "--diagnose" in (words := sys.argv[1:] if argv is None else argv):
        return _diagnose(words)
    return program.run("benchmark_loader.py", _parser(), argv, _measure)


def _measure(args: argparse.Namespace, command: str) -> str:
    from vir.benchmarks import loader

    return loader.benchmark(loader.Settings(**vars(args)), command)


def _diagnose(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, add_help=False, usage="benchmark_loader.py --diagnose [--seconds S] [--loader_only] "
                                                  "[--json FILE] [flags of vir-train]")
    parser.add_argument("--diagnose", action="store_true")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--loader_only", action="store_true")
    parser.add_argument("--json", type=Path)
    args, flags = parser.parse_known_args(words)

    from vir.benchmarks import diagnosis

    try:
        settings = diagnosis.Settings(seconds=args.seconds, loader_only=args.loader_only, json=args.json)
        if said := diagnosis.run(flags, settings, f"python tools/benchmark_loader.py {shlex.join(words)}"):
            print(said)
    except VirError as error:
        return cli.tell(error, "error")
    return 0


def counts(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def milliseconds(text: str) -> list[float]:
    return [float(word) for word in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=_KINDS, nargs="?", default="pixels", help="default pixels")
    parser.add_argument("--folder", type=Path, default=Path(), help="where to write (default: this one)")
    parser.add_argument("--images", type=int, default=2_000, help="default 2,000")
    parser.add_argument("--image_bytes", type=int, default=71_000, help="of each file, at most (default 71,000)")
    parser.add_argument("--workers", type=counts, default=[1, 2], metavar="N,...",
                        help="loader processes (default 1,2)")
    parser.add_argument("--latency", type=milliseconds, default=[0, 2, 20], metavar="MS,...",
                        help="of latency: added to each read (default 0,2,20)")
    parser.add_argument("--samples", type=counts, default=[1_281_167, 14_197_122], metavar="N,...",
                        help="of order: in an epoch (default those of ImageNet-1k and ImageNet-21k)")
    parser.add_argument("--rounds", type=int, default=3, help="default 3")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the numbers go")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="of pixels: a picture of the rates")
    return parser


if __name__ == "__main__":
    sys.exit(main())
