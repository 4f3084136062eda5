"""A heartbeat of each rank, so that a fault anywhere ends all ranks within a minute, and says what it was.

Each rank has a thread that tells the store that it lives and where it is, once per beat. Rank 0 reads all of it and
gives a verdict where one has been silent or has failed; the others read the verdict and rank 0's own beat. So a beat
costs each rank two messages to one place, and nothing on the device. Silence is counted in the reader's own beats: a
run that was suspended as a whole (SLURM, a closed laptop) finds nobody lost when it goes on.

The store is served by rank 0 or by torchrun's agent. A request to a server that was stopped waits for ever, so a second
thread counts the beats for which the first one has waited.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import socket
import statistics
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Callable

from torch.distributed import PrefixStore, Store

from vir import cli, distributed, status
from vir.errors import EXIT_RANK_LOST
from vir.launcher import Place

BEATS = 30
"""In a rank_timeout."""
FIRST_WORD = 5
"""Timeouts that a rank has until its first beat: its node may still be importing from a cold disk."""
_HEED = 3
"""Beats from another rank's failure to one's own end: where all meet the same error, each tells it itself."""
_LINGER_S = 10
"""How long rank 0 waits at its end for the last words of the others: the store ends with it. Where it has failed, for a
timeout: those that begin later hear of it, too."""
_END_S = 5
"""The longest that a process takes to say why it ends, to a pipe that nobody may read."""
_STALL_S = 600.0
"""Without progress, at least: ten times the longest stage so far, if that is more."""
_JUDGED_BY = 3
"""Beats that a link is judged by: a single one waits also where a process or a machine is busy."""
_NEVER = timedelta(days=365)
_ALIVE, _DONE, _FAILED = "adf"
"""The first letter of a beat; JSON of _Word follows."""
_UNKNOWN = "unknown"
_NOTHING = b" "
"""What the store holds until there is something to say."""


@dataclass
class _Word:
    """What a rank says of itself."""

    rank: int
    host: str
    kernel: str
    """Where its process has this number: on which start of which machine, in which container."""
    pid: int
    born: str
    """When its process began, by its machine's clock: a number of a process is given out again."""
    where: str
    beat: int = 0
    failure: str = ""


