"""Speed and memory of ViR beside timm's ViT, or of the retention operator beside scaled_dot_product_attention.

    python tools/benchmark_model.py model --model vir_small_patch16_224 --sizes 224 512 1024 --output benchmarks
    python tools/benchmark_model.py operator --sizes 197 1025 4097 --dtypes fp32 bf16 --output benchmarks
    python tools/benchmark_model.py model --rows vit auto stream --passes forward --batch-size 1 --rounds 0 \\
        --sizes 224 512 1024 2048 4096 --output benchmarks        # memory against resolution

Prints a table; with --output also writes KIND.md, KIND.json (the raw numbers) and KIND.png.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from vir.benchmarks import program
from vir.config import PRECISIONS


def main(argv: list[str] | None = None) -> int:
    return program.run("benchmark_model.py", _parser(), argv, _measure)


def _measure(args: argparse.Namespace, command: str) -> str:
    from vir.benchmarks import model

    return model.benchmark(model.Settings(**vars(args)), command).removesuffix("\n")


def _model_args(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("operator", "model"))
    parser.add_argument("--sizes", type=int, nargs="+", metavar="N",
                        help="tokens (default 197 577 1025 4097; a square and 1 has 2-D rows too), "
                             "or pixels of an image side (default 224 512 1024)")
    parser.add_argument("--rows", nargs="+", metavar="ROW",
                        help="model: vit, auto, parallel, chunkwise, recurrent, 'free mixer' (retention that returns "
                             "v), stream; operator: sdpa, auto, parallel, chunkwise, recurrent, '2-D auto', …, and "
                             "on GPUs fused, fla, '2-D fused'; default: all but recurrent")
    parser.add_argument("--dtypes", nargs="+", choices=PRECISIONS, default=["fp32", "bf16"],
                        help="of weights and inputs (default fp32 bf16)")
    parser.add_argument("--passes", nargs="+", choices=("forward", "training"), default=["forward", "training"],
                        help="training is forward and backward (default both)")
    parser.add_argument("--batch-size", type=int, metavar="B", help="default: about 3,000 tokens in all")
    parser.add_argument("--model", default="vir_small_patch16_224", help="default vir_small_patch16_224")
    parser.add_argument("--model-args", type=_model_args, default={}, metavar="JSON",
                        help="further arguments for timm.create_model, for peers too, e.g. '{\"depth\": 2}'")
    parser.add_argument("--heads", type=int, default=6, help="of the operator (default 6)")
    parser.add_argument("--width", type=int, default=64, help="channels of a head of the operator (default 64)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's own)")
    parser.add_argument("--rounds", type=int, default=10, help="timed runs of each row; 0: the first one is timed "
                                                               "(default 10)")
    parser.add_argument("--seconds", type=float, default=10, help="begin no further round after so long (default 10)")
    parser.add_argument("--row-seconds", type=float, default=60, metavar="S",
                        help="leave a row out at larger sizes when a run took longer (default 60)")
    parser.add_argument("--memory-gib", type=float, default=8, metavar="GIB",
                        help="a CPU run that needs more ends as 'out of memory' (default 8)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for KIND.md, KIND.json and KIND.png")
    return parser


if __name__ == "__main__":
    sys.exit(main())
