"""The command by which torchrun starts a run on this machine, from the options of launch/torchrun.sh.

One agent runs on each machine and starts its ranks; the agents meet at the address of one of them (rendezvous c10d).
After a rank has failed they start all ranks again, on as many machines as are there, so every number of machines in
the range that was given must divide the batch.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, Sequence

from vir.cluster.supervisor import Start, python_path
from vir.config import TrainConfig, plan_accumulation
from vir.errors import SettingsError
from vir.status import Status

_ENVIRONMENT = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""For the agents. Rank 0 then serves a store of its own after each start. That of the agents outlives the starts, and
ranks cannot tell one start from another there: each agent counts those that it has caused itself."""
_PORT = 29400
"""Where agents meet, if only a host is given: torchrun's own default."""
_ANSWERS_WITHIN_S = 10
_IMPORTS_S = 20
"""For torch, on a busy machine."""
_IS_STORE = ("import sys; from torch.distributed import TCPStore; "
             "TCPStore(sys.argv[1], int(sys.argv[2]), is_master=False, wait_for_workers=False)")
_MAX_NODES = 4096
"""Machines up to which numbers that divide the batch are looked for."""
_PASSED_ON = ("local_addr", "node_rank", "rdzv_conf", "log_dir", "redirects", "tee", "monitor_interval")


def add_options(parser: ArgumentParser) -> None:
    def add(name: str, metavar: str, default: str, says: str) -> None:
        parser.add_argument(*dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")), metavar=metavar,
                            default=default, help=says)

    add("nnodes", "N|MIN:MAX", "1", "machines of the run (default: %(default)s)")
    add("nproc_per_node", "N|gpu|cpu|auto", "", "ranks on each; one for each GPU, or one, when not given")
    add("rdzv_endpoint", "HOST[:PORT]", "",
        f"of one of the machines, where they meet, the same on all; PORT {_PORT} when not given")
    add("rdzv_id", "NAME", "vir", "of this run, the same on all machines (default: %(default)s)")
    of_torchrun = parser.add_argument_group("options of torchrun itself, see torchrun --help")
    for name in _PASSED_ON:
        of_torchrun.add_argument(f"--{name}", metavar="VALUE")


class TorchrunLaunch:
    """A launch by torchrun of the ranks of this machine; the script is started on each.

    Args:
        args: what `add_options` has read, and `max_restarts`, which are left to the agents.
        words: options of vir.train.

    Raises:
        SettingsError: an option of torchrun is none, or a number of machines does not divide the batch.
    """

    def __init__(self, args: Namespace, words: list[str], train: TrainConfig, on_cpu: bool) -> None:
        self.max_restarts, self.passes_codes_on = 0, False  # its agents start the ranks again, and end with 1
        self._nodes = node_range(args.nnodes)
        self._endpoint = args.rdzv_endpoint
        per_node = ranks_per_node(args.nproc_per_node, 0 if on_cpu else _gpus())
        check_worlds(self._nodes, per_node, train)
        self._command = command(args, self._nodes, per_node, words)

    def unreachable(self) -> dict[str, str]:
        """None: the other machines come by themselves.

        Raises:
            SettingsError: something else answers where they are to meet.
        """
        if self._endpoint:
            check_endpoint(self._endpoint)
        return {}

    def ended(self, found: Status) -> None:
        """Nothing is to be done."""

    @contextmanager
    def start(self, name: str, file: Path) -> Iterator[Start]:
        """How to start this machine's agent. Other machines have a script of their own, so `name` is not told."""
        yield Start(self._command, {**_ENVIRONMENT, "PYTHONPATH": python_path()}, Path.cwd())


def node_range(said: str) -> range:
    """Numbers of machines: 2, 3, 4 for 2:4."""
    least, colon, most = said.partition(":")
    lowest = _count("--nnodes", least)
    highest = _count("--nnodes", most) if colon else lowest
    if highest < lowest:
        raise SettingsError(f"--nnodes is {said}; a range begins with its smaller number: {highest}:{lowest}")
    return range(lowest, highest + 1)