class Heartbeat:
    """From start() to close(), tells the other ranks of this one, and ends this process when one of them is lost.

    Args:
        timeout: seconds of silence after which a rank is lost.
        stall: seconds without progress, at least, after which the stacks of all threads are printed.
    """

    _runs = 0

    def __init__(self, place: Place, timeout: float, stall: float = _STALL_S) -> None:
        self._place, self._timeout, self._stall = place, timeout, stall
        self._seconds = timeout / BEATS
        self._word = _Word(place.rank, socket.gethostname(), _kernel(), os.getpid(), _born(os.getpid()), "starting")
        self._where: Callable[[], str] = lambda: "starting"
        self._state = _ALIVE
        self._moved, self._longest, self._counts, self._dumped_at = time.monotonic(), 0.0, False, 0.0
        self._ends, self._told, self._ending = threading.Event(), threading.Event(), threading.Lock()
        self._waiting = 0
        """Beats since the store was last heard."""
        self._round_trips: tuple[float, ...] = ()
        self._names = [str(rank) for rank in range(1, place.size)]
        self._others = [_NOTHING] * place.size
        self._silent = [0] * place.size
        """Beats since each rank's last one."""
        self._failed_for = [0] * place.size
        self._met_rank_0 = False
        Heartbeat._runs += 1  # a process may do one run after another
        self._name = f"heartbeat-{Heartbeat._runs}"

    def start(self) -> None:
        """Raises SettingsError where rank 0 cannot serve the store."""
        if self._place.size > 1:
            distributed.serve(self._place)
            threading.Thread(target=self._talk, name="heartbeat", daemon=True).start()
        threading.Thread(target=self._watch, name="heartbeat-watch", daemon=True).start()

    @property
    def round_trip(self) -> float:
        """Seconds to rank 0's store and back, the median of the last beats: over a link that is full most of them wait.
        0 before there are enough of them."""
        return statistics.median(self._round_trips) if len(self._round_trips) == _JUDGED_BY else 0.0

    def at(self, where: str | Callable[[], str], counts: bool = True) -> None:
        """Say where this rank is, which is also a sign of progress.

        Args:
            where: or a function that tells it when it is asked for, from another thread.
            counts: False for what may take as long as it likes: compiling, saving.
        """
        now = time.monotonic()
        if self._counts:
            self._longest = max(self._longest, now - self._moved)
        self._where = where if callable(where) else lambda: where
        self._counts, self._moved = counts, now

    def where(self) -> str:
        """This rank's host, and where it is."""
        try:
            where = self._where()
        except Exception as error:  # it may read what the main thread is changing
            where = f"somewhere ({error!r})"
        return f"({self._word.host}) {where}"

    def failed(self, failure: str) -> None:
        """Tell the others that this rank ends for this reason; returns when they know, or cannot be reached."""
        self._word.failure = failure
        self._leave(_FAILED)

    def close(self) -> None:
        """This rank has done its part. On the rank that serves the store: returns when the others have too."""
        self._leave(_DONE)

    def wait_for_verdict(self) -> None:
        """A collective has failed, which is what a lost rank looks like: give the threads the time to find it.

        Ends the process where they do; returns where nobody is lost.
        """
        if self._place.size > 1:
            where = self._where
            self.at(lambda: f"{where()}, in a collective that failed")
            time.sleep(self._timeout)

    def _leave(self, state: str) -> None:
        if self._ends.is_set():
            return
        self._state = state
        self._ends.set()
        if self._place.size > 1:
            self._told.wait(self._linger() + 2 * self._seconds)

    def _linger(self) -> float:
        return max(_LINGER_S, self._timeout) if self._state == _FAILED else _LINGER_S

    # ---- the thread that talks

    def _talk(self) -> None:
        try:
            patience = timedelta(seconds=FIRST_WORD * self._timeout)
            store = PrefixStore(self._name, distributed.connect(self._place, patience))
            if self._place.rank == 0:
                for name in self._names:  # so that it can be asked for before its rank is there
                    store.compare_set(name, "", _NOTHING.decode())
                store.set("verdict", _NOTHING.decode())
            while not self._ends.is_set():
                self._beat(store)
                store.set_timeout(_NEVER)  # _watch counts beats; the seconds of a request pass while a run is suspended
                self._ends.wait(self._seconds)
            self._beat(store)
            if self._place.rank == 0:
                self._wait_for_the_others(store)
        except RuntimeError as error:  # of torch.distributed: no connection, or one that broke
            self._rank_0_is_lost(f"its store cannot be reached ({str(error).splitlines()[0][:200]})")
        finally:
            self._told.set()

    def _beat(self, store: Store) -> None:
        self._word.beat += 1
        self._word.where = self.where()
        began = time.monotonic()
        store.set(str(self._place.rank), self._state + json.dumps(asdict(self._word)))
        if self._place.rank == 0:
            self._judge(store)
        elif self._state != _DONE:  # then rank 0 may have gone already
            self._listen(store)
        self._waiting = 0
        self._round_trips = (*self._round_trips, time.monotonic() - began)[-_JUDGED_BY:]

    def _listen(self, store: Store) -> None:
        """On the other ranks: hear rank 0, and end where it is lost or has given a verdict."""
        verdict, of_rank_0 = store.multi_get(["verdict", "0"])
        self._met_rank_0 = True
        if self._state != _ALIVE:
            return
        self._hear(0, of_rank_0)
        said, word = self._loss(0), of_rank_0.decode()
        if verdict != _NOTHING:
            said, word = json.loads(verdict)
        if said:
            store.set(str(self._place.rank), _DONE)  # nobody has to wait for this rank
            self._end(said, word)

    def _judge(self, store: Store) -> None:
        """Rank 0: hear all, and give a verdict where one is lost."""
        for rank, heard in enumerate(store.multi_get(self._names), 1):
            if self._hear(rank, heard) and self._state == _ALIVE and (said := self._loss(rank)):
                store.set("verdict", json.dumps([said, heard.decode()]))
                self._wait_for_the_others(store, lost=rank)
                self._end(said, heard.decode())

    def _hear(self, rank: int, heard: bytes) -> bool:
        """Take up what the store holds of a rank; whether it is anything but a new sign of life."""
        if heard != self._others[rank]:
            self._others[rank], self._silent[rank] = heard, 0
            if heard.startswith(b"a"):
                return False
        else:
            self._silent[rank] += 1
        if heard.startswith(b"f"):
            self._failed_for[rank] += 1
        return True

    def _loss(self, rank: int) -> str:
        """Why a rank is lost; empty while it is not."""
        heard, silent = self._others[rank], self._silent[rank]
        if heard.startswith(b"f"):
            return _tell(heard, "ended") if self._failed_for[rank] > _HEED else ""
        if silent < 2 or heard.startswith(b"d"):
            return ""
        if heard == _NOTHING:
            return "" if silent < FIRST_WORD * BEATS else (
                f"rank {rank} has not begun within {silent * self._seconds:.0f} s of this one; see what its node says")
        if self._is_gone(heard):
            return _tell(heard, "is lost: its process is gone")
        return _tell(heard, f"is lost: silent for {silent * self._seconds:.0f} s") if silent >= BEATS else ""

    def _is_gone(self, heard: bytes) -> bool:
        word = _parse(heard)
        return self._sees(word) and _born(word.pid) not in (word.born, _UNKNOWN)

    def _sees(self, word: _Word) -> bool:
        """Whether another rank's process would be known here by its number."""
        return word.rank != self._place.rank and "" not in (word.kernel, word.born) and word.kernel == self._word.kernel

    def _wait_for_the_others(self, store: Store, lost: int = 0) -> None:
        """The store may end with this process, so those that live or have yet to begin hear from it before.

        Args:
            lost: a rank that will not.
        """
        silent = {rank for rank, beats in enumerate(self._silent) if beats > 1 and self._others[rank] != _NOTHING}
        until = time.monotonic() + self._linger()
        while time.monotonic() < until:
            self._waiting = 0
            words = dict(enumerate(store.multi_get(self._names), 1))
            if all(words[rank].startswith((b"d", b"f")) for rank in words.keys() - silent - {lost}):
                return
            time.sleep(0.1)

    # ---- the thread that watches

    def _watch(self) -> None:
        while not self._ends.wait(self._seconds):
            self._waiting += 1
            # Where a link is cut each side misses the other; rank 0, which knows who else is there, tells it first.
            limit = BEATS + _HEED if self._met_rank_0 or self._place.rank == 0 else FIRST_WORD * BEATS + BEATS
            if self._place.size > 1 and self._waiting > limit:
                self._rank_0_is_lost(f"its store has not answered for {self._waiting * self._seconds:.0f} s")
            self._look_at_progress()

    def _look_at_progress(self) -> None:
        """Where there has been none for long, print the stacks of all threads, once for each such place."""
        moved = self._moved
        still = time.monotonic() - moved
        if self._counts and still > max(self._stall, 10 * self._longest) and self._dumped_at != moved:
            self._dumped_at = moved
            _say(f"rank {self._place.rank} {self.where()}: no progress for {still:.0f} s; it goes on waiting, and "
                 "these are the stacks of its threads:")
            faulthandler.dump_traceback(2, all_threads=True)

    # ---- the end

    def _rank_0_is_lost(self, why: str) -> None:
        heard = self._others[0]
        if heard.startswith(b"d"):  # it ended well, and this rank has nothing to do but end as well
            return
        if self._place.agent_serves:
            self._end(f"torchrun's agent is lost: {why}")
        elif heard.startswith(b"f"):
            self._end(_tell(heard, "ended"))
        elif heard.strip():
            self._end(_tell(heard, f"is lost: {why}"), heard.decode())
        else:
            self._end(f"rank 0 is lost: nobody answers at {self._place.address}:{self._place.port}")

    def _end(self, said: str, word: str = "") -> None:
        """End this process because of another rank, unless it is about to end for a reason of its own.

        Args:
            word: the last beat of the rank that is lost.
        """
        if self._ends.is_set() or not self._ending.acquire(blocking=False):
            return
        in_time = threading.Timer(_END_S, os._exit, [EXIT_RANK_LOST])
        in_time.daemon = True
        in_time.start()
        try:
            if word[:1] == "a":
                self._end_the_lost(_parse(word.encode()))
            line = (f"{said}. Rank {self._place.rank} {self.where()} ends with it, exit code {EXIT_RANK_LOST}; the "
                    "same command continues from the last checkpoint")
            status.write(EXIT_RANK_LOST, line)
            _say(line)
            cli.report(line)
        finally:
            cli.end_now(EXIT_RANK_LOST)

    def _end_the_lost(self, lost: _Word) -> None:
        """A process that was stopped or hangs would stay for ever, or go on when all others are gone."""
        if self._sees(lost) and _born(lost.pid) == lost.born:
            with suppress(OSError):  # it has ended just now
                os.kill(lost.pid, signal.SIGKILL)


def _say(line: str) -> None:
    with suppress(OSError):  # nobody may read it any more
        os.write(2, f"vir-train: {line}\n".encode(errors="backslashreplace"))  # at once: lines of ranks do not mix


def _parse(heard: bytes) -> _Word:
    return _Word(**json.loads(heard[1:]))


def _tell(heard: bytes, what: str) -> str:
    word = _parse(heard)
    return f"rank {word.rank} {word.where} (process {word.pid}) {what}" + (
        f" with {word.failure}" if word.failure else "")


def _kernel() -> str:
    """Names this start of this machine and this space of process numbers; empty where there is no /proc."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _born(pid: int) -> str:
    """When a process of this machine began; empty where it is gone, or where there is no /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    except OSError:  # too many open files
        return _UNKNOWN
    return "" if fields[0] in "ZX" else fields[19]
