"""Tells what a run needs before machines are asked for: memory, time, traffic, checkpoints and money, on one page.

    vir-plan --config vir/recipes/vir_small_in1k.yaml --deepspeed_config zero2_bf16 --nodes 1 --gpu h100-80gb
    vir-plan --config vir/recipes/vir_giant_in1k.yaml --nodes 16 --gpu a100-80gb --price 2.5 --picture plan.png
    vir-plan --config run.yaml --data s3://b/train --gpu memory=80GB,tflops=400,bandwidth=20GB --json p.json

All other options are those of vir-train (vir-train --help). Nothing is allocated, trained or written, but what --json
and --picture name: the network is built of shapes alone, so this machine needs neither GPUs nor memory for it. What
cannot be known beforehand is an estimate, and the page ends with what each of them rests on.

The exit code is 0 where the plan is told, 2 where an option is wrong or no shipped DeepSpeed JSON makes the run fit, 3
where the shards cannot be read.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from vir import cli
from vir.config import RunConfig, plan_accumulation
from vir.errors import SettingsError, VirError
from vir.files import replace_text
from vir.flags import parse
from vir.output_folder import check_file
from vir.planning.checkpoints import DISK_RATE, RESTART_S
from vir.planning.images import (
    IMAGE_BYTES,
    IMAGENET,
    IMAGENET_1K,
    IMAGENET_21K,
    IMAGENET_WHOLE,
    SAMPLES_PER_SHARD,
    Images,
    imagenet,
)

if TYPE_CHECKING:  # a wrong flag is told before torch is imported
    from vir.planning.estimate import Estimate, Question

PROGRAM = "vir-plan"
_HOUR = 3600.0
_LEAST = 1e-6
"""Of prices, shares and times."""


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    args, settings = _parser().parse_known_args(words)
    try:
        check_file("--json", args.json)
        images = [] if args.data is None else ["--data.train", args.data]
        config = parse(["--data.train", IMAGENET_1K, *settings, *images])
        estimate = _estimate(args, config)
        _tell(estimate, args, shlex.join(["vir-plan", *words]))
        estimate.check_that_something_fits()
    except VirError as error:
        return cli.tell(error, PROGRAM)
    except BrokenPipeError:  # whoever reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def command() -> int:
    """main() as a program of its own, which ends without taking all apart that was imported: in a second less."""
    end = cli.QuickEnd()
    end.code = main()
    return end.code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--nodes", type=_count, default=1, metavar="N", help="nodes (default: %(default)s)")
    add("--gpus-per-node", "--gpus_per_node", type=_count, default=8, metavar="N",
        help="GPUs of each node (default: %(default)s)")
    add("--gpu", default="h100-80gb", metavar="NAME",
        help="kind of GPU, or memory=80GB,tflops=989,bandwidth=450GB[,network=50GB] of one: TFLOP/s of its dense peak "
             "in the precision of the run, bytes/s of one GPU to the others of its node and to other nodes "
             "(default: %(default)s)")
    add("--network", metavar="RATE",
        help="of one GPU's share of the network cards of its node, in bytes/s, e.g. 50GB, or bits/s, e.g. 400Gb "
             "(default: as is usual for this GPU)")
    add("--data", metavar="SHARDS",
        help=f"training shards, as --data.train names them; {IMAGENET_1K} assumes {IMAGENET:,} images "
             f"of {IMAGE_BYTES / 1000:.0f} KB in shards of {SAMPLES_PER_SHARD:,} (default, "
             f"where no --data.train is given), {IMAGENET_21K} {IMAGENET_WHOLE:,}")
    add("--mfu", type=_share, metavar="SHARE",
        help="model FLOPs utilisation, e.g. 0.3 (default: what was measured and published for such GPUs and models)")
    add("--cores", type=_count, metavar="N", help="CPU cores of each node, for its loader processes")
    add("--storage", metavar="RATE",
        help="at which each node reads images, from a disk, its cache or a server, e.g. 2GB")
    add("--disk", default=f"{DISK_RATE / 1e9:g}GB", metavar="RATE",
        help="at which all nodes together write a checkpoint (default: %(default)s)")
    add("--mtbf", type=_positive, metavar="HOURS",
        help="mean time between failures of one node (default: as published of 16,384 H100s)")
    add("--restart", type=_positive, default=RESTART_S / 60, metavar="MINUTES",
        help="from a failure to the first step after it (default: %(default)g)")
    add("--price", type=_positive, metavar="PER_HOUR", help="of one GPU, in any currency")
    add("--json", type=Path, metavar="FILE", help="write all numbers there")
    add("--picture", type=Path, metavar="FILE", help="draw them there, e.g. plan.png")
    return parser


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= 1 << 20):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 to {1 << 20:,}")
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not _LEAST <= value <= 1 / _LEAST:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from {_LEAST:g} to {1 / _LEAST:g}")
    return value


def _share(text: str) -> float:
    if (value := _positive(text)) > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is above 1; 0.3 means 30 %")
    return value


def _estimate(args: argparse.Namespace, config: RunConfig) -> Estimate:
    world = args.nodes * args.gpus_per_node
    _check_world(config, world, args.gpus_per_node)

    with cli.importing():
        from vir.planning.estimate import estimate
        from vir.reports.curves import check_picture

    if args.picture is not None:
        check_picture("--picture", args.picture)
    return estimate(_question(args, config))


def _check_world(config: RunConfig, world: int, gpus_per_node: int) -> None:
    """Raises SettingsError where the batch does not divide; it names batches and numbers of nodes that would."""
    train = config.train
    try:
        plan_accumulation(train.global_batch_size, train.micro_batch_size, world)
    except SettingsError as error:
        per_node, nodes = train.micro_batch_size * gpus_per_node, world // gpus_per_node
        fit = [few for few in range(1, train.global_batch_size // per_node + 1)
               if train.global_batch_size % (per_node * few) == 0]
        near = [*[few for few in fit if few < nodes][-1:], *[more for more in fit if more > nodes][:1]]
        step = 2 if config.augment.mixes else 1
        micro = [size for size in range(step, train.micro_batch_size, step)
                 if train.global_batch_size % (size * world) == 0][-1:]
        ways = [f"--nodes {' or '.join(map(str, near))}"] * bool(near)
        ways += [f"--train.micro_batch_size {size}" for size in micro]
        raise SettingsError(f"{error}; or, as the rest is, {', or '.join(ways)}" if ways else str(error)) from error


def _question(args: argparse.Namespace, config: RunConfig) -> Question:
    from vir.engine import ds_config
    from vir.models.build import sketch
    from vir.planning.estimate import Question
    from vir.planning.hardware import Cluster, Range, parse_gpu, parse_rate
    from vir.training.distill import make_student
    from vir.training.schedule import check_schedule, total_steps

    gpu = parse_gpu(args.gpu)
    images = _images(config)
    name = config.deepspeed_config or ("zero2_bf16" if "bf16" in gpu.tflops else "zero2_fp16")
    content = ds_config.read(name)
    gpu.peak(ds_config.precision(content))
    steps = total_steps(config.train, images.count)
    check_schedule(steps, images.count / config.train.global_batch_size, config.schedule)
    network, spec = sketch(config.model, images.classes, config.train.linear_probe)
    make_student(network, spec.name, config.distill)
    return Question(
        config=config, ds_name=Path(name).stem, ds_config=content, network=network, spec=spec,
        images=images, on_gpu=True, total_steps=steps,
        cluster=Cluster(nodes=args.nodes, gpus_per_node=args.gpus_per_node, gpu=gpu,
                        network=parse_rate(args.network, "--network") if args.network is not None else gpu.network),
        mfu=Range(args.mfu, args.mfu) if args.mfu else None, cores=args.cores,
        storage=parse_rate(args.storage, "--storage") if args.storage is not None else None,
        disk=parse_rate(args.disk, "--disk"), mtbf=args.mtbf and args.mtbf * _HOUR,
        restart=args.restart * 60, price=args.price)


def _images(config: RunConfig) -> Images:
    if config.data.train in (IMAGENET_1K, IMAGENET_21K):
        return imagenet(name=config.data.train)
    from vir.data.opening import open_reader, places

    return Images.of(open_reader(config.data.train, places(config.data), first=True))


def _tell(estimate: Estimate, args: argparse.Namespace, command: str) -> None:
    from vir.planning.page import lines

    print(*lines(estimate), sep="\n", flush=True)
    if args.json is not None:
        replace_text(args.json, estimate.to_json(command))
    if args.picture is not None:
        from vir.planning.picture import draw

        draw(estimate, args.picture)


if __name__ == "__main__":
    sys.exit(command())
