"""Commands in process groups of their own, with a bound; the real launcher on a free port."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent

# A network that two slow cores train in no time; what it computes is the same as at full size.
TINY = ["--model.name", "vir_tiny_patch16_224", "--model.img_size", "28", "--data.workers", "1", "--data.lanes", "4",
        "--model.args", "{patch_size: 14, embed_dim: 128, depth: 2, num_heads: 2}"]


DEEPSPEED = [sys.executable, "-m", "deepspeed.launcher.runner"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]
"""The launchers as modules: their scripts need not be beside this Python, nor be of this Python."""

HANGS = 1500
"""Seconds after which a launch counts as hanging: many times what it takes on a slow machine with other work."""


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def call(*command, timeout: int = 240, **environment: str) -> subprocess.CompletedProcess:
    """Run a command in the project's root, in a process group of its own that is gone when this returns."""
    process = subprocess.Popen([str(word) for word in command], cwd=ROOT, text=True, start_new_session=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, **environment})
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"{' '.join(map(str, command))} took over {timeout} s:\n{output[-4000:]}")
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    return subprocess.CompletedProcess(command, process.returncode, stdout=output)


def deepspeed(*arguments, ranks: int = 2) -> subprocess.CompletedProcess:
    """The deepspeed launcher on local ranks."""
    port = free_port()
    return _launch(port, *DEEPSPEED, "--num_accelerators", ranks, "--master_port", port, *arguments)


def torchrun(*arguments, ranks: int = 2) -> subprocess.CompletedProcess:
    """torchrun on local ranks; it starts in a third of the other's time, for it imports no deepspeed."""
    port = free_port()
    return _launch(port, *TORCHRUN, "--nproc_per_node", ranks, "--master_port", port, *arguments)


def _launch(port: str, *command) -> subprocess.CompletedProcess:
    """One thread for each rank under every launcher: with another number sums would round otherwise."""
    try:
        return call(*command, timeout=HANGS, OMP_NUM_THREADS="1")
    finally:
        remove_shared_memory(port)


def remove_shared_memory(port: str) -> None:
    """DeepSpeed's CPU backend leaves a buffer of 69 MB per rank in memory, killed or not, named for the port."""
    for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_{os.getuid()}_*_{port}_*"):
        buffer.unlink(missing_ok=True)


def fake_ssh(folder: Path, monkeypatch, text: str) -> None:
    """Puts an ssh in front of others that runs a text of shell here; its $command is what it is told to run there."""
    (folder / "ssh").write_text(f"#!/bin/sh\nfor command; do :; done\n{text}\n")
    (folder / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
