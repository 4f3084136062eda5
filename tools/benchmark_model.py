"""Speed and memory of ViR beside timm's ViT, or of the retention operator beside scaled_dot_product_attention.

    python tools/benchmark_model.py model --model vir_small_patch16_224 --sizes 224 512 1024 --output benchmarks
    python tools/benchmark_model.py operator --sizes 197 1025 4097 --dtypes fp32 bf16 --output benchmarks
    python tools/benchmark_model.py model --rows vit auto stream --passes forward --batch-size 1 --rounds 0 \\
        --sizes 224 512 1024 2048 4096 --output benchmarks        # memory against resolution

Prints a table; with --output also writes KIND.md, KIND.json (the raw numbers) and KIND.png.
"""

import argparse
import dataclasses
import json
import shlex
import sys
from pathlib import Path

from vir.errors import DataError, SettingsError, VirError


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        print(benchmark(args, sys.argv[1:] if argv is None else argv), end="")
    except VirError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def benchmark(args: argparse.Namespace, argv: list[str]) -> str:
    """Measure as the command line says; returns the table."""
    import torch

    from vir.benchmarks import model as b

    known = b.OPERATOR_ROWS if args.kind == "operator" else b.MODEL_ROWS
    rows = args.rows or [row for row in known if not row.endswith("recurrent")]
    if unknown := [row for row in rows if row not in known]:
        raise SettingsError(f"--rows has {unknown[0]!r}; choose from {', '.join(known)}")
    if bad := [size for size in args.sizes or [] if size < 1]:
        raise SettingsError(f"--sizes has {bad[0]}; a size is at least 1")
    device = b.check_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    limits = b.Limits(rounds=args.rounds, seconds=args.seconds, row_seconds=args.row_seconds,
                      memory_gib=args.memory_gib)
    results = []
    for dtype in args.dtypes:
        for direction in args.passes:
            common = (rows, dtype, direction, args.batch_size)
            if args.kind == "operator":
                sizes = args.sizes or [197, 577, 1025, 4097]
                found = b.operator(sizes, *common, args.heads, args.width, device, limits)
            else:
                sizes = args.sizes or [224, 512, 1024]
                found = b.model(args.model, sizes, *common, args.model_args, device, limits)
            for result in found:
                results.append(result)
                print(f"{result.size} {dtype} {direction} {result.row}: "
                      f"{result.failed or f'{result.ms:.4g} ms'}", file=sys.stderr, flush=True)

    title = f"{args.model if args.kind == 'model' else f'{args.heads} heads of {args.width}'} on {b.machine(device)}"
    command = f"python tools/benchmark_model.py {shlex.join(argv)}"
    text = f"{title}\n\n`{command}`\n\n" + b.table(results, "vit" if args.kind == "model" else "sdpa")
    if args.output:
        try:
            args.output.mkdir(parents=True, exist_ok=True)
            (args.output / f"{args.kind}.md").write_text(text)
            raw = dict(title=title, command=command, results=[dataclasses.asdict(r) for r in results])
            (args.output / f"{args.kind}.json").write_text(json.dumps(raw, indent=1))
            unit = "pixels of an image side" if args.kind == "model" else "tokens"
            b.plot(results, args.output / f"{args.kind}.png", unit, title)
        except OSError as error:
            raise DataError(f"cannot write to --output {args.output}: {error.strerror}; choose another "
                            f"folder") from error
    return text


def _model_args(text: str) -> dict:
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
                             "v), stream; operator: sdpa, auto, parallel, chunkwise, recurrent, '2-D auto', …; "
                             "default: all but recurrent")
    parser.add_argument("--dtypes", nargs="+", choices=("fp32", "bf16", "fp16"), default=["fp32", "bf16"],
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
