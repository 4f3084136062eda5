"""Several machines on one: each has its own network, name, processes, /dev/shm and sshd; files alone are shared.

A node is a set of Linux namespaces whose first process is its sshd, so that all of it ends with that one. The nodes
hang on a bridge that is in a network namespace of its own, too: nothing of this machine is changed, and several tests
may have the same nodes at the same time.
"""

import os
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Iterable

import psutil

from support.launchers import ROOT

WITHIN_S = 30
"""What a command about a node, or its sshd, may take."""
_NEEDS = {"ip": "iproute2", "tc": "iproute2", "sshd": "openssh-server", "ssh": "openssh-client",
          "ssh-keygen": "openssh-client", "pdsh": "pdsh", "unshare": "util-linux", "nsenter": "util-linux",
          "setpriv": "util-linux", "cc": "gcc"}
# libfaketime fails in clock_nanosleep with an absolute time, by which Python sleeps. Files lie on a shared folder: its
# server stamps them, so their times are right.
_CLOCK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
static time_t ahead(void) {
    const char *seconds = getenv("CLOCK_AHEAD");
    return seconds ? atol(seconds) : 0;
}
int clock_gettime(clockid_t clock, struct timespec *now) {
    int (*real)(clockid_t, struct timespec *) = dlsym(RTLD_NEXT, "clock_gettime");
    int done = real(clock, now);
    if (!done && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += ahead();
    return done;
}
int gettimeofday(struct timeval *now, void *zone) {
    int (*real)(struct timeval *, void *) = dlsym(RTLD_NEXT, "gettimeofday");
    int done = real(now, zone);
    if (!done) now->tv_sec += ahead();
    return done;
}
time_t time(time_t *into) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (into) *into = now.tv_sec;
    return now.tv_sec;
}
/* Deadlines by this clock are handed to the kernel by its own; those by another one are smaller than any date. */
static struct timespec real_deadline(const struct timespec *until) {
    struct timespec found = *until;
    if (found.tv_sec > 1000000000) found.tv_sec -= ahead();
    return found;
}
int pthread_cond_timedwait(pthread_cond_t *condition, pthread_mutex_t *mutex, const struct timespec *until) {
    int (*real)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *) = dlvsym(
        RTLD_NEXT, "pthread_cond_timedwait", "GLIBC_2.3.2");
    struct timespec deadline = real_deadline(until);
    if (!real) real = dlsym(RTLD_NEXT, "pthread_cond_timedwait");
    return real(condition, mutex, &deadline);
}
int sem_timedwait(sem_t *semaphore, const struct timespec *until) {
    int (*real)(sem_t *, const struct timespec *) = dlsym(RTLD_NEXT, "sem_timedwait");
    struct timespec deadline = real_deadline(until);
    return real(semaphore, &deadline);
}
"""
# Root may have a locked password (a container), which sshd without PAM takes for a locked account. A server of names
# cannot be reached from there: each look-up of an unknown one would wait for it.
_BOOT = """
set -e
hostname "$NODE"
mount --bind "$HOSTS" /etc/hosts
mount --bind "$SHADOW" /etc/shadow
mount --bind "$NAMES" /etc/nsswitch.conf
mount -t tmpfs tmpfs /run
mkdir /run/sshd
mount -t tmpfs tmpfs /dev/shm
ip link set lo up
exec "$SSHD" -D -e -f "$CONFIG"
"""
_SSHD = """
Port 22
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PermitRootLogin yes
StrictModes no
UsePAM no
PidFile none
"""
_SSH = """
Host *
User root
IdentityFile {folder}/user_key
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
LogLevel ERROR
"""


def lacking() -> str:
    """What is missing here to have nodes, for a skipped test to say; empty where nothing is."""
    if os.geteuid():
        return "needs to be root, to make network namespaces"
    if missing := sorted({package for program, package in _NEEDS.items() if shutil.which(program) is None}):
        return f"needs {', '.join(missing)} (apt-get install {' '.join(missing)})"
    tried = subprocess.run(["unshare", "-n", "-u", "-m", "-p", "-i", "--fork", "true"], capture_output=True, text=True)
    return "" if tried.returncode == 0 else f"needs the right to make namespaces: {tried.stderr.strip()}"


class NodeError(Exception):
    """A command about a node has failed; says which, and how."""


class Nodes:
    """From entering to leaving a block: the machines node-a, node-b, …, of which nothing stays.

    Args:
        folder: an empty one for keys and settings.
    """

    def __init__(self, folder: Path, count: int = 2):
        self.names = [f"node-{letter}" for letter in "abcdefgh"[:count]]
        self.addresses = {name: f"10.77.0.{number}" for number, name in enumerate(self.names, 1)}
        self.folder = folder
        self.hostfile = folder / "hostfile"
        self._first: dict[str, subprocess.Popen] = {}
        """The process that waits for each node's first one."""
        self._started: list[subprocess.Popen] = []
        self._clocks: dict[str, float] = {}
        self._switch: subprocess.Popen | None = None

    # ---- the whole

    def __enter__(self) -> "Nodes":
        self.folder.mkdir(parents=True, exist_ok=True)
        for key in ("host_key", "user_key"):
            _done(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / key)])
        (self.folder / "ssh_config").write_text(_SSH.format(folder=self.folder))
        (self.folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(
            f"{address} {name}\n" for name, address in self.addresses.items()))
        (self.folder / "shadow").write_text("root:*:19000:0:99999:7:::\n")
        (self.folder / "shadow").chmod(0o600)
        (self.folder / "nsswitch.conf").write_text("passwd: files\ngroup: files\nshadow: files\nhosts: files\n")
        self.write_hostfile(self.names)
        try:
            self._switch = _dies_with_us(["unshare", "-n", "sleep", "infinity"])
            _wait_until(lambda: _namespace(self._switch.pid, "net") != _namespace(os.getpid(), "net"), "the switch")
            self._on_switch("ip", "link", "add", "bridge", "type", "bridge")
            self._on_switch("ip", "link", "set", "bridge", "up")
            for name in self.names:
                self.power_on(name)
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *error) -> None:
        self._remove()

    def _remove(self) -> None:
        """Namespaces, links and mounts are gone with the last process that is in them."""
        for name in list(self._first):
            self.power_off(name)
        for process in (*self._started, *([self._switch] if self._switch else [])):
            with suppress(ProcessLookupError):
                process.kill()
            process.wait(timeout=WITHIN_S)

    def write_hostfile(self, names: list[str], path: Path | None = None) -> Path:
        """One slot on each of these."""
        path = path or self.hostfile
        path.write_text("".join(f"{name} slots=1\n" for name in names))
        return path

    # ---- what is done on a node

    @property
    def environment(self) -> dict[str, str]:
        """What a user of these nodes has set: how pdsh gets to them. Without what pytest itself was started with."""
        own = {name: value for name, value in os.environ.items()
               if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}
        return {**own, "PDSH_SSH_ARGS_APPEND": f"-F {self.folder / 'ssh_config'}"}

    def launch(self, node: str, words: list, log: Path, folder: Path = ROOT, **environment: str) -> subprocess.Popen:
        """Start a command there as a user of it would, its output to a file.

        Returns:
            A process whose end and exit code are those of the command. For signals ask `processes`.
        """
        faked = self._faked(node)
        words = [str(word) for word in words]
        with log.open("w") as file:
            self._started.append(_dies_with_us(
                [*self._entered(node), "env", "-C", str(folder), *words], stdout=file, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, env={**self.environment, **faked, **environment}))
        return self._started[-1]

    def processes(self, node: str, *words: str) -> list[psutil.Process]:
        """Those that run there beside its first one, with all these words in their command line; zombies are none."""
        if node not in self._first:
            return []
        first = self._pid(node)
        here, found = _namespace(first, "pid"), []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.pid != first and _namespace(process.pid, "pid") == here and (
                        process.status() != psutil.STATUS_ZOMBIE) and set(words) <= set(process.cmdline()):
                    found.append(process)
        return found

    def pythons(self, node: str, module: str) -> list[psutil.Process]:
        """Those that run a module by `python -m` there, and no shell, ssh or pdsh that is told to."""
        found = []
        for process in self.processes(node, module):
            with suppress(psutil.Error, IndexError):  # it ended meanwhile
                if "python" in process.cmdline()[0]:
                    found.append(process)
        return found

    def everything(self, nodes: Iterable[str]) -> dict[str, list[str]]:
        """What runs on some of the nodes, but for their sshd."""
        left = {}
        for node in sorted(set(nodes) & self._first.keys()):
            for process in self.processes(node):
                with suppress(psutil.Error):
                    left.setdefault(node, []).append(" ".join(process.cmdline())[:200])
        return left

    # ---- faults

    def cut(self, node: str) -> None:
        """As if its cable were pulled: nothing comes or goes, and no connection is told."""
        self._on_switch("ip", "link", "set", _port(node), "down")

    def join(self, node: str) -> None:
        self._on_switch("ip", "link", "set", _port(node), "up")

    def power_off(self, node: str) -> None:
        """Everything there ends by SIGKILL, and nobody hears of it: the link is down before."""
        with suppress(NodeError):  # it had not come so far
            self.cut(node)
        waits = self._first.pop(node)
        for process in (child.pid for child in _children(waits.pid)):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        waits.kill()
        waits.wait(timeout=WITHIN_S)
        with suppress(NodeError):  # it goes with the namespace, a little later
            self._on_switch("ip", "link", "delete", _port(node))

    def power_on(self, node: str) -> None:
        """Returns when its sshd answers."""
        self._configure(node)
        self._first[node] = _dies_with_us(
            ["unshare", "-n", "-u", "-m", "-p", "-i", "--fork", "--kill-child", "--mount-proc", "bash", "-c", _BOOT],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=(self.folder / f"{node}.log").open("a"),
            env={**os.environ, "NODE": node, "HOSTS": str(self.folder / "hosts"), "SSHD": shutil.which("sshd"),
                 "SHADOW": str(self.folder / "shadow"), "NAMES": str(self.folder / "nsswitch.conf"),
                 "CONFIG": str(self.folder / f"{node}.conf")})
        _wait_until(lambda: _children(self._first[node].pid), f"the first process of {node}")
        inside = str(self._pid(node))
        self._on_switch("ip", "link", "add", _port(node), "type", "veth", "peer", "name", "eth0", "netns", inside)
        self._on_switch("ip", "link", "set", _port(node), "master", "bridge", "up")
        for words in (["addr", "add", f"{self.addresses[node]}/24", "dev", "eth0"], ["link", "set", "eth0", "up"]):
            _done(["nsenter", "-t", inside, "-n", "ip", *words])
        _wait_until(lambda: self.says(node, "true"), f"sshd of {node}")

    def slow(self, node: str, mbit: float) -> None:
        """Let no more than so many megabits a second leave the node."""
        _done(["nsenter", "-t", str(self._pid(node)), "-n", "tc", "qdisc", "replace", "dev", "eth0", "root", "tbf",
               "rate", f"{mbit}mbit", "burst", "32kb", "latency", "200ms"])

    def clock(self, node: str, hours: float) -> None:
        """Let what is started there from now on see a clock that is so far ahead."""
        if not (self.folder / "clock.so").exists():
            (self.folder / "clock.c").write_text(_CLOCK)
            _done(["cc", "-shared", "-fPIC", "-o", self.folder / "clock.so", self.folder / "clock.c", "-ldl"])
        self._clocks[node] = hours
        self._configure(node)
        os.kill(self._pid(node), signal.SIGHUP)
        _wait_until(lambda: abs(float(self.says(node, "date +%s") or 0) - time.time() - 3600 * hours) < 60,
                    f"the clock of {node}")

    def says(self, node: str, command: str) -> str:
        """What a command says there, by ssh from the node itself; empty where it fails. `true` says its own name."""
        done = subprocess.run([*self._entered(node), "ssh", "-F", self.folder / "ssh_config", node,
                               f"{command} && echo {command if command == 'true' else ''}"],
                              capture_output=True, text=True, timeout=WITHIN_S, stdin=subprocess.DEVNULL)
        return done.stdout.strip() if done.returncode == 0 else ""

    # ---- pieces

    def _configure(self, node: str) -> None:
        kept = {name: os.environ[name] for name in ("TORCH_EXTENSIONS_DIR",) if name in os.environ}
        words = [f"{name}={value}" for name, value in {**kept, **self._faked(node)}.items()]
        (self.folder / f"{node}.conf").write_text(
            _SSHD.format(folder=self.folder) + (f"SetEnv {' '.join(words)}\n" if words else ""))

    def _faked(self, node: str) -> dict[str, str]:
        if not (hours := self._clocks.get(node)):
            return {}
        return {"LD_PRELOAD": str(self.folder / "clock.so"), "CLOCK_AHEAD": f"{3600 * hours:.0f}"}

    def _pid(self, node: str) -> int:
        """Of its sshd, by this machine's count."""
        (first,) = _children(self._first[node].pid)
        return first.pid

    def _entered(self, node: str) -> list[str]:
        return ["nsenter", "-t", str(self._pid(node)), "-n", "-u", "-m", "-p", "-i"]

    def _on_switch(self, *words: str) -> None:
        _done(["nsenter", "-t", str(self._switch.pid), "-n", *words])


def _port(node: str) -> str:
    """The bridge's end of its cable."""
    return f"to-{node}"


def _dies_with_us(words: list, **options) -> subprocess.Popen:
    """Nothing is left even where the tests are ended by SIGKILL."""
    return subprocess.Popen(["setpriv", "--pdeathsig", "KILL", *words], start_new_session=True, **options)


def _done(words: list) -> None:
    done = subprocess.run(words, timeout=WITHIN_S, capture_output=True, text=True)
    if done.returncode:
        raise NodeError(f"{' '.join(map(str, words))}: {done.stderr}")


def _children(pid: int) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children()
    return []


def _namespace(pid: int, kind: str) -> str:
    with suppress(OSError):
        return os.readlink(f"/proc/{pid}/ns/{kind}")
    return ""


def _wait_until(holds, what: str) -> None:
    until = time.monotonic() + WITHIN_S
    while not holds():
        assert time.monotonic() < until, f"{what} is not there after {WITHIN_S} s"
        time.sleep(0.02)
