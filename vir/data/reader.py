"""Samples by number: what a reader is, and the one of shards, with the checksums of the index where it has them."""

from __future__ import annotations

import errno
import os
import shlex
import stat
import time
import zlib
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np

from vir import files
from vir.data.access import Access, LocalShards
from vir.data.decode import BadSampleError
from vir.data.shards import INDEX, SplitManifest, read_index, read_manifest
from vir.errors import DataError, VirError
from vir.files import sha256

_MOST_AT_ONCE = 1 << 23
"""The most bytes of a read that takes several samples together."""
_MOST_CHECKS = 1 << 14
"""Whose time is kept where nobody asks for it."""
_ROWS_AT_ONCE = 1 << 18
"""Of the index, while it is checked."""


class Reader(ABC):
    """Labelled images, numbered in a fixed order. Threads may share a reader, a forked process may continue to use it.
    """

    name: str
    """Where the images come from, for messages: a folder, or a URL without secrets."""

    @property
    def shard_bytes(self) -> tuple[int, ...]:
        """The size of each shard; nothing where the images are files of their own."""
        return ()

    @property
    def budget_bytes(self) -> int | None:
        """Of the cache that shards are kept in; None without one."""
        return None

    @abstractmethod
    def __len__(self) -> int:
        """The number of samples."""

    @property
    @abstractmethod
    def classes(self) -> tuple[str, ...]:
        """Class names; the position is the label."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Changes with the samples, their order and the class list; checkpoints keep it to know their data."""

    @property
    @abstractmethod
    def shard_sizes(self) -> tuple[int, ...]:
        """Samples in each shard: those that are read best one after another."""

    @property
    @abstractmethod
    def labels(self) -> np.ndarray:
        """[len(reader)] int32, read-only."""

    @abstractmethod
    def key(self, i: int) -> str:
        """The sample's name, unique in the split."""

    def find(self, keys: Container[str]) -> dict[str, int]:
        """The number of each sample whose key is among these, by its key."""
        return {key: i for i in range(len(self)) if (key := self.key(i)) in keys}

    @abstractmethod
    def file_of(self, i: int) -> tuple[str, int]:
        """The name of the shard or image file that sample i lies in, and the byte where its image begins there."""

    @abstractmethod
    def where(self, i: int) -> str:
        """The sample's place, for messages."""

    @abstractmethod
    def read(self, i: int) -> bytes:
        """The image file of sample i.

        Raises:
            DataError: it could not be read in several attempts.
            BadSampleError: it was read, and it is damaged.
        """

    def read_at_hand(self, i: int) -> bytes | None:
        """As read(), where it can be had at once and is sound; else None. Never raises."""
        return None

    def together(self, samples: Sequence[int]) -> list[list[int]]:
        """The samples, each once, in groups that are best read by one call each, in the best order for a disk."""
        return [[i] for i in sorted(set(samples))]

    def read_group(self, group: Sequence[int]) -> list[bytes | VirError]:
        """What read() gives or raises for each sample of a group of together()."""
        return [self._read_or_error(i) for i in group]

    def expect(self, group: Sequence[int]) -> None:
        """A hint that a group will be read soon. Never raises."""

    def checking(self) -> float:
        """CPU seconds that checksums have taken in this process since this was last asked."""
        return 0.0

    def substitutes(self, i: int) -> Iterator[int]:
        """Every other sample once, the best substitutes first.

        First the samples of the same class in the same shard, then all others; both in cyclic order after i.
        """
        ends = np.cumsum(self.shard_sizes)
        shard = int(np.searchsorted(ends, i, side="right"))
        start, stop = int(ends[shard]) - self.shard_sizes[shard], int(ends[shard])
        alike = start + np.flatnonzero(self.labels[start:stop] == self.labels[i])
        same = [int(j) for j in np.concatenate([alike[alike > i], alike[alike < i]])]
        yield from same
        tried = {i, *same}
        for step in range(1, len(self)):
            j = (i + step) % len(self)
            if j not in tried:
                yield j

    def _read_or_error(self, i: int) -> bytes | VirError:
        try:
            return self.read(i)
        except VirError as error:
            return error


class _ReaderState(TypedDict):
    folder: Path
    access: Access
    name: str
    _manifest: SplitManifest


