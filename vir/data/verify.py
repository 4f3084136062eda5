"""Whether a split is what its manifest says, to the last byte; what is not is named, and written anew from its source.

The fast way reads every shard once, for its sha256. Only a shard whose sha256 differs is looked at more closely.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np

from vir.data.damage import MAX_ALIKE, Finding, damaged_images, damaged_structure, lost_images
from vir.data.executors import Stopped
from vir.data.repeats import among, repeated
from vir.data.shards import (
    INDEX,
    MANIFEST,
    PARTIAL,
    ShardInfo,
    SplitManifest,
    read_index,
    read_manifest,
    write_index,
)
from vir.errors import DataError, SettingsError
from vir.files import open_regular, replacing, sha256
from vir.log import progress_bar

_BLOCK = 1 << 20
"""Bytes that a thread reads and hashes at a time: they stay in its cache in between."""

_KEY_BYTES = 1 << 22
"""Of the keys that are compared at a time."""


def split_folders(shards: Path) -> list[Path]:
    """The folder itself if it is a split, else the splits in it, sorted.

    One that holds an index or tars is a split that has lost its manifest; so may be one that cannot be listed. What
    a conversion has not finished is none.

    Raises:
        DataError: there are none.
    """
    shards = Path(shards).absolute()
    if os.path.lexists(shards / MANIFEST):
        return [shards]
    with suppress(OSError):
        if found := sorted(path for path in shards.iterdir() if not path.name.startswith(".")
                           and not path.name.endswith(PARTIAL) and path.is_dir() and _may_be_split(path)):
            return found
    read_manifest(shards)  # tells what the folder is instead
    return [shards]


def _may_be_split(folder: Path) -> bool:
    try:
        names = os.listdir(folder)
    except OSError:
        return True
    return MANIFEST in names or INDEX in names or any(name.endswith(".tar") for name in names)


def verify_split(folder: Path, *, jobs: int) -> list[Finding]:
    """All that is wrong in a split folder; none if it is sound. With a progress bar in bytes.

    Where a shard has no sha256 in the manifest, its contents are not read, only its tar headers.

    Args:
        jobs: threads; each reads another shard.

    Raises:
        DataError: the folder cannot be read, or holds nothing of a split.
        SettingsError: jobs < 1.
    """
    if jobs < 1:
        raise SettingsError(f"--jobs must be at least 1, got {jobs}")
    folder = Path(folder).absolute()
    try:
        manifest = read_manifest(folder)
    except DataError as error:
        if os.path.lexists(folder / MANIFEST):
            return [Finding(MANIFEST, None, None, str(error))]
        if isinstance(error.__cause__, FileNotFoundError) and folder.is_dir() and _may_be_split(folder):
            return [Finding(MANIFEST, None, None, f"missing: {error}")]
        raise
    index, findings = _checked_index(folder, manifest)
    return [*findings, *_extra(folder, manifest), *_damaged_shards(folder, manifest, index, jobs)]


def repair_split(folder: Path, source: Path, findings: Sequence[Finding], *, jobs: int,
                 is_stopping: Callable[[], bool] = lambda: False) -> None:
    """Writes the damaged shards anew from the source that they were converted from, then a damaged index from the
    shards; each only if it becomes what the manifest names. Removes nothing.

    Args:
        is_stopping: called several times a second while shards are written, and before each shard that is read for
            the index; True ends the repair.

    Raises:
        DataError: that would give other bytes than the manifest names; then nothing is replaced.
        Stopped: `is_stopping` returned True. What was not replaced until then stays as it is.
    """
    from vir.data.convert import rewrite_shards  # slow to import, and seldom needed

    folder = Path(folder).absolute()
    manifest = read_manifest(folder)
    damaged = {finding.shard for finding in findings}
    if names := [shard.name for shard in manifest.shards if shard.name in damaged]:
        rewrite_shards(folder, Path(source).absolute(), names, jobs, is_stopping)
    if INDEX in damaged:
        restore_index(folder, jobs=jobs, is_stopping=is_stopping)


def is_repairable(folder: Path, findings: Sequence[Finding]) -> bool:
    """Whether repair_split can mend any of it: it needs what vir-convert or vir-index --checksums wrote."""
    try:
        manifest = read_manifest(folder)
    except DataError:
        return False
    damaged = {finding.shard for finding in findings}
    return (INDEX in damaged and _names_checksums(manifest)
            or manifest.conversion is not None and any(shard.name in damaged for shard in manifest.shards))


def _names_checksums(manifest: SplitManifest) -> bool:
    return all(shard.sha256 is not None for shard in manifest.shards)


def restore_index(folder: Path, *, jobs: int, is_stopping: Callable[[], bool] = lambda: False) -> None:
    """Makes the index anew from the shards.

    Raises:
        DataError: a shard is damaged, or the result is not the index that the manifest names; then nothing is replaced.
        Stopped: `is_stopping` returned True; nothing is replaced.
    """
    from vir.data.foreign import IndexedShard, index_shard, labelled  # brings Pillow, which checking does not need

    manifest = read_manifest(folder)
    if unread := [shard.name for shard in manifest.shards if shard.sha256 is None]:
        raise DataError(f"{folder / INDEX} cannot be made anew as it was, because {unread[0]} was indexed without its "
                        "images; make index and manifest anew with vir-index")

    def indexed(shard: ShardInfo) -> IndexedShard:
        if is_stopping():
            raise Stopped
        if sha256(folder / shard.name) != shard.sha256:
            raise DataError(f"{folder / INDEX} cannot be made anew, because {shard.name} is damaged: copy it again")
        return index_shard(folder / shard.name, shard.name, checksums=True)

    try:
        with ThreadPoolExecutor(jobs) as pool, replacing(folder / INDEX) as path:
            _, shards = labelled(list(pool.map(indexed, manifest.shards)), manifest.classes)
            write_index(path, [shard.rows for shard in shards])
            if sha256(path) != manifest.index_sha256:
                raise DataError(f"{folder / INDEX} was made anew from the shards and is not the one that the manifest "
                                "names: it was made by another version, or in another way; make or convert the split "
                                "again")
    except OSError as error:
        raise DataError(f"cannot make {folder / INDEX} anew: {error.filename or folder}: {error.strerror}") from error


# ---- the index


def _checked_index(folder: Path, manifest: SplitManifest) -> tuple[np.ndarray | None, list[Finding]]:
    """The index, or None where it does not tell which image is which, and what is wrong with it."""
    try:
        index = read_index(folder)
        digest = sha256(folder / INDEX)
    except (DataError, OSError) as error:
        return None, [Finding(INDEX, None, None, f"{error}; {_way_to_index(manifest)}")]
    is_named = digest == manifest.index_sha256
    findings = [] if is_named else [_another_index(folder, manifest, digest)]
    sizes = [shard.num_samples for shard in manifest.shards]
    if len(index) != sum(sizes):
        return None, [*findings, Finding(INDEX, None, None, f"it has {len(index):,} samples, the manifest says "
                                         f"{sum(sizes):,}")]
    wrong = index["shard"] != np.repeat(np.arange(len(sizes)), sizes)
    if wrong.any():
        return None, [*findings, *_row_findings(index, manifest, np.flatnonzero(wrong), lambda i: (
            "it is in the place of another shard: rows and the manifest's sample counts disagree"))]
    findings += _bad_values(index, manifest)
    return index if is_named else None, findings


def _another_index(folder: Path, manifest: SplitManifest, digest: str) -> Finding:
    """Names the split beside this one that the index belongs to, if it does."""
    for other in _beside(folder):
        with suppress(DataError, OSError):
            if (other / MANIFEST).is_file() and read_manifest(other).index_sha256 == digest:
                return Finding(INDEX, None, None, f"it is the index of another split, {other.name}: copy the right "
                               f"one, or {_way_to_index(manifest)}")
    return Finding(INDEX, None, None, f"it is damaged or of another split: its sha256 is {digest}, the manifest says "
                   f"{manifest.index_sha256}; {_way_to_index(manifest)}")


def _beside(folder: Path) -> list[Path]:
    try:
        return sorted(folder.parent.iterdir())
    except OSError:
        return []


def _way_to_index(manifest: SplitManifest) -> str:
    return ("--repair makes it anew from the shards" if _names_checksums(manifest) else
            f"vir-index makes it and {MANIFEST} anew")


def _bad_values(index: np.ndarray, manifest: SplitManifest) -> list[Finding]:
    """Labels without class, images outside their shard, keys that come twice or are no text."""
    labels, sizes, offsets = index["label"], index["size"], index["offset"]
    bounds = np.repeat([shard.bytes for shard in manifest.shards], [shard.num_samples for shard in manifest.shards])
    # Not offset + size: hostile ones overflow.
    outside = (offsets < 0) | (sizes < 0) | (offsets > bounds - np.maximum(sizes, 0))
    classes = len(manifest.classes)
    return [
        *_row_findings(index, manifest, np.flatnonzero((labels < 0) | (labels >= classes)), lambda i: (
            f"label {labels[i]} is out of range: the manifest lists {classes:,} classes")),
        *_row_findings(index, manifest, np.flatnonzero(outside), lambda i: (
            f"its {sizes[i]} bytes are not all in the shard")),
        *_bad_keys(index, manifest)]


def _row_findings(index: np.ndarray, manifest: SplitManifest, rows: np.ndarray, what: Callable[[int], str]
                  ) -> list[Finding]:
    """The first of many, and a line that counts the others."""
    findings = [_row_finding(index, manifest, i, what(i)) for i in rows[:MAX_ALIKE].tolist()]
    if len(rows) > MAX_ALIKE:
        findings.append(Finding(INDEX, None, None, f"and {len(rows) - MAX_ALIKE:,} more of this kind"))
    return findings


def _row_finding(index: np.ndarray, manifest: SplitManifest, i: int, what: str) -> Finding:
    key = index["key"][i].decode("utf-8", "backslashreplace")
    return Finding(INDEX, key, None, f"row {i}, {_place(index, manifest, i)}: {what}")


def _place(index: np.ndarray, manifest: SplitManifest, i: int) -> str:
    number = int(index["shard"][i])
    shard = manifest.shards[number].name if 0 <= number < len(manifest.shards) else f"shard number {number}"
    return f"{shard}@{index['offset'][i]}"


def _bad_keys(index: np.ndarray, manifest: SplitManifest) -> list[Finding]:
    """Keys that are no text, or that an earlier sample has.

    Memory: 24 bytes a sample. Keys are compared by a hash first, and then only those whose hash comes twice.
    """
    hashes, is_broken = np.empty(len(index), np.uint64), np.zeros(len(index), bool)
    for start, keys in _key_bytes(index):
        hashes[start:start + len(keys)] = _hashes(keys)
        if _is_broken_text(keys):
            is_broken[start:start + len(keys)] = [_is_broken_text(key) for key in keys]
    rows = np.flatnonzero(among(hashes, repeated(hashes)))
    keys = index["key"][rows]
    order = np.argsort(keys, kind="stable")
    is_same = keys[order][1:] == keys[order][:-1]
    later, earlier = rows[order[1:][is_same]], rows[order[:-1][is_same]]
    by_row = np.argsort(later)
    before = dict(zip(later[by_row[:MAX_ALIKE]].tolist(), earlier[by_row[:MAX_ALIKE]].tolist()))
    return [
        *_row_findings(index, manifest, np.flatnonzero(is_broken), lambda i: "the key is not UTF-8"),
        *_row_findings(index, manifest, later[by_row], lambda i: (
            f"a duplicate key: the sample at {_place(index, manifest, before[i])} has it too"))]


def _key_bytes(index: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """The keys as bytes, [rows, width] with a width that is a multiple of 8 and zeros behind each, part by part."""
    size = index.dtype["key"].itemsize
    width = (size // 8 + 1) * 8
    step = max(1, _KEY_BYTES // width)
    for start in range(0, len(index), step):
        part = np.ascontiguousarray(index["key"][start:start + step])
        keys = np.zeros((len(part), width), np.uint8)
        keys[:, :size] = part.view(np.uint8).reshape(len(part), size)
        yield start, keys


def _hashes(keys: np.ndarray) -> np.ndarray:
    """[rows] uint64 of [rows, width] bytes."""
    words = keys.view(np.uint64)
    factors = np.random.default_rng(0).integers(0, 1 << 63, words.shape[1], np.uint64) * np.uint64(2) + np.uint64(1)
    return ((words ^ (words >> np.uint64(29))) * factors).sum(axis=1, dtype=np.uint64)


def _is_broken_text(keys: np.ndarray) -> bool:
    try:
        keys.tobytes().decode("utf-8")
        return False
    except UnicodeDecodeError:
        return True


# ---- the shards


def _extra(folder: Path, manifest: SplitManifest) -> list[Finding]:
    known = {shard.name for shard in manifest.shards}
    try:
        names = sorted(path.name for path in folder.iterdir() if path.name.endswith(".tar") and not path.is_dir())
    except OSError as error:
        raise DataError(f"cannot list {folder}: {error.strerror}; make the folder readable") from error
    return [Finding(name, None, None, "extra: the manifest does not name it; remove it if it is not needed")
            for name in names if name not in known]


def _damaged_shards(folder: Path, manifest: SplitManifest, index: np.ndarray | None, jobs: int) -> Iterator[Finding]:
    starts = np.cumsum([0, *(shard.num_samples for shard in manifest.shards)])
    owners = {shard.sha256: shard.name for shard in manifest.shards if shard.num_samples}
    bar = progress_bar(sum(shard.bytes for shard in manifest.shards), "B", unit_scale=True, desc=folder.name)
    lock, stop = threading.Lock(), threading.Event()

    def advance(count: int) -> None:
        if stop.is_set():
            raise _Stopped
        with lock:
            bar.update(count)

    def check(number: int) -> list[Finding]:
        rows = None if index is None else index[starts[number]:starts[number + 1]]
        return _damaged_shard(folder, manifest.shards[number], rows, manifest.classes, owners, advance)

    pool = ThreadPoolExecutor(jobs)
    try:
        for findings in pool.map(check, range(len(manifest.shards))):
            yield from findings
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
        bar.close()


class _Stopped(Exception):
    """Ends the threads when the main one has ended, by Ctrl-C."""


def _damaged_shard(folder: Path, info: ShardInfo, rows: np.ndarray | None, classes: Sequence[str],
                   owners: dict[str | None, str], advance: Callable[[int], None]) -> list[Finding]:
    """Args: owners: from sha256 to the name of the shard that should have it."""
    try:
        descriptor = open_regular(folder / info.name)
    except FileNotFoundError:
        return [Finding(info.name, None, None, "missing")]
    except OSError as error:
        return [Finding(info.name, None, None, f"cannot be opened: {error.strerror}")]
    try:
        return _damaged_contents(descriptor, info, rows, classes, owners, advance)
    except OSError as error:
        return [Finding(info.name, None, None, f"cannot be read: {error.strerror or error}; check the disk")]
    finally:
        os.close(descriptor)


def _damaged_contents(descriptor: int, info: ShardInfo, rows: np.ndarray | None, classes: Sequence[str],
                      owners: dict[str | None, str], advance: Callable[[int], None]) -> list[Finding]:
    size = os.fstat(descriptor).st_size
    findings = [] if size == info.bytes else [Finding(
        info.name, None, min(size, info.bytes),
        f"{'truncated' if size < info.bytes else 'too long'}: it has {size} bytes, the manifest says {info.bytes}")]
    if rows is not None:
        rows = rows[(rows["offset"] >= 0) & (rows["size"] >= 0)]
        findings += lost_images(size, info.name, rows)
    if info.sha256 is None:
        advance(size)
        return [*findings, *damaged_structure(descriptor, info, rows, classes)]
    digest = _sha256(descriptor, advance)
    if digest == info.sha256:
        return [] if size == info.bytes else [Finding(
            info.name, None, None, f"the manifest was edited: it says {info.bytes} bytes, and the sha256 of this file "
            f"of {size} bytes")]
    if digest in owners:
        return [Finding(info.name, None, None, f"swapped: it holds the bytes of {owners[digest]}")]
    if rows is not None:
        findings += damaged_images(descriptor, info.name, rows)
    findings += damaged_structure(descriptor, info, rows, classes)
    return findings or [Finding(
        info.name, None, None, f"its sha256 is {digest}, the manifest says {info.sha256}: "
        + ("images, labels, headers and padding are sound, so other members are damaged or the manifest was edited"
           if rows is not None else "which image is damaged cannot be said, because the index is damaged too"))]


_buffers = threading.local()


def _sha256(descriptor: int, advance: Callable[[int], None]) -> str:
    if not hasattr(_buffers, "view"):
        _buffers.view = memoryview(bytearray(_BLOCK))
    view: memoryview = _buffers.view
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    digest = hashlib.sha256()
    while count := os.readv(descriptor, [view]):
        digest.update(view[:count])
        advance(count)
    return digest.hexdigest()


if __name__ == "__main__":
    raise SystemExit("vir.data.verify is a part of the library; the program is vir-verify")
