"""Where a run takes place: the command, the versions, the machines. Its log begins with it."""

from __future__ import annotations

import platform
import shlex
import socket
import sys
from collections import Counter
from importlib import metadata
from typing import Iterator

import torch

import vir
from vir import distributed
from vir.addresses import shown
from vir.distributed import World

_PACKAGES = ("deepspeed", "timm", "webdataset")


def describe_environment(world: World) -> Iterator[str]:
    """Lines for people: the command line, versions, hosts with their devices. Collective."""
    yield f"command: {shlex.join(map(shown, sys.orig_argv))}"
    accelerator = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    others = (f"{name} {metadata.version(name)}" for name in _PACKAGES)
    yield (f"vir-at-scale {vir.__version__}, Python {platform.python_version()}, torch {torch.__version__} "
           f"({accelerator}), {', '.join(others)}")
    ranks = Counter(distributed.gather((socket.gethostname(), _device(world.device))))
    yield "ranks: " + ", ".join(f"{count} on {host} ({device})" for (host, device), count in ranks.items())


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
