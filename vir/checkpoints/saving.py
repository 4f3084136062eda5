"""The course of a checkpoint: handed over at the end of a step, written by every rank, published by rank 0.

Behind what ranks do by themselves the course goes on when every rank has done it. In the asynchronous way threads do
these things while training goes on, from copies of the state; in the synchronous way they are done at once.
"""

from __future__ import annotations

import shutil
import time
from concurrent.futures import wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterator

from vir import distributed
from vir.checkpoints import store
from vir.checkpoints.info import CheckpointInfo, Files
from vir.checkpoints.local import LocalCopies
from vir.checkpoints.names import name_of, part_of
from vir.checkpoints.store import Kept
from vir.checkpoints.writer import Work, Writer, Written, do, done
from vir.distributed import World
from vir.errors import CheckpointError
from vir.files import refused
from vir.log import log
from vir.run_folder import CHECKPOINTS

_CLOSES_WITHIN_S = 5.0

Take = Callable[[Any, Path], None]
"""Takes the content of one file."""
HandOver = Callable[[Path, Take], None]
"""Hands over the content of every file of this rank, by its path in a folder. Collective."""


@dataclass
class Saved:
    """A checkpoint, and what it has cost."""

    step: int
    is_best: bool
    bytes: int = 0
    seconds: float = 0.0
    """Of copying, writing (by the slowest rank) and publishing; training may have come to know of each only later."""
    stalled: float = 0.0
    """That training has waited for it."""


class Checkpointer:
    """Makes the checkpoints of a run, at most one at a time.

    Args:
        run: the run folder.
        asynchronous: begin() returns when the state is copied; advance() and finish() do the rest. Otherwise begin()
            does all of it.
        local: also keeps each on the nodes' own disks, before it is written to the run folder.
    """

    def __init__(self, run: Path, world: World, kept: Kept, asynchronous: bool,
                 local: LocalCopies | None = None) -> None:
        self._root, self._world, self._kept, self._asynchronous = run / CHECKPOINTS, world, kept, asynchronous
        self._writer, self._local = Writer(world.device, asynchronous), local
        self._course: Iterator[Work[Any]] = iter(())
        self._awaited: Work[Any] | None = None
        self._publishes = False
        self.saved: list[Saved] = []
        """The checkpoints that were published, in that order."""

    @property
    def step(self) -> int | None:
        """Of the checkpoint that is on its way."""
        return None if self._awaited is None else self._current.step

    @property
    def is_best(self) -> bool:
        """Whether that is the best so far."""
        return self._awaited is not None and self._current.is_best

    @property
    def is_ready(self) -> bool:
        """Whether this rank has done what the others wait for, so that advance() would go on at once."""
        return self._awaited is not None and self._awaited.done()

    def begin(self, hand_over: HandOver, info: CheckpointInfo, is_best: bool) -> None:
        """Make a checkpoint of the state as it is now. Collective, while none is on its way.

        Args:
            info: the description, without the files.

        Raises:
            CheckpointError: it could not be written; those before it are as they were.
        """
        assert self._awaited is None, "one is on its way: finish() first"
        self._current = Saved(info.step, is_best)
        self._course = self._make(hand_over, info)
        self.advance()
        if not self._asynchronous:
            self.finish()

    def advance(self) -> None:
        """Go on with the one on its way, where every rank is ready. Collective. Raises CheckpointError as begin()."""
        with self._stalling():
            self._awaited = None  # and so it stays where the course breaks off
            self._awaited = next(self._course, None)
        if self._awaited is None:
            made = self._current
            self.saved.append(made)
            log.info("checkpoint %s: %.1f MB in %.1f s, for which training waited %.2f s%s",
                     self._folder(made.step), made.bytes / 1e6, made.seconds, made.stalled,
                     ", the best so far" if made.is_best else "")

    def finish(self) -> None:
        """Wait until the one on its way, if any, is published. Collective. Raises CheckpointError as begin()."""
        while self._awaited is not None:
            with self._stalling():
                self._awaited.exception()
            self.advance()

    def give_up(self) -> None:
        """Write no further the one on its way; one of which all is written is finished. Collective."""
        if self._awaited is None or self._publishes:
            self.finish()
            return
        self._writer.give_up()
        self._awaited.exception()
        self._awaited = None
        distributed.barrier()
        if self._world.is_main:
            shutil.rmtree(part_of(self._folder(self._current.step)), ignore_errors=True)

    def close(self) -> None:
        """This rank writes no more, and leaves what is on its way as a kill would."""
        if self._awaited is not None:
            self._writer.give_up()
            if wait([self._awaited], _CLOSES_WITHIN_S).not_done:  # a disk that does not answer
                return
            self._awaited = None
        self._writer.close()

    @contextmanager
    def _stalling(self) -> Iterator[None]:
        """Count the block as time that training waits for the checkpoint."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._current.stalled += time.monotonic() - began

    def _folder(self, step: int) -> Path:
        return self._root / name_of(step)

    def _make(self, hand_over: HandOver, info: CheckpointInfo) -> Iterator[Work[Any]]:
        """The course. Collective between what it yields."""
        part, made = part_of(self._folder(info.step)), self._current
        self._publishes = False
        self._agree_on(self._on_main(lambda: store.make_room(self._root, part), in_background=False), part)
        self._writer.begin()
        began = time.monotonic()
        hand_over(part, self._writer.take)
        made.seconds += time.monotonic() - began
        for work in self._local.make(self._writer, info, made.is_best) if self._local is not None else ():
            yield work
            made.seconds += work.seconds
        yield (written := self._writer.write(part))
        info = info.with_files(self._of_all(written, part))
        made.bytes = info.bytes
        self._publishes = True
        yield (published := self._on_main(lambda: self._publish(part, info), self._asynchronous))
        self._agree_on(published, part)

    def _publish(self, part: Path, info: CheckpointInfo) -> None:
        store.publish(part, self._folder(info.step), info, self._current.is_best)
        store.remove_old(self._root, info.step, self._kept)

    def _on_main(self, work: Callable[[], None], in_background: bool) -> Work[str]:
        """Have rank 0 do this, and find out what the system has refused."""
        return do(lambda: refused(work), in_background) if self._world.is_main else done("")

    def _agree_on(self, of_main: Work[str], part: Path) -> None:
        """Give the checkpoint up on every rank where rank 0 has failed. Collective."""
        problem, seconds = distributed.broadcast((of_main.result(), of_main.seconds))
        self._current.seconds += seconds
        if problem:
            self._fail(part, f"rank 0: {problem}")

    def _of_all(self, written: Work[Written], part: Path) -> list[Files]:
        """What each rank has written. Collective."""
        everyone = distributed.gather((*written.result(), written.seconds))
        self._current.seconds += max(seconds for _, _, seconds in everyone)
        if said := next((f"rank {rank}: {problems[0]}" for rank, (problems, _, _) in enumerate(everyone) if problems),
                        ""):
            self._fail(part, said)
        return [files for _, files, _ in everyone]

    def _fail(self, part: Path, problem: str) -> None:
        """Collective."""
        free = _free_space(part.parent)  # torch does not tell of a full disk
        distributed.barrier()
        if self._world.is_main:
            shutil.rmtree(part, ignore_errors=True)
        raise CheckpointError(f"the checkpoint {part.with_suffix('')} could not be written: {problem} ({free}); those "
                              "before it are whole: free some space and run the same command again")


def _free_space(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free / 1e6:.1f} MB are free there"
    except OSError as error:
        return f"its folder cannot be asked for free space: {error.strerror}"
