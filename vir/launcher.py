"""What the launcher says of this process: torchrun, deepspeed and accelerate in their variables, srun in its own."""

from __future__ import annotations

import os
import re
import sys
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from vir.control_groups import cpu_limit
from vir.errors import SettingsError

_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
RUN_ID = "VIR_RUN_ID"
"""The name of a run that a launch script or srun has started: of all ranks, and of no other run."""
_BY_SRUN = "slurm-"
"""It begins with this where each task of srun is a rank."""
FOLDER = "VIR_FOLDER"
"""Where the command was given, for ranks that were started elsewhere."""
_LAUNCHER = re.compile(r"(?:.*/)?(?:deepspeed|torchrun|accelerate)|deepspeed\.launcher\.(?:runner|launch)|"
                       r"torch\.distributed\.run|accelerate\.commands\.launch|vir\.launch")
"""A word among the first of a launcher's command line."""
GRACE_S = 30.0
"""That deepspeed's and torchrun's launchers leave a rank between SIGTERM and SIGKILL."""


@dataclass(frozen=True)
class Place:
    """This process among those of a run, and where rank 0 (or torchrun's agent) can be reached."""

    rank: int
    size: int
    local_rank: int
    """Its number on its machine."""
    address: str
    port: int
    run: str = ""
    """Tells this run from another one that may be met at the same address; empty where the launcher gives it no name.
    """

    @property
    def agent_serves(self) -> bool:
        """Whether torchrun's agent serves the store of the ranks, and not rank 0."""
        return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def adopt() -> Place:
    """The place that the environment describes; rank 0 of 1 where it describes none.

    Under a plain `srun` it is what SLURM says of the task, under Open MPI's mpirun what that says; it is then also said
    in torch's variables, where DeepSpeed and accelerate look for it.

    Raises:
        SettingsError: only a part of it is there, or a value that is no number.
    """
    if not {"RANK", "WORLD_SIZE"} & os.environ.keys():
        if "OMPI_COMM_WORLD_SIZE" in os.environ:
            os.environ.update(_from_mpi())
            return adopt()
        if (os.environ.get("SLURM_STEP_NUM_TASKS") or "1") == "1":
            return Place(0, 1, local_rank(), "127.0.0.1", 0)
        os.environ.update({**_from_slurm(), **{name: os.environ[name] for name in _NAMES if name in os.environ}})
        start = (os.environ.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"))
        os.environ[RUN_ID] = _BY_SRUN + ".".join(filter(None, start))
    if missing := [name for name in ("RANK", "WORLD_SIZE") if not os.environ.get(name)]:
        raise SettingsError(_half_said(missing))
    rank, size = _number("RANK"), _number("WORLD_SIZE")
    if size == 1:
        return Place(0, 1, local_rank(), "127.0.0.1", 0)
    if missing := [name for name in _NAMES if not os.environ.get(name)]:
        raise SettingsError(_half_said(missing))
    if not 0 <= rank < size:
        raise SettingsError(f"RANK is {rank} and WORLD_SIZE {size}; a rank is from 0 to {size - 1}")
    run = os.environ.get(RUN_ID) or os.environ.get("TORCHELASTIC_RUN_ID", "")
    return Place(rank, size, _number("LOCAL_RANK"), os.environ["MASTER_ADDR"], _number("MASTER_PORT"), run)


def enter_folder() -> None:
    """Go where the command was given: pdsh starts ranks elsewhere.

    Raises:
        SettingsError: there is no such folder on this machine.
    """
    if folder := os.environ.get(FOLDER):
        try:
            os.chdir(folder)
        except OSError as error:
            raise SettingsError(f"the command was given in {folder}, which cannot be entered on {os.uname().nodename} "
                                f"({error.strerror}); give it in a folder that all nodes have at the same path"
                                ) from error


def launchers() -> list[psutil.Process]:
    """The launchers above this process, nearest first: deepspeed's for a node and for all, torchrun's agent, ours."""
    found = []
    with suppress(psutil.Error, OSError):
        for process in psutil.Process().parents():
            if not any(_LAUNCHER.fullmatch(word) for word in process.cmdline()[:5]):
                break
            found.append(process)
    return found


def local_rank() -> int:
    """This process's number on its machine; 0 without a launcher. Never raises."""
    said = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or "0"
    return int(said) if said.isdigit() else 0


def local_size() -> int:
    """How many processes of the run are on this machine, as the launcher says; 1 where it does not."""
    said = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1"
    return max(1, int(said)) if said.isdigit() else 1


def nodes() -> int:
    """On how many machines the run is, as many processes on each; 1 where the launcher says nothing."""
    return -(-adopt().size // local_size())


def cores() -> int:
    """How many cores this process may use: its share of those of its machine, or what srun has given it alone."""
    allowed = _cores_of_node()
    given = os.environ.get("SLURM_CPUS_PER_TASK", "")
    if given.isdigit() and int(given):
        return max(1, min(allowed, int(given)) // sharing())
    return max(1, allowed // local_size())


def sharing() -> int:
    """How many processes of the run share what srun gives a task, or a container or pod has: all of this machine.

    1 where each is a task of srun; under a launcher that srun has started they share that of the launcher.
    """
    return 1 if os.environ.get(RUN_ID, "").startswith(_BY_SRUN) else local_size()


def share_of_machine() -> int:
    """How many cores this process would have if nothing but the other processes of the run kept it from any."""
    return max(1, (os.cpu_count() or 1) // local_size())


def _cores_of_node() -> int:
    """Those that the processes of the run may use here together: of the affinity, no more than a container's time."""
    return max(1, int(min(len(os.sched_getaffinity(0)), cpu_limit())))


def threads_are_said() -> bool:
    """Whether OMP_NUM_THREADS is somebody's word; torchrun and accelerate write a 1 where nobody has said anything."""
    said = os.environ.get("OMP_NUM_THREADS")
    unsaid = "1" if {"TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"} & os.environ.keys() else None
    return said not in (None, unsaid)


def wants_cpu(device: str = "auto") -> bool:
    """Whether to compute on CPU: by --device, or by DeepSpeed's own variable, which its launcher hands on to all ranks
    where it sets CUDA_VISIBLE_DEVICES anew."""
    return device == "cpu" or os.environ.get("DS_ACCELERATOR") == "cpu"


def hide_gpus() -> None:
    """Let this process and its children compute on CPU, whatever GPUs there are. Before torch or deepspeed look.

    DeepSpeed decides at its import, and hands out page-locked memory, processes' devices and kernels by that.
    """
    os.environ.update(CUDA_VISIBLE_DEVICES="-1", DS_ACCELERATOR="cpu")


def gpus_are_hidden() -> bool:
    """Whether the environment keeps all GPUs from this process; the last of the values is SLURM's."""
    return os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1", "NoDevFiles")


def tell_of_missing_processes(module: str) -> None:
    """Say on standard error where `accelerate launch` was asked for several processes and has started this one alone.

    It does so where it finds no two GPUs, unless it is told --multi_gpu. Only its command line, which Linux shows,
    tells how many were asked for.

    Args:
        module: what is run, e.g. vir.evaluate.
    """
    if "ACCELERATE_MIXED_PRECISION" not in os.environ or "WORLD_SIZE" in os.environ:
        return
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return
    if (asked := processes_asked_for(words)) > 1:
        print(f"{module}: accelerate was asked for {asked} processes and has started one, as it does without several "
              f"GPUs; this goes on with one. Start {asked} by: torchrun --nproc_per_node {asked} -m {module} …",
              file=sys.stderr)


def processes_asked_for(words: list[str]) -> int:
    """The number in a command line of accelerate; 0 where there is none."""
    joined = " ".join(words).replace("--num-processes", "--num_processes")
    found = re.findall(r"(?<!\S)--num_processes[ =](\d+)(?!\S)", joined)
    return int(found[-1]) if found else 0


def _number(name: str) -> int:
    try:
        return int(os.environ[name])
    except ValueError:
        raise SettingsError(f"the environment's {name} is {os.environ[name]!r}; it must be a number") from None


def _half_said(missing: list[str]) -> str:
    said = [f"{name}={os.environ[name]}" for name in _NAMES if os.environ.get(name)]
    return (f"the environment says {', '.join(said)} but not {', '.join(missing)}; start by deepspeed, torchrun, "
            "accelerate or srun, which set them all, or unset these to run one process")


def _from_slurm() -> dict[str, str]:
    """Torch's variables from those that srun gives to each task of a step."""
    needed = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NODELIST", "SLURM_JOB_ID", "SLURM_STEP_ID")
    if missing := [name for name in needed if not os.environ.get(name)]:
        raise SettingsError(f"SLURM_STEP_NUM_TASKS is {os.environ['SLURM_STEP_NUM_TASKS']} but {', '.join(missing)} is "
                            "not set; start by srun, or unset it to run one process")
    one_node = os.environ.get("SLURM_STEP_NUM_NODES", "1") == "1"
    port = port_of(f"{os.environ['SLURM_JOB_ID']}.{os.environ['SLURM_STEP_ID']}")
    per_node = tasks_of_node(os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""), os.environ.get("SLURM_NODEID", "0"))
    return {"RANK": os.environ["SLURM_PROCID"], "WORLD_SIZE": os.environ["SLURM_STEP_NUM_TASKS"],
            "LOCAL_RANK": os.environ["SLURM_LOCALID"], "MASTER_PORT": str(port),
            "MASTER_ADDR": "127.0.0.1" if one_node else first_host(os.environ["SLURM_STEP_NODELIST"]),
            **({"LOCAL_WORLD_SIZE": per_node} if per_node else {})}


def _from_mpi() -> dict[str, str]:
    """Torch's variables from those that Open MPI's mpirun gives to each process; MASTER_ADDR is not among these."""
    world = {"RANK": "OMPI_COMM_WORLD_RANK", "WORLD_SIZE": "OMPI_COMM_WORLD_SIZE",
             "LOCAL_RANK": "OMPI_COMM_WORLD_LOCAL_RANK", "LOCAL_SIZE": "OMPI_COMM_WORLD_LOCAL_SIZE"}
    return {name: os.environ[theirs] for name, theirs in world.items() if theirs in os.environ}


def tasks_of_node(tasks: str, node: str) -> str:
    """How many of SLURM's tasks are on a node: 7 of `8(x2),7` on the third, number 2; "" where it does not tell."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks)
    of_each = [count for count, times in found for _ in range(min(int(times or 1), 1 << 20))]
    return of_each[int(node)] if node.isdigit() and int(node) < len(of_each) else ""


def port_of(start: str) -> int:
    """To each step or start of a job its port, for jobs share nodes; below those that outgoing connections are given.
    """
    return 10000 + zlib.crc32(start.encode()) % 20000


def first_host(nodes: str) -> str:
    """The first of SLURM's compressed list of hosts: node03 of `node[03-07,9],login`."""
    found = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,\[]*))?", nodes)
    if found is None:
        raise SettingsError(f"SLURM_STEP_NODELIST is {nodes!r}, which names no host; set MASTER_ADDR to that of rank 0")
    return "".join(part or "" for part in found.groups())