class ShardReader(Reader):
    """The shards of a split, numbered as in its index.

    It can be pickled: the copy opens its own files and does not repeat the checks.

    Args:
        folder: where manifest and index lie.
        access: how the shards' bytes are reached. None: they lie in the folder.
        name: as Reader.name; the folder if None.
        check: False trusts the index, and leaves shards alone until they are read. For all ranks of a node but one: a
            network disk is not asked for thousands of sizes by each, and the index is hashed once.
        is_hashed: the index was compared with its hash just now.

    Raises:
        DataError: as read_manifest; also if a shard in the folder is missing or has another size, or the index is
            damaged.
    """

    def __init__(self, folder: Path | str, access: Access | None = None, name: str | None = None, *,
                 check: bool = True, is_hashed: bool = False) -> None:
        self.folder = Path(folder).absolute()
        self.name = str(self.folder) if name is None else name
        self._manifest = read_manifest(self.folder)
        self._index = read_index(self.folder)
        self._checks: deque[float] = deque(maxlen=_MOST_CHECKS)
        self.access = access or LocalShards([self.folder / shard.name for shard in self._manifest.shards])
        if check and access is None:
            self._check_shards()
        self._check_count()
        if check:
            self._check_index(is_hashed)

    def __getstate__(self) -> _ReaderState:
        return {"folder": self.folder, "access": self.access, "name": self.name, "_manifest": self._manifest}

    def __setstate__(self, state: _ReaderState) -> None:
        self.__dict__.update(state)
        self._index = read_index(self.folder)
        self._checks = deque(maxlen=_MOST_CHECKS)

    def __len__(self) -> int:
        return len(self._index)

    @property
    def classes(self) -> tuple[str, ...]:
        return self._manifest.classes

    @property
    def fingerprint(self) -> str:
        """Changes with any byte of the shards and with the class list; see SplitManifest.fingerprint."""
        return self._manifest.fingerprint

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        return tuple(shard.num_samples for shard in self._manifest.shards)

    @property
    def shard_bytes(self) -> tuple[int, ...]:
        return tuple(shard.bytes for shard in self._manifest.shards)

    @property
    def budget_bytes(self) -> int | None:
        return self.access.budget_bytes

    @property
    def labels(self) -> np.ndarray:
        """[len(reader)] int32, read-only, a part of the mapped index: a copy would be one for each worker."""
        return self._index["label"]

    def key(self, i: int) -> str:
        """Raises DataError where it is not UTF-8."""
        key = self._index["key"][i]
        try:
            return key.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{self.folder / INDEX}: the key of sample {i}, {key[:100]!r}, is not UTF-8; copy the "
                            "split again or convert it again") from error

    def find(self, keys: Container[str]) -> dict[str, int]:
        found: dict[str, int] = {}
        for first in range(0, len(self), _ROWS_AT_ONCE):
            part = self._index["key"][first:first + _ROWS_AT_ONCE].tolist()
            found.update((name, first + place) for place, key in enumerate(part)
                         if (name := key.decode("utf-8", "replace")) in keys)
        return found

    def file_of(self, i: int) -> tuple[str, int]:
        row = self._index[i]
        return self._manifest.shards[row["shard"]].name, int(row["offset"])

    def where(self, i: int) -> str:
        """SHARD:KEY@OFFSET: enough to cut the sample out with dd."""
        row = self._index[i]
        key = row["key"].decode("utf-8", "backslashreplace")
        return f"{self._manifest.shards[row['shard']].name}:{key}@{row['offset']}"

    def read(self, i: int) -> bytes:
        """The image file of sample i.

        Raises:
            DataError: it could not be read in 1 + len(files.RETRY_WAITS_S) attempts.
            BadSampleError: it was read twice, and both times its checksum differed from the index. Shards that were
                indexed without checksums have none.
        """
        row = self._index[i]
        if self._is_sound(row, data := self._read_with_retries(i, row)):
            return data
        self.access.forget()
        if self._is_sound(row, data := self._read_with_retries(i, row)):
            return data
        raise BadSampleError(f"wrong checksum, {self.access.where(row['shard'])} is damaged")

    def read_at_hand(self, i: int) -> bytes | None:
        row = self._index[i]
        data = self.access.read_at_hand(int(row["shard"]), int(row["offset"]), int(row["size"]))
        return data if data is not None and self._is_sound(row, data) else None

    def together(self, samples: Sequence[int]) -> list[list[int]]:
        """In order of shards and offsets, which is that of the numbers; neighbours that are worth one read together."""
        if not self.access.joins:
            return super().together(samples)
        groups: list[list[int]] = []
        for i in sorted(set(samples)):
            if groups and self._joins(groups[-1], i):
                groups[-1].append(i)
            else:
                groups.append([i])
        return groups

    def read_group(self, group: Sequence[int]) -> list[bytes | VirError]:
        rows = self._index[list(group)]
        if len(group) == 1:
            return super().read_group(group)
        begin, end = int(rows["offset"][0]), int(rows["offset"][-1] + rows["size"][-1])
        try:
            data = self.access.read(int(rows["shard"][0]), begin, end - begin)
        except DataError as error:  # what can be tried was tried
            return [error] * len(group)
        except OSError:  # perhaps of one of them alone
            return super().read_group(group)
        parts = [data[int(row["offset"]) - begin:int(row["offset"]) - begin + int(row["size"])] for row in rows]
        return [part if self._is_sound(row, part) else self._read_or_error(i)
                for i, row, part in zip(group, rows, parts)]

    def expect(self, group: Sequence[int]) -> None:
        for row in self._index[list(group)]:
            self.access.expect(int(row["shard"]), int(row["offset"]), int(row["size"]))

    def checking(self) -> float:
        seconds = 0.0
        while self._checks:  # threads that read add at the right meanwhile
            seconds += self._checks.popleft()
        return seconds

    def _joins(self, group: list[int], i: int) -> bool:
        first, before, row = self._index[group[0]], self._index[group[-1]], self._index[i]
        gap = int(row["offset"]) - int(before["offset"] + before["size"])
        total = int(row["offset"] + row["size"] - first["offset"])
        return bool(row["shard"] == before["shard"]) and 0 <= gap < self.access.joins and total <= _MOST_AT_ONCE

    def _is_sound(self, row: np.void, data: bytes) -> bool:
        if self._manifest.shards[row["shard"]].sha256 is None:
            return True
        began = time.thread_time()  # of this thread: after a checksum, it may wait for the interpreter
        is_sound = zlib.crc32(data) == row["crc32"]
        self._checks.append(time.thread_time() - began)
        return bool(is_sound)

    def _read_with_retries(self, i: int, row: np.void) -> bytes:
        shard, offset, size = int(row["shard"]), int(row["offset"]), int(row["size"])
        try:  # on network disks, a new descriptor may work where a stale one fails
            return files.retried(lambda: self.access.read(shard, offset, size), failed=self.access.forget)
        except OSError as error:
            raise DataError(f"cannot read {self.where(i)} in {self.access.where(shard)}: {error.strerror or error}, "
                            f"after {1 + len(files.RETRY_WAITS_S)} attempts; check the disk or copy the shard again") \
                from error

    def _check_shards(self) -> None:
        try:
            with os.scandir(self.folder) as listing:  # on network disks, it also brings the sizes that are asked below
                entries = {entry.name: entry for entry in listing}
        except OSError as error:
            raise DataError(f"cannot list {self.folder}: {error.strerror}; make the folder readable or copy the split "
                            f"again") from error
        again = ("copy it again or convert the split again" if self._manifest.is_converted else
                 f"copy it again, or make the index anew: vir-index {shlex.quote(str(self.folder))}")
        for shard in self._manifest.shards:
            path = self.folder / shard.name
            try:
                if shard.name not in entries:
                    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
                found = entries[shard.name].stat()
                if not stat.S_ISREG(found.st_mode):
                    raise OSError(errno.EINVAL, "it is no regular file")
            except OSError as error:
                raise DataError(f"cannot open shard {path}: {error.strerror}; {again}") from error
            if found.st_size != shard.bytes:
                raise DataError(f"shard {path} has {found.st_size} bytes, the manifest says {shard.bytes}; {again}")

    def _check_count(self) -> None:
        path, again = self.folder / INDEX, "copy the split again or convert it again"
        if len(self._index) != self._manifest.num_samples:
            raise DataError(f"{path} has {len(self._index)} samples, the manifest says {self._manifest.num_samples}; "
                            f"{again}")
        if not len(self._index):
            raise DataError(f"{self.folder} holds no samples; {again}")

    def _check_index(self, is_hashed: bool) -> None:
        path = self.folder / INDEX
        index, shards = self._index, self._manifest.shards
        again = "copy the split again or convert it again"
        if not is_hashed and sha256(path) != self._manifest.index_sha256:
            raise DataError(f"{path} is not the index that the manifest names (its sha256 differs); {again}")
        starts = np.cumsum([0, *self.shard_sizes])
        sizes = np.array([shard.bytes for shard in shards])
        for first in range(0, len(index), _ROWS_AT_ONCE):
            part = index[first:first + _ROWS_AT_ONCE]
            places = np.searchsorted(starts, np.arange(first, first + len(part)), side="right") - 1
            if not np.array_equal(part["shard"], places):
                raise DataError(f"{path} and the manifest disagree on the shards' sample counts; {again}")
            # Not offset + size: hostile ones overflow.
            left = sizes[places] - np.maximum(part["size"], 0)
            if part["offset"].min() < 0 or part["size"].min() < 0 or (part["offset"] > left).any():
                raise DataError(f"{path} has samples beyond the end of their shard; {again}")
        lowest, highest = int(index["label"].min()), int(index["label"].max())
        if lowest < 0 or highest >= len(self.classes):
            raise DataError(f"{path} has labels {lowest}..{highest}, the manifest lists {len(self.classes)} classes; "
                            f"{again}")


if __name__ == "__main__":
    raise SystemExit("vir.data.reader is a part of the library; the program is vir-train")
