"""The deepspeed launcher, on this machine or on those of a hostfile: its command, and what it needs around it.

What its runner for pdsh lacks is made up for here: it passes words of the command to a remote shell almost as they are,
changes to a folder without quoting it, forwards variables of a few names only, and asks for the address of the first
node by an ssh without the options that pdsh was given.
"""

from __future__ import annotations

import os
import random
import re
import socket
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Iterator, Mapping

from vir import interfaces, launcher, status
from vir.cluster import hosts
from vir.cluster.supervisor import Start, python_path
from vir.errors import SettingsError
from vir.status import Status

_DEFAULT_HOSTFILE = Path("/job/hostfile")
"""Where deepspeed looks for one by itself."""
_WITH_VALUE = ("--include", "--exclude", "--num_nodes", "--num_gpus", "--node_rank", "--launcher", "--launcher_args",
               "--ssh_port", "--venv_script", "--bind_core_list", "--enable_each_rank_log", "--log_level")
_KINDS: dict[str, Callable[[str], object]] = {
    "--num_nodes": int, "--num_gpus": int, "--node_rank": int, "--ssh_port": hosts.port,
    "--enable_each_rank_log": os.path.abspath, "--venv_script": os.path.abspath}  # nodes start in another folder
_SWITCHES = ("--no_ssh", "--force_multi", "--bind_cores_to_rank", "--quiet")
_PLAIN = re.compile(r"[\w@%+=:,./-]*")
"""What the runner leaves as it is when it exports a variable; all else it puts between double quotes."""


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("-H", "--hostfile", type=Path, metavar="FILE",
                        help="machines of the run, a line `host slots=GPUS` for each; without it this machine alone")
    parser.add_argument("--interface", metavar="NAME",
                        help="network interface that joins the machines, for NCCL and gloo; found when not given")
    parser.add_argument("--master_addr", "--master-addr", metavar="ADDRESS",
                        help="of the first machine; that of the interface, or its first one, when not given")
    parser.add_argument("--master_port", "--master-port", type=hosts.port, metavar="PORT",
                        help="of rank 0's store; one that is free when not given")
    of_deepspeed = parser.add_argument_group("options of deepspeed's own launcher, see deepspeed --help")
    for flag in _WITH_VALUE:
        names = [flag, "--num_accelerators"] if flag == "--num_gpus" else [flag]
        of_deepspeed.add_argument(*names, metavar="VALUE", type=_KINDS.get(flag, str))
    for flag in _SWITCHES:
        of_deepspeed.add_argument(flag, action="store_true")


class DeepSpeedLaunch:
    """A launch by deepspeed.

    Args:
        args: what `add_options` has read, and `max_restarts`.
        words: options of vir.train.
    """

    def __init__(self, args: Namespace, words: list[str]) -> None:
        self.max_restarts, self.passes_codes_on = args.max_restarts, True
        self._args, self._words = args, words
        hostfile = args.hostfile or (_DEFAULT_HOSTFILE if _DEFAULT_HOSTFILE.is_file() else None)
        self._hosts = active_hosts(hosts.read_hostfile(hostfile), args) if hostfile else {}
        self._hostfile = hostfile
        _check_hands(args, bool(hostfile))
        args.force_multi = args.force_multi or len(self._hosts) == 1 and not all(map(hosts.is_here, self._hosts))
        self._by_ssh = bool(self._hosts) and (len(self._hosts) > 1 or args.force_multi) and not args.no_ssh
        self._by_pdsh = self._by_ssh and args.launcher in (None, "pdsh")
        if self._by_pdsh and " " in sys.executable:
            raise SettingsError(f"{sys.executable} has a space in its path, which deepspeed does not quote for the "
                                "shells of other nodes; install into a folder without one")

    def unreachable(self) -> dict[str, str]:
        """Hosts that do not answer, and why. mpirun finds that out by itself, and may not need ssh."""
        return hosts.unreachable(self._hosts, self._args.ssh_port) if self._by_pdsh else {}

    def ended(self, found: Status) -> None:
        """Nothing is to be done."""

    @contextmanager
    def start(self, name: str, file: Path) -> Iterator[Start]:
        """How to start the ranks; what is forwarded to other nodes lies in a file while the block runs."""
        port = self._args.master_port or self._free_port()
        command, environment = self._command(port), {status.FILE: str(file)} | self._environment(name, port)
        if not self._by_ssh:
            yield Start(command, environment, Path.cwd())
            return
        forwarded = self._forwarded(environment)
        with tempfile.NamedTemporaryFile("w", prefix=".deepspeed_env-") as exports:  # for this user's eyes alone
            exports.writelines(f"{name}={value}\n" for name, value in forwarded.items())
            exports.flush()
            # `cd` to a folder with spaces fails over there; ranks go where VIR_FOLDER says.
            # The runner exports variables of some names by itself, for all to see.
            yield Start(command, environment | {"DS_ENV_FILE": exports.name},
                        Path("/") if self._by_pdsh else Path.cwd(), hosts.secrets(os.environ))

    def _command(self, port: int) -> list[str]:
        args = self._args
        words = [sys.executable, "-m", "deepspeed.launcher.runner", f"--master_port={port}"]
        if self._hostfile:
            words += [f"--hostfile={self._hostfile.absolute()}", "--no_ssh_check",
                      f"--master_addr={self._master_addr()}"]
        for flag in _WITH_VALUE:
            value = getattr(args, flag.lstrip("-"))
            words += [] if value is None else [f"{flag}={value}"]
        words += [flag for flag in _SWITCHES if getattr(args, flag.lstrip("-"))]
        own = [for_remote_shell(word) for word in self._words] if self._by_pdsh else self._words
        return [*words, "--module", "vir.train", *own]

    def _environment(self, name: str, port: int) -> dict[str, str]:
        found = {launcher.FOLDER: os.getcwd(), "PYTHONPATH": python_path()}
        if not self._args.no_ssh:  # then other nodes are started by other hands
            found[launcher.RUN_ID] = name
        if self._args.interface:
            found |= {interfaces.NCCL: self._args.interface, interfaces.GLOO: self._args.interface}
        if self._by_ssh and not self._by_pdsh:  # mpirun says where a rank is, but not where rank 0 is
            found |= {"MASTER_ADDR": self._master_addr(), "MASTER_PORT": str(port)}
        return found

    def _forwarded(self, environment: Mapping[str, str]) -> dict[str, str]:
        """Variables for the other nodes: those of the user's own files win over those of this process."""
        found = {**hosts.forwarded(os.environ, _of_users_files()), **environment}
        del found["PYTHONPATH"]  # the runner forwards it itself
        if self._by_pdsh:
            return {name: in_double_quotes(value) for name, value in found.items() if "\n" not in value}
        plain = {name: value for name, value in found.items() if _PLAIN.fullmatch(value)}  # others come with quotes
        lost = sorted(environment.keys() - plain.keys() - {"PYTHONPATH"})
        if lost and not all(map(hosts.is_here, self._hosts)):
            raise SettingsError(f"--launcher {self._args.launcher} cannot tell other nodes {lost[0]}="
                                f"{environment[lost[0]]}; give folders without spaces, or leave --launcher out")
        return plain

    def _master_addr(self) -> str:
        """Of the first host, as the others reach it."""
        if self._args.master_addr or not self._by_ssh:
            return self._args.master_addr or "127.0.0.1"
        first = next(iter(self._hosts))
        if self._args.print:
            return f"ADDRESS_OF_{first}"
        ask = f"ip -4 -o address show dev {self._args.interface}" if self._args.interface else "hostname -I"
        said, problem = hosts.say(first, ask, self._args.ssh_port)
        found = re.search(r"\b\d+(?:\.\d+){3}\b", said)
        if found is None:
            raise SettingsError(f"{first} does not tell its address by `{ask}` ({problem or 'no answer'}); "
                                "give --master_addr" + (", or another --interface" * bool(self._args.interface)))
        self._args.master_addr = found[0]
        return found[0]

    def _free_port(self) -> int:
        """For one start; a new one each time, for the last one may still be waiting to close."""
        if self._by_ssh:
            return random.SystemRandom().randrange(20000, 30000)  # below those of outgoing connections
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return int(probe.getsockname()[1])


