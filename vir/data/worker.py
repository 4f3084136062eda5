"""A loader process from the inside: how it begins, ends with its trainer, and reads samples at the same time."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import resource
import signal
import stat
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence

from vir.cluster.signals import SIGNALS
from vir.data.reader import Reader
from vir.errors import VirError

_WHERE_BYTES = 1024
_READERS = 32
"""Samples that a worker reads at the same time: a read from a network disk waits for 1 to 20 ms."""
_MOST_FILES = 1 << 16
_PR_SET_PDEATHSIG = 1
"""Of Linux's prctl."""


def board(workers: int) -> Any:
    """[workers] texts that the workers share with the trainer: the sample that each is waiting for."""
    return multiprocessing.get_context("fork").RawArray(ctypes.c_char * _WHERE_BYTES, workers)


class Worker:
    """This loader process, `number` of its loader; it writes on that loader's board()."""

    def __init__(self, number: int, reading: Any) -> None:
        self.number, self._reading = number, reading
        self._pool = ThreadPoolExecutor(_READERS)

    def read(self, reader: Reader, samples: Sequence[int]) -> Iterator[Callable[[], bytes]]:
        """Read all samples at once; for each in turn a function that waits for its bytes and raises what reading did.

        They are read in the order of their places, and given in that of `samples`. Threads read what has to be waited
        for; handing it to them takes twice as long as reading what the system has in its memory.
        """
        found: dict[int, Callable[[], bytes]] = {}
        # Texts, not numbers: to look those up, the trainer would read the index, on a disk that may hang.
        places = [f"{reader.where(sample)} of {reader.name}".encode(errors="replace") for sample in samples]
        for sample, place in zip(samples, places):
            self._tell(place)  # its shard may have to be opened
            if (data := reader.read_at_hand(sample)) is not None:
                found[sample] = partial(bytes, data)
        groups = reader.together([sample for sample in samples if sample not in found])
        for turn, group in enumerate(groups):
            later = groups[turn + _READERS:turn + _READERS + 1]
            reads = self._pool.submit(_read_group, reader, group, later)
            found.update((sample, partial(_result, reads, number)) for number, sample in enumerate(group))
        for sample, place in zip(samples, places):
            self._tell(place)
            yield found[sample]

    def _tell(self, place: bytes) -> None:
        self._reading[self.number].value = place[:_WHERE_BYTES - 1]


def _read_group(reader: Reader, group: Sequence[int], later: Sequence[Sequence[int]]) -> list[bytes | VirError]:
    """What the reader says of a group; the disk is told of those whose turn comes when all threads are done."""
    for hint in later:
        reader.expect(hint)
    return reader.read_group(group)


def _result(reads: Future[list[bytes | VirError]], number: int) -> bytes:
    found = reads.result()[number]
    if isinstance(found, VirError):
        raise found
    return found


_here: Worker | None = None


def here() -> Worker:
    """The worker that this process is."""
    assert _here is not None, "batches are made in loader processes alone"
    return _here


def begin_in_this_process() -> None:
    """Let this process, which is no loader's, make batches itself."""
    global _here
    _here = Worker(0, board(1))


def start(reading: Any, trainer: int, number: int) -> None:
    """Begin as worker `number` of the process `trainer`; DataLoader's worker_init_fn."""
    global _here
    # The trainer decides what a signal means: a worker that died of it would take the last checkpoint along.
    for stopping in SIGNALS:
        signal.signal(stopping, signal.SIG_IGN)
    _die_with_parent()
    if os.getppid() != trainer:  # it ended before that was arranged
        os._exit(1)
    _let_go_of_sockets()
    _open_many_files()
    _here = Worker(number, reading)


def _die_with_parent() -> None:
    """Let the kernel end this process when the trainer ends in whatever way. Linux; elsewhere DataLoader looks."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _let_go_of_sockets() -> None:
    """Those of the process group: while a copy is open, the other ranks do not see that the trainer has ended.

    Their numbers stay taken, by /dev/null: objects of the trainer that this process has inherited may close them at any
    time, and would close whatever file had the number by then.
    """
    folder, nothing = Path("/proc/self/fd"), os.open(os.devnull, os.O_RDWR)
    for name in os.listdir(folder) if folder.is_dir() else ():
        try:
            if int(name) > 2 and stat.S_ISSOCK(os.fstat(int(name)).st_mode):  # the output may be one
                os.dup2(nothing, int(name), inheritable=False)
        except OSError:  # the listing's own, closed by now
            pass
    os.close(nothing)


def _open_many_files() -> None:
    """As many as the system lets this process have: a shard that is reopened for each read costs a network disk two
    more round trips."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
