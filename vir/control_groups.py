"""What a container, a pod or a job of SLURM grants this process: the limits of its control groups."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

_OF_PROCESS, _MOUNTED = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
_NO_LIMIT = 1 << 60
"""Bytes of memory from which on a limit is none."""


def cpu_limit(proc: Path = _OF_PROCESS, mounted: Path = _MOUNTED) -> float:
    """CPU seconds per second that the control groups of this process grant it (docker --cpus, Kubernetes' limits).

    Infinite where none of them says so.
    """
    return min((_quota(group / "cpu.max") if is_second else
                _quota(group / "cpu.cfs_quota_us", group / "cpu.cfs_period_us")
                for is_second, group in _limiting("cpu", proc, mounted)), default=math.inf)


def available_memory() -> float:
    """Bytes that this process, and those that share its machine and its container with it, can still take."""
    return min(psutil.virtual_memory().available, memory_left())


def memory_left(proc: Path = _OF_PROCESS, mounted: Path = _MOUNTED) -> float:
    """Bytes that the control groups of this process still grant (docker --memory, Kubernetes' limits, SLURM's --mem).

    Cached files count as free, because the kernel gives them up before it kills. Infinite where no group has a limit.
    """
    return min((_left(group, "memory.max", "memory.current", "") if is_second else
                _left(group, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
                for is_second, group in _limiting("memory", proc, mounted)), default=math.inf)


def _limiting(controller: str, proc: Path, mounted: Path) -> Iterator[tuple[bool, Path]]:
    """The groups that may limit this process, and whether they are of version 2.

    One that is not mounted here is looked for at the root, which is where a container sees its own.
    """
    try:
        lines = [line.split(":", 2) for line in proc.read_text().splitlines()]
    except OSError:
        return
    for _, controllers, path in (line for line in lines if len(line) == 3):
        if not controllers:
            yield from ((True, group) for group in _groups(mounted, path))
        elif controller in controllers.split(","):
            for mount in {mounted / controller, mounted / controllers}:
                yield from ((False, group) for group in _groups(mount, path))


def _groups(mount: Path, path: str) -> list[Path]:
    """A control group and those around it, which limit it as well."""
    group = mount / path.lstrip("/")
    return [group, *(around for around in group.parents if around == mount or mount in around.parents)]


def _quota(*files: Path) -> float:
    """`max 100000` or `150000 100000` of one file, -1 or 150000 and 100000 of two."""
    try:
        quota, period, *_ = " ".join(file.read_text() for file in files).split()
        return int(quota) / int(period) if int(quota) > 0 and int(period) > 0 else math.inf
    except (OSError, ValueError):  # not there; max
        return math.inf


def _left(group: Path, limit: str, usage: str, prefix: str) -> float:
    """Of a control group's memory; version 1 says nearly 2^63 where there is no limit, version 2 `max`."""
    try:
        most, used = int((group / limit).read_text()), int((group / usage).read_text())
    except (OSError, ValueError):  # not there; max
        return math.inf
    if most >= _NO_LIMIT:
        return math.inf
    with suppress(OSError, ValueError):
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used -= sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
    return max(0, most - used)
