"""Index and manifest for WebDataset tars that were made elsewhere; the tars stay as they are."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from glob import glob
from itertools import islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from vir.addresses import expand, shown
from vir.data.decode import BadSampleError, inspect_image
from vir.data.executors import Stopped, run_tasks, run_threads, stopping
from vir.data.random_access import LocalFile, RandomAccess, RemoteFile
from vir.data.repeats import among, repeated
from vir.data.shards import (
    MANIFEST,
    MAX_SHARDS,
    NAME,
    ShardInfo,
    SplitManifest,
    count_of,
    index_dtype,
    read_manifest,
    write_split,
)
from vir.data.sources.folder import names_in, some
from vir.data.sources.reading import MAX_IMAGE_BYTES
from vir.data.stores.choose import open_store
from vir.data.stores.store import Identity, Store
from vir.data.tar import Member, opened
from vir.data.tar_samples import TarSample, read_part, read_samples
from vir.errors import DataError, SettingsError
from vir.files import try_to_write
from vir.log import progress_bar

MAX_FOREIGN_KEY_BYTES = 512
"""The longest key, in UTF-8, folders included: every row of the index takes as much as the longest key."""
MAX_CLASS_NAMES = 1 << 16
"""The most different names that the txt of a split may hold without a class list: more are captions."""
MAX_LABEL = (1 << 20) - 1
"""The highest label without a class list, which then is "0", "1", ... up to it."""

_THREADS = 16
"""Of a process that indexes remote shards. They mostly wait, but each request takes a millisecond of Python's time."""
_CHUNK = 4096
_BLOCK = 1 << 22


@dataclass(frozen=True)
class IndexSummary:
    folder: Path
    images: int
    shards: int
    bytes: int
    """Of all shards."""
    classes: int
    seconds: float
    checksums: bool

    def __str__(self) -> str:
        lines = [f"{self.images:,} images of {self.classes:,} classes in {count_of(self.shards)}, "
                 f"{self.bytes / 1e6:,.1f} MB, in {self.seconds:.1f} s ({self.images / self.seconds:,.0f} images/s)"]
        if not self.checksums:
            lines.append("the images were not read: damage within them is seen only where they do not decode; "
                         "--checksums reads them and keeps their checksums")
        return "\n".join([*lines, f"index and manifest written to {self.folder}"])


@dataclass(frozen=True)
class IndexedShard:
    """One shard; the rows' labels are final, or ~i for names[i]."""

    info: ShardInfo
    rows: np.ndarray
    names: tuple[str, ...]


def index_shards(pattern: str, *, classes: Sequence[str] | None = None, split: str | None = None,
                 name: str | None = None, jobs: int = 8, checksums: bool = False,
                 is_stopping: Callable[[], bool] = lambda: False) -> IndexSummary:
    """Writes index.npy and manifest.json beside tars of one folder, which are only read.

    Each sample has an image and a label, as vir.data.tar_samples.read_samples says. Without `checksums` only headers
    and labels are read. Worker processes start by forkserver: a script that calls this needs the
    `if __name__ == "__main__"` guard.

    Args:
        pattern: a folder (all its .tar), a glob, or a pattern with braces: shards/x-{0000..1023}.tar
        classes: class list in label order. If None: the names in the txt, sorted, or else "0", "1", ... up to the
            highest label.
        split: None: the name of the folder.
        name: None: what the names of the shards have in common.
        is_stopping: called several times a second; True ends the indexing.

    Raises:
        DataError, SettingsError: each names the shard, the value and what to do.
        Stopped: `is_stopping` returned True. Nothing was written.
    """
    folder, names = find_shards(pattern)
    return index_tars(folder, names, classes=classes, split=split, name=name, jobs=jobs, checksums=checksums,
                      is_stopping=is_stopping)


