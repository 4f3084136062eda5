"""Turn a ZeRO checkpoint into one portable weights file.

    vir-consolidate runs/a --output vir_small.safetensors --ema
    vir-consolidate runs/a --which best --output vir_best.safetensors

Needs no GPU, no DeepSpeed and not the world that trained it. The file loads with vir.models.load and with timm.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vir import cli
from vir.config import PRECISIONS
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
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    args = parser.parse_args(argv)

    from vir.checkpoints.consolidate import consolidate

    try:
        metadata = consolidate(args.source, args.output, which=args.which, ema=args.ema, dtype=args.dtype,
                               force=args.force)
    except VirError as error:
        return cli.tell(error, "vir-consolidate")
    print(f"{args.output}: {metadata.model.name}, {'EMA' if metadata.ema else 'raw'} weights of step {metadata.step} "
          f"in {metadata.dtype}, {args.output.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
