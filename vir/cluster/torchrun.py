"""The command by which torchrun starts a run on this machine, from the options of launch/torchrun.sh.

One agent runs on each machine and starts its ranks; the agents meet at the address of one of them (rendezvous c10d).
After a rank has failed they start all ranks again, on as many machines as are there, so every number of machines in
the range that was given must divide the batch.
"""

from __future__ import annotations

import os
import socket
import sys
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn, Sequence

from vir.config import TrainConfig, plan_accumulation
from vir.errors import SettingsError

ENVIRONMENT = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""For the agents. Rank 0 then serves a store of its own after each start. That of the agents outlives the starts, and
ranks cannot tell one start from another there: each agent counts those that it has caused itself."""
_PORT = 29400
"""Where agents meet, if only a host is given: torchrun's own default."""
_ANSWERS_WITHIN = timedelta(seconds=5)
_MAX_NODES = 4096
"""Machines up to which numbers that divide the batch are looked for."""


@dataclass(frozen=True)
class Options:
    """What launch/torchrun.sh was told of the processes; named as torchrun does."""

    min_nodes: int = 1
    max_nodes: int = 1
    nproc_per_node: str = ""
    """A number, or gpu, cpu, auto; empty: as many as this machine has GPUs, or one."""
    rdzv_endpoint: str = ""
    rdzv_id: str = ""
    max_restarts: int = 0
    passed_on: tuple[str, ...] = ()
    """Other options of torchrun, with their values."""


class _Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SettingsError(message)


def split(words: Sequence[str]) -> tuple[Options, list[str]]:
    """The options of torchrun among the words of a command line, and the other words, which are those of vir.train.

    Raises:
        SettingsError: an option without a value, or one that is no number.
    """
    parser = _Parser(add_help=False, allow_abbrev=False)
    for name in ("nnodes", "nproc_per_node", "rdzv_endpoint", "rdzv_id", "max_restarts", "local_addr", "node_rank",
                 "rdzv_conf", "log_dir", "redirects", "tee", "monitor_interval"):
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}")
    said, rest = parser.parse_known_args(list(words))
    least, most = _node_range(said.nnodes or "1")
    return Options(least, most, said.nproc_per_node or "", said.rdzv_endpoint or "", said.rdzv_id or "",
                   _count("--max-restarts", said.max_restarts or "0", 0), tuple(_passed_on(said))), rest


def _passed_on(said: Namespace) -> list[str]:
    names = ("local_addr", "node_rank", "rdzv_conf", "log_dir", "redirects", "tee", "monitor_interval")
    return [word for name in names if (value := getattr(said, name)) is not None for word in (f"--{name}", value)]


def _node_range(said: str) -> tuple[int, int]:
    least, colon, most = said.partition(":")
    lowest = _count("--nnodes", least, 1)
    highest = _count("--nnodes", most, 1) if colon else lowest
    if highest < lowest:
        raise SettingsError(f"--nnodes is {said}; a range begins with its smaller number: {highest}:{lowest}")
    return lowest, highest


def _count(flag: str, said: str, least: int) -> int:
    if not (said.isascii() and said.isdigit() and int(said) >= least):
        limit = f"a number from {least} on" + (", or a range as 2:4" if flag == "--nnodes" else "")
        raise SettingsError(f"{flag} is {said!r}; it must be {limit}")
    return int(said)


def ranks_per_node(said: str, gpus: int) -> int:
    """How many ranks each machine gets, as torchrun understands it; by default one for each GPU, or one.

    Raises:
        SettingsError: gpu is asked for where there is none, or what is neither a number nor a word of torchrun.
    """
    if said in ("", "auto") and gpus:
        return gpus
    if said in ("cpu", "auto"):
        return os.cpu_count() or 1
    if said == "gpu":
        if not gpus:
            raise SettingsError("--nproc_per_node is gpu, but torch sees no GPU here; give a number, or see why by: "
                                "python -c 'import torch; torch.cuda.init()'")
        return gpus
    if said and not said.isdigit():
        raise SettingsError(f"--nproc_per_node is {said!r}; it must be a number, gpu, cpu or auto")
    return _count("--nproc_per_node", said or "1", 1)


