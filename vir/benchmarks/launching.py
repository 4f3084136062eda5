"""A module of ours in several processes, as a user would start it."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from threading import Event

import psutil

from vir.errors import SettingsError

# glibc would give freed tensors back to the system and fault them in again: noise, and up to half of the time on CPU.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MALLOC_TRIM_THRESHOLD_": "1073741824", "MALLOC_MMAP_THRESHOLD_": "1073741824",
               "TQDM_DISABLE": "1"}

DEEPSPEED = ["deepspeed.launcher.runner", "--num_accelerators"]
TORCHRUN = ["torch.distributed.run", "--nproc_per_node"]
"""It starts in a third of the time that deepspeed's takes."""

_ENDS_WITHIN_S, _LOOKS_EVERY_S = 30.0, 0.5


def launch(launcher: list[str], ranks: int, words: list[str], way_out: str) -> None:
    """Run `--module MODULE ...`, which are the words, on so many ranks of one thread each.

    Raises:
        SettingsError: it has failed; `way_out` tells what to do then.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", *launcher, str(ranks), "--master_port", port, *words]
    try:
        code, said = call(command)
    finally:  # DeepSpeed leaves 69 MB per rank and port behind
        for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
            buffer.unlink(missing_ok=True)
    if code != 0:
        raise SettingsError(f"{shlex.join(command)} ended with code {code}; {way_out}. It said:\n{said[-3000:]}")


def call(command: Sequence[str], ended: Event | None = None) -> tuple[int, str]:
    """Run it in ENVIRONMENT: its exit code, and what it said. It and its children end with this call.

    Args:
        ended: set by another thread to end it.
    """
    process = subprocess.Popen(command, env={**os.environ, **ENVIRONMENT}, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT)
    try:
        while True:
            try:
                said, _ = process.communicate(timeout=None if ended is None else _LOOKS_EVERY_S)
                return process.returncode, said
            except subprocess.TimeoutExpired:
                if ended is not None and ended.is_set():
                    _end(process.pid)
    except BaseException:
        _end(process.pid)
        raise


def _end(pid: int) -> None:
    """Ask that process and all processes below it to end, and kill those that have not after a while."""
    below = []
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        below = [*process.children(recursive=True), process]  # those of one that has ended would be another's
    for one in below:
        with suppress(psutil.Error):
            one.terminate()
    until = time.monotonic() + _ENDS_WITHIN_S
    while any(map(_runs, below)) and time.monotonic() < until:
        time.sleep(0.05)
    for one in filter(_runs, below):
        with suppress(psutil.Error):
            one.kill()


def _runs(process: psutil.Process) -> bool:
    """Not of one that has ended and that its parent does not ask for."""
    with suppress(psutil.Error):
        return process.status() != psutil.STATUS_ZOMBIE
    return False
