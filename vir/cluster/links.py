"""How fast the links between machines are: all-reduces of pairs, in the rounds of a tournament.

One process of each machine takes part, which needs no launcher. The first machine serves a store that the others meet
at; whoever does not get there is left out. In each round every machine is in one pair, and all pairs measure at the
same time, so that the time grows with the rounds, not with the pairs. Each pair is a process group of its own: where
two do not reach each other, the rest goes on.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from statistics import median
from typing import TYPE_CHECKING, Any, Iterable, Mapping, Sequence

from vir.cluster.preflight import Finding
from vir.interfaces import GLOO, NCCL, addresses

if TYPE_CHECKING:  # whoever only judges does without torch
    from torch import Tensor
    from torch.distributed import Store

ROUNDS = 12
"""At most: all pairs of 12 machines, and of more as many as they have time for."""
SECONDS = 18.0
"""That the measuring may take, but for what is begun then."""
_JOIN_S, _REACH_S, _WAIT_S, _PAIR_S = 7.0, 2.0, 3.0, 6.0
"""Until all have met; of one connection; for one that is late; of a pair."""
_PINGS, _ENOUGH_S, _REPEATS = 20, 0.1, 3
_FIRST_BYTES, _MOST_BYTES = 64 << 10, 64 << 20
_SLOW = 3
"""A pair is slow that takes this many times longer than others."""
_LATE, _LATE_MS = 10, 10.0
"""Or answers this many times later, if that is more than these milliseconds."""
_LEAST_GB_S = 0.01
"""What is slow in any case: 100 megabits."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a machine must know to take part."""

    me: int
    """Its number; 0 serves the store."""
    count: int
    addresses: tuple[str, ...]
    """At which the first machine may be reached, the likeliest first."""
    port: int
    """At which it listens."""
    interface: str = ""
    """To take on all machines; empty: that which leads to the first one."""


@dataclass(frozen=True, order=True)
class Pair:
    """What two machines, by their numbers, have measured."""

    first: int
    second: int
    gb_s: float = 0.0
    """Bytes of an all-reduce by its seconds, 1e9 a second."""
    ms: float = 0.0
    """Of an all-reduce of one number."""
    problem: str = ""


def listen() -> socket.socket:
    """A port of all interfaces at which others can try to reach this machine."""
    listener = socket.socket()
    listener.bind(("", 0))
    listener.listen(512)
    return listener


def rounds(count: int, most: int = ROUNDS) -> list[list[tuple[int, int]]]:
    """Pairs of numbers below `count`, each number once in a round, no pair twice; all of them if `most` allows it.

    The circle method: two meet in round r where the sum of their numbers is r, modulo the players but for the last one.
    """
    players = count + count % 2 - 1
    found = []
    for number in sorted({round(at * players / min(most, players)) for at in range(min(most, players))} if count > 1
                         else ()):
        meets = {player: (number - player) % players for player in range(players)}
        pairs = {tuple(sorted((player, players if meets[player] == player else meets[player])))
                 for player in range(players)}
        found.append(sorted((one, other) for one, other in pairs if other < count))
    return found


# ---- on each machine


def measure(plan: Plan, listener: socket.socket) -> dict[str, Any]:
    """Meet the others and measure this machine's pairs. Changes this process's choice of interfaces.

    Returns:
        JSON: `pairs`, what this machine has measured as the first of a pair; `unreached`, why it does not reach the
        first machine, or an empty string.
    """
    until = time.monotonic() + SECONDS
    try:
        store, own = _meet(plan, listener)
        members = _members(plan, store, own, listener)
    except (OSError, RuntimeError) as error:
        return {"pairs": [], "unreached": str(error).splitlines()[0]}
    if plan.me not in members:
        return {"pairs": [], "unreached": f"it came there later than the {_JOIN_S:g} s that the others wait"}
    _take_interface(plan.interface or next((name for name, address in addresses().items() if address == own), ""))
    pairs = []
    for number, of_round in enumerate(rounds(len(members))):
        for one, other in of_round:
            first, second = members[one], members[other]
            if plan.me in (first, second) and time.monotonic() + _PAIR_S < until:
                pairs += _pair(store, number, first, second, plan.me)
    _leave(plan, store, members, until)
    return {"pairs": [asdict(pair) for pair in pairs if pair.first == plan.me], "unreached": ""}