def check_worlds(options: Options, per_node: int, train: TrainConfig) -> None:
    """Every number of machines with which torchrun may start must divide the batch.

    Raises:
        SettingsError: one does not; it names those of the range that do not, and ranges that do.
    """
    asked = range(options.min_nodes, options.max_nodes + 1)
    refused = [nodes for nodes in asked if not _divides(nodes * per_node, train)]
    if not refused:
        return
    said = str(asked[0]) if len(asked) == 1 else f"{asked[0]}:{asked[-1]}"
    worlds = ", ".join(str(nodes * per_node) for nodes in refused[:8]) + (", …" if len(refused) > 8 else "")
    most = min(_MAX_NODES, train.global_batch_size // (train.micro_batch_size * per_node))
    fit = ", ".join(_ranges([nodes for nodes in range(1, most + 1) if _divides(nodes * per_node, train)]))
    raise SettingsError(
        f"--nnodes {said} with {per_node} ranks on each may start {worlds} ranks, and --train.global_batch_size "
        f"{train.global_batch_size} is not a multiple of --train.micro_batch_size {train.micro_batch_size} x as many; "
        + (f"--nnodes that fit: {fit}" if fit else "lower --train.micro_batch_size or --nproc_per_node"))


def _divides(world: int, train: TrainConfig) -> bool:
    try:
        plan_accumulation(train.global_batch_size, train.micro_batch_size, world)
    except SettingsError:
        return False
    return True


def _ranges(numbers: Sequence[int]) -> list[str]:
    """Of increasing numbers: 1:4, 6, 8 for 1, 2, 3, 4, 6, 8."""
    found: list[list[int]] = []
    for number in numbers:
        if found and found[-1][-1] == number - 1:
            found[-1].append(number)
        else:
            found.append([number])
    return [str(run[0]) if len(run) == 1 else f"{run[0]}:{run[-1]}" for run in found]


def command(options: Options, per_node: int, words: Sequence[str]) -> list[str]:
    """The command that starts this machine's agent, for an environment with ENVIRONMENT.

    Args:
        words: of vir.train.

    Raises:
        SettingsError: several machines, and nothing said of where they meet.
    """
    if options.max_nodes > 1 and not options.rdzv_endpoint:
        raise SettingsError(f"--nnodes {options.min_nodes}:{options.max_nodes} needs --rdzv_endpoint HOST[:PORT], the "
                            "same on all machines: a name or address of one of them that the others reach, and a free "
                            f"port of it ({_PORT} when not given)")
    meeting = ["--standalone"] if not options.rdzv_endpoint else [
        "--rdzv_backend", "c10d", "--rdzv_endpoint", _endpoint(options.rdzv_endpoint),
        "--rdzv_id", options.rdzv_id or "vir"]
    return [sys.executable, "-m", "torch.distributed.run", "--nnodes", f"{options.min_nodes}:{options.max_nodes}",
            "--nproc_per_node", str(per_node), "--max_restarts", str(options.max_restarts), *meeting,
            *options.passed_on, "-m", "vir.train", *words]


def _endpoint(said: str) -> str:
    """With a port; the last colon of an address of IPv6 in brackets is within them."""
    return said if ":" in said.rpartition("]")[2] else f"{said}:{_PORT}"


def check_endpoint(said: str) -> None:
    """Where something answers at --rdzv_endpoint, it must be an agent: torchrun would wait for its word for minutes.

    Raises:
        SettingsError: it is something else, or the port is no number.
    """
    host, _, number = _endpoint(said).rpartition(":")
    port = _count("the port of --rdzv_endpoint", number, 1)
    try:
        socket.create_connection((host.strip("[]"), port), _ANSWERS_WITHIN.total_seconds()).close()
    except OSError:  # nobody yet: the agent there may come later, or be this one
        return
    from torch.distributed import TCPStore

    try:
        TCPStore(host.strip("[]"), port, is_master=False, wait_for_workers=False, timeout=_ANSWERS_WITHIN)
    except RuntimeError as error:
        raise SettingsError(f"--rdzv_endpoint {said}: what answers at port {port} is no agent of torchrun; give "
                            "another port, the same on all machines") from error


if __name__ == "__main__":
    raise SystemExit("vir.cluster.torchrun is a part of the library; the script is launch/torchrun.sh")