def index_tars(folder: Path, names: Sequence[str], *, classes: Sequence[str] | None = None, split: str | None = None,
               name: str | None = None, jobs: int = 8, checksums: bool = False,
               is_stopping: Callable[[], bool] = lambda: False) -> IndexSummary:
    """As index_shards, of the tars of these names in this folder."""
    began = time.monotonic()
    if jobs < 1:
        raise SettingsError(f"--jobs must be at least 1, got {jobs}")
    if unsayable := [name for name in names if not name.isprintable()]:
        raise DataError(f"the name of the shard {unsayable[0]!r} in {folder} is not UTF-8 or cannot be printed; rename "
                        "it")
    split = checked_name("--split", folder.name if split is None else split)
    name = checked_name("--name", common_name(names, split) if name is None else name)
    before = _replaceable(folder, names, checksums)
    tars = [LocalTar(folder / name, name) for name in names]
    given, (classes, shards) = classes, index_local(tars, checksums, classes, jobs, is_stopping)
    if before is not None and given is None:
        _refuse_to_drop(before.classes, classes, folder)
    try:
        manifest = write_foreign(folder, shards, name, split, classes)
    except OSError as error:
        raise DataError(_not_writable(folder, error)) from error
    return summary_of(folder, manifest, began)


def write_foreign(folder: Path, shards: Sequence[IndexedShard], name: str, split: str, classes: Sequence[str]
                  ) -> SplitManifest:
    """Writes index and manifest of shards that vir-convert has not made. Raises OSError where it cannot."""
    return write_split(folder, [(shard.info, shard.rows) for shard in shards], name=name, split=split, classes=classes,
                       seed=0, samples_per_shard=max(shard.info.num_samples for shard in shards))


def summary_of(folder: Path, manifest: SplitManifest, began: float) -> IndexSummary:
    """Args: began: by time.monotonic."""
    return IndexSummary(folder, manifest.num_samples, len(manifest.shards),
                        sum(shard.bytes for shard in manifest.shards), len(manifest.classes), time.monotonic() - began,
                        all(shard.sha256 is not None for shard in manifest.shards))


def find_shards(pattern: str) -> tuple[Path, list[str]]:
    """The folder and the names of the tars that a pattern names, in order.

    Raises:
        DataError: there are none, or some of those that braces name are missing.
        SettingsError: they lie in more than one folder.
    """
    if os.path.isdir(pattern):
        folder = Path(pattern).absolute()
        names = [name for name in names_in(folder) if name.endswith(".tar") and not (folder / name).is_dir()]
        if not names:
            raise DataError(f"{folder} holds no .tar; found {some(names_in(folder))}")
        return folder, names
    paths = find_paths(pattern)
    if other := [path for path in paths if not path.endswith(".tar")]:
        raise SettingsError(f"PATTERN names files that do not end in .tar: {some(other)}; index.npy and manifest.json "
                            "are for plain tars, compressed ones must be unpacked before")
    folders = sorted({os.path.dirname(path) for path in paths})
    if len(folders) > 1:
        raise SettingsError(f"PATTERN names tars in {len(folders)} folders: {some(folders)}; index.npy and "
                            "manifest.json lie beside the tars of one folder: index each folder by itself")
    return Path(folders[0]).absolute(), list(dict.fromkeys(os.path.basename(path) for path in paths))


def is_indexed(folder: Path, names: Sequence[str]) -> bool:
    """Whether a folder has a manifest of exactly these tars, or one of vir-convert.

    Raises:
        DataError: it is damaged.
    """
    if not os.path.lexists(folder / MANIFEST):
        return False
    manifest = read_manifest(folder)
    return manifest.is_converted or {shard.name for shard in manifest.shards} == set(names)


def find_paths(pattern: str) -> list[str]:
    """The paths of the tars that a pattern names, in order: a path, a glob, a pattern with braces, or several of them
    joined by `::`.

    Raises:
        DataError: there are none, or some of those that braces name are missing.
        SettingsError: as vir.addresses.expand.
    """
    if os.path.lexists(pattern):
        return [pattern]
    parts = expand(pattern, MAX_SHARDS)
    paths: list[str] = []
    missing: list[str] = []
    for part in parts:
        if is_glob(part):
            paths += sorted(path for path in glob(part) if path.endswith(".tar"))
        else:
            (paths if os.path.lexists(part) else missing).append(part)
    if missing == [pattern]:
        raise DataError(f"{pattern} does not exist; give a folder of tars, or a quoted pattern that names some")
    if missing and len(parts) > 1:
        raise DataError(f"{len(missing)} of the {len(parts)} shards that {pattern} names are missing: {some(missing)}; "
                        "complete them, or name those that are there")
    if not paths:
        raise DataError(f"no .tar is named by {pattern!r}; give a folder, or quote the pattern so that the shell "
                        "leaves it as it is")
    return paths


