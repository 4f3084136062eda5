"""Rank, world, device, and sums over ranks that are exact."""

from __future__ import annotations

import os
import socket
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import HashStore, PrefixStore, Store, TCPStore

from vir import interfaces, launcher
from vir.driver import DRIVER, driver_version
from vir.errors import SettingsError, VirError
from vir.launcher import Place
from vir.log import log

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """One process of a run: `rank` of `size`, on `device`."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


TIMEOUT = timedelta(hours=1)
"""Of a collective. Longer than any save or evaluation that others wait for; a lost rank is found by the heartbeat."""

_host: Any = None
_server: Store | None = None
"""Keeps serving while it is referred to."""
_starting_server = threading.Lock()
_turns = 0
_POLL_S = 0.25
_TELLS_EVERY_S = 60.0


def serve(place: Place) -> None:
    """On rank 0, unless torchrun's agent does it: start the store that all ranks share; a second call does nothing.

    Raises:
        SettingsError: the port is taken.
    """
    global _server
    if place.rank != 0 or place.agent_serves:
        return
    with _starting_server:
        if _server is None:
            try:
                _server = TCPStore(place.address, place.port, is_master=True, wait_for_workers=False, multi_tenant=True)
            except RuntimeError as error:
                taken = "EADDRINUSE" in str(error)
                raise SettingsError(f"rank 0 cannot serve on port {place.port}" + (
                    ", which another process has, maybe another run" if taken else f" ({str(error).splitlines()[0]})"
                ) + "; give the launcher another --master_port, or set MASTER_PORT") from error


def connect(place: Place, timeout: timedelta) -> Store:
    """A connection of one's own to that store: a request that waits holds up no other connection.

    Args:
        timeout: of this and of each request.

    Raises:
        RuntimeError: nobody serves it.
    """
    serve(place)
    store = TCPStore(place.address, place.port, is_master=False, wait_for_workers=False, timeout=timeout)
    # The store of torchrun's agent outlives a restart of the ranks. Only there: agents of several machines count the
    # restarts that each has caused itself, so that ranks of one start may be told different numbers.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if place.agent_serves else "0"
    return PrefixStore(f"{place.run}-attempt-{attempt}", store)


@contextmanager
def first_of_machine_first(place: Place, is_stopping: Callable[[], bool] = lambda: False) -> Iterator[bool]:
    """The first process of each machine goes through the block, however it ends, before the others of it begin.

    Before the process group is there; all processes of a run come here equally often. The first one is known by the
    name of its host, or by its rank, where ranks of a machine follow one another: containers have names of their own.

    Args:
        is_stopping: asked while this process waits; True lets it begin.

    Yields:
        Whether this is the first one.
    """
    global _turns
    _turns += 1
    is_first = place.local_rank == 0
    if place.size == 1:
        yield is_first
        return
    store = connect(place, TIMEOUT)
    keys = [f"turn-{_turns}-{of}" for of in (socket.gethostname(), place.rank - place.local_rank)]
    tells = time.monotonic() + _TELLS_EVERY_S
    while not is_first and not any(store.check([key]) for key in keys) and not is_stopping():
        if time.monotonic() > tells:
            tells += _TELLS_EVERY_S
            log.warning("rank %d waits for the first rank of its machine, which opens the data", place.rank)
        time.sleep(_POLL_S)
    try:
        yield is_first
    finally:
        for key in keys if is_first else ():
            store.set(key, "done")


def is_of_a_collective(error: Exception) -> bool:
    """Whether an error is what a rank meets when another one has gone; gloo has no class of its own for it."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(name in str(error) for name in ("gloo", "NCCL", "ProcessGroup")))


def start() -> World:
    """Join the process group that the launcher describes; alone when there is none.

    Raises:
        SettingsError: the launcher has said only a part of what is needed, or rank 0's port is taken.
    """
    place = launcher.adopt()
    if launcher.wants_cpu():
        launcher.hide_gpus()
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1"),
                        ("MASTER_PORT", "0")):
        os.environ.setdefault(name, value)  # DeepSpeed reads them
    cuda = torch.cuda.is_available()
    device = gpu_of(place) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    share_cores()
    interfaces.set_gloos(place, launcher.nodes())
    global _host
    if not dist.is_initialized():
        store = HashStore() if place.size == 1 else PrefixStore("group", connect(place, TIMEOUT))
        dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=place.rank, world_size=place.size,
                                timeout=TIMEOUT,
                                # With a device NCCL splits each later group off this one, which fails for one rank.
                                device_id=device if cuda and place.size > 1 else None)
    if _host is None and dist.get_world_size() > 1:
        _host = dist.new_group(backend="gloo", timeout=TIMEOUT)
    return World(rank=dist.get_rank(), size=dist.get_world_size(), device=device)