def active_hosts(found: dict[str, int], args: Namespace) -> dict[str, int]:
    """Those of a hostfile that deepspeed's --include, --exclude and --num_nodes leave."""
    def named(words: str | None) -> dict[str, str]:
        return {host: slots for host, _, slots in (part.partition(":") for part in (words or "").split("@") if part)}

    included, excluded = named(args.include), named(args.exclude)
    for flag, given in (("include", included), ("exclude", excluded)):
        if unknown := given.keys() - found.keys():
            raise SettingsError(f"--{flag} names {', '.join(sorted(unknown))}; the hostfile has {', '.join(found)}")
    left = {host: slots for host, slots in found.items()
            if (not included or host in included) and excluded.get(host) != ""}
    count = len(left) if args.num_nodes is None else args.num_nodes
    if not 0 < count <= len(left):
        raise SettingsError(f"--num_nodes is {count}; the hostfile has {len(left)} hosts")
    return dict(list(left.items())[:count])


def _check_hands(args: Namespace, has_hostfile: bool) -> None:
    """Nodes that other hands start must be told where they meet: each would choose a port of its own."""
    if (args.no_ssh or args.node_rank is not None) and not (
            args.no_ssh and args.node_rank is not None and has_hostfile and args.master_addr and args.master_port):
        raise SettingsError("without ssh the script is started on each node, with --hostfile, --no_ssh, --node_rank, "
                            "--master_addr and --master_port; give them all, the last two the same on each")
    if args.master_addr and not has_hostfile:
        raise SettingsError(f"--master_addr {args.master_addr} is for several nodes; give their --hostfile, too")


def for_remote_shell(word: str) -> str:
    """The word as deepspeed's runner must get it, so that the shell of the other node sees what was given.

    The runner puts words with a space between double quotes, in which it escapes these alone, and leaves the others as
    they are; pdsh replaces %h, %n and %u.
    """
    if " " in word:
        word = re.sub(r"([\\$`])", r"\\\1", word)
    elif not re.fullmatch(r"[\w@+=:,./-]+", word):
        word = "'" + word.replace("'", "'\\''") + "'"
    return word.replace("%", "%%")


def in_double_quotes(value: str) -> str:
    """A value that the runner puts between double quotes where it is not plain, without escaping anything; pdsh
    replaces %h, %n and %u."""
    quoted = value if _PLAIN.fullmatch(value) else re.sub(r'([\\$`"])', r"\\\1", value)
    return quoted.replace("%", "%%")


def _of_users_files() -> dict[str, str]:
    """From .deepspeed_env in the home folder and in this one, and from the file that DS_ENV_FILE names, without the
    empty lines and comments on which deepspeed stumbles."""
    name = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
    found = {}
    for path in (Path.home() / name, Path.cwd() / name):
        for line in path.read_text().splitlines() if path.is_file() else ():
            key, _, value = line.partition("=")
            if value and not key.lstrip().startswith("#"):
                found[key.strip()] = value.strip()
    return found
