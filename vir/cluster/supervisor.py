"""From the start of a launcher to the exit code of the run: what a launch script does while the ranks work.

Launchers hand signals on badly and report codes as they like, so neither goes through them. A signal becomes a file in
the run folder, which the ranks look for and agree about (vir/cluster/switches.py); the code comes from the status that
the first rank leaves there when it ends (vir/status.py).
"""

from __future__ import annotations

import os
import secrets
import shlex
import signal
import subprocess
import sys
import time
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Callable, Protocol

import psutil

import vir
from vir import files, status
from vir.addresses import shown
from vir.cluster.signals import SECOND_AFTER_S, SIGNALS
from vir.errors import EXIT_RANK_LOST, EXIT_STOPPED_BY_SIGNAL, SettingsError
from vir.run_folder import LOCK
from vir.status import Status

PROGRAM = "vir-launch"
STARTS_WITHOUT_CHECKPOINT = 3
"""In a row, after which starting again is given up."""
_POLL_S = 0.2
_ENDS_S = {0: 60.0, EXIT_STOPPED_BY_SIGNAL: 60.0}
"""From the status to the end of all processes; a logger may still be sending what it has."""
_ENDS_AFTER_FAILURE_S = 10.0
_GONE_S = 30.0
"""How long nothing must be seen of a run whose launcher has gone, until it counts as gone as well."""
_ORPHANS_S = 3600.0
"""How long ranks may take to save and end without their launcher."""
_RANK = "vir.train"
"""A word of the command line of every rank."""
_BELIEVED = (2, 3, 4, 6)
"""Exit codes of ranks that launchers pass on, where no rank could leave its status; 1 may be one of theirs."""
_TELLS_EVERY_S = 60.0
_HOSTS_WITHIN_S = 3600.0
"""How long a start again waits for a machine to come back."""
_ASKS_EVERY_S = 2.0


@dataclass(frozen=True)
class Start:
    """How the processes of a run are started."""

    command: list[str]
    environment: dict[str, str]
    """Beside that of this process."""
    folder: Path
    """To start in."""
    without: frozenset[str] = frozenset()
    """Variables of this process that it must not get."""


class Launch(Protocol):
    """A launcher with its options."""

    max_restarts: int
    """How often the ranks are started again from here; a launcher may do it by itself."""
    passes_codes_on: bool
    """Whether the launcher ends with the code of a rank that has failed."""

    def start(self, name: str, file: Path) -> AbstractContextManager[Start]:
        """How to start; what it needs is there while the block runs.

        Args:
            name: of this start.
            file: where its ranks leave their status.
        """

    def unreachable(self) -> dict[str, str]:
        """Machines that do not answer, and why."""

    def ended(self, found: Status) -> None:
        """Called with what each start has come to, where a rank has told it."""


class Requests:
    """The signals that came to this process while the block runs; none of them ends it."""

    def __init__(self) -> None:
        self.first = 0
        """Number of the first signal; 0 while there is none."""
        self.is_urgent = False
        """Whether a second one came."""
        self._began = 0.0

    def __enter__(self) -> Requests:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS
                        if signal.getsignal(number) is not signal.SIG_IGN}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.is_urgent = bool(self.first) and time.monotonic() - self._began > SECOND_AFTER_S
        if not self.first:
            self.first, self._began = number, time.monotonic()


