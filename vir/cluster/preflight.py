"""What is wrong with machines, by their facts: each is compared with the others, most of which are right."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from statistics import median
from typing import Any, Iterable, Mapping, Sequence

from vir.cluster.probe import NO_ANSWER, Facts
from vir.config import differences

_FREE_BYTES = 5e9
"""Below it few checkpoints of a small model fit: one of ViR-B takes 1.5 GB."""
_SPEED, _SLOWEST, _SHARE = 100e6, 2e6, 4
"""Bytes a second: a disk may be slower than the first number if it is no more than _SHARE times slower than the middle
one, and never slower than the second. All write at the same time, as they do in a checkpoint."""
CLOCK_S = 60.0
"""What a clock may be off."""
DEEPSPEED = "the DeepSpeed JSON"
"""The name of what it says among the settings."""
NO_INDEX = ""
"""Takes the place of a fingerprint among facts."""
LOCAL = frozenset(("data.train", "data.val", "data.cache", "data.cache_bytes", "data.index_dir", "data.workers",
                   "data.prefetch", "data.lanes", "data.window"))
"""Settings that may differ by machine; what they lead to, the images and their order, is compared by itself."""


@dataclass(frozen=True, order=True)
class Finding:
    """What is wrong with a machine, and the way out."""

    host: str
    fact: str
    """One word for a table."""
    said: str

    def __str__(self) -> str:
        return f"{self.host}: {self.said}"


def judge(nodes: Mapping[str, Facts], interface: str = "", port: int = 0) -> list[Finding]:
    """All findings on machines that have answered.

    Args:
        nodes: in the order of the hostfile. Facts have `offset`, too: seconds that the clock is ahead of the asker's.
        interface: of all machines; empty: each takes the one that leads to the first.
        port: that the first machine must have free; 0: any will do.
    """
    return [*_problems(nodes), *_versions(nodes), *_code(nodes), *_config(nodes), *_data(nodes), *_disk(nodes),
            *_devices(nodes), *_clock(nodes), *_interface(nodes, interface), *_port(nodes, port)]


def right(values: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """What most of the hosts have, among equals what the first of them has, and who has something else."""
    counts = Counter(map(repr, values.values()))
    best = max(values.values(), key=lambda value: counts[repr(value)], default=None)
    return best, [host for host, value in values.items() if value != best]


def others(values: Mapping[str, Any], best: Any) -> str:
    """`node-a` or `node-a and 30 more`: those who have it."""
    first, *more = [host for host, value in values.items() if value == best]
    return f"{first} and {len(more)} more" if more else first


def _told(nodes: Mapping[str, Facts], name: str) -> dict[str, Any]:
    return {host: facts[name] for host, facts in nodes.items() if name in facts}


def _problems(nodes: Mapping[str, Facts]) -> Iterable[Finding]:
    for host, facts in nodes.items():
        for part, problem in facts.get("problems", {}).items():
            way = "see what it waits for there" if problem.startswith(NO_ANSWER) else "mend that, or leave it out"
            yield Finding(host, part, f"its {part} could not be looked at: {problem}; {way}")


def _versions(nodes: Mapping[str, Facts]) -> Iterable[Finding]:
    told = _told(nodes, "versions")
    for host, cuda in _told(nodes, "cuda").items():
        told[host] = {**told.get(host, {}), "CUDA of torch": cuda}
    for name in sorted({name for versions in told.values() for name in versions}):
        of_each = {host: versions[name] for host, versions in told.items() if name in versions}
        best, wrong = right(of_each)
        for host in wrong:
            yield Finding(host, "environment", f"{name} is {of_each[host]}, but {best} on {others(of_each, best)}; "
                                               "install the same everywhere")


def _code(nodes: Mapping[str, Facts]) -> Iterable[Finding]:
    told = _told(nodes, "code")
    best, wrong = right(told)
    for host in wrong:
        yield Finding(host, "code", f"its vir package has digest {told[host][:12]}, but {best[:12]} on "
                                    f"{others(told, best)}; check out the same version, without changes of its own")


def _config(nodes: Mapping[str, Facts]) -> Iterable[Finding]:
    told = {host: without_local(config) for host, config in _told(nodes, "config").items()}
    best, wrong = right(told)
    for host in wrong:
        if changed := differences(best, told[host], skips=LOCAL):
            yield Finding(host, "config", f"its settings differ from those of {others(told, best)}: "
                                          f"{'; '.join(changed)}; see that it reads the same YAML files")


def without_local(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The settings that all machines must have alike."""
    return {key: without_local(value, f"{prefix}{key}.") if isinstance(value, Mapping) else value
            for key, value in settings.items() if prefix + key not in LOCAL}


def _data(nodes: Mapping[str, Facts]) -> Iterable[Finding]:
    told = _told(nodes, "data")
    for flag in sorted({flag for data in told.values() for flag in data}):
        of_each = {host: data.get(flag, "nothing") for host, data in told.items() if data.get(flag) != NO_INDEX}
        best, wrong = right(of_each)
        for host in wrong:
            yield Finding(host, "data", f"{flag} has other images there: fingerprint {of_each[host][:12]}, but "
                                        f"{best[:12]} on {others(of_each, best)}; copy the same shards there")


