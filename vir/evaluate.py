"""Evaluate a weights file on a split of shards: top-1, top-5 and loss, every image once.

    vir-evaluate --weights vir_small.safetensors --data SHARDS/val

That is on one device. On several GPUs `accelerate launch -m vir.evaluate` starts it, on CPUs
`torchrun --nproc_per_node N -m vir.evaluate`. No DeepSpeed is needed. Exit codes: 0 done, 2 settings, 3 data.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from vir import cli, launcher
from vir.addresses import shown
from vir.config import DataConfig, RetentionMode
from vir.errors import DataError, SettingsError, VirError
from vir.files import replace_text, try_to_write

if TYPE_CHECKING:  # --help and a wrong flag are answered before torch is imported
    from accelerate import PartialState
    from torch import nn

    from vir.data.loader import Batch
    from vir.data.opening import Places
    from vir.data.reader import Reader
    from vir.models.spec import InputSpec
    from vir.models.weights import WeightsMetadata

MODES = get_args(RetentionMode)


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="vir-evaluate", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, metavar="FILE.safetensors",
                        help="made by vir-consolidate; names its model itself")
    parser.add_argument("--data", required=True, metavar="SHARDS/val", help="images, named as for vir-train: folder of "
                        "shards or of one folder per class, or shards by URL or pattern")
    parser.add_argument("--cache", default="", metavar="DIR", help="keep shards from servers in this folder")
    parser.add_argument("--cache-bytes", default=DataConfig.cache_bytes, metavar="BYTES",
                        help=f"the most that it may hold (default: {DataConfig.cache_bytes})")
    parser.add_argument("--index-dir", default="", metavar="DIR", help="folder for the indexes of shards that have "
                        "none beside them (default: vir-at-scale/indexes in the user's cache folder)")
    parser.add_argument("--timeout", type=float, default=DataConfig.timeout, metavar="SECONDS",
                        help=f"without an answer of a server, after which to give up (default: {DataConfig.timeout:g})")
    parser.add_argument("--mode", choices=MODES, default="auto", help="form of retention (default: auto)")
    parser.add_argument("--compare-modes", action="store_true",
                        help="run the three forms on the first batch and print their largest logit difference")
    parser.add_argument("--batch-size", type=int, default=128, help="images per forward pass and process")
    parser.add_argument("--workers", type=int, help="loader processes per process (default: what its "
                        "share of the cores allows, at most 16)")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto",
                        help="auto takes a GPU, and the CPU on a machine without one (default: auto)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there as JSON")
    args = parser.parse_args(argv)
    for name in ("batch_size", "workers"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    return args


def main(argv: list[str] | None = None) -> int:
    args = _arguments(sys.argv[1:] if argv is None else argv)
    launcher.tell_of_missing_processes("vir.evaluate")
    if launcher.wants_cpu(args.device):
        launcher.hide_gpus()
    try:
        return _evaluate(args)
    except VirError as error:  # every process meets it at the door; later, maybe one alone
        from torch import distributed

        return cli.tell(error, "vir-evaluate", every_rank=distributed.is_initialized())


def _evaluate(args: argparse.Namespace) -> int:
    import torch
    from accelerate import PartialState
    from tqdm import tqdm

    from vir import arithmetic, distributed
    from vir.data.loader import eval_batches
    from vir.data.opening import check_agreement
    from vir.evaluation.classify import classify
    from vir.models import load
    from vir.models.spec import input_of

    distributed.check_driver()
    kept, is_first = _places(args), launcher.local_rank() == 0
    reader = _open(args.data, kept, first=True) if is_first else None
    arithmetic.set_up()
    model = load(args.weights)
    metadata: WeightsMetadata = getattr(model, "weights_metadata")
    if reader is not None:
        _check(args, model, metadata, reader)
    if hasattr(model, "set_retention_mode"):
        getattr(model, "set_retention_mode")(args.mode)
    # Without an accelerator accelerate joins a launcher's processes only when told that they are to run on CPU.
    state = PartialState(cpu=not torch.accelerator.is_available())
    distributed.share_cores()
    distributed.barrier()
    if reader is None:  # the first process of the machine has made what this one takes
        reader = _open(args.data, kept, first=False)
        _check(args, model, metadata, reader)
    check_agreement("--data", reader)
    _check_json(args.json, state)
    model.to(state.device)
    model_input = input_of(model)
    batches: dict[str, Any] = dict(batch_size=args.batch_size, rank=state.process_index,
                                   world_size=state.num_processes, workers=args.workers, device=state.device)
    result: dict[str, Any] = {
        "weights": str(args.weights), "data": shown(args.data), "model": metadata.model.name, "step": metadata.step,
        "ema": metadata.ema, "dtype": metadata.dtype, "mode": args.mode, "processes": state.num_processes}
    if args.compare_modes:
        with closing(eval_batches(reader, model_input, **batches)) as first_of:
            first = next(first_of)
        assert first is not None, "nothing makes the loader give up"
        result["mode_differences"] = _compare(model, first, model_input, args.mode)
    with tqdm(total=len(reader), unit="image", disable=not state.is_main_process, dynamic_ncols=True) as bar:
        accuracy = classify(model, eval_batches(reader, model_input, **batches), model_input, state.device, bar)
    assert accuracy is not None, "only a stop cuts it short, and none was given"
    result |= {"images": accuracy.images, "top1": accuracy.top1, "top5": accuracy.top5, "loss": accuracy.loss}
    if state.is_main_process:
        _print_result(result)
    state.destroy_process_group()
    if args.json and state.is_main_process:
        try:
            replace_text(args.json, json.dumps(result, indent=1) + "\n")
        except OSError as error:
            raise DataError(f"--json {args.json} could not be written: {error.strerror}; the last line on stdout is "
                            "the result") from error
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


def _check(args: argparse.Namespace, model: nn.Module, metadata: WeightsMetadata, reader: Reader) -> None:
    classes = metadata.model.classes
    if list(classes) != list(reader.classes):
        raise SettingsError(f"{args.weights} knows {len(classes)} classes, {shown(args.data)} has "
                            f"{len(reader.classes)}, and their lists differ; evaluate on the classes it was trained on")
    if not hasattr(model, "set_retention_mode") and (args.mode != "auto" or args.compare_modes):
        raise SettingsError(f"{metadata.model.name} has no retention; leave out --mode and --compare-modes")


def _check_json(path: Path | None, state: PartialState) -> None:
    """Whether the result can be written, asked of the process that will write it before the evaluation. Collective."""
    from vir import distributed

    problem = None
    if path and state.is_main_process:
        try:
            try_to_write(path)
        except OSError as error:
            problem = error.strerror
    if problem := distributed.broadcast(problem):
        state.destroy_process_group()
        raise SettingsError(f"--json {path} cannot be written: {problem}; give a file in a folder that is there")


def _print_result(result: dict[str, Any]) -> None:
    print(f"{result['model']}{' EMA' if result['ema'] else ''}, step {result['step']}, {result['images']} images, "
          f"{result['processes']} processes: top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} %, "
          f"loss {result['loss']:.4f}")
    for mode, difference in result.get("mode_differences", {}).items():
        print(f"largest logit difference, {mode} against parallel: {difference:.2e}")
    print(json.dumps(result), flush=True)


def _compare(model: nn.Module, batch: Batch, model_input: InputSpec, mode: str) -> dict[str, float]:
    """Largest absolute logit difference of each form against the parallel one, on one batch."""
    import torch

    from vir.data.device import normalize

    images, set_mode = normalize(batch.images, model_input), getattr(model, "set_retention_mode")
    logits = {}
    with torch.no_grad():
        for name in MODES[1:]:
            set_mode(name)
            logits[name] = model(images)
    set_mode(mode)
    return {name: float((logits[name] - logits["parallel"]).abs().max()) for name in MODES[2:]}


if __name__ == "__main__":
    sys.exit(main())