class Attempt:
    """One start of the launcher.

    Args:
        file: where the run leaves its status.
        lock: the run folder's, which rank 0 holds while it trains.
    """

    def __init__(self, start: Start, file: Path, lock: Path, requests: Requests) -> None:
        self._file, self._lock, self._requests = file, lock, requests
        self._is_anothers = self._is_locked()
        """Whether another run was in the folder before this one, which will be refused."""
        self._status: Status | None = None
        self._ended_at = 0.0
        self._has_asked = False
        # In a session of its own: a Ctrl-C in the terminal comes to this process alone.
        self._process = subprocess.Popen(start.command, cwd=start.folder, start_new_session=True,
                                         env={**_left(start.without), **start.environment, status.FILE: str(file)},
                                         stdin=subprocess.DEVNULL)

    def wait(self) -> Status | None:
        """What the run has come to; None where none of its ranks could tell. All of its processes here are gone."""
        try:
            self._wait()
        finally:
            self._kill()
        return self._find()

    def _wait(self) -> None:
        while self._process.poll() is None and not self._requests.is_urgent and not self._is_over():
            self._look()
            time.sleep(_POLL_S)
        if self._requests.is_urgent:
            self._end_at_once()
        elif self._process.poll() is not None and self._find() is None:
            self._wait_without_launcher()

    def _look(self) -> None:
        if self._requests.first and not self._has_asked:
            self._ask(self._requests.first)
            say(f"{_name(self._requests.first)}: asking all ranks to finish their step and to save; a second one ends "
                "them at once")

    def _ask(self, number: int) -> None:
        self._has_asked = True
        try:
            status.ask_to_stop(self._file, number)
        except OSError as error:
            say(f"the ranks cannot be asked by a file in the run folder ({error.strerror}): signalling those of this "
                "machine")
            for member in self._ranks():
                with suppress(psutil.Error):
                    member.send_signal(number)

    def _find(self) -> Status | None:
        if (found := status.read(self._file)) != self._status:
            self._status, self._ended_at = found, time.monotonic()
        return self._status

    def _is_over(self) -> bool:
        """Whether the run has told how it ended, and its launcher has had the time to end as well."""
        if (found := self._find()) is None or found.goes_on:
            return False
        return time.monotonic() - self._ended_at > _ENDS_S.get(found.code, _ENDS_AFTER_FAILURE_S)

    def _wait_without_launcher(self) -> None:
        """The launcher has gone, by a signal or because a connection broke; its ranks may be there still."""
        began = seen = time.monotonic()
        tells = 0.0
        while self._find() is None and not self._requests.is_urgent and time.monotonic() - seen < self._patience():
            if time.monotonic() - began > _ORPHANS_S:
                say(f"its ranks have not ended within {_ORPHANS_S:.0f} s: ending those of this machine")
                return
            if self._ranks() or not self._is_anothers and self._is_locked():
                seen = time.monotonic()
                if not self._has_asked:
                    self._ask(signal.SIGTERM)
                if seen > tells:
                    tells = seen + _TELLS_EVERY_S
                    say(f"the launcher has gone (exit code {self._process.returncode}) before its ranks: waiting for "
                        "them to save and end; a second signal ends them at once")
            time.sleep(_POLL_S)

    @property
    def code(self) -> int:
        """Of the launcher, once it has ended."""
        return self._process.returncode

    def _patience(self) -> float:
        """A launcher that was killed has left ranks that may not be seen from here; one that ended has waited."""
        return _GONE_S if self._process.returncode < 0 or self._requests.first else 5 * _POLL_S

    def _is_locked(self) -> bool:
        try:
            if self._lock.exists():
                files.unlock(files.lock(self._lock))
        except OSError as error:
            return isinstance(error, BlockingIOError)
        return False

    def _ranks(self) -> list[psutil.Process]:
        """Those of this machine, with their launchers: not what they may have left behind."""
        found = []
        for member in self._members():
            with suppress(psutil.Error):
                if _RANK in member.cmdline():
                    found.append(member)
        return found

    def _members(self) -> list[psutil.Process]:
        """What runs on this machine of this start: known by its environment, also without its parents."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                if process.environ().get(status.FILE) == str(self._file):
                    found.append(process)
        return found

    def _end_at_once(self) -> None:
        say("a second signal: ending at once, without saving")
        with suppress(OSError):
            self._process.terminate()  # pdsh's runner ends what it has started on other nodes
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_ENDS_AFTER_FAILURE_S)

    def _kill(self) -> None:
        had_time = self._requests.is_urgent or self._process.poll() is None
        until = time.monotonic() + (0 if had_time else _ENDS_AFTER_FAILURE_S)
        while (members := self._members()) and time.monotonic() < until:
            time.sleep(_POLL_S)
        for member in members:
            with suppress(psutil.Error):
                member.kill()
        with suppress(OSError):
            self._process.kill()
        self._process.wait()
        psutil.wait_procs(members, _ENDS_AFTER_FAILURE_S)


def python_path() -> str:
    """PYTHONPATH of ranks, which may start in another folder: the package that this process runs comes first."""
    root = str(Path(vir.__file__).resolve().parents[1])
    return os.pathsep.join(dict.fromkeys(filter(None, (root, *os.environ.get("PYTHONPATH", "").split(os.pathsep)))))


def supervise(launch: Launch, run: Path, newest_step: Callable[[], int]) -> int:
    """Start the ranks, and start them again where one was lost; returns the exit code of the run.

    Args:
        run: its folder.
        newest_step: of the newest checkpoint; 0 where there is none.

    Raises:
        SettingsError: the run folder cannot be made, or the launcher cannot be started.
    """
    made = _make(run)
    try:
        with Requests() as requests:
            return _supervise(launch, run, newest_step, requests)
    finally:
        for folder in made:
            with suppress(OSError):  # there is a run in it
                folder.rmdir()


def _supervise(launch: Launch, run: Path, newest_step: Callable[[], int], requests: Requests) -> int:
    name, began_at, barren, max_restarts = secrets.token_hex(4), newest_step(), 0, launch.max_restarts
    for restart in range(max_restarts + 1):
        if restart:
            say(f"starting again from step {began_at}, restart {restart} of {max_restarts}")
            if not _wait_for_hosts(launch, requests):
                break
            if requests.first:
                return _stopped(launch, requests.first)
        code = _attempt(launch, run, f"{name}-{restart}", requests)
        if code != EXIT_RANK_LOST or requests.first:
            return code
        reached = newest_step()
        barren = 0 if reached > began_at else barren + 1
        began_at = reached
        if barren == STARTS_WITHOUT_CHECKPOINT and restart < max_restarts:
            say(f"{barren} starts in a row ended without a new checkpoint, the newest is of step {reached}: not "
                "starting again. Find the cause in their lines, or save more often by --checkpoint.every_steps")
            break
    return EXIT_RANK_LOST


def _wait_for_hosts(launch: Launch, requests: Requests) -> bool:
    """Until all machines answer, or a signal comes; False where one does not answer within an hour."""
    until, tells = time.monotonic() + _HOSTS_WITHIN_S, 0.0
    while not requests.first and (silent := launch.unreachable()):
        if time.monotonic() > until:
            say(f"{', '.join(silent)} did not come back within {_HOSTS_WITHIN_S:.0f} s")
            return False
        if time.monotonic() > tells:
            tells = time.monotonic() + _TELLS_EVERY_S
            say("waiting for " + "; ".join(f"{host} ({reason})" for host, reason in silent.items()))
        time.sleep(_ASKS_EVERY_S)
    return True


def _stopped(launch: Launch, number: int) -> int:
    """By a signal while nothing ran."""
    found = Status(EXIT_STOPPED_BY_SIGNAL, f"stopped by {_name(number)} before it could start again",
                   cause=number)
    say(f"exit code {found.code}: {found.said}")
    launch.ended(found)
    return found.code


def _attempt(launch: Launch, run: Path, name: str, requests: Requests) -> int:
    file = run.absolute() / f".status-{name}.json"
    with launch.start(name, file) as start:
        say(f"starting {shlex.join(map(shown, start.command))}")
        try:
            status.make_room(file)
        except OSError as error:
            status.remove(file)
            raise SettingsError(f"--output {run} cannot be written to: {error.strerror}; free some space, or give "
                                "another folder") from error
        try:
            attempt = _begin(start, file, run / LOCK, requests)
            found = attempt.wait()
        finally:
            status.remove(file)
    if found is None:
        if requests.is_urgent:
            return 128 + requests.first
        if launch.passes_codes_on and attempt.code in _BELIEVED:
            say(f"exit code {attempt.code}, of the launcher: no rank has told more than its lines above")
            return attempt.code
        say("the ranks ended without a word: a rank was killed (out of memory?) before it could begin, or all were; "
            f"see the lines above. Exit code {EXIT_RANK_LOST}")
        return EXIT_RANK_LOST
    say(f"exit code {found.code}, told by rank {found.rank} ({found.host}): {found.said}")
    launch.ended(found)
    return found.code


def _begin(start: Start, file: Path, lock: Path, requests: Requests) -> Attempt:
    try:
        return Attempt(start, file, lock, requests)
    except OSError as error:
        raise SettingsError(f"{start.command[0]} cannot be started: {error.strerror}") from error


def _left(without: frozenset[str]) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in without}


def _make(run: Path) -> list[Path]:
    """Make the run folder, where its ranks leave their status; the folders that were not there."""
    made = [path for path in (run, *run.parents) if not path.exists()]
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"--output {run} cannot be made: {error.strerror}; give another folder") from error
    return made


def _name(number: int) -> str:
    return signal.Signals(number).name


def say(line: str) -> None:
    with suppress(OSError):  # a terminal that is gone
        print(f"{PROGRAM}: {line}", file=sys.stderr, flush=True)