def is_glob(part: str) -> bool:
    return any(character in part for character in "*?[")


def common_name(names: Sequence[str], split: str) -> str:
    """imagenet1k of imagenet1k-train-0000.tar, ...; the split where nothing is left."""
    prefix = os.path.commonprefix([name.removesuffix(".tar") for name in names])
    prefix = re.sub(r"[0-9]*$", "", prefix).rstrip("-_.").removesuffix(split).rstrip("-_.")
    return re.sub(r"[^A-Za-z0-9_.-]", "_", prefix) or split


def checked_name(flag: str, value: str) -> str:
    """A name that a manifest can hold. Raises SettingsError for another."""
    if not NAME.fullmatch(value):
        raise SettingsError(f"{flag} {value!r} cannot be a name; give one of letters, digits, '_', '-', '.' with "
                            f"{flag}")
    return value


def _replaceable(folder: Path, names: Sequence[str], checksums: bool) -> SplitManifest | None:
    """The manifest in `folder`, if there is one. Raises DataError where it must stay, or none can be written."""
    path = folder / MANIFEST
    before = read_manifest(folder) if os.path.lexists(path) else None
    if before is not None and before.is_converted:
        raise DataError(f"{path} was written by vir-convert, with the checksums of every image: it stays. The files of "
                        f"other readers are written beside it by --also; to index anew all the same, remove {path}")
    if before is not None:
        known = {shard.name for shard in before.shards}
        if not known & set(names):
            raise DataError(f"{path} is the manifest of other shards ({some(sorted(known), 1)}), and a folder holds "
                            "one split: give each split a folder of its own, with the tars or with links to them")
        if not checksums and any(shard.sha256 is not None for shard in before.shards):
            raise DataError(f"{path} has checksums, which would be lost: give --checksums, or remove {path} to do "
                            "without them; with --also alone, files for other readers are written beside it")
    try:
        try_to_write(path)
    except OSError as error:
        raise DataError(_not_writable(folder, error)) from error
    return before


def _refuse_to_drop(before: Sequence[str], classes: Sequence[str], folder: Path) -> None:
    """Raises DataError where a class list that was given once would be lost. Names from txt stay, so they are none."""
    known = set(before)
    is_numbered = list(before) == [str(label) for label in range(len(before))]
    if not is_numbered and [name for name in classes if name in known] != list(before):
        path = folder / MANIFEST
        raise DataError(f"{path} has a list of {len(before):,} classes ({some(before)}), which would be lost: give the "
                        f"list with --classes, or remove {path} to do without it")


def _not_writable(folder: Path, error: OSError) -> str:
    return (f"cannot write {MANIFEST} in {folder}: {error.strerror}; free space or ask for the right to write, or keep "
            "the index elsewhere with --index-dir")


def labelled(indexed: Sequence[IndexedShard], given: Sequence[str] | None
             ) -> tuple[tuple[str, ...], list[IndexedShard]]:
    """The class list, and the shards with labels that are positions in it."""
    highest = max(int(shard.rows["label"].max()) for shard in indexed)
    names = sorted({name for shard in indexed for name in shard.names})
    if not names:
        return _numbered(indexed, highest, given), list(indexed)
    if highest >= 0:
        number = _first(indexed, lambda labels: labels >= 0)
        raise DataError(f"{_first(indexed, lambda labels: labels < 0)} has the class {names[0]!r}, {number} has the "
                        f"number {highest}: all labels of a split are names, or all are numbers")
    classes = tuple(names if given is None else given)
    label_of = {name: label for label, name in enumerate(classes)}
    for shard in indexed:
        _refuse_unknown(shard, label_of)
    for shard in indexed:
        shard.rows["label"] = np.array([label_of[name] for name in shard.names])[~shard.rows["label"]]
    return classes, [replace(shard, names=()) for shard in indexed]


