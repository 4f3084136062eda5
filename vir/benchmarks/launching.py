"""A module of ours in several processes, as a user would start it."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

from vir.errors import SettingsError

ROOT = Path(__file__).resolve().parent.parent.parent

# glibc would give freed tensors back to the system and fault them in again: noise, and up to half of the time on CPU.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MALLOC_TRIM_THRESHOLD_": "1073741824", "MALLOC_MMAP_THRESHOLD_": "1073741824"}


DEEPSPEED = ["deepspeed.launcher.runner", "--num_accelerators"]
TORCHRUN = ["torch.distributed.run", "--nproc_per_node"]
"""It starts in a third of the time that deepspeed's takes."""


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
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, **ENVIRONMENT}, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    finally:  # DeepSpeed leaves 69 MB per rank and port behind
        for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
            buffer.unlink(missing_ok=True)
    if done.returncode != 0:
        raise SettingsError(f"{shlex.join(command)} ended with code {done.returncode}; {way_out}. It said:\n"
                            f"{done.stdout[-3000:]}")