def check_driver(driver: Path = DRIVER, devices: Path = Path("/dev")) -> None:
    """Refuse to compute on CPU in silence on a machine whose GPUs torch cannot use: a driver too old, another wheel.

    A container that was given no GPU sees the driver of its machine, but no device. Without the driver, or where the
    GPUs are hidden (--device cpu hides them), nothing is refused.

    Raises:
        SettingsError: with the driver's version and the CUDA version that torch was built for.
    """
    if torch.cuda.is_available() or launcher.gpus_are_hidden() or not any(devices.glob("nvidia[0-9]*")):
        return
    if not (version := driver_version(driver)):
        return
    built = torch.version.cuda
    raise SettingsError(f"this machine has NVIDIA GPUs with driver {version}, but torch {torch.__version__} cannot use "
                        "them: it was built " + (
                            f"for CUDA {built}; install a newer driver (nvidia-smi shows the newest CUDA that one "
                            "runs), or a wheel of torch for an older CUDA" if built else
                            "without CUDA; install a wheel of torch with CUDA") +
                        " (https://pytorch.org/get-started), or give --device cpu to compute on the CPU; torch says: "
                        + _why_there_is_no_cuda())


def _why_there_is_no_cuda() -> str:
    """In torch's words, which also tell other causes than the driver: no right to the devices, a missing service."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).splitlines()[0]
    return "nothing"


def gpu_of(place: Place) -> torch.device:
    """The GPU of a rank: that of its number on its machine, or the only one that it sees (`srun --gpus-per-task 1`).

    Raises:
        SettingsError: there are more ranks on this machine than GPUs.
    """
    count = torch.cuda.device_count()
    if count == 1:
        os.environ["LOCAL_RANK"] = "0"  # DeepSpeed takes it for the number of the GPU
    elif place.local_rank >= count:
        raise SettingsError(f"rank {place.rank} is number {place.local_rank} on its machine, which has {count} GPUs; "
                            f"start at most {count} ranks there")
    return torch.device("cuda", 0 if count == 1 else place.local_rank)


def share_cores() -> None:
    """Let the processes of a node share its cores, unless it was said how many threads each gets.

    Without that each would start as many threads as there are cores, or one alone under torchrun. On GPUs too: there
    DeepSpeed's Adam for CPUs steps the weights of an offloaded optimizer; its threads are those of torch (one libgomp).
    """
    if not launcher.threads_are_said():
        torch.set_num_threads(launcher.cores())


def host_group() -> Any:
    """Of all ranks, between their hosts: a collective of it waits for no device. None before start(), and for one rank
    alone."""
    return _host


def stop() -> None:
    global _host
    _host = None
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def broadcast(value: Any) -> Any:
    """Rank 0's value on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=_host)
    return box[0]


def gather(value: Any) -> list[Any]:
    """Every rank's value, in rank order, on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    boxes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(boxes, value, group=_host)
    return boxes


def gather_rows(rows: Tensor) -> Tensor:
    """[W N, ...]: the rows [N, ...] of all W ranks, in rank order, on every rank. Each rank has as many."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    everyone = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, rows.contiguous())
    return torch.cat(everyone)


def at_the_door(act: Callable[[], T]) -> T:
    """What `act` gives on this rank. Collective, for what comes before the work.

    Raises:
        VirError: the first that any rank has met, on every rank; the process group is no more then.
    """
    found, refused = None, None
    try:
        found = act()
    except VirError as error:
        refused = error.with_traceback(None)
    if first := next(filter(None, gather(refused)), None):
        stop()
        raise first
    return cast(T, found)


def sum_over_ranks(numbers: Sequence[float], device: torch.device) -> list[float]:
    """Elementwise sums in float64: exact for counts below 2^53."""
    total = torch.tensor(list(numbers), dtype=torch.float64, device=device)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(total)
    return total.tolist()