def _meet(plan: Plan, listener: socket.socket) -> tuple[Store, str]:
    """The store and the address of this machine that leads to it. Raises OSError where the first is not reached."""
    from torch.distributed import TCPStore

    timeout = timedelta(seconds=_JOIN_S)
    if plan.me == 0:
        store = TCPStore("localhost", listener.getsockname()[1], is_master=True, wait_for_workers=False,
                         timeout=timeout, master_listen_fd=listener.detach())
        return store, plan.addresses[0]
    refused, until = [], time.monotonic() + _JOIN_S - _REACH_S
    for address in plan.addresses:
        if time.monotonic() > until:
            break
        try:
            with socket.create_connection((address, plan.port), _REACH_S) as tried:
                own = tried.getsockname()[0]
            return TCPStore(address, plan.port, is_master=False, wait_for_workers=False, timeout=timeout), own
        except (OSError, RuntimeError) as error:
            refused.append(f"{address}: {str(error).splitlines()[0]}")
    raise OSError(", ".join(refused))


def _members(plan: Plan, store: Store, own: str, listener: socket.socket) -> list[int]:
    """Who has come within the bound, in order; the first machine says it."""
    port = plan.port if plan.me == 0 else listener.getsockname()[1]
    store.set(f"at-{plan.me}", json.dumps([own, port]))
    if plan.me:
        return json.loads(_get(store, "members", 2 * _JOIN_S))
    until = time.monotonic() + _JOIN_S
    missing = set(range(plan.count))
    while missing and time.monotonic() < until:
        missing = {number for number in missing if not store.check([f"at-{number}"])}
        time.sleep(0.02)
    members = sorted(set(range(plan.count)) - missing)
    store.set("members", json.dumps(members))
    return members


def _leave(plan: Plan, store: Store, members: list[int], until: float) -> None:
    """The first machine serves until the others have ended."""
    with suppress(RuntimeError):
        store.set(f"left-{plan.me}", "")
        while plan.me == 0 and time.monotonic() < until and not store.check([f"left-{other}" for other in members]):
            time.sleep(0.02)


def _get(store: Store, key: str, seconds: float) -> str:
    store.wait([key], timedelta(seconds=seconds))
    return store.get(key).decode()


def _take_interface(name: str) -> None:
    if name:
        os.environ.update({GLOO: name, NCCL: f"={name}"})


def _pair(store: Store, number: int, first: int, second: int, me: int) -> list[Pair]:
    """This machine's part of one pair; whatever goes wrong is its problem. None where the other does not come: what
    keeps it is found elsewhere."""
    other = second if me == first else first
    try:
        store.set(f"round-{number}-{me}", "")
        store.wait([f"round-{number}-{other}"], timedelta(seconds=_WAIT_S))
    except RuntimeError:
        return []
    try:
        with socket.create_connection(tuple(json.loads(store.get(f"at-{other}"))), _REACH_S):
            pass
        gb_s, ms = _all_reduces(store, f"pair-{number}-{first}", int(me == second))
        return [Pair(first, second, round(gb_s, 4), round(ms, 3))]
    except (OSError, RuntimeError) as error:
        return [Pair(first, second, problem=str(error).splitlines()[0])]


