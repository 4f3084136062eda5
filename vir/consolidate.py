"""Turn a ZeRO checkpoint into a portable weights file.

    vir-consolidate runs/a --output vir_small.safetensors --ema
    vir-consolidate runs/a --which best --output vir_best.safetensors
    vir-consolidate runs/a --output big.safetensors --dtype bf16 --max-shard-size 2GB

Needs no GPU, no DeepSpeed, not the world that trained it, and memory for a piece of a tensor. The file loads with
vir.models.load and with timm. A large model becomes several, big-00001-of-00003.safetensors and so on, with the index
big.safetensors.index.json.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vir import cli
from vir.config import PRECISIONS, parse_bytes
from vir.errors import VirError


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="vir-consolidate", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="RUN|CHECKPOINT",
                        help="a run folder, one checkpoint folder, or RUN/checkpoints/best")
    parser.add_argument("--which", default="latest", metavar="latest|best|STEP",
                        help="checkpoint of the run folder: the newest complete one (default), the one with the best "
                             "validation accuracy, or that of a step, such as 1000")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.safetensors", help="the file to write")
    parser.add_argument("--ema", action="store_true", help="take the average of weights instead of the last ones")
    parser.add_argument("--dtype", choices=PRECISIONS, default="fp32", help="of the tensors in the file")
    parser.add_argument("--max-shard-size", default="5GB", metavar="BYTES",
                        help="more than this becomes several files with an index (default 5GB)")
    parser.add_argument("--force", action="store_true", help="replace what is there under this name")
    args = parser.parse_args(argv)

    try:
        limit = parse_bytes(args.max_shard_size, "--max-shard-size")

        from vir.checkpoints.consolidate import consolidate
        from vir.weights.tensor_files import existing

        with cli.interruptible():
            metadata = consolidate(args.source, args.output, which=args.which, ema=args.ema, dtype=args.dtype,
                                   max_shard_bytes=limit, force=args.force)
    except VirError as error:
        return cli.tell(error, "vir-consolidate")
    except cli.Interrupted as end:
        print(f"vir-consolidate: interrupted before {args.output} was whole", file=sys.stderr)
        return end.exit_code
    first, *others = existing(args.output)  # the file, or the index and its files
    print(f"{first}: {metadata.model.name}, {'EMA' if metadata.ema else 'raw'} weights of step {metadata.step} "
          f"in {metadata.dtype}, {sum(path.stat().st_size for path in others or [first]) / 1e6:.1f} MB"
          f"{f' in {len(others)} files' if others else ''}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