def notes(nodes: Mapping[str, Facts]) -> list[str]:
    """What could not be compared, and is no fault of a machine."""
    told = _told(nodes, "data")
    without = {flag: {host: NO_INDEX for host, data in told.items() if data.get(flag) == NO_INDEX}
               for flag in sorted({flag for data in told.values() for flag in data})}
    return [f"{flag} has no index yet on {others(hosts, NO_INDEX)}, so its images were not compared; make it by "
            "vir-index first, or the run makes it" for flag, hosts in without.items() if hosts]


def _disk(nodes: Mapping[str, Facts]) -> Iterable[Finding]:
    disks = _told(nodes, "disk")
    middle = median([disk["speed"] for disk in disks.values()] or [0.0])
    least = max(_SLOWEST, min(_SPEED, middle / _SHARE))
    for host, disk in disks.items():
        if disk["free"] < _FREE_BYTES:
            yield Finding(host, "disk", f"{disk['folder']} has {disk['free'] / 1e9:.1f} GB free, less than "
                                        f"{_FREE_BYTES / 1e9:.0f} GB for checkpoints; free some, or give another "
                                        "--output")
        if disk["speed"] < least:
            yield Finding(host, "disk", f"{disk['folder']} takes {disk['speed'] / 1e6:.1f} MB/s, where "
                                        f"{middle / 1e6:.1f} MB/s is usual here; each checkpoint waits for it: "
                                        "mend it, or give another --output")
    for host, sees in _told(nodes, "shared").items():
        if not sees:
            yield Finding(host, "shared", "it does not see in the output folder what the asking machine writes there; "
                                          "give --output a folder that all machines share")


def _devices(nodes: Mapping[str, Facts]) -> Iterable[Finding]:
    told = {host: counted(devices) for host, devices in _told(nodes, "devices").items()}
    best, wrong = right(told)
    for host in wrong:
        yield Finding(host, "devices", f"it has {told[host]}, but {others(told, best)} {best}; all ranks wait for the "
                                       "slowest: leave it out, or see why a device is missing")
    for host, facts in nodes.items():
        for number, errors in enumerate(facts.get("ecc", [])):
            if errors:
                yield Finding(host, "ECC", f"GPU {number} has had {errors} uncorrected memory errors since its driver "
                                           "was loaded; reset it or leave the machine out")
        if facts.get("xid"):
            yield Finding(host, "Xid", f"its driver has told of an error: {facts['xid'][-1]}; look it up in NVIDIA's "
                                       "list, and leave the machine out until it was restarted")


def counted(devices: Sequence[str]) -> str:
    """`8 x NVIDIA H100, 81559 MiB`, with + between kinds."""
    return " + ".join(f"{count} x {name}" for name, count in Counter(devices).items())


def clocks_off(offsets: Mapping[str, float]) -> dict[str, float]:
    """Seconds that the clocks of some are off the middle one, of two the first, where that is more than CLOCK_S."""
    values = list(offsets.values())
    middle = sorted(values)[(len(values) - 1) // 2] if len(values) > 2 else sum(values[:1])
    return {host: offset - middle for host, offset in offsets.items() if abs(offset - middle) > CLOCK_S}


def _clock(nodes: Mapping[str, Facts]) -> Iterable[Finding]:
    for host, off in clocks_off(_told(nodes, "offset")).items():
        yield Finding(host, "clock", f"its clock is {abs(off):,.0f} s {'ahead of' if off > 0 else 'behind'} the "
                                     f"others', more than {CLOCK_S:.0f} s; start its time service (chrony, ntpd)")


def _interface(nodes: Mapping[str, Facts], interface: str) -> Iterable[Finding]:
    for host, there in _told(nodes, "interfaces").items() if interface else ():
        if interface not in there:
            has = ", ".join(f"{name} {address}" for name, address in there.items()) or "none"
            yield Finding(host, "interface", f"it has no interface {interface} with an address, but {has}; give "
                                             "--interface a name that all machines have, or bring it up")


def _port(nodes: Mapping[str, Facts], port: int) -> Iterable[Finding]:
    for host, facts in list(nodes.items())[:1] if port else ():
        if problem := facts.get("port"):
            yield Finding(host, "port", f"the ranks cannot meet at its port {port}: {problem}; end what has it there, "
                                        "or give another --master_port")


# ---- the table


def table(nodes: Mapping[str, Facts], hosts: Sequence[str], links: Mapping[str, str],
          findings: Sequence[Finding]) -> str:
    """A line for each host with its facts and what is wrong in a word, and below it the findings.

    Args:
        links: what was measured, by host.
    """
    rows: list[tuple[str, ...]] = [("host", "torch", "code", "devices", "disk", "clock", "links", "verdict")]
    for host in hosts:
        facts = nodes.get(host, {})
        wrong = sorted({finding.fact for finding in findings if finding.host == host})
        rows.append((host, *_cells(facts), links.get(host, "-"), ", ".join(wrong) or "good"))
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join(lines + ([""] if findings else []) + list(map(str, findings)))


def _cells(facts: Facts) -> tuple[str, ...]:
    disk = facts.get("disk")
    return (facts.get("versions", {}).get("torch", "-"), facts.get("code", "-")[:8],
            counted(facts.get("devices", [])) or "-",
            f"{disk['free'] / 1e9:,.0f} GB, {disk['speed'] / 1e6:,.0f} MB/s" if disk else "-",
            f"{facts['offset']:+.0f} s" if "offset" in facts else "-")


if __name__ == "__main__":
    raise SystemExit("vir.cluster.preflight is a part of the library; the program is vir-check")