def _refuse_unknown(shard: IndexedShard, known: Collection[str]) -> None:
    """Raises DataError where a sample has the name of a class that is none of the known ones."""
    if unknown := [name for name in shard.names if name not in known]:
        which = ~shard.names.index(unknown[0])
        raise DataError(f"{_first([shard], lambda labels: labels == which)} has the class {unknown[0][:100]!r}, which "
                        f"the list of {len(known)} classes lacks; give the right list with --classes")


def _numbered(indexed: Sequence[IndexedShard], highest: int, given: Sequence[str] | None) -> tuple[str, ...]:
    limit = MAX_LABEL if given is None else len(given) - 1
    if highest > limit:
        list_says = (f"the list has {len(given)} classes" if given is not None else
                     f"without a class list {limit} is the highest")
        raise DataError(f"{_first(indexed, lambda labels: labels > limit)} has the label {highest}, but {list_says}; "
                        "give the right list with --classes")
    return tuple(map(str, range(highest + 1))) if given is None else tuple(given)


def _first(indexed: Sequence[IndexedShard], is_meant: Callable[[np.ndarray], np.ndarray]) -> str:
    """SHARD:KEY of the sample with the highest label among those that are meant."""
    best = max((shard for shard in indexed if is_meant(shard.rows["label"]).any()),
               key=lambda shard: int(shard.rows["label"].max()))
    rows = best.rows[is_meant(best.rows["label"])]
    return f"{best.info.name}:{rows['key'][rows['label'].argmax()].decode()}"


def _refuse_duplicates(indexed: Sequence[IndexedShard]) -> None:
    """Raises DataError where a key comes twice. Takes 17 bytes a sample: only keys of one hash are compared."""
    hashes = np.concatenate([np.fromiter(map(hash, shard.rows["key"].tolist()), np.int64, len(shard.rows))
                             for shard in indexed])
    starts = np.cumsum([0, *(len(shard.rows) for shard in indexed)])
    seen: dict[bytes, str] = {}
    for position in np.flatnonzero(among(hashes, repeated(hashes))).tolist():
        number = int(np.searchsorted(starts, position, side="right")) - 1
        key, name = indexed[number].rows["key"][position - starts[number]], indexed[number].info.name
        if key in seen:
            raise DataError(f"the key {key.decode()!r} is in {seen[key]} and in {name}: keys must differ within a "
                            "split; does PATTERN mix two splits, or name a shard and its copy?")
        seen[key] = name


def index_local(tars: Sequence[LocalTar], checksums: bool, classes: Sequence[str] | None, jobs: int,
                is_stopping: Callable[[], bool]) -> tuple[tuple[str, ...], list[IndexedShard]]:
    """The class list and the shards, indexed by processes, with a progress bar.

    Args:
        classes: as of index_shards.
        jobs: processes.

    Raises:
        DataError: a shard is refused, or they do not fit together.
        Stopped: `is_stopping` returned True.
    """
    tasks = [_Task(tar, checksums) for tar in tars]
    ended = run_tasks("local", _index, tasks, min(jobs, len(tasks)), is_stopping, Path())
    return _together(_collected(ended, len(tasks), classes), [str(tar.path) for tar in tars], classes)


