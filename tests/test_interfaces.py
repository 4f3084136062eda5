"""Which network interface gloo is told: of the machine, and of machines that share a name or a network alone."""

import os
import subprocess

import pytest

from vir import interfaces
from vir.interfaces import GLOO, NCCL
from vir.launcher import Place

NAMES = dict.fromkeys(["lo", "docker0", "eth0", "eth1", "ib0"], "10.0.0.1")
THERE = Place(1, 2, 0, "127.0.0.1", 29500)


@pytest.mark.parametrize("said, name", [
    ("eth0", "eth0"), ("eth", "eth0"), ("ib,eth1", "eth1"), ("=eth1", "eth1"), ("=eth", None), ("=ib0,eth1", "eth1"),
    ("^docker", "eth0"), ("^docker,lo", "eth0"), ("^=docker0,eth0", "eth1"), ("^docker,eth,ib", None), ("lo", "lo"),
    ("wlan", None)])
def test_the_interface_is_the_first_that_nccl_would_take(said, name):
    assert interfaces.meant(said, NAMES) == name


@pytest.fixture
def unsaid(monkeypatch):
    monkeypatch.delenv(NCCL, raising=False)
    monkeypatch.setenv(GLOO, "mine0")  # so that it is taken back
    monkeypatch.delenv(GLOO)


def test_gloo_is_left_alone_on_one_machine_without_a_word_to_nccl(unsaid):
    interfaces.set_gloos(THERE, nodes=1)
    assert GLOO not in os.environ


def test_gloo_takes_the_interface_that_nccl_was_told_and_leaves_one_of_its_own(unsaid, monkeypatch):
    monkeypatch.setenv(NCCL, "l")
    interfaces.set_gloos(THERE, nodes=1)
    assert os.environ[GLOO] == "lo"
    monkeypatch.setenv(NCCL, "eth")
    interfaces.set_gloos(THERE, nodes=2)
    assert os.environ[GLOO] == "lo"


def of_iproute(words):
    done = subprocess.run(["ip", "-4", "-o", *words], capture_output=True, text=True)
    if done.returncode:
        pytest.skip("needs ip (apt-get install iproute2)")
    return [line.split() for line in done.stdout.splitlines()]


def test_interfaces_and_their_addresses_are_those_of_iproute():
    first: dict[str, str] = {}
    for line in of_iproute(["address", "show"]):
        first.setdefault(line[1], line[3].partition("/")[0])
    assert interfaces.addresses() == first


def test_the_interface_that_leads_to_another_machine_is_that_of_the_route():
    if not (routes := of_iproute(["route", "show", "default"])):
        pytest.skip("this machine has no default route")
    name = routes[0][routes[0].index("dev") + 1]
    assert interfaces.leads_to("198.51.100.7") == name
    assert interfaces.leads_to(interfaces.addresses()[name]) == name  # rank 0's own machine
    assert interfaces.leads_to("127.0.1.1") == name  # its name leads to itself, as on Debian
    assert interfaces.leads_to("no.such.host.invalid") == name
