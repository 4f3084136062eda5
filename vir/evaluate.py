"""Evaluate weights files on images, each image once: top-1, top-5, loss, calibration, and what each class is taken for.

    vir-evaluate --weights vir_small.safetensors --data SHARDS/val
    vir-evaluate --weights raw.safetensors ema.safetensors --data SHARDS/val --img-size 384 --json results.json

That is on one device. On several GPUs `accelerate launch -m vir.evaluate` starts it, on CPUs
`torchrun --nproc_per_node N -m vir.evaluate`; the result is the same. No DeepSpeed is needed. Data of other classes is
evaluated on those that it shares with the model by name (ImageNet-A, -R), or by number (ImageNet-V2). Validation images
of ImageNet get their ReaL accuracy too. Exit codes: 0 done, 2 settings, 3 data.
"""

from __future__ import annotations

import argparse
import platform
import re
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from vir import __version__, cli, launcher
from vir.addresses import shown
from vir.config import PRECISIONS, DataConfig, RetentionMode
from vir.errors import DataError, SettingsError, VirError
from vir.evaluation.limits import add_image_flags, add_timeout
from vir.evaluation.outputs import OUTPUTS, check_outputs, json_of, write_outputs
from vir.log import progress_bar

if TYPE_CHECKING:  # --help and a wrong flag are answered before torch is imported
    from vir.data.opening import Places
    from vir.data.reader import Reader
    from vir.evaluation.run import Evaluation


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="vir-evaluate", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, nargs="+", metavar="FILE.safetensors",
                        help="made by vir-consolidate; each names its model itself, several make one table")
    data = parser.add_argument_group("data")
    data.add_argument("--data", required=True, metavar="SHARDS/val", help="images, named as for vir-train: folder of "
                      "shards or of one folder per class, or shards by URL or pattern")
    data.add_argument("--cache", default="", metavar="DIR", help="keep shards from servers in this folder")
    data.add_argument("--cache-bytes", default=DataConfig.cache_bytes, metavar="BYTES",
                      help=f"the most that it may hold (default: {DataConfig.cache_bytes})")
    data.add_argument("--index-dir", default="", metavar="DIR", help="folder for the indexes of shards that have "
                      "none beside them (default: vir-at-scale/indexes in the user's cache folder)")
    add_timeout(data)
    data.add_argument("--workers", type=int, help="loader processes per process (default: what its "
                      "share of the cores allows, at most 16)")
    images = add_image_flags(parser)
    images.add_argument("--hflip-tta", action="store_true",
                        help="mean of the probabilities of each image and its mirror image")
    computing = parser.add_argument_group("computing")
    computing.add_argument("--mode", choices=get_args(RetentionMode), default="auto",
                           help="form of retention (default: auto)")
    computing.add_argument("--compare-modes", action="store_true", help="compute all three forms, and tell the "
                           "accuracy, the speed and the largest logit difference of each")
    computing.add_argument("--dtype", choices=PRECISIONS, default="fp32",
                           help="of weights and activations (default: fp32)")
    computing.add_argument("--batch-size", type=int, default=128, help="images per forward pass and process")
    computing.add_argument("--device", choices=("auto", "cpu"), default="auto",
                           help="auto takes a GPU, and the CPU on a machine without one (default: auto)")
    outputs = parser.add_argument_group("files to write")
    for flag, output in OUTPUTS.items():
        outputs.add_argument(flag, type=Path, metavar=f"FILE{output.endings[0] if output.endings else ''}",
                             help=output.help)
    outputs.add_argument("--force", action="store_true", help="replace files that exist")
    args = parser.parse_args(argv)
    for name in ("batch_size", "workers", "img_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    if args.crop_pct is not None and not 0 < args.crop_pct <= 1:
        parser.error(f"--crop-pct is {args.crop_pct:g}; it must be in (0, 1]")
    if len(args.weights) > 1 and (of_one := _asked_for(args).keys() - {"--json"}):
        flag = sorted(of_one)[0]
        parser.error(f"{flag} is of one weights file, and {len(args.weights)} are given; give one, or leave {flag} out")
    return args


def _asked_for(args: argparse.Namespace) -> dict[str, Path]:
    """The files to write, by flag."""
    given = {flag: getattr(args, flag.removeprefix("--").replace("-", "_")) for flag in OUTPUTS}
    return {flag: path for flag, path in given.items() if path is not None}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = _arguments(argv)
    launcher.tell_of_missing_processes("vir.evaluate")
    if launcher.wants_cpu(args.device):
        launcher.hide_gpus()
    try:
        with cli.interruptible():
            return _evaluate(args, argv)
    except VirError as error:  # every process meets it at the door; later, maybe one alone
        from torch import distributed

        return cli.tell(error, "vir-evaluate", every_rank=distributed.is_initialized())
    except cli.Interrupted as end:
        print("vir-evaluate: interrupted", file=sys.stderr)
        cli.end_now(end.exit_code)  # others, and loaders, may be waited for for ever


def _evaluate(args: argparse.Namespace, argv: list[str]) -> int:
    import torch
    from accelerate import PartialState

    from vir import arithmetic, distributed
    from vir.data import jpeg
    from vir.data.opening import check_agreement
    from vir.distributed import World
    from vir.evaluation.run import How, check_weights, evaluate
    from vir.weights.portable import files_of

    distributed.check_driver()
    jpeg.decoder()  # as the environment asks for it
    kept, is_first = _places(args), launcher.local_rank() == 0
    reader = _open(args.data, kept, first=True) if is_first else None
    arithmetic.set_up()
    # Without an accelerator accelerate joins a launcher's processes only when told that they are to run on CPU.
    state = PartialState(cpu=not torch.accelerator.is_available())
    world = World(rank=state.process_index, size=state.num_processes, device=state.device)
    distributed.share_cores()
    distributed.barrier()
    if reader is None:  # the first process of the machine has made what this one takes
        reader = _open(args.data, kept, first=False)
    check_agreement("--data", reader)
    how = How(mode=args.mode, compare_modes=args.compare_modes, dtype=args.dtype, hflip_tta=args.hflip_tta,
              img_size=args.img_size, crop_pct=args.crop_pct, crop_mode=args.crop_mode, batch_size=args.batch_size,
              workers=args.workers)
    distributed.at_the_door(lambda: check_weights(args.weights, reader, how))
    outputs = _asked_for(args) if world.is_main else {}
    read = [file for weights in args.weights for file in (weights, *files_of(weights))]
    distributed.at_the_door(lambda: check_outputs(outputs, args.force, read))
    evaluations: list[Evaluation] = []
    refused: VirError | None = None
    for weights in args.weights:
        try:
            found = evaluate(weights, reader, how, world, lambda total, title: progress_bar(
                total, "image", desc=title, disable=not world.is_main, dynamic_ncols=True))
        except VirError as error:
            if not evaluations:
                raise
            refused = error  # what is done is not lost
            break
        found.fields.update(data=shown(args.data), versions=_versions(),
                            command=f"vir-evaluate {shlex.join(map(shown, argv))}")
        evaluations.append(found if len(args.weights) == 1 else found.without_records())
        if world.is_main:
            _print(found.fields)
    distributed.stop()
    if world.is_main:
        problem = write_outputs(outputs, evaluations, reader)
        if len(evaluations) > 1:
            _print_table([evaluation.fields for evaluation in evaluations])
        print(json_of(evaluations), flush=True)
        if problem:
            raise DataError(f"{problem}; the last line on stdout is the result")
    if refused is not None:
        raise refused
    return 0


def _places(args: argparse.Namespace) -> Places:
    """Raises SettingsError with the names of this program's flags."""
    from vir.data.opening import places

    try:
        return places(DataConfig(cache=args.cache, cache_bytes=args.cache_bytes, index_dir=args.index_dir,
                                 timeout=args.timeout))
    except SettingsError as error:
        raise SettingsError(re.sub(r"--data\.\w+", lambda flag: flag[0].replace("data.", "").replace("_", "-"),
                                   str(error))) from error


def _open(data: str, kept: Places, *, first: bool) -> Reader:
    from vir.data.opening import open_reader

    try:
        return open_reader(data, kept, first=first)
    except DataError as error:
        raise DataError(f"--data: {error}") from error


def _versions() -> dict[str, str]:
    """Of what decides the numbers, the pixels among them."""
    return {"vir": __version__, **{name: version(name) for name in ("torch", "torchvision", "timm", "pillow")},
            "python": platform.python_version()}


def _print(fields: dict[str, Any]) -> None:
    count = fields["processes"]
    print(f"{fields['model']}{' EMA' if fields['ema'] else ''}, step {fields['step']}, {fields['images']} images, "
          f"{count} process{'' if count == 1 else 'es'}: top-1 {fields['top1']:.2f} %, top-5 {fields['top5']:.2f} %, "
          f"loss {_number(fields['loss'], 4)}, ECE {_number(fields['ece'], 2)} %, "
          f"{fields['images_per_second']:.1f} images/s", flush=True)
    if "real_top1" in fields:
        print(f"ReaL: top-1 {fields['real_top1']:.2f} %, top-5 {fields['real_top5']:.2f} % of {fields['real_images']} "
              "images", flush=True)
    for mode, of_mode in fields.get("modes", {}).items():
        difference = _number(of_mode["largest_logit_difference"], 2, "e")
        print(f"{mode:>9}: top-1 {of_mode['top1']:.2f} %, {of_mode['forward_images_per_second']:.1f} images/s without "
              f"the loader, largest logit difference {difference}", flush=True)


def _print_table(results: list[dict[str, Any]]) -> None:
    rows: list[tuple[str, ...]] = [("weights", "top-1 %", "top-5 %", "loss", "ECE %", "images/s")]
    rows += [(fields["weights"], *(_number(fields[name], digits) for name, digits in (
        ("top1", 2), ("top5", 2), ("loss", 4), ("ece", 2), ("images_per_second", 1)))) for fields in results]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for first, *others in rows:
        print(first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:])), sep="  ")


def _number(value: float | None, digits: int, kind: str = "f") -> str:
    return "not finite" if value is None else f"{value:.{digits}{kind}}"


if __name__ == "__main__":
    sys.exit(main())
