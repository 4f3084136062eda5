"""The machines of vir-check, asked by ssh or by the store of a launcher that has started a rank on each.

For both ways there is what asks them all, and how the one that is asked says and hears something. What they are asked
and told is the matter of vir/check.py.
"""

from __future__ import annotations

import errno
import json
import resource
import shlex
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Callable, Protocol, Sequence

from vir.cluster.hosts import ssh
from vir.errors import SettingsError

if TYPE_CHECKING:
    from torch.distributed import Store

_POLL_S = 0.05
_MARK = "vir-check: "
"""Begins the lines that machines answer with, among all that programs print."""
_READS = shlex.join(["sh", "-c", 'IFS= read -r line && eval "$line"'])
"""Waits for a line of shell and becomes what it says, whatever the login shell is."""


@dataclass(frozen=True)
class Answer:
    """What a machine has said, and when by the clock of this one; or why it has said nothing."""

    said: Any = None
    at: float = 0.0
    problem: str = ""


class Machines(Protocol):
    """Those that are asked, by whatever leads to them."""

    @property
    def names(self) -> list[str]: ...

    def answers(self, of: Sequence[str], seconds: float) -> dict[str, Answer]:
        """The next answer of each of these; within the bound."""

    def tell(self, name: str, message: Any) -> None:
        """What it waits for."""


class Asked(Protocol):
    """How one of them answers."""

    def say(self, answer: Any) -> None: ...

    def hear(self) -> Any:
        """What it is told; waits for it."""


# ---- by ssh


class BySsh:
    """Machines that run a line of shell which ssh brings them, and answer in lines.

    Args:
        line: told by standard input, so that no list of processes shows what it says.
        port: of their ssh servers; None is that of ssh's own settings.
    """

    def __init__(self, hosts: Sequence[str], line: str, port: int | None) -> None:
        self.names = list(hosts)
        self._lines: dict[str, list[Answer]] = {name: [] for name in self.names}
        self._folder = TemporaryDirectory(prefix="vir-check-")
        self._errors = {name: Path(self._folder.name) / str(number) for number, name in enumerate(self.names)}
        self._processes: dict[str, subprocess.Popen[str]] = {}
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        try:
            for host in self.names:
                self._processes[host] = self._start(host, port)
        except BaseException:
            self.__exit__()
            raise
        for host, process in self._processes.items():
            threading.Thread(target=self._read, args=[host, process], daemon=True).start()
            self._say(host, line)

    def __enter__(self) -> BySsh:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self._processes.values():
            process.kill()
            process.wait()
        self._folder.cleanup()

    def _start(self, host: str, port: int | None) -> subprocess.Popen[str]:
        try:
            with self._errors[host].open("wb") as errors:
                return subprocess.Popen(ssh(host, _READS, port), text=True, errors="replace", stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=errors)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
                raise SettingsError(f"{len(self.names)} machines need {2 * len(self.names)} open files and some more, "
                                    f"but a process may have {most} here; raise it (ulimit -n), or check the machines "
                                    "of a shorter hostfile") from error
            raise SettingsError(f"ssh cannot be run: {error.strerror}; install an ssh client, or start by srun or "
                                "torchrun without --hostfile") from error

    def _read(self, host: str, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(_MARK):
                at = time.time()
                self._lines[host].append(Answer(json.loads(line.removeprefix(_MARK)), at))

    def answers(self, of: Sequence[str], seconds: float) -> dict[str, Answer]:
        wait_until(lambda: all(self._lines[host] or self._processes[host].poll() is not None for host in of), seconds)
        return {host: self._lines[host].pop(0) if self._lines[host] else self._nothing(host, seconds) for host in of}

    def _nothing(self, host: str, seconds: float) -> Answer:
        code = self._processes[host].poll()
        if code is None:
            return Answer(problem=f"it has not answered within {seconds:.0f} s")
        lines = self._errors[host].read_text(errors="replace").split("\n")
        said = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return Answer(problem=f"ssh does not reach it ({said or 'without a word'})" if code == 255 else
                      f"vir.check cannot run there ({said or f'exit code {code}'})")

    def tell(self, name: str, message: Any) -> None:
        self._say(name, json.dumps(message))

    def _say(self, name: str, line: str) -> None:
        pipe = self._processes[name].stdin
        assert pipe is not None
        with suppress(OSError):  # it has ended, which is found by its missing answer
            pipe.write(line + "\n")
            pipe.flush()


class AskedBySsh:
    """Answers by standard output; standard input ends when the one who asks does."""

    def say(self, answer: Any) -> None:
        print(_MARK + json.dumps(answer), flush=True)

    def hear(self) -> Any:
        return json.loads(sys.stdin.readline() or "null")


# ---- by the store of a launcher


class ByStore:
    """Machines whose first ranks answer by the store.

    Args:
        size: how many ranks there are; each says by `join` whether it is asked.
        seconds: how long those are waited for that have not said it.
    """

    def __init__(self, store: Store, size: int, seconds: float) -> None:
        self._store = store
        self._came: dict[int, Answer] = {}
        self._heard: dict[int, int] = {}
        found: dict[int, str] = {}

        def all_are_named() -> bool:
            for rank in range(size):
                if rank not in found and store.check([f"name-{rank}"]):
                    found[rank] = store.get(f"name-{rank}").decode()
                if found.get(rank):
                    self._hear(rank)  # now, for its clock is compared with that of the moment
            return len(found) == size

        wait_until(all_are_named, seconds)
        self._ranks: dict[str, int] = {}
        for rank in range(size):
            if name := found.get(rank, f"rank {rank}"):
                self._ranks[f"{name} (rank {rank})" if name in self._ranks else name] = rank

    @property
    def names(self) -> list[str]:
        return list(self._ranks)

    def answers(self, of: Sequence[str], seconds: float) -> dict[str, Answer]:
        wait_until(lambda: all([self._hear(self._ranks[name]) for name in of]), seconds)
        silent = Answer(problem=f"it has not answered within {seconds:.0f} s")
        return {name: self._came.pop(self._ranks[name], silent) for name in of}

    def _hear(self, rank: int) -> bool:
        """Whether the next answer of a rank is there."""
        number = self._heard.get(rank, 0) + 1
        if rank not in self._came and self._store.check([key := f"answer-{rank}-{number}"]):
            self._came[rank] = Answer(json.loads(self._store.get(key)), time.time())
            self._heard[rank] = number
        return rank in self._came

    def tell(self, name: str, message: Any) -> None:
        self._store.set(f"told-{self._ranks[name]}", json.dumps(message))


class AskedByStore:
    """Answers by the store; it is told one message."""

    def __init__(self, store: Store, rank: int) -> None:
        self._store, self._rank, self._said = store, rank, 0

    def say(self, answer: Any) -> None:
        self._said += 1
        self._store.set(f"answer-{self._rank}-{self._said}", json.dumps(answer))

    def hear(self) -> Any:
        return json.loads(self._store.get(f"told-{self._rank}"))


def join(store: Store, rank: int, name: str) -> None:
    """A rank's first word: the name of its machine if it speaks for it, or an empty one."""
    store.set(f"name-{rank}", name)


def wait_until(holds: Callable[[], bool], seconds: float) -> None:
    """Waits until it holds, or for so long."""
    until = time.monotonic() + seconds
    while not holds() and time.monotonic() < until:
        time.sleep(_POLL_S)
