"""Converts an ImageNet folder into WebDataset shards with an index.

    vir-convert --source imagenet --split train --output shards --workers 8
    vir-convert --source imagenet --split val --output shards --workers 8

The first command reads imagenet/train/<class>/<image>. It writes shards/train/imagenet1k-train-000000.tar ... with
index.npy and manifest.json beside them.
"""

import argparse
import signal
import sys
from pathlib import Path

from vir import cli
from vir.data.convert import CHECKS, ON_ERROR, Stopped, convert
from vir.data.sources.folder import read_class_list
from vir.errors import VirError


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    received: list[signal.Signals] = []
    handlers = {number: signal.signal(number, lambda number, frame: received.append(signal.Signals(number)))
                for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        summary = convert(args.source, args.split, args.output, name=args.name, workers=args.workers,
                          samples_per_shard=args.samples_per_shard, seed=args.seed, on_error=args.on_error,
                          check=args.check, classes=read_class_list(args.classes) if args.classes else None,
                          stopping=lambda: bool(received))
    except VirError as error:
        return cli.tell(error, "vir-convert")
    except Stopped:
        print(f"stopped by {received[0].name}; what was written is removed", file=sys.stderr)
        return 128 + received[0]
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    print(summary)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vir-convert", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--source", type=Path, required=True, help="ImageNet folder: SOURCE/SPLIT/<class>/<image>; JPEG, PNG or WebP")
    add("--split", required=True, help="folder in SOURCE to convert, and folder in OUTPUT to write: train, val, ...")
    add("--output", type=Path, required=True, help="where the split folder will appear, once it is whole")
    add("--workers", type=int, default=8, help="processes (default 8); the shards' bytes do not depend on it")
    add("--name", default="imagenet1k", help="first part of the shards' names (default imagenet1k)")
    add("--samples-per-shard", type=int, default=1000, help="at most, spread evenly (default 1000: about 110 MB)")
    add("--seed", type=int, default=0, help="of the shuffle over the whole split (default 0)")
    add("--on-error", choices=ON_ERROR, default="fail",
        help="a file that is no whole image stops the conversion (fail, default) or is left out and listed (skip)")
    add("--check", choices=CHECKS, default="header",
        help="header (default): parse headers, decode what looks truncated; decode: decode every image")
    add("--classes", type=Path, help="file with the class names, one a line, in label order (default: as in the splits "
                                     "already in OUTPUT, else the folders of SOURCE/train, else those of the split)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
