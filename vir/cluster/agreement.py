"""What all ranks of a run must have in common, asked once when it begins: the code, the versions, the settings.

Ranks that differ in these would train on, and give other numbers, or wait for each other for ever. One gather of some
hundred bytes of each rank, and a second one of the settings only where they differ.
"""

from __future__ import annotations

import hashlib
import json
import socket
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any, Callable, Iterator, Mapping, Sequence

from vir import distributed
from vir.cluster.preflight import CLOCK_S, DEEPSPEED, LOCAL, clocks_off
from vir.cluster.probe import code_digest, versions
from vir.config import RunConfig, differences, to_dict
from vir.errors import SettingsError
from vir.log import log

_ELSEWHERE = LOCAL | {"output"}
"""That the output folder is one of all ranks is checked by a file in it."""
_PYTHON, _DRIVER = "python", "driver"
_TOLD = 4
"""Hosts that differ, named in one message."""


@dataclass(frozen=True)
class Word:
    """What a rank says of itself."""

    host: str
    code: str
    versions: Mapping[str, str]
    config: str
    """A digest of the settings."""
    clock: float = 0.0


def check(config: RunConfig, deepspeed_json: Mapping[str, Any]) -> None:
    """Collective, once the process group is there. A clock that is off, another NVIDIA driver and the last number of
    Python's version are warnings: a run does not depend on them.

    Raises:
        SettingsError: on all ranks the same, naming the hosts that differ from most of the others, and in what.
    """
    settings = {**to_dict(config), DEEPSPEED: deepspeed_json}
    distributed.barrier()  # so that the clocks are read at the same time
    words = distributed.gather(Word(socket.gethostname(), code_digest(), versions(), digest(settings), time.time()))
    if problem := different(words, lambda: distributed.gather(settings)):
        raise SettingsError(problem)
    for said in (*version_warnings(words), *clock_warnings(words)):
        log.warning(said)


def digest(settings: Mapping[str, Any]) -> str:
    """Of the settings that must be the same on all machines."""
    return hashlib.sha256(json.dumps(list(_flat(settings)), sort_keys=True).encode()).hexdigest()


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in sorted(settings.items()):
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif prefix + key not in _ELSEWHERE:
            yield prefix + key, value


def different(words: Sequence[Word], settings: Callable[[], Sequence[Mapping[str, Any]]]) -> str:
    """The first thing in which ranks differ, in a sentence; empty where they do not.

    Args:
        words: by rank.
        settings: of all ranks, asked only where the digests of these differ.
    """
    if said := _hosts_with_other(words, [word.code for word in words], lambda code: code[:12]):
        return (f"the code of vir is not the same on all hosts: its digest is {said}; check out the same version on "
                "all of them, without changes of their own")
    for name in filter(_DRIVER.__ne__, words[0].versions):
        if said := _hosts_with_other(words, [_version(word, name) for word in words], str):
            return f"{name} is not the same on all hosts: it is {said}; install the same version on all of them"
    of_all = [word.config for word in words]
    most = _most(of_all)
    wrong = [rank for rank, of_rank in enumerate(of_all) if of_rank != most]
    if not wrong:
        return ""
    told = settings()
    changed = differences(dict(told[of_all.index(most)]), dict(told[wrong[0]]), skips=_ELSEWHERE)
    return (f"the settings on {_named(words, wrong)} differ from those of {words[of_all.index(most)].host}: "
            f"{'; '.join(changed)}; start all ranks with the same options and the same YAML files")


def _version(word: Word, name: str) -> str:
    """As far as a run depends on it: of Python 3.11.7 this is 3.11."""
    version = word.versions.get(name, "none")
    return ".".join(version.split(".")[:2]) if name == _PYTHON else version


def version_warnings(words: Sequence[Word]) -> list[str]:
    """Of drivers, and of what `_version` leaves out."""
    found = [(name, _hosts_with_other(words, [word.versions.get(name, "none") for word in words], str))
             for name in (_PYTHON, _DRIVER) if name in words[0].versions]
    return [f"{name} is not the same on all hosts: it is {said}; where hosts behave differently, look at this first"
            for name, said in found if said]


def _hosts_with_other(words: Sequence[Word], values: Sequence[str], shown: Callable[[str], str]) -> str:
    """`X on node-b, but Y on node-a and the others`; empty where all values are the same."""
    most = _most(values)
    wrong = [rank for rank, value in enumerate(values) if value != most]
    if not wrong:
        return ""
    alike = [rank for rank in wrong if values[rank] == values[wrong[0]]]
    return (f"{shown(values[wrong[0]])} on {_named(words, alike)}, but {shown(most)} on "
            f"{words[values.index(most)].host}")


def _most(values: Sequence[str]) -> str:
    """The commonest one; among equals the first."""
    return Counter(values).most_common(1)[0][0]


def _named(words: Sequence[Word], ranks: Sequence[int]) -> str:
    hosts = list(dict.fromkeys(words[rank].host for rank in ranks))
    more = f" and {len(hosts) - _TOLD} more" if len(hosts) > _TOLD else ""
    return f"{', '.join(hosts[:_TOLD])}{more}"


def clock_warnings(words: Sequence[Word]) -> list[str]:
    """A line for each host whose clock is off that of the middle one."""
    offsets = {word.host: word.clock for word in words}
    return [f"the clock of {host} is {abs(off):,.0f} s {'ahead of' if off > 0 else 'behind'} the others', more than "
            f"{CLOCK_S:.0f} s: times in its log mislead; start its time service (chrony, ntpd)"
            for host, off in clocks_off(offsets).items()]


if __name__ == "__main__":
    raise SystemExit("vir.cluster.agreement is a part of the library; the program is vir-train")
