"""Rounds of pairs, what they measure between processes of this machine, and which link or machine is named."""

import itertools
import json
import subprocess
import sys
import time

import pytest

from support.launchers import ROOT
from vir.cluster import links
from vir.cluster.links import Pair, judge, rounds, summaries

HOSTS = ["node-a", "node-b", "node-c", "node-d"]

PROGRAM = """
import json, sys
from vir.cluster import links
import torch.distributed
listener = links.listen()
print(listener.getsockname()[1], flush=True)
plan = json.loads(sys.stdin.readline())
print(json.dumps(links.measure(links.Plan(**{**plan, "addresses": tuple(plan["addresses"])}), listener)))
"""


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 7, 12, 13])
def test_all_pairs_meet_once_and_each_once_in_a_round(count):
    found = rounds(count, most=100)
    for of_round in found:
        players = list(itertools.chain(*of_round))
        assert len(players) == len(set(players)) >= count - 1
    assert sorted(itertools.chain(*found)) == list(itertools.combinations(range(count), 2))
    assert len(found) == (0 if count < 2 else count - 1 + count % 2)


@pytest.mark.parametrize("count", [64, 257, 4096])
def test_many_machines_have_no_more_rounds_and_everybody_is_in_them(count):
    found = rounds(count)
    assert len(found) == links.ROUNDS
    pairs = list(itertools.chain(*found))
    assert len(pairs) == len(set(pairs)) == links.ROUNDS * (count // 2)
    games = [sum(number in pair for pair in pairs) for number in (0, 1, count - 1)]
    assert all(links.ROUNDS - 1 <= each <= links.ROUNDS for each in games)


def ready():
    """A process that has imported what it needs and measures when it is told a plan."""
    return subprocess.Popen([sys.executable, "-c", PROGRAM], cwd=ROOT, text=True, stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE)


def test_those_who_come_measure_and_those_who_do_not_hold_up_nobody():
    """Of four the third never comes, and the fourth has a wrong port."""
    processes = [ready() for _ in range(3)]
    try:
        port, *_ = [int(process.stdout.readline()) for process in processes]
        plan = {"count": 4, "addresses": ["127.0.0.1"], "port": port}
        plans = [{**plan, "me": 0}, {**plan, "me": 1}, {**plan, "me": 3, "port": 1}]
        began = time.monotonic()
        for process, of_process in zip(processes, plans):
            process.stdin.write(json.dumps(of_process) + "\n")
            process.stdin.flush()
        found = [json.loads(process.communicate(timeout=60)[0]) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert time.monotonic() - began < links.SECONDS + links._JOIN_S + 10
    assert [told["unreached"] for told in found] == ["", "", "127.0.0.1: [Errno 111] Connection refused"]
    (pair,) = found[0]["pairs"]
    assert (pair["first"], pair["second"], pair["problem"]) == (0, 1, "") and found[1]["pairs"] == []
    assert 0.01 < pair["gb_s"] < 1000 and 0 < pair["ms"] < 1000


def all_pairs(count=4, **of_pairs):
    """Good pairs; `ab` and the like are what is said of others."""
    found = []
    for first, second in itertools.combinations(range(count), 2):
        more = of_pairs.get("abcd"[first] + "abcd"[second], {})
        found.append(Pair(first, second, **{"gb_s": 10.0 + first / 10, "ms": 0.05, **more}))
    return found


SLOW, LATE, BROKEN = {"gb_s": 1.0}, {"ms": 20.0}, {"problem": "timed out"}


@pytest.mark.parametrize("bad", [SLOW, LATE, BROKEN])
def test_a_bad_link_is_named_by_its_ends_and_one_of_them_left_out(bad):
    for count in (3, 4):
        (finding,) = judge(HOSTS[:count], all_pairs(count, ac=bad), {})
        assert (finding.host, finding.fact) == ("node-c", "slow link")
        assert finding.said.startswith("the link between node-a and node-c: ")
        assert finding.said.endswith("; look at cables and switch, or leave one of them out")


@pytest.mark.parametrize("bad", [SLOW, LATE, BROKEN])
@pytest.mark.parametrize("count", [3, 4])
def test_a_machine_whose_links_are_all_bad_is_named_alone(bad, count):
    pairs = all_pairs(count, ab=bad, bc=bad, bd=bad)
    (finding,) = judge(HOSTS[:count], pairs, {})
    assert (finding.host, finding.fact) == ("node-b", "slow node")
    assert finding.said.startswith("all its links are bad: to node-a ")


def test_what_is_said_of_a_bad_link():
    said = [judge(HOSTS[:3], all_pairs(3, ac=bad), {})[0].said for bad in (SLOW, BROKEN)]
    assert "1 GB/s and 0.05 ms, where 10.1 GB/s and 0.05 ms are usual here;" in said[0]
    assert "no all-reduce (timed out);" in said[1]


def test_links_that_are_a_little_slower_are_good():
    assert judge(HOSTS, all_pairs(ac={"gb_s": 3.5}, bd={"ms": 9.0}), {}) == []
    assert judge(HOSTS[:2], [Pair(0, 1, 0.011, 5.0)], {}) == []
    assert judge(HOSTS, [], {}) == []


def test_a_single_link_is_bad_below_a_bound():
    (finding,) = judge(HOSTS[:2], [Pair(0, 1, 0.009, 5.0)], {})
    assert (finding.host, finding.fact) == ("node-b", "slow link")


def test_two_bad_links_of_one_machine_among_good_ones_leave_out_that_one():
    findings = judge(HOSTS, all_pairs(ab=SLOW, ac=SLOW), {})
    assert [(finding.host, finding.fact) for finding in findings] == [("node-a", "slow link")] * 2


def test_a_thousand_machines_are_judged_in_seconds():
    """A bad link of each tenth machine and a machine without a good one, among the pairs that are measured."""
    hosts = [f"node-{number}" for number in range(1000)]
    pairs = [Pair(first, second, 1.0 if second % 10 == 0 or first == 7 or second == 7 else 10.0, 0.05)
             for of_round in rounds(1000) for first, second in of_round]
    began = time.monotonic()
    findings = judge(hosts, pairs, {})
    assert summaries(hosts, pairs)["node-7"] == "1 GB/s, 0.05 ms"
    assert time.monotonic() - began < 5
    assert [finding.fact for finding in findings if finding.host == "node-7"] == ["slow node"]


def test_who_does_not_reach_the_first_is_named_and_the_first_where_nobody_does():
    way = "; see that the address is right and routed and no firewall is between, or give --interface"
    assert [str(finding) for finding in judge(HOSTS, [], {"node-c": "10.0.0.1: timed out"})] == [
        f"node-c: it cannot connect to node-a (10.0.0.1: timed out){way}"]
    assert [str(finding) for finding in judge(HOSTS, [], {host: "x" for host in HOSTS[1:]})] == [
        f"node-a: no other machine can connect to it (x){way}"]
    assert [finding.host for finding in judge(HOSTS[:2], [], {"node-b": "x"})] == ["node-b"]


def test_the_summary_is_of_the_middle_pair():
    assert summaries(HOSTS[:3], [Pair(0, 1, 1.0, 0.1), Pair(0, 2, 3.0, 0.3), Pair(1, 2, problem="x")]) == {
        "node-a": "2 GB/s, 0.20 ms", "node-b": "1 GB/s, 0.10 ms", "node-c": "3 GB/s, 0.30 ms"}
