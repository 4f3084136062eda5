"""What control groups of both versions leave a process, from files as the kernel has them."""

import math

import psutil
import pytest

from vir import control_groups

GB = 10 ** 9


def mounted_in(folder, lines, files):
    """The file of the process and the folder of the groups."""
    (folder / "cgroup").write_text(lines + "\n")
    for name, text in files.items():
        (folder / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "fs" / name).write_text(text + "\n")
    return folder / "cgroup", folder / "fs"


@pytest.mark.parametrize("lines, files, limit", [
    ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "150000 100000", "cpu.max": "400000 100000"}, 1.5),
    ("0::/host/docker-1", {"cpu.max": "250000 100000"}, 2.5),  # a container sees its own group at the root
    ("0::/", {}, math.inf), ("", {}, math.inf), ("0::/", {"cpu.max": "broken"}, math.inf),
    ("0::/\n2:cpu,cpuacct:/x", {"cpu/x/cpu.cfs_quota_us": "300000", "cpu/x/cpu.cfs_period_us": "100000"}, 3.0),
    ("2:cpu,cpuacct:/x", {"cpu,cpuacct/cpu.cfs_quota_us": "50000", "cpu,cpuacct/cpu.cfs_period_us": "100000"}, 0.5),
    ("2:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, math.inf),
    ("3:cpuset:/", {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, math.inf),
])
def test_what_control_groups_grant(tmp_path, lines, files, limit):
    proc, mounted = mounted_in(tmp_path, lines, files)
    assert control_groups.cpu_limit(proc, mounted) == limit
    assert control_groups.cpu_limit(tmp_path / "no such file", mounted) == math.inf


def memory(limit, used, *cached, version=2):
    """The files of a control group."""
    names = ("memory.max", "memory.current", "") if version == 2 else (
        "memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
    kinds = zip(("active", "inactive"), cached)
    return {names[0]: str(limit), names[1]: str(used),
            "memory.stat": "anon 1\nfile 7" + "".join(f"\n{names[2]}{kind}_file {size}" for kind, size in kinds)}


def inside(folder, files):
    return {f"{folder}/{name}": text for name, text in files.items()}


@pytest.mark.parametrize("lines, files, left", [
    ("0::/a/b", inside("a/b", memory("max", GB)) | inside("a", memory(8 * GB, 5 * GB)) | memory(64 * GB, GB), 3 * GB),
    ("0::/a/b", inside("a/b", memory(4 * GB, 3 * GB, GB, GB // 2)) | inside("a", memory(9 * GB, 5 * GB)), 5 * GB // 2),
    ("0::/host/docker-1", memory(2 * GB, GB), GB),                       # a container sees its own group at the root
    ("0::/", memory(GB, 2 * GB), 0), ("0::/", memory("max", GB), math.inf), ("", {}, math.inf),
    ("0::/", {"memory.max": "5"}, math.inf), ("0::/", {"memory.max": "5", "memory.current": "2"}, 3),
    ("0::/\n4:memory:/x/y", inside("memory/x", memory(6 * GB, 3 * GB, GB, version=1)) |
     inside("memory", memory(2 ** 63 - 4096, 9 * GB, version=1)), 4 * GB),
    ("4:memory:/x", inside("memory/x", memory(2 ** 63 - 4096, GB, version=1)), math.inf),
    ("3:cpu:/", inside("memory", memory(GB, 0, version=1)), math.inf),
])
def test_the_memory_that_control_groups_leave(tmp_path, monkeypatch, lines, files, left):
    proc, mounted = mounted_in(tmp_path, lines, files)
    assert control_groups.memory_left(proc, mounted) == left
    assert control_groups.memory_left(tmp_path / "no such file", mounted) == math.inf
    monkeypatch.setattr(control_groups, "memory_left", lambda: left)
    machine = psutil.virtual_memory().available
    assert control_groups.available_memory() == (left if left < machine else pytest.approx(machine, rel=0.2))
