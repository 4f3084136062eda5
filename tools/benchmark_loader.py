"""Images per second of the loader by augmentation, decoder, source and latency of a read, beside other loaders.

    python tools/benchmark_loader.py --folder /data --json loader.json

Writes an image folder of 2,000 JPEGs of 71 KB and its shards; they stay in the system's memory, so --latency alone
tells what a disk would add. The folder is left as it was. Prints a Markdown table.
"""

import argparse
import shlex
import sys
from pathlib import Path

from vir import cli
from vir.errors import VirError


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)

    from vir.benchmarks import loader

    command = f"python tools/benchmark_loader.py {shlex.join(sys.argv[1:] if argv is None else argv)}"
    try:
        print(loader.benchmark(loader.Settings(**vars(args)), command))
    except VirError as error:
        return cli.tell(error, "error")
    return 0


def counts(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def milliseconds(text: str) -> list[float]:
    return [float(word) for word in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(), help="where to write (default: this one)")
    parser.add_argument("--images", type=int, default=2_000, help="default 2,000")
    parser.add_argument("--image_bytes", type=int, default=71_000, help="of each file, at least (default 71,000)")
    parser.add_argument("--workers", type=counts, default=[1, 2], metavar="N,...",
                        help="loader processes (default 1,2)")
    parser.add_argument("--latency", type=milliseconds, default=[0, 2, 20], metavar="MS,...",
                        help="added to each read (default 0,2,20)")
    parser.add_argument("--rounds", type=int, default=3, help="default 3")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the numbers go")
    return parser


if __name__ == "__main__":
    sys.exit(main())
