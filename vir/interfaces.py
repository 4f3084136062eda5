"""Which network interface joins the machines of a run: gloo and NCCL are told it by variables."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from contextlib import suppress
from typing import Mapping

from vir.launcher import Place

NCCL, GLOO = "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"
_SIOCGIFADDR = 0x8915
"""The request for an interface's address (netdevice(7))."""


def set_gloos(place: Place, nodes: int) -> None:
    """Let gloo, which carries the stop flag, take the interface that NCCL was told, else the one to rank 0's machine.

    By itself it takes that of the host's name, which on many machines is 127.0.1.1 and leads nowhere from another node.
    GLOO_SOCKET_IFNAME, where it is set, is left as it is; NCCL finds its own by itself.

    Args:
        nodes: machines of the run.
    """
    if GLOO in os.environ:
        return
    said = os.environ.get(NCCL)
    name = meant(said, addresses()) if said else leads_to(place.address) if nodes > 1 else None
    if name:
        os.environ[GLOO] = name


def meant(said: str, names: Mapping[str, str]) -> str | None:
    """The first of a machine's interfaces that a value of NCCL_SOCKET_IFNAME means; None where it means none of them.

    Args:
        said: beginnings of names, `eth,ib`; whole names, `=eth0`; or all but these, `^docker` and `^=docker0`.
    """
    listed = [name for name in said.lstrip("^=").split(",") if name]
    all_but, whole = said.startswith("^"), said.lstrip("^").startswith("=")
    for interface in names:
        is_named = interface in listed if whole else interface.startswith(tuple(listed))
        if is_named != all_but and not (all_but and interface == "lo"):  # it leads to no other node
            return interface
    return None


def leads_to(host: str) -> str | None:
    """The interface by which this machine reaches a host, or that has the host's address; None where none is known.

    Where the name of this machine itself leads to its loopback, as /etc/hosts has it on Debian: that of the default
    route.
    """
    for aim in (host, "192.0.2.1"):  # the second is nobody's (RFC 5737): the way to it is the default one
        address = _own_address_towards(aim)
        for name, has in addresses().items():
            if has == address and name != "lo":
                return name
    return None


def addresses() -> dict[str, str]:
    """The network interfaces of this machine that have an IPv4 address, and it: without one gloo cannot begin."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            with suppress(OSError):
                answer = fcntl.ioctl(asking, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                found[name] = socket.inet_ntoa(answer[20:24])
    return found


def _own_address_towards(host: str) -> str | None:
    """Which of its addresses this machine would use to send to the host; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        with suppress(OSError):
            probe.connect((host, 9))
            return str(probe.getsockname()[0])
    return None
