"""Whole shards on a node's disk, within a budget of bytes: DIR/NAME, where the name tells which bytes they are.

A shard is written under a temporary name, while `.NAME.lock` is locked, and takes its name when it is whole. Who holds
the lock removes what a killed download has left. All of it holds between processes, and between runs on one node.
"""

from __future__ import annotations

import enum
import errno
import hashlib
import itertools
import os
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from vir.addresses import place
from vir.data.stores.store import Identity
from vir.errors import DataError
from vir.files import TEMPORARY, lock, open_regular, replacing, unlock

SHARD = ".tar"
"""The end of the names of whole shards."""

RECENT_S = 3600.0
"""A file that was opened within this time may be in use by another run."""

# Its own files, as cache_name names them: a user may keep others in the folder.
_WHOLE = re.compile(rf"[0-9a-f]{{32}}{re.escape(SHARD)}")
_PART = re.compile(rf"\.({_WHOLE.pattern})\..*{re.escape(TEMPORARY)}", re.DOTALL)
_ROOM = ".room.lock"
_ROOM_WAIT_S, _ROOM_POLL_S = 30.0, 0.01


class ChecksumError(DataError):
    """A download that is not what the manifest says."""


class NoRoomError(DataError):
    """What is needed sooner, or being written, leaves no room for this shard now."""


def cache_name(url: str, identity: Identity, sha256: str | None = None) -> str:
    """The name of these bytes in a cache: the same for all who may read them, another one for other bytes.

    Args:
        sha256: tells them apart where the server has no tag for them.
    """
    text = f"{place(url)}\0{identity.size}\0{identity.tag or sha256 or ''}"
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:32] + SHARD


class Entry(NamedTuple):
    """A shard that a cache may hold."""

    name: str
    where: str
    """Its address, for messages, without secrets."""
    size: int
    """In bytes."""
    sha256: str | None = None
    """Of its bytes, where the manifest has it."""


class File(NamedTuple):
    """A file of a cache."""

    name: str
    size: int
    touched: float
    """When it was last opened, in seconds since 1970."""


class Outcome(enum.Enum):
    DOWNLOADED = "downloaded"
    PRESENT = "present"
    LOCKED = "locked"
    """Another process or thread downloads it."""


class Uses(NamedTuple):
    """What a run does with a cache."""

    own: Collection[str] = ()
    """The names of all its shards."""
    needed: Sequence[str] | None = None
    """The names of those that it will need, in order of next use; None: not known."""
    spares_others: bool = False
    """What others have opened lately stays."""


def victims(files: Sequence[File], name: str, uses: Uses, now: float) -> list[File]:
    """The files that may go for the shard `name`, first those that are missed least.

    They are: own ones that are not needed; those of other runs that nobody has opened lately; own ones that are needed
    later than that shard, the farthest next use first, or those opened longest ago where that is not known; last, what
    other runs have opened lately.

    Args:
        now: in seconds since 1970.
    """
    places = {needed: place for place, needed in enumerate(uses.needed or ())}
    own, place = set(uses.own), places.get(name, -1)

    def missed(file: File) -> tuple[int, float]:
        if file.name in places:
            return 2, -places[file.name]
        if file.name in own:
            return 2 if uses.needed is None else 0, file.touched
        return (1 if file.touched < now - RECENT_S else 3), file.touched

    may_go = [file for file in files if places.get(file.name, place) >= place]
    return sorted((file for file in may_go if missed(file)[0] < 3 or not uses.spares_others), key=missed)


