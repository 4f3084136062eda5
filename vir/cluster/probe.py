"""The facts of this machine that a run depends on: versions, code, disk, devices, network, clock.

No process group is needed, and no part is waited for longer than a bound: a file system or a driver that hangs is a
fact, too.
"""

from __future__ import annotations

import csv
import hashlib
import os
import platform
import re
import shutil
import socket
import subprocess
import threading
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Callable, Mapping

import vir
from vir import files
from vir.driver import driver_version
from vir.interfaces import addresses

Facts = dict[str, Any]
"""JSON. By name: host, versions, code, config, data, disk, shared, devices, memory_gib, ecc, xid, interfaces,
reached_at, port, clock, and problems: why a part tells nothing. A part that was not asked for is missing."""

PART_S = 24.0
"""What all parts together may take."""
NO_ANSWER = "no answer within"
"""Begins the problem of a part that takes longer."""
_PACKAGES = ("torch", "deepspeed", "timm")
_WRITTEN_BYTES, _BLOCK_BYTES, _WRITES_S = 64 << 20, 8 << 20, 5.0
_SMI = ("nvidia-smi", "--query-gpu=name,memory.total,ecc.errors.uncorrected.volatile.total",
        "--format=csv,noheader,nounits")
_XID = re.compile(r"NVRM: Xid.*")
_XIDS_TOLD = 3


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked of every machine in the same words."""

    options: tuple[str, ...] = ()
    """Of vir.train; empty asks for no settings."""
    folder: str
    """Where checkpoints will be: a folder that the asking machine has."""
    token: str = ""
    """The name of a file in it, whose text is its name; empty asks nothing."""
    port: int = 0
    """That must be free; 0 asks nothing."""


def look(question: Question, more: Mapping[str, Callable[[], Facts]] = {}) -> Facts:
    """All facts of this machine; returns within little more than PART_S.

    Args:
        more: parts that are looked at elsewhere, by name.
    """
    folder = Path(question.folder)
    parts: dict[str, Callable[[], Facts]] = {
        "versions": lambda: {"versions": versions()}, "code": lambda: {"code": code_digest()},
        "torch": _torch, "disk": lambda: {"disk": disk(folder)}, "devices": devices, "driver's log": xids,
        "network": lambda: {"interfaces": addresses(), "reached_at": _reached_at()}}
    if question.token:
        parts["shared folder"] = lambda: {"shared": sees(folder, question.token)}
    if question.port:
        parts["port"] = lambda: {"port": port_problem(question.port)}
    return {"host": socket.gethostname(), **_within({**parts, **more}, PART_S), "clock": time.time()}


def _within(parts: Mapping[str, Callable[[], Facts]], seconds: float) -> Facts:
    """What the parts tell, each in a thread of its own, and the problems of the others."""
    found: Facts = {}
    problems = {name: f"{NO_ANSWER} {seconds:g} s" for name in parts}

    def ask(name: str, part: Callable[[], Facts]) -> None:
        try:
            facts, problem = part(), ""
        except Exception as error:  # whatever is wrong with this machine is what is asked for
            facts, problem = {}, " ".join(str(error).split()) or type(error).__name__
        found.update(facts)
        problems[name] = problem

    threads = [threading.Thread(target=ask, args=item, daemon=True) for item in parts.items()]
    until = time.monotonic() + seconds
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    return {**found, "problems": {name: problem for name, problem in problems.items() if problem}}


# ---- software


def versions() -> dict[str, str]:
    """Of Python, of the packages ("none": not installed), of vir and of the NVIDIA driver. Imports none of them."""
    return {"python": platform.python_version(), **{name: _installed(name) for name in _PACKAGES},
            "vir": vir.__version__, "driver": driver_version() or "none"}


def _installed(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def _torch() -> Facts:
    """That torch can be imported, and what for: a library of another CUDA is met here."""
    import torch

    return {"cuda": torch.version.cuda or "none"}


def code_digest(folder: Path = Path(vir.__file__).parent) -> str:
    """Of what a run executes and of the settings that it ships: file names and contents, at any place on the disk."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".json", ".yaml")):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{files.sha256(path)}\n".encode())
    return digest.hexdigest()


# ---- disk


def nearest(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there already."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def disk(folder: Path) -> Facts:
    """Free bytes, and the bytes that are written and flushed in a second; nothing of it is left, also after a kill.

    Raises:
        OSError: with the folder in its text.
    """
    free = shutil.disk_usage(folder).free
    block, written, path = os.urandom(_BLOCK_BYTES), 0, folder / f".speed-{os.urandom(8).hex()}"
    began = time.monotonic()
    with path.open("wb", buffering=0) as file:
        path.unlink()  # its bytes are there until it is closed
        while written < _WRITTEN_BYTES and time.monotonic() - began < _WRITES_S:
            written += file.write(block)
            os.fsync(file.fileno())
    return {"folder": str(folder), "free": free, "speed": round(written / (time.monotonic() - began))}


def sees(folder: Path, token: str) -> bool:
    """Whether this machine reads in the folder what the asking one has written there."""
    try:
        return (folder / token).read_text() == token
    except OSError:
        return False


# ---- devices


def devices() -> Facts:
    """GPUs as nvidia-smi names them, or the cores; GiB of the machine's memory; uncorrected errors of each GPU."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    memory = {"memory_gib": round(pages / (1 << 30))}
    if shutil.which(_SMI[0]) is None:
        return {**memory, "devices": [f"CPU, {os.cpu_count()} cores"], "ecc": []}
    done = subprocess.run(_SMI, capture_output=True, text=True, errors="replace", timeout=PART_S)
    if done.returncode:
        raise OSError(f"nvidia-smi ended with {done.returncode}: {(done.stdout + done.stderr).strip()}")
    names, errors = gpus(done.stdout)
    return {**memory, "devices": names, "ecc": errors}


def gpus(said: str) -> tuple[list[str], list[int]]:
    """From lines `NVIDIA H100, 81559, 0` of nvidia-smi; a GPU without ECC says [N/A], which counts as 0."""
    rows = [[field.strip() for field in row] for row in csv.reader(said.splitlines()) if row]
    return ([f"{name}, {memory} MiB" for name, memory, _ in rows],
            [int(errors) if errors.isdigit() else 0 for _, _, errors in rows])


def xids() -> Facts:
    """The last errors that the NVIDIA driver has put into the kernel's log, where this user may read it."""
    if shutil.which("dmesg") is None:
        return {"xid": []}
    done = subprocess.run(["dmesg"], capture_output=True, text=True, errors="replace", timeout=PART_S)
    return {"xid": _XID.findall(done.stdout)[-_XIDS_TOLD:]}


# ---- network


def _reached_at() -> str:
    """The address at which the ssh that has started this process has met the machine; empty without one."""
    words = os.environ.get("SSH_CONNECTION", "").split()
    return words[2] if len(words) == 4 else ""


def port_problem(port: int) -> str:
    """Why this machine cannot serve on a port; empty where it can."""
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind(("", port))
            tried.listen()
        except OSError as error:
            return error.strerror or str(error)
    return ""


if __name__ == "__main__":
    raise SystemExit("vir.cluster.probe is a part of the library; the program is vir-check")
