"""Reads the samples of a split by number: one pread per sample, with the checksum of the index where it has one."""

import errno
import functools
import os
import stat
import zlib
from pathlib import Path
from typing import Callable, Iterator, TypedDict

import numpy as np

from vir import files
from vir.data.decode import BadSampleError
from vir.data.shards import INDEX, SplitManifest, read_index, read_manifest
from vir.errors import DataError
from vir.files import open_regular, pread, sha256

MAX_OPEN_SHARDS = 128
"""The most open files per reader and process."""


class _ReaderState(TypedDict):
    folder: Path
    _manifest: SplitManifest


class ShardReader:
    """A split folder, opened and checked: all shards exist with the right size; the index fits the manifest.

    It has `len(reader)` samples, numbered in shard order. Threads may share a reader, a forked process may continue to
    use it, and it can be pickled: the copy opens its own files and does not repeat the checks.

    Args:
        check_shards: False leaves the shards alone until they are read. For all ranks of a node but one: a network disk
            is not asked for thousands of sizes by each.

    Raises:
        DataError: as read_manifest; also if a shard is missing or has another size, or the index is damaged.
    """

    def __init__(self, folder: Path | str, *, check_shards: bool = True) -> None:
        self.folder = Path(folder).absolute()
        self._manifest = read_manifest(self.folder)
        self._open()
        if check_shards:
            self._check_shards()
        self._check_index()

    def _open(self) -> None:
        self._index = read_index(self.folder)
        self._starts = np.cumsum([0, *self.shard_sizes])
        paths = [self.folder / shard.name for shard in self._manifest.shards]
        # A descriptor that leaves the cache is closed when the last thread has read from it. The cached function does
        # not refer to `self`: such a cycle would keep all files open until the garbage collector runs.
        self._descriptor = functools.lru_cache(maxsize=MAX_OPEN_SHARDS)(lambda shard: _Descriptor(paths[shard]))

    def __getstate__(self) -> _ReaderState:
        return {"folder": self.folder, "_manifest": self._manifest}

    def __setstate__(self, state: _ReaderState) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return len(self._index)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; the position is the label."""
        return self._manifest.classes

    @property
    def fingerprint(self) -> str:
        """Changes with any byte of the shards and with the class list; see SplitManifest.fingerprint."""
        return self._manifest.fingerprint

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        """Samples in each shard."""
        return tuple(shard.num_samples for shard in self._manifest.shards)

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """[len(reader)] int32, read-only."""
        labels = np.ascontiguousarray(self._index["label"])
        labels.flags.writeable = False
        return labels

    def key(self, i: int) -> str:
        """Raises DataError where it is not UTF-8."""
        key = self._index["key"][i]
        try:
            return key.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{self.folder / INDEX}: the key of sample {i}, {key[:100]!r}, is not UTF-8; copy the "
                            "split again or convert it again") from error

    def where(self, i: int) -> str:
        """SHARD:KEY@OFFSET, for messages: enough to cut the sample out with dd."""
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
        data = self._read_with_retries(i, int(row["shard"]), int(row["offset"]), int(row["size"]))
        if self._manifest.shards[row["shard"]].sha256 is None:
            return data
        if zlib.crc32(data) != row["crc32"]:
            self._descriptor.cache_clear()
            data = self._read_with_retries(i, int(row["shard"]), int(row["offset"]), int(row["size"]))
        if zlib.crc32(data) != row["crc32"]:
            raise BadSampleError(f"wrong checksum, the shard in {self.folder} is damaged; copy it again or convert "
                                 "the split again")
        return data

    def substitutes(self, i: int) -> Iterator[int]:
        """Every other sample once, the best substitutes first.

        First the samples of the same class in the same shard, then all others; both in cyclic order after i.
        """
        shard = self._index["shard"][i]
        start, stop = self._starts[shard], self._starts[shard + 1]
        same = start + np.flatnonzero(self.labels[start:stop] == self.labels[i])
        same = [int(j) for j in np.concatenate([same[same > i], same[same < i]])]
        yield from same
        tried = {i, *same}
        for step in range(1, len(self)):
            j = (i + step) % len(self)
            if j not in tried:
                yield j

    def _read_with_retries(self, i: int, shard: int, offset: int, size: int) -> bytes:
        def read() -> bytes:
            # Kept in a variable while reading: another thread may remove it from the cache, which would close it.
            descriptor = self._descriptor(shard)
            return pread(descriptor.number, size, offset)

        try:  # on network disks, a new descriptor may work where a stale one fails
            return files.retried(read, failed=self._descriptor.cache_clear)
        except OSError as error:
            raise DataError(f"cannot read {self.where(i)} in {self.folder}: {error.strerror or error}, after "
                            f"{1 + len(files.RETRY_WAITS_S)} attempts; check the disk or copy the shard again") \
                from error

    def _check_shards(self) -> None:
        try:
            with os.scandir(self.folder) as listing:  # on network disks, it also brings the sizes that are asked below
                entries = {entry.name: entry for entry in listing}
        except OSError as error:
            raise DataError(f"cannot list {self.folder}: {error.strerror}; make the folder readable or copy the split "
                            f"again") from error
        for shard in self._manifest.shards:
            path = self.folder / shard.name
            try:
                if shard.name not in entries:
                    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
                found = entries[shard.name].stat()
                if not stat.S_ISREG(found.st_mode):
                    raise OSError(errno.EINVAL, "it is no regular file")
            except OSError as error:
                raise DataError(f"cannot open shard {path}: {error.strerror}; copy it again or convert the split "
                                f"again") from error
            if found.st_size != shard.bytes:
                raise DataError(f"shard {path} has {found.st_size} bytes, the manifest says {shard.bytes}; copy it "
                                f"again or convert the split again")

    def _check_index(self) -> None:
        path = self.folder / INDEX
        index, shards = self._index, self._manifest.shards
        again = "copy the split again or convert it again"
        if len(index) != self._manifest.num_samples:
            raise DataError(f"{path} has {len(index)} samples, the manifest says {self._manifest.num_samples}; {again}")
        if not len(index):
            raise DataError(f"{self.folder} holds no samples; {again}")
        if sha256(path) != self._manifest.index_sha256:
            raise DataError(f"{path} is not the index that the manifest names (its sha256 differs); {again}")
        if not np.array_equal(index["shard"], np.repeat(np.arange(len(shards)), self.shard_sizes)):
            raise DataError(f"{path} and the manifest disagree on the shards' sample counts; {again}")
        lowest, highest = int(index["label"].min()), int(index["label"].max())
        if lowest < 0 or highest >= len(self.classes):
            raise DataError(f"{path} has labels {lowest}..{highest}, the manifest lists {len(self.classes)} classes; "
                            f"{again}")
        # Not offset + size: hostile ones overflow.
        left = np.array([shard.bytes for shard in shards])[index["shard"]] - np.maximum(index["size"], 0)
        if index["offset"].min() < 0 or index["size"].min() < 0 or (index["offset"] > left).any():
            raise DataError(f"{path} has samples beyond the end of their shard; {again}")


class _Descriptor:
    """An open file; it is closed when there is no reference to this object any more."""

    number: int

    def __init__(self, path: Path) -> None:
        self.number = open_regular(path)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        if hasattr(self, "number"):  # not if it could not be opened
            close(self.number)