@dataclass
class Cache:
    """A folder of whole shards. It is made when the first one is filled in.

    Processes and threads may share one, and so may several runs: each counts the bytes of all.
    """

    folder: Path
    budget_bytes: int

    def touch(self, entry: Entry) -> bool:
        """Whether it is there, whole; notes that it is in use."""
        path = self.find(entry)
        if path is not None:
            with suppress(OSError):  # a folder that can only be read
                os.utime(path)
        return path is not None

    def find(self, entry: Entry) -> Path | None:
        """Where it lies, whole; None where it does not."""
        path = self.folder / entry.name
        with suppress(OSError):
            if path.stat().st_size == entry.size:
                return path
        return None

    def open(self, entry: Entry) -> int | None:
        """A descriptor of it, for reading, or None where it is not there whole; notes that it is in use.

        Raises:
            OSError: it is there and cannot be opened.
        """
        try:
            descriptor = open_regular(self.folder / entry.name)
        except FileNotFoundError:
            return None
        if os.fstat(descriptor).st_size != entry.size:
            os.close(descriptor)
            return None
        with suppress(OSError):  # a folder that can only be read
            os.utime(descriptor)
        return descriptor

    def progress(self, entry: Entry | None = None) -> float:
        """When something of it, or of any shard, was last written, in seconds since 1970; 0 where nobody downloads."""
        with suppress(OSError):
            return max((file.touched for file in self._files(_PART)
                        if entry is None or file.name.startswith(f".{entry.name}.")), default=0.0)
        return 0.0

    def remove(self, entry: Entry) -> None:
        """It will not be found any more. Raises OSError."""
        (self.folder / entry.name).unlink(missing_ok=True)

    def room(self) -> int:
        """The bytes that all its files may have: the budget, or less where the disk is full of something else."""
        try:
            disk = os.statvfs(self.folder)
            return min(self.budget_bytes, self._held() + disk.f_bavail * disk.f_frsize)
        except OSError:  # the folder is not there yet
            return self.budget_bytes

    def fill(self, entry: Entry, blocks: Callable[[], Iterable[bytes]], uses: Uses = Uses(),
             evicted: Callable[[str], None] = lambda name: None) -> Outcome:
        """Download it, unless it is there or somebody else is about it.

        Args:
            blocks: begins the download.
            uses: what is needed sooner than this shard does not go for it.
            evicted: called with the name of each file that goes.

        Raises:
            ChecksumError: other bytes came than the manifest says.
            NoRoomError: there is no room for it now.
            DataError: as `blocks`; too many or too few bytes came.
            OSError: they cannot be written, or what should go for it cannot be removed.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        locked = self.folder / f".{entry.name}.lock"
        try:
            held = _lock(locked)
        except BlockingIOError:
            return Outcome.LOCKED
        try:
            if self.find(entry):
                return Outcome.PRESENT
            self._download(entry, blocks, uses, evicted)
            return Outcome.DOWNLOADED
        finally:
            with suppress(OSError):
                locked.unlink()
            unlock(held)

    def _download(self, entry: Entry, blocks: Callable[[], Iterable[bytes]], uses: Uses,
                  evicted: Callable[[str], None]) -> None:
        with self._room_locked():
            self._remove_leftovers(entry.name)
            self._surplus(entry, uses)
        coming = iter(blocks())
        first = next(coming, b"")  # nothing goes for a shard whose server does not answer
        path = self.folder / entry.name
        with replacing(path) as temporary:
            with self._room_locked():
                self._make_room(entry, uses, evicted)
                _reserve(temporary, entry.size)
            with temporary.open("r+b") as file:
                _write(file, entry, itertools.chain([first], coming))

    @contextmanager
    def _room_locked(self) -> Iterator[None]:
        """Alone with the room, for a moment."""
        end = time.monotonic() + _ROOM_WAIT_S
        while True:
            try:
                held = _lock(self.folder / _ROOM)
                break
            except BlockingIOError as error:
                if time.monotonic() > end:
                    raise OSError(errno.ETIMEDOUT, f"another process has it since {_ROOM_WAIT_S:.0f} s",
                                  str(self.folder / _ROOM)) from error
                time.sleep(_ROOM_POLL_S)
        try:
            yield
        finally:
            unlock(held)

    def _surplus(self, entry: Entry, uses: Uses) -> tuple[int, list[File]]:
        """The bytes that have to go for this shard, and the files that may, in this order. NoRoomError: too few."""
        room = self.room()
        surplus = entry.size + self._held() - room
        files = victims(self._files(_WHOLE), entry.name, uses, time.time())
        if surplus > sum(file.size for file in files):
            limit = (f"among its {room}; raise --data.cache_bytes" if room == self.budget_bytes else
                     f"on its disk, where {room} are for it; make room there, or give another folder to --data.cache")
            raise NoRoomError(f"{entry.where} has {entry.size} bytes, for which the cache {self.folder} has no room "
                              f"{limit}")
        return surplus, files

    def _make_room(self, entry: Entry, uses: Uses, evicted: Callable[[str], None]) -> None:
        """Let files go until this shard fits. Raises PermissionError where too many are those of other users."""
        surplus, files = self._surplus(entry, uses)
        refused: PermissionError | None = None
        for file in files:
            if surplus <= 0:
                return
            try:
                (self.folder / file.name).unlink(missing_ok=True)
            except PermissionError as error:
                refused = error
                continue
            surplus -= file.size
            evicted(file.name)
        if surplus > 0 and refused is not None:
            raise refused

    def _held(self) -> int:
        """The bytes of its files. Raises OSError."""
        return sum(file.size for file in self._files(_WHOLE, _PART))

    def _files(self, *kinds: re.Pattern[str]) -> list[File]:
        """Of its own, the whole shards, or what is being written."""
        files = []
        with os.scandir(self.folder) as listing:
            for item in listing:
                with suppress(FileNotFoundError):  # it has just gone
                    if any(kind.fullmatch(item.name) for kind in kinds) and item.is_file(follow_symlinks=False):
                        found = item.stat()
                        files.append(File(item.name, found.st_size, found.st_mtime))
        return files

    def _remove_leftovers(self, name: str) -> None:
        """What killed downloads have left, of this shard, whose lock the caller holds, and of others that nobody
        holds."""
        for file in self._files(_PART):
            path, other = self.folder / file.name, file.name[1:len(name) + 1]  # all names are equally long
            with suppress(OSError):  # its writer lives, or it is that of another user
                if other == name:
                    path.unlink(missing_ok=True)
                    continue
                locked = self.folder / f".{other}.lock"
                held = _lock(locked)
                try:
                    path.unlink(missing_ok=True)
                    locked.unlink(missing_ok=True)
                finally:
                    unlock(held)


def _lock(path: Path) -> int:
    """As vir.files.lock, of a file that those can lock too who may write into the folder, and nobody else."""
    held = lock(path)
    with suppress(OSError):  # it is that of another user, who has done so
        os.fchmod(held, os.stat(path.parent).st_mode & 0o666)
    return held


def _reserve(path: Path, size: int) -> None:
    """A new file of this size, so that all see how much room it takes, and a full disk is found at once."""
    with path.open("xb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENODEV):  # it cannot
                raise
            file.truncate(size)


def _write(file: BinaryIO, entry: Entry, blocks: Iterable[bytes]) -> None:
    digest, size = hashlib.sha256(), 0
    for block in blocks:
        size += len(block)
        if size > entry.size:
            break
        file.write(block)
        if entry.sha256 is not None:
            digest.update(block)
    if size != entry.size:
        raise DataError(f"{entry.where}: {size} bytes came{' so far' if size > entry.size else ''}, its server said "
                        f"{entry.size}; if the shard was replaced, start the program again")
    if entry.sha256 not in (None, digest.hexdigest()):
        raise ChecksumError(f"{entry.where} has the SHA-256 {digest.hexdigest()}, the manifest says {entry.sha256}; "
                            "copy the shard to the store again")


if __name__ == "__main__":
    raise SystemExit("vir.data.cache is a part of the library; the program is vir-train")
