"""One task of a conversion is one shard: read, checked, written, and marked as whole."""

from __future__ import annotations

import itertools
import json
import socket
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, overload

import numpy as np

from vir.data.decode import BadSampleError
from vir.data.executors import Stopped, stopping
from vir.data.picture import PictureSettings, encoder_versions, prepare_picture
from vir.data.shards import ShardInfo, ShardSample, SkippedFile, write_shard
from vir.data.sources.listing import Sample, Source
from vir.data.sources.reading import SampleReader, UnreadableError, states
from vir.data.work_folder import DONE, NotToContinueError, working_name
from vir.errors import DataError
from vir.files import replacing


class DoneShard(NamedTuple):
    """A finished shard."""

    info: ShardInfo
    rows: np.ndarray
    skipped: list[SkippedFile]
    fixed: list[SkippedFile]
    changes: Counter[str]
    seconds: float
    was_found: bool
    """It was finished by an earlier conversion."""


@dataclass(frozen=True)
class ShardTask:
    path: Path
    """Of the shard to write."""
    root: Path
    samples: list[Sample]
    pictures: PictureSettings
    encoders: Mapping[str, str]
    """The versions that the conversion began with: other machines may have others."""


class ShardTasks(Sequence[ShardTask]):
    """The tasks, made when they are asked for: all samples at once would take gigabytes."""

    def __init__(self, source: Source, parts: Sequence[np.ndarray], folder: Path, token: str,
                 pictures: PictureSettings, encoders: Mapping[str, str]) -> None:
        self._source, self._parts, self._folder, self._token = source, parts, folder, token
        self._pictures, self._encoders = pictures, encoders

    def __len__(self) -> int:
        return len(self._parts)

    @overload
    def __getitem__(self, at: int) -> ShardTask: ...

    @overload
    def __getitem__(self, at: slice) -> list[ShardTask]: ...

    def __getitem__(self, at: int | slice) -> ShardTask | list[ShardTask]:
        if isinstance(at, slice):
            return [self[number] for number in range(*at.indices(len(self)))]
        return ShardTask(self.path(at), self._source.root, [self._source.samples[i] for i in self._parts[at]],
                         self._pictures, self._encoders)

    def path(self, number: int) -> Path:
        return self._folder / working_name(self._token, number)

    def images(self, number: int) -> int:
        return len(self._parts[number])


def convert_shard(task: ShardTask) -> DoneShard:
    """Writes the shard and its mark; only its mark is read if an earlier conversion has finished it.

    Raises:
        DataError: a bad image that may not be left out, a disk that fails or is full, a source that has changed since
            the shard was finished, a machine that encodes with other versions.
        Stopped: the conversion is to end.
    """
    if (here := encoder_versions(task.pictures)) != task.encoders:
        raise DataError(f"{socket.gethostname()} encodes with {here}, the conversion began with {dict(task.encoders)}; "
                        "install the same versions on all machines")
    found = _found(task)
    if found is not None:
        return found
    began = time.monotonic()
    before = states(task.root, task.samples)
    left = _Left([], [], Counter(), [])
    pictures = _pictures(task, left)
    first = next(pictures, None)
    info, rows = ShardInfo(task.path.name, 0, 0, None), np.empty(0)
    try:
        if first is not None:
            with replacing(task.path) as temporary:
                info, rows = write_shard(temporary, itertools.chain([first], pictures))
        info = replace(info, name=task.path.name)
        _mark(task.path.with_suffix(DONE), info, rows, left, before)
    except OSError as error:
        raise DataError(f"cannot write {task.path}: {error.strerror}") from error
    return DoneShard(info, rows, left.skipped, left.fixed, left.changes, time.monotonic() - began, False)


class _Left(NamedTuple):
    """What a shard does not hold as it was in the source."""

    skipped: list[SkippedFile]
    fixed: list[SkippedFile]
    changes: Counter[str]
    doubtful: list[str]
    """Files that were skipped and could perhaps be read another day."""


def _pictures(task: ShardTask, left: _Left) -> Iterator[ShardSample]:
    reader = SampleReader(task.root)
    try:
        for sample in task.samples:
            if stopping():
                raise Stopped
            try:
                picture = prepare_picture(reader.read(sample), sample.filename, task.pictures)
            except BadSampleError as error:
                if task.pictures.on_error == "fail":
                    raise _bad_file(task, sample, str(error)) from error
                left.skipped.append(SkippedFile(sample.filename, str(error)))
                if isinstance(error, UnreadableError):
                    left.doubtful.append(sample.filename)
                continue
            if picture.change is not None:
                left.changes[picture.change] += 1
                if picture.is_fixed:
                    left.fixed.append(SkippedFile(sample.filename, picture.change))
            yield ShardSample(sample.key, picture.data, picture.extension, picture.width, picture.height, sample.label,
                              sample.filename)
    finally:
        reader.close()


def _bad_file(task: ShardTask, sample: Sample, reason: str) -> DataError:
    inside = f" at byte {sample.offset} of {task.root / sample.path}" if sample.offset else f" in {task.root}"
    return DataError(f"{sample.filename}{inside}: {reason}; mend the file, or leave out all such files with --on-error "
                     "skip, or mend what can be mended with --on-error fix")


def _mark(path: Path, info: ShardInfo, rows: np.ndarray, left: _Left, before: np.ndarray) -> None:
    about = {"info": vars(info), "skipped": [vars(file) for file in left.skipped],
             "fixed": [vars(file) for file in left.fixed], "changes": left.changes, "doubtful": left.doubtful}
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, rows=rows, states=before, about=np.frombuffer(json.dumps(about).encode(), np.uint8))


def _found(task: ShardTask) -> DoneShard | None:
    """The shard of an earlier conversion, if it is whole.

    Raises:
        DataError: a file that went into it is another one now; or it has left out files, and none may be now.
    """
    try:
        with open(task.path.with_suffix(DONE), "rb") as file, np.load(file, allow_pickle=False) as mark:
            rows, before, about = mark["rows"], mark["states"], json.loads(mark["about"].tobytes())
        info = ShardInfo(**about["info"])
        skipped = [SkippedFile(**file) for file in about["skipped"]]
        fixed = [SkippedFile(**file) for file in about["fixed"]]
        if about["doubtful"] or (len(rows) and task.path.stat().st_size != info.bytes):
            return None
    except Exception:  # none yet, or damaged in any way: it is written again
        return None
    changed = np.flatnonzero((before != states(task.root, task.samples)).any(axis=1))
    if len(changed):
        path = task.root / task.samples[changed[0]].path
        raise NotToContinueError(f"the source has changed since its first shards were written: {path} has another size "
                                 f"or time of change; give the source as it was, or remove {task.path.parent} to start "
                                 "over")
    if skipped and task.pictures.on_error == "fail":
        name, reason = skipped[0].filename, skipped[0].reason
        raise _bad_file(task, next(sample for sample in task.samples if sample.filename == name), reason)
    return DoneShard(info, rows, skipped, fixed, Counter(about["changes"]), 0.0, True)


if __name__ == "__main__":
    raise SystemExit("vir.data.tasks is a part of the library; the program is vir-convert")