def index_remote(tars: Sequence[RemoteTar], checksums: bool, classes: Sequence[str] | None, jobs: int, scratch: Path,
                 is_stopping: Callable[[], bool]) -> tuple[tuple[str, ...], list[IndexedShard]]:
    """As index_local, by threads of processes that read headers and labels from servers.

    A shard that has to be read whole, for its checksums or because its server sends no parts, is downloaded to
    `scratch`, and removed when it is indexed; a process does so with one at a time.
    """
    size = min(_THREADS, -(-len(tars) // jobs))
    groups = [_Group(tars[start:start + size], checksums, scratch) for start in range(0, len(tars), size)]
    ended = (_by_threads(groups[0], is_stopping) if len(groups) == 1 else
             _ungrouped(run_tasks("local", _index_group, groups, min(jobs, len(groups)), is_stopping, Path()), size))
    return _together(_collected(ended, len(tars), classes), [shown(tar.url) for tar in tars], classes)


def _ungrouped(ended: Generator[tuple[int, list[IndexedShard]], None, None], size: int
               ) -> Generator[tuple[int, IndexedShard], None, None]:
    with closing(ended):
        for group, shards in ended:
            yield from enumerate(shards, group * size)


def _together(indexed: Sequence[IndexedShard], places: Sequence[str], given: Sequence[str] | None
              ) -> tuple[tuple[str, ...], list[IndexedShard]]:
    """Raises DataError where the shards do not make one split."""
    if empty := [place for place, shard in zip(places, indexed) if not shard.info.num_samples]:
        raise DataError(f"shards without samples: {some(empty)}; remove them, or leave them out of PATTERN")
    classes, shards = labelled(indexed, given)
    _refuse_duplicates(shards)
    return classes, shards


def _collected(ended: Generator[tuple[int, IndexedShard], None, None], count: int, classes: Sequence[str] | None
               ) -> list[IndexedShard]:
    """The shards in their order, with a progress bar. Refuses as soon as the names in the txt cannot be those of
    classes, and keeps each name once, so that captions do not fill the memory."""
    results: dict[int, IndexedShard] = {}
    names: dict[str, str] = {}
    known = None if classes is None else set(classes)
    bar = progress_bar(count, "shard")
    with closing(ended), closing(bar):
        for number, result in ended:
            if known is not None:
                _refuse_unknown(result, known)
            results[number] = replace(result, names=tuple(names.setdefault(name, name) for name in result.names))
            if known is None and len(names) > MAX_CLASS_NAMES:
                raise DataError(f"the txt hold more than {MAX_CLASS_NAMES:,} different texts, as "
                                f"{result.names[-1][:50]!r} in {result.info.name}: these are captions, not class "
                                "names; give the class list with --classes, or add a cls with the label")
            bar.update()
    return [results[number] for number in range(count)]


# ---- in worker processes: one task is one local shard, or a few remote ones


class LocalTar(NamedTuple):
    path: Path
    name: str
    """In the manifest."""


class RemoteTar(NamedTuple):
    url: str
    timeout: float
    """Of its server, in seconds."""
    identity: Identity
    name: str
    """In the manifest."""


class _Task(NamedTuple):
    tar: LocalTar
    checksums: bool


class _Group(NamedTuple):
    tars: Sequence[RemoteTar]
    checksums: bool
    scratch: Path


def _index(task: _Task) -> IndexedShard:
    try:
        return index_shard(*task.tar, task.checksums)
    except DataError as error:
        if isinstance(error.__cause__, OSError):
            raise DataError(f"{error}; copy or download it again, or leave it out of PATTERN") from error
        raise


def _index_group(group: _Group) -> list[IndexedShard]:
    found = dict(_by_threads(group, stopping))
    return [found[number] for number in range(len(group.tars))]


def _by_threads(group: _Group, is_stopping: Callable[[], bool]) -> Generator[tuple[int, IndexedShard], None, None]:
    index = _Remote(group.checksums, threading.Lock(), group.scratch)
    return run_threads(index, group.tars, len(group.tars), is_stopping)


@dataclass(frozen=True)
class _Remote:
    """Indexes one remote shard after another, in many threads at a time."""

    checksums: bool
    downloading: threading.Lock
    scratch: Path

    def __call__(self, tar: RemoteTar) -> IndexedShard:
        where = shown(tar.url)
        store = open_store(tar.url, tar.timeout)
        if tar.identity.ranged and not self.checksums:
            return _index_open(RemoteFile(store, tar.url, tar.identity), where, tar.name, checksums=False)
        while not self.downloading.acquire(timeout=0.2):
            if stopping():
                raise Stopped
        try:
            with tempfile.TemporaryFile(dir=self.scratch) as file:
                _download(store, tar, file)
                return _index_open(LocalFile(file.fileno()), where, tar.name, self.checksums)
        except OSError as error:
            raise DataError(f"cannot keep {where} in {self.scratch} while it is indexed: {error.strerror}; free space, "
                            "or choose another folder with --index-dir") from error
        finally:
            self.downloading.release()


def _download(store: Store, tar: RemoteTar, file: BinaryIO) -> None:
    for block in store.blocks(tar.url, tar.identity):
        if stopping():
            raise Stopped
        file.write(block)
    file.flush()


def index_shard(path: Path, name: str, checksums: bool) -> IndexedShard:
    """Args: name: in the manifest. Raises DataError where the tar is refused or cannot be read."""
    with opened(path) as file:
        return _index_open(file, str(path), name, checksums)


def _index_open(file: RandomAccess, where: str, name: str, checksums: bool) -> IndexedShard:
    """Args: where: names the tar in messages."""
    size = file.size
    reading = _Reading(file, where) if checksums else None
    names: dict[str, int] = {}
    chunks: list[np.ndarray] = []
    samples = _until_stopped(read_samples(file, where))
    while rows := [_row(sample, where, names, reading) for sample in islice(samples, _CHUNK)]:
        chunks.append(np.array(rows, dtype=index_dtype(max(len(row[-1]) for row in rows))))
    longest = max((part.dtype["key"].itemsize for part in chunks), default=1)
    whole = np.empty(sum(map(len, chunks)), index_dtype(longest))
    start = 0
    for part in chunks:
        whole[start:start + len(part)] = part
        start += len(part)
    digest = None if reading is None else reading.rest(size)
    return IndexedShard(ShardInfo(name, len(whole), size, digest), whole, tuple(names))


def _until_stopped(samples: Iterable[TarSample]) -> Iterator[TarSample]:
    for sample in samples:
        if stopping():
            raise Stopped
        yield sample


def _row(sample: TarSample, where: str, names: dict[str, int],
         reading: _Reading | None) -> tuple[int, int, int, int, int, int, int, bytes]:
    key, image = sample.key.encode(), sample.image
    if len(key) > MAX_FOREIGN_KEY_BYTES:
        raise DataError(f"{where}: the key {sample.key[:50]!r}... at byte {sample.start} has {len(key)} bytes, the "
                        f"limit is {MAX_FOREIGN_KEY_BYTES}; write the shard again with shorter names")
    if not 0 < image.size <= MAX_IMAGE_BYTES:
        raise DataError(f"{where}: the image of sample {sample.key!r} at byte {image.offset} has {image.size} bytes, "
                        f"expected 1 to {MAX_IMAGE_BYTES}; copy or download the shard again")
    label = sample.label if isinstance(sample.label, int) else ~_name_number(sample, sample.label, where, names)
    crc32, width, height = (0, 0, 0) if reading is None else reading.image(sample.key, image)
    return 0, label, image.offset, image.size, crc32, width, height, key


def _name_number(sample: TarSample, name: str, where: str, names: dict[str, int]) -> int:
    if not name or not name.isprintable():
        raise DataError(f"{where}: sample {sample.key!r} at byte {sample.start} has {name[:50]!r} in its txt, which is "
                        "neither a number nor the name of a class; add a cls with the label")
    number = names.setdefault(name, len(names))
    if number > MAX_CLASS_NAMES:
        raise DataError(f"{where}: the txt hold more than {MAX_CLASS_NAMES} different texts, as {name[:50]!r}: these "
                        "are captions, not class names; add a cls with the label")
    return number


class _Reading:
    """All bytes of a shard, read once and in order: their sha256, and the images among them."""

    def __init__(self, file: RandomAccess, where: str) -> None:
        self.file, self.where = file, where
        self.position = 0
        self.sha256 = hashlib.sha256()

    def image(self, key: str, member: Member) -> tuple[int, int, int]:
        """crc32, width and height of an image that lies beyond all that was read."""
        self._read_to(member.offset)
        data = read_part(self.file, member, self.where)
        self.sha256.update(data)
        self.position += len(data)
        try:
            _, width, height = inspect_image(data)
        except BadSampleError as error:
            raise DataError(f"{self.where}: sample {key!r} at byte {member.offset}: {error}; copy or download the "
                            "shard again, or index it without --checksums: training leaves out single images that do "
                            "not decode") from error
        return zlib.crc32(data), width, height

    def rest(self, size: int) -> str:
        """The sha256 of the shard, which has `size` bytes."""
        self._read_to(size)
        return self.sha256.hexdigest()

    def _read_to(self, end: int) -> None:
        while self.position < end:
            block = self.file.pread(min(_BLOCK, end - self.position), self.position)
            if not block:
                raise DataError(f"{self.where} became shorter while it was read, at byte {self.position}")
            self.sha256.update(block)
            self.position += len(block)


if __name__ == "__main__":
    raise SystemExit("vir.data.foreign is a part of the library; the program is vir-index")
