"""Start a run by a launcher, hand signals on to its ranks on all nodes, and end with the exit code of the run.

    bash launch/deepspeed.sh [--hostfile H] [--interface NAME] [--max-restarts N] [--print] OPTIONS OF vir-train

launch/torchrun.sh and launch/slurm.sbatch do the same by other launchers. The exit codes are those of vir-train,
whatever the launcher says. A first signal lets all ranks finish their step and save, exit code 75; a second one ends
them at once.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

from vir import cli
from vir.addresses import shown
from vir.checkpoints.names import newest, step_of
from vir.cluster import deepspeed, slurm, torchrun
from vir.cluster.deepspeed import DeepSpeedLaunch
from vir.cluster.slurm import SlurmLaunch
from vir.cluster.supervisor import PROGRAM, Launch, supervise
from vir.cluster.torchrun import TorchrunLaunch
from vir.config import RunConfig, folder_of
from vir.errors import SettingsError, VirError
from vir.flags import parse
from vir.launcher import wants_cpu

# By kind: how it is called, its own options, how often it starts again by default, and what it is.
_KINDS = {
    "deepspeed": ("launch/deepspeed.sh", deepspeed.add_options, 0, "by deepspeed, on this machine or a hostfile's"),
    "torchrun": ("launch/torchrun.sh", torchrun.add_options, 0, "by torchrun, on this machine or started on each"),
    "srun": ("sbatch [options of sbatch] launch/slurm.sbatch", slurm.add_options, 3, "within a job of Slurm"),
}


def main(argv: list[str] | None = None) -> int:
    args, words = _parser().parse_known_args(argv)
    try:
        if args.kind == "srun":
            words = slurm.words_of_task(words, os.environ)
        config = parse(words)  # a wrong flag is told before any process starts
        launch = _launch(args, words, config)
        if args.print:
            _print(launch)
            return 0
        if silent := launch.unreachable():
            raise SettingsError("; ".join(f"{host} does not answer ssh ({reason})" for host, reason in silent.items()) +
                                f"; mend it, or leave it out of {args.hostfile} (tools/check_cluster.py --hostfile "
                                f"{args.hostfile} --write-good FILE writes one of the good nodes)")
        run = folder_of(config)
        return supervise(launch, run, lambda: _newest_step(run))
    except VirError as error:
        return cli.tell(error, PROGRAM)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for kind, (script, add_options, max_restarts, what) in _KINDS.items():
        of_kind = kinds.add_parser(kind, allow_abbrev=False, help=what,
                                   usage=f"{script} [options below] [options of vir-train]",
                                   description="All other options are those of vir-train (vir-train --help).")
        add_options(of_kind)
        of_kind.add_argument("--max-restarts", "--max_restarts", type=_restarts, default=max_restarts, metavar="N",
                             help="start again up to N times after a lost rank or node (default: %(default)s)")
        of_kind.add_argument("--print", action="store_true", help="print the final command, and do no more")
    return parser


def _restarts(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 on")
    return int(text)


def _launch(args: argparse.Namespace, words: list[str], config: RunConfig) -> Launch:
    if args.kind == "torchrun":
        return TorchrunLaunch(args, words, config.train, wants_cpu(config.device))
    return SlurmLaunch(args, words) if args.kind == "srun" else DeepSpeedLaunch(args, words)


def _print(launch: Launch) -> None:
    with launch.start("print", Path("print")) as start:
        print(shlex.join(map(shown, start.command)))


def _newest_step(run: Path) -> int:
    try:
        found = newest(run)
    except VirError:  # the run tells it better
        return 0
    return step_of(found) if found else 0


if __name__ == "__main__":
    sys.exit(main())
