"""The machines of a hostfile, and which of them answer."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
from argparse import ArgumentTypeError
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Iterable, Mapping

from vir import files, interfaces
from vir.addresses import shown
from vir.errors import SettingsError

_ANSWERS_WITHIN_S = 10
"""Of an ssh that has to do nothing."""
_AT_A_TIME = 64
"""Connections that are being opened."""
_FORWARDED = re.compile(
    r"(?:NCCL|GLOO|UCX|TORCH|CUDA|OMP|MKL|MALLOC|HF|WANDB|AWS|GOOGLE|AZURE|FSSPEC|TRITON|DS|VIR)_\w+|PYTHON\w*|"
    r"LD_LIBRARY_PATH|LD_PRELOAD|(?:https?|no|all)_proxy", re.IGNORECASE)
_OF_ONE_MACHINE = {"CUDA_VISIBLE_DEVICES", "DS_ENV_FILE"}
_SECRET = re.compile(
    r"(?!\w+_(?:FILE|PATH|PKEY)$|GOOGLE_APPLICATION_CREDENTIALS$|HF_HUB_DISABLE_IMPLICIT_TOKEN$)"
    r".*(?:KEY|TOKEN|SECRET|PASSW|PWD|CREDENTIAL|CONNECTION_STRING|_SAS|_PAT$|AUTH$)|FSSPEC_", re.IGNORECASE)
"""Names of such variables, but for those that name a file or a partition of InfiniBand."""
_LINE = re.compile(r"([\w\[][\w.:@%\[\]-]*)\s+slots=(\d+)\s*(#.*)?")
"""Its host is a word of commands and shells: no option of ssh, and nothing that a shell heeds."""


def read_hostfile(path: Path) -> dict[str, int]:
    """Hosts and how many ranks each gets, in the order of the file, whose lines are `node1 slots=8`.

    Raises:
        SettingsError: it cannot be read, has another line, a host twice, or none.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise SettingsError(f"--hostfile {path} cannot be read: {reason}; give a file with a line "
                            "`host slots=GPUS` for each machine") from error
    hosts: dict[str, int] = {}
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        found = _LINE.fullmatch(line)
        if found is None or not int(found[2]):
            raise SettingsError(f"{path}:{number}: {line!r} is no line `host slots=GPUS` with at least one")
        if found[1] in hosts:
            raise SettingsError(f"{path}:{number}: {found[1]} is named twice; give each host one line with all its "
                                "slots")
        hosts[found[1]] = int(found[2])
    if not hosts:
        raise SettingsError(f"--hostfile {path} names no host; give it a line `host slots=GPUS` for each machine")
    return hosts


def write_hostfile(path: Path, hosts: dict[str, int]) -> None:
    """Raises OSError."""
    files.replace_text(path, "".join(f"{host} slots={slots}\n" for host, slots in hosts.items()))


def forwarded(environment: Mapping[str, str], of_user: Mapping[str, str] = {}) -> dict[str, str]:
    """The variables that other nodes get: of a process those that a run heeds, and all that the user has named.

    What is forwarded can be read in lists of processes and in logs, so that a secret stays here: it is known by its
    name, or by a login in its value, and named on standard error, once.

    Args:
        of_user: from the user's own files; wins.
    """
    found = {name: value for name, value in environment.items()
             if _FORWARDED.fullmatch(name) and name not in _OF_ONE_MACHINE} | dict(of_user)
    if secret := secrets(found):
        _tell_of_secrets(tuple(sorted(secret)))
    return {name: value for name, value in found.items() if name not in secret}


def secrets(environment: Mapping[str, str]) -> frozenset[str]:
    """Names of variables that hold a secret, by their name or by a URL with a login in their value."""
    return frozenset(name for name, value in environment.items() if _SECRET.match(name) or shown(value) != value)


@cache
def _tell_of_secrets(names: tuple[str, ...]) -> None:
    print(f"{', '.join(names)}: not forwarded to other nodes, where lists of processes would show them; keep what logs "
          "in in files that each node reads, such as ~/.netrc or ~/.aws/credentials", file=sys.stderr, flush=True)


def ssh(host: str, command: str, port: int | None = None) -> list[str]:
    """The words that run a command of a shell on a host, as pdsh would, never asking for a password.

    PDSH_SSH_ARGS_APPEND, which pdsh gives to its ssh (`-F config`, `-i key`), is heeded here, too.
    """
    more = shlex.split(os.environ.get("PDSH_SSH_ARGS_APPEND", ""))
    to_port = [] if port is None else ["-p", str(port)]
    return ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={_ANSWERS_WITHIN_S}", *more, *to_port, host, command]


def port(text: str) -> int:
    """For argparse."""
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 1 << 16):
        raise ArgumentTypeError(f"{text!r} is no port from 1 to 65535")
    return int(text)


def is_here(host: str) -> bool:
    """Whether the name is one of this machine."""
    with suppress(OSError, UnicodeError):  # no such name, or none at all
        address = socket.gethostbyname(host)
        return address.startswith("127.") or address in interfaces.addresses().values()
    return host == socket.gethostname()


def say(host: str, command: str, port: int | None = None) -> tuple[str, str]:
    """What a command of a shell says on a host, and why it has failed; empty where it has not."""
    try:
        done = subprocess.run(ssh(host, command, port), capture_output=True, text=True, errors="replace",
                              stdin=subprocess.DEVNULL, timeout=2 * _ANSWERS_WITHIN_S)
    except subprocess.TimeoutExpired:
        return "", f"no answer within {2 * _ANSWERS_WITHIN_S} s"
    except OSError as error:
        return "", f"ssh cannot be run: {error.strerror}"
    said = done.stderr.strip().splitlines()
    return done.stdout, "" if done.returncode == 0 else said[-1] if said else f"ssh ended with {done.returncode}"


def unreachable(hosts: Iterable[str], port: int | None = None) -> dict[str, str]:
    """Which hosts run no command by ssh, and why, in a few words. All are asked at the same time."""
    names = list(hosts)
    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        return {host: reason for host, (_, reason) in zip(names, pool.map(lambda host: say(host, "true", port), names))
                if reason}