def _all_reduces(store: Store, name: str, rank: int) -> tuple[float, float]:
    """GB/s and milliseconds, of a process group of two."""
    import torch
    import torch.distributed as dist

    cuda = torch.cuda.is_available()
    where = torch.device("cuda", 0) if cuda else torch.device("cpu")
    os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"  # a wait that is too long is an error here, and no end of the process
    dist.init_process_group("nccl" if cuda else "gloo", store=dist.PrefixStore(name, store), rank=rank, world_size=2,
                            timeout=timedelta(seconds=_PAIR_S), device_id=where if cuda else None)
    try:
        one = torch.ones(1, device=where)
        ms = 1000 * median(_seconds(one) for _ in range(_PINGS))
        size = _FIRST_BYTES
        while True:
            data = torch.ones(size // 4, device=where)
            took = torch.tensor([min(_seconds(data) for _ in range(_REPEATS))], device=where)
            dist.all_reduce(took, op=dist.ReduceOp.MAX)  # both must go on, or neither
            if took.item() > _ENOUGH_S or size >= _MOST_BYTES:
                return size / took.item() / 1e9, ms
            size *= 4
    finally:
        dist.destroy_process_group()


def _seconds(tensor: Tensor) -> float:
    import torch.distributed as dist

    began = time.perf_counter()
    dist.all_reduce(tensor)
    tensor[0].item()  # on a GPU the call alone waits for nothing
    return time.perf_counter() - began


# ---- what it means


def judge(hosts: Sequence[str], pairs: Iterable[Pair], unreached: Mapping[str, str]) -> list[Finding]:
    """The slow link and the slow machine, and those that do not reach each other.

    A machine is named where all its pairs are bad and it has several; else the two ends of a bad pair are, in a finding
    on the one of them that has more of these, or comes later: without it the others are good.

    Args:
        unreached: by host, why it did not reach the first of the hosts.
    """
    findings = _unreached(hosts, unreached)
    pairs = list(pairs)
    of_each = _of_each(hosts, pairs)
    usual = _usual(of_each)
    bad = {(pair.first, pair.second): said for pair in pairs if (said := _why_bad(pair, usual))}
    for number, host in enumerate(hosts):
        of_host = [(pair.first, pair.second) for pair in of_each[number]]
        if len(of_host) > 1 and all(pair in bad for pair in of_host) and len(of_host) < len(pairs):
            findings.append(Finding(host, "slow node", f"all its links are bad: to {_other(hosts, of_host[0], number)} "
                                    f"{bad[of_host[0]]}; look at its cable, card and switch port, or leave it out"))
            for pair in of_host:
                del bad[pair]
    while bad:
        links_of = Counter(number for pair in bad for number in pair)
        worst = max(links_of, key=lambda number: (links_of[number], number))
        for pair in [pair for pair in bad if worst in pair]:
            findings.append(Finding(hosts[worst], "slow link", f"the link between {hosts[pair[0]]} and {hosts[pair[1]]}"
                                    f": {bad.pop(pair)}; look at cables and switch, or leave one of them out"))
    return findings


def _unreached(hosts: Sequence[str], unreached: Mapping[str, str]) -> list[Finding]:
    way = "see that the address is right and routed and no firewall is between, or give --interface"
    if 1 < len(hosts) - 1 == len(unreached):  # it is the first one that is not reached
        said = next(iter(unreached.values()))
        return [Finding(hosts[0], "interface", f"no other machine can connect to it ({said}); {way}")]
    return [Finding(host, "interface", f"it cannot connect to {hosts[0]} ({said}); {way}")
            for host, said in unreached.items()]


def _other(hosts: Sequence[str], pair: tuple[int, int], number: int) -> str:
    return hosts[pair[0] if pair[1] == number else pair[1]]


def _of_each(hosts: Sequence[str], pairs: Iterable[Pair]) -> list[list[Pair]]:
    """By number of a machine the pairs that it is in."""
    found: list[list[Pair]] = [[] for _ in hosts]
    for pair in pairs:
        found[pair.first].append(pair)
        found[pair.second].append(pair)
    return found


def _usual(of_each: Iterable[Sequence[Pair]]) -> tuple[float, float]:
    """GB/s and milliseconds of the middle machine in its best pair: one bad machine is in most pairs of three."""
    good = ([pair for pair in of_host if not pair.problem] for of_host in of_each)
    measured = [of_host for of_host in good if of_host]
    if not measured:
        return 0.0, 0.0
    return (median(max(pair.gb_s for pair in of_host) for of_host in measured),
            median(min(pair.ms for pair in of_host) for of_host in measured))


def _why_bad(pair: Pair, usual: tuple[float, float]) -> str:
    """Empty for a good pair."""
    gb_s, ms = usual
    if pair.problem:
        return f"no all-reduce ({pair.problem})"
    if pair.gb_s < max(gb_s / _SLOW, _LEAST_GB_S) or pair.ms > max(_LATE * ms, _LATE_MS):
        return f"{pair.gb_s:.3g} GB/s and {pair.ms:.3g} ms, where {gb_s:.3g} GB/s and {ms:.3g} ms are usual here"
    return ""


def summaries(hosts: Sequence[str], pairs: Sequence[Pair]) -> dict[str, str]:
    """By host its middle GB/s and milliseconds."""
    found = {}
    for host, of_host in zip(hosts, _of_each(hosts, (pair for pair in pairs if not pair.problem))):
        if of_host:
            found[host] = (f"{median(pair.gb_s for pair in of_host):.2g} GB/s, "
                           f"{median(pair.ms for pair in of_host):.2f} ms")
    return found


if __name__ == "__main__":
    raise SystemExit("vir.cluster.links is a part of the library; the program is vir-check")