def _count(flag: str, said: str) -> int:
    if not (said.isascii() and said.isdigit() and int(said)):
        raise SettingsError(f"{flag} is {said!r}; it must be a number from 1 on" +
                            (", or a range as 2:4" if flag == "--nnodes" else ""))
    return int(said)


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


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
    return _count("--nproc_per_node", said or "1")


def check_worlds(nodes: range, per_node: int, train: TrainConfig) -> None:
    """Every number of machines with which torchrun may start must divide the batch.

    Raises:
        SettingsError: one does not; it names those of the range that do not, and ranges that do.
    """
    refused = [count for count in nodes if not _divides(count * per_node, train)]
    if not refused:
        return
    most = min(_MAX_NODES, train.global_batch_size // (train.micro_batch_size * per_node))
    fit = ", ".join(_ranges([count for count in range(1, most + 1) if _divides(count * per_node, train)]))
    worlds = ", ".join(str(count * per_node) for count in refused[:8]) + (", …" if len(refused) > 8 else "")
    raise SettingsError(
        f"--nnodes {_ranges(nodes)[0]} with --nproc_per_node {per_node} allows for worlds of {worlds} ranks, which "
        f"times --train.micro_batch_size {train.micro_batch_size} do not divide --train.global_batch_size "
        f"{train.global_batch_size}; " + (f"--nnodes may be {fit}" if fit else
                                          "lower --train.micro_batch_size or --nproc_per_node"))


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


def command(args: Namespace, nodes: range, per_node: int, words: Sequence[str]) -> list[str]:
    """The command that starts this machine's agent.

    Raises:
        SettingsError: several machines, and nothing said of where they meet.
    """
    span = f"{nodes[0]}:{nodes[-1]}"
    if nodes[-1] > 1 and not args.rdzv_endpoint:
        raise SettingsError(f"--nnodes {_ranges(nodes)[0]} needs --rdzv_endpoint HOST[:PORT], the same on all machines:"
                            f" one of them, as the others reach it, and a free port of it ({_PORT} when not given)")
    meeting = ["--standalone"] if not args.rdzv_endpoint else [
        "--rdzv_backend", "c10d", "--rdzv_endpoint", _endpoint(args.rdzv_endpoint), "--rdzv_id", args.rdzv_id]
    passed_on = [word for name in _PASSED_ON if (value := getattr(args, name)) is not None
                 for word in (f"--{name}", value)]
    return [sys.executable, "-m", "torch.distributed.run", "--nnodes", span, "--nproc_per_node", str(per_node),
            "--max_restarts", str(args.max_restarts), *meeting, *passed_on, "-m", "vir.train", *words]


def _endpoint(said: str) -> str:
    """With a port; the last colon of an address of IPv6 in brackets is within them."""
    return said if ":" in said.rpartition("]")[2] else f"{said}:{_PORT}"


def check_endpoint(said: str) -> None:
    """Where something answers at --rdzv_endpoint, it must be an agent: torchrun would wait for its word for minutes.

    Raises:
        SettingsError: it is something else, or the port is no number.
    """
    host, _, number = _endpoint(said).rpartition(":")
    port = _count("the port of --rdzv_endpoint", number)
    if port >= 1 << 16:
        raise SettingsError(f"--rdzv_endpoint {said}: {port} is no port from 1 to 65535")
    try:
        socket.create_connection((host.strip("[]"), port), _ANSWERS_WITHIN_S).close()
    except OSError:  # nobody yet: the agent there may come later, or be this one
        return
    try:
        done = subprocess.run([sys.executable, "-c", _IS_STORE, host.strip("[]"), str(port)], capture_output=True,
                              timeout=_IMPORTS_S + _ANSWERS_WITHIN_S)
        answers = done.returncode == 0
    except subprocess.TimeoutExpired:  # in a process: a store's client waits on what says nothing as long as it likes
        answers = False
    if not answers:
        raise SettingsError(f"--rdzv_endpoint {said}: what answers at port {port} is no agent of torchrun; give "
                            "another port, the same on all machines")


if __name__ == "__main__":
    raise SystemExit("vir.cluster.torchrun is a part of the library; the script is launch/torchrun.sh")
