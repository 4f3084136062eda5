"""A source of images -> one split of shards, in parallel, with the same bytes for any number of workers.

While it works, OUTPUT/SPLIT.partial holds

    conversion.json    settings and source: what the bytes depend on
    000000.tar         a finished shard; 000000.done beside it is its commit mark, with its rows of the index
    .lock              held by the conversion that is at work

and is renamed to OUTPUT/SPLIT when all is whole. The same command goes on after a kill at any moment.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
from tqdm import tqdm

from vir.data.decode import BadSampleError
from vir.data.executors import Stopped, check_executor, run_tasks, stopping
from vir.data.picture import PictureSettings, encoder_versions, prepare_picture
from vir.data.shards import (
    MANIFEST,
    PARTIAL,
    ShardInfo,
    ShardSample,
    SkippedFile,
    SplitManifest,
    read_manifest,
    write_shard,
    write_split,
)
from vir.data.sources.choose import open_source
from vir.data.sources.listing import Sample, Source
from vir.data.sources.reading import SampleReader, states
from vir.data.tar import padded
from vir.errors import DataError, SettingsError, VirError
from vir.files import TEMPORARY, flush, lock, replace_text, replacing, unlock

JOURNAL = "conversion.json"
LOCK = ".lock"
DONE = ".done"
SLURM = ".slurm"
"""The end of the name of the folder beside OUTPUT/SPLIT that keeps the logs of Slurm jobs that failed."""

_TAR_BYTES = 5 * 512
"""Of a sample beside its image: three headers, label and json."""

_DRY_RUN_SAMPLES = 256
"""Of each worker."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the bytes of the shards depend on, beside the source and the split."""

    name: str = "imagenet1k"
    """First part of the shards' names."""
    samples_per_shard: int = 1000
    """The most samples in a shard; they are spread evenly, so that no last shard is tiny."""
    bytes_per_shard: int | None = None
    """If given, it takes the place of samples_per_shard: shards of about this size."""
    seed: int = 0
    """Of the shuffle over the whole split."""
    pictures: PictureSettings = field(default_factory=PictureSettings)


@dataclass(frozen=True, kw_only=True)
class ConversionSummary:
    folder: Path
    source: str
    """The kind of source."""
    images: int
    shards: int
    bytes: int
    """Of all shards."""
    classes: int
    seconds: float
    skipped: tuple[SkippedFile, ...]
    fixed: tuple[SkippedFile, ...]
    changes: Mapping[str, int]
    """How many images were written otherwise than they were, by what was done."""
    ignored: int
    """What lies in the source and is no image by its name."""
    found_shards: int
    """Shards that an earlier, interrupted conversion had finished; all of them if it was complete already."""

    def __str__(self) -> str:
        if self.found_shards == self.shards:
            return f"{self.folder} is complete already: {self.images:,} images in {_shards(self.shards)}"
        lines = [f"{self.images:,} images of {self.classes:,} classes in {_shards(self.shards)}, "
                 f"{self.bytes / 1e6:,.1f} MB, in {self.seconds:.1f} s ({self.images / self.seconds:,.0f} images/s), "
                 f"from: {self.source}"]
        if self.found_shards:
            lines.append(f"continued: {_shards(self.found_shards)} had been finished before")
        if self.ignored:
            lines.append(f"ignored: {self.ignored:,} files that are no images by name")
        lines += [f"changed: {count:,} images: {what}" for what, count in sorted(self.changes.items())]
        for what, files in (("skipped", self.skipped), ("fixed", self.fixed)):
            if files:
                reason = " that are no whole images" if what == "skipped" else ""
                lines.append(f"{what}: {len(files):,} files{reason}, all listed in {MANIFEST}:")
                lines += [f"  {file.filename}: {file.reason}" for file in files[:20]]
        return "\n".join([*lines, f"written to {self.folder}"])


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """What a conversion would write."""

    source: str
    folder: Path
    images: int
    classes: int
    shards: int
    bytes: int
    """Of all shards, by the sizes of the images that were tried."""
    images_per_second: float
    tried: int
    workers: int
    free_bytes: int
    skipped: tuple[SkippedFile, ...]

    def __str__(self) -> str:
        lines = [f"source: {self.source}, {self.images:,} images of {self.classes:,} classes",
                 f"would write {_shards(self.shards)}, about {self.bytes / 1e9:,.3g} GB, to {self.folder} "
                 f"({self.free_bytes / 1e9:,.3g} GB free)",
                 f"in about {_duration(self.images / self.images_per_second)}: {self.images_per_second:,.0f} images/s "
                 f"with {self.workers} workers, measured on {self.tried:,} images; nothing was written"]
        lines += [f"  {file.filename}: {file.reason}" for file in self.skipped]
        return "\n".join(lines)


def convert(source: Path, split: str, output: Path, settings: Settings = Settings(), *, workers: int = 8,
            executor: str = "local", classes: Sequence[str] | None = None,
            is_stopping: Callable[[], bool] = lambda: False) -> ConversionSummary:
    """Converts one split of a source into `output/split`, which appears when everything in it is complete.

    The images are shuffled over the whole split, so that each shard alone is a random sample of it. Image files go into
    the shards unchanged, byte for byte, unless the settings say otherwise. The same call goes on where an interrupted
    one was; what it had finished is not written again. Worker processes start by forkserver: a script that calls this
    needs the `if __name__ == "__main__"` guard.

    Args:
        source: see vir.data.sources.choose.
        executor: where the shards are written: see vir.data.executors.
        classes: class list in label order. If None: that of the splits already in `output`, else the source's own.
        is_stopping: called several times a second; True ends the conversion. Signal handlers should use it: an
            exception raised in a handler can reach the process pool while it starts a worker, which may then wait for
            ever.

    Raises:
        DataError, SettingsError: each names the value and what to do.
        Stopped: `is_stopping` returned True. After any exception the workers have ended, and finished shards are kept.
    """
    began = time.monotonic()
    source, folder = Path(source).absolute(), Path(output).absolute() / split
    _check_settings(source, split, folder, settings, workers)
    check_executor(executor)
    listed, parts, record = _plan(source, folder, settings, classes)
    if os.path.lexists(folder):
        manifest = _complete(folder, record)
        return _summary(folder, listed, manifest, began, len(manifest.shards))
    with _claimed(folder, record, len(parts)) as partial:
        if not (partial / MANIFEST).exists():
            tasks = _Tasks(listed, parts, partial, settings.pictures)
            done = _run(tasks, min(workers, len(tasks)), executor, is_stopping, folder)
            _write_manifest(partial, listed, done, split, settings, record)
            found = sum(shard.was_found for shard in done if len(shard.rows))
        else:  # killed while it gave the names
            found = len(read_manifest(partial).shards)
        _name_shards(partial)
        manifest = read_manifest(partial)
        _publish(partial, folder)
    return _summary(folder, listed, manifest, began, found)


def dry_run(source: Path, split: str, output: Path, settings: Settings = Settings(), *, workers: int = 8,
            executor: str = "local", classes: Sequence[str] | None = None,
            is_stopping: Callable[[], bool] = lambda: False) -> DryRun:
    """What `convert` with these arguments would write, and in which time: measured on a few images of each worker,
    which are written beside `output` and removed again. Raises as `convert`."""
    source, folder = Path(source).absolute(), Path(output).absolute() / split
    _check_settings(source, split, folder, settings, workers)
    check_executor(executor)
    listed, parts, _ = _plan(source, folder, settings, classes)
    place = next(path for path in folder.parents if path.is_dir())
    pictures = replace(settings.pictures, on_error="skip") if settings.pictures.on_error == "fail" else \
        settings.pictures
    with _scratch(place) as scratch:
        tasks = _Tasks(listed, [part[:_DRY_RUN_SAMPLES] for part in parts[:workers]], scratch, pictures)
        done = _run(tasks, len(tasks), executor, is_stopping, folder)
    written = sum(len(shard.rows) for shard in done)
    skipped = tuple(file for shard in done for file in shard.skipped)
    if not written:
        raise DataError(f"none of the {len(skipped)} images that were tried is whole: {skipped[0].filename}: "
                        f"{skipped[0].reason}")
    return DryRun(source=listed.kind, folder=folder, images=len(listed.samples), classes=len(listed.classes),
                  shards=len(parts), bytes=len(listed.samples) * sum(shard.info.bytes for shard in done) // written,
                  images_per_second=sum(len(shard.rows) / shard.seconds for shard in done), tried=written,
                  workers=workers, free_bytes=shutil.disk_usage(place).free, skipped=skipped)


def rewrite_shards(folder: Path, source: Path, names: Sequence[str], workers: int,
                   is_stopping: Callable[[], bool] = lambda: False) -> None:
    """Writes shards of a converted split anew from its source. All must come out as the manifest says, byte for byte;
    otherwise none is replaced.

    Raises:
        DataError: the split was made elsewhere; the source, or a library that encodes, is another than then.
        Stopped: `is_stopping` returned True; none was replaced.
    """
    manifest = read_manifest(folder)
    if manifest.conversion is None:
        raise DataError(f"{folder} was not written by this version of vir-convert: its settings are not known; convert "
                        "the split again")
    settings = _settings_of(manifest)
    listed = open_source(Path(source).absolute(), manifest.split, manifest.classes,
                         settings.bytes_per_shard is not None)
    parts = _deal(len(listed.samples), listed.sizes, settings)
    with _scratch(folder) as scratch:
        numbers = _numbers_of(manifest, listed, parts, names)
        tasks = _Tasks(listed, [parts[number] for number in numbers], scratch, settings.pictures)
        done = _run(tasks, min(workers, len(tasks)), "local", is_stopping, folder)
        expected = {shard.name: shard.sha256 for shard in manifest.shards}
        for name, shard in zip(names, done):
            if shard.info.sha256 != expected[name]:
                raise DataError(f"{source} gives other bytes for {name} than those that were converted: an image, or "
                                "the version of a library, has changed since; give the source as it was")
        for number, name in enumerate(names):
            os.replace(tasks.path(number), folder / name)
    flush(folder)


def finished_shards(folder: Path) -> int:
    """How many shards of the split that is to become `folder` an interrupted conversion has finished."""
    return len(list(folder.with_name(folder.name + PARTIAL).glob("[0-9]*.tar")))


# ---- before the work


def _check_settings(source: Path, split: str, folder: Path, settings: Settings, workers: int) -> None:
    for flag, value in (("--split", split), ("--name", settings.name)):
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", value) or value.endswith(PARTIAL):
            raise SettingsError(f"{flag} {value!r} cannot be part of a file name; use letters, digits, '_', '-', '.'")
    for flag, number in (("--workers", workers), ("--samples-per-shard", settings.samples_per_shard),
                         ("--bytes-per-shard", settings.bytes_per_shard)):
        if number is not None and number < 1:
            raise SettingsError(f"{flag} must be at least 1, got {number}")
    if not 0 <= settings.seed < 2 ** 64:
        raise SettingsError(f"--seed must be from 0 to 2^64 - 1, got {settings.seed}")
    # Unlike resolve, realpath says nothing of links that go round in circles: reading or writing them does.
    if Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(source / split)):
        raise SettingsError(f"--output {folder.parent} would write into the folder to convert; choose another")


def _plan(source: Path, folder: Path, settings: Settings, classes: Sequence[str] | None
          ) -> tuple[Source, list[np.ndarray], dict[str, Any]]:
    """The source, which of its samples go into which shard, and what the bytes depend on."""
    if folder.parent.exists() and not folder.parent.is_dir():
        raise DataError(f"--output {folder.parent} is a file; give a folder")
    listed = open_source(source, folder.name, _class_list(folder.parent, classes), settings.bytes_per_shard is not None)
    return listed, _deal(len(listed.samples), listed.sizes, settings), _record(listed, folder.name, settings)


def _class_list(output: Path, classes: Sequence[str] | None) -> Sequence[str] | None:
    """The class list that gives the labels; None for the source's own. All splits of one output share one list."""
    for manifest in sorted(output.glob(f"*/{MANIFEST}")):
        if manifest.parent.name.endswith(PARTIAL):
            continue
        existing = read_manifest(manifest.parent).classes
        if classes is not None and tuple(classes) != existing:
            raise DataError(f"{manifest.parent} was converted with another class list ({len(existing)} classes) than "
                            f"the one given ({len(classes)} classes): the labels would not agree; choose another "
                            "--output")
        return existing
    return classes


def _deal(total: int, sizes: np.ndarray | None, settings: Settings) -> list[np.ndarray]:
    """Shuffles so many samples and cuts them into shards whose lengths, or sizes, are about equal."""
    # Sorts Philox's raw output, because numpy promises the same raw output in all versions, but not the same results of
    # Generator methods.
    order = np.argsort(np.random.Philox(key=settings.seed).random_raw(total), kind="stable")
    if settings.bytes_per_shard is None:
        count = -(-total // settings.samples_per_shard)
        return np.split(order, [total * number // count for number in range(1, count)])
    assert sizes is not None  # asked for where bytes_per_shard is given
    ends = np.cumsum(padded(sizes[order]) + _TAR_BYTES)
    count = min(-(-int(ends[-1]) // settings.bytes_per_shard), total)
    cuts = np.searchsorted(ends, [int(ends[-1]) * number // count for number in range(1, count)], side="left")
    return [part for part in np.split(order, cuts) if len(part)]


def _record(source: Source, split: str, settings: Settings) -> dict[str, Any]:
    """What the bytes of the split depend on. "fail" and "skip" write the same."""
    pictures = settings.pictures
    return {"images": len(source.samples), "source": source.fingerprint, "name": settings.name, "split": split,
            "seed": settings.seed, "samples_per_shard": settings.samples_per_shard,
            "bytes_per_shard": settings.bytes_per_shard, "fix": pictures.on_error == "fix", "check": pictures.check,
            "resize_short": pictures.resize_short, "quality": pictures.quality, "transcode": pictures.transcode,
            "encoders": encoder_versions(pictures)}


def _settings_of(manifest: SplitManifest) -> Settings:
    """The settings that a record tells. Raises DataError where it is not one of ours."""
    try:
        record = dict(manifest.conversion or {})
        return Settings(
            name=record["name"], samples_per_shard=record["samples_per_shard"], seed=record["seed"],
            bytes_per_shard=record["bytes_per_shard"],
            pictures=PictureSettings(on_error="fix" if record["fix"] else "skip", check=record["check"],
                                     resize_short=record["resize_short"], quality=record["quality"],
                                     transcode=record["transcode"]))
    except KeyError as error:
        raise DataError(f"the manifest does not say with which {error} the split was converted; convert it again") \
            from error


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between two records, for messages; "" if nothing does."""
    def shown(key: str) -> str:
        if key == "images":
            return f"the source had {before.get(key)} images, has {now[key]}"
        if key == "source":
            return "the names, classes or places of the source's images are others"
        if key == "encoders":
            return f"the versions of what encodes were {before.get(key)}, are {now[key]}"
        return f"--{key.replace('_', '-')} was {before.get(key)}, is {now[key]}"
    return "; ".join(shown(key) for key in now if before.get(key) != now[key])


def _complete(folder: Path, record: Mapping[str, Any]) -> SplitManifest:
    """The manifest of a split that the same conversion has written; DataError if it was another one."""
    again = "remove it to convert again, or choose another --output"
    if not folder.is_dir():
        raise DataError(f"{folder} exists already and is no folder; {again}")
    try:
        manifest = read_manifest(folder)
    except DataError as error:
        raise DataError(f"{folder} exists already; {again}") from error
    if manifest.conversion is None:
        raise DataError(f"{folder} exists already; {again}")
    if differences := _differences(manifest.conversion, record):
        raise DataError(f"{folder} exists already, from another conversion ({differences}); {again}")
    return manifest


@contextmanager
def _claimed(folder: Path, record: Mapping[str, Any], shards: int) -> Iterator[Path]:
    """The partial folder of this conversion of so many shards, new or as it was interrupted, with its lock.

    An exception leaves it, with a word of how to go on, if a shard is finished; otherwise it is removed.
    """
    partial = folder.with_name(folder.name + PARTIAL)
    made = [path for path in (partial, *partial.parents) if not path.exists()]
    try:
        partial.mkdir(parents=True, exist_ok=True)
        held = lock(partial / LOCK)
    except BlockingIOError as error:
        raise DataError(f"{partial} is in use: another conversion is writing there; wait for it, end it, or choose "
                        "another --output") from error
    except OSError as error:
        raise DataError(f"cannot write to {folder.parent}: {error.strerror}; choose another --output") from error
    try:
        _begin(partial, record)
        yield partial
    except BaseException as error:
        finished = finished_shards(folder)
        if not finished:
            _remove(made)
        elif isinstance(error, VirError):
            raise type(error)(f"{error}. {finished:,} of {_shards(shards)} are finished and kept: the same command "
                              "continues") from error
        raise
    finally:
        unlock(held)


def _begin(partial: Path, record: Mapping[str, Any]) -> None:
    """Writes the journal, or compares it with that of the conversion that was interrupted here."""
    before = _journal(partial)
    if before is None:
        if strangers := [path.name for path in partial.iterdir() if path.name != LOCK]:
            raise DataError(f"{partial} holds {strangers[0]!r} but no {JOURNAL}: it is not of a conversion that could "
                            f"be continued; remove it (rm -r {partial}) and convert again")
        replace_text(partial / JOURNAL, json.dumps(record, indent=1) + "\n")
        return
    if differences := _differences(before, record):
        raise DataError(f"{partial} is of another conversion, which was interrupted: {differences}. Give the same "
                        f"source and settings to continue it, or remove it (rm -r {partial}) to start over")
    for left in partial.glob(f".*{TEMPORARY}"):  # of a process that was killed; the lock says that none is at work
        left.unlink(missing_ok=True)


def _journal(partial: Path) -> Mapping[str, Any] | None:
    """The record of the conversion that was interrupted; None if nothing has begun."""
    path = partial / JOURNAL
    try:
        before = json.loads(path.read_bytes())
    except FileNotFoundError:  # not begun, or all but the name of the folder is done
        return read_manifest(partial).conversion if (partial / MANIFEST).exists() else None
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}; remove {partial} and convert again") from error
    if not isinstance(before, dict):
        raise DataError(f"{path} is damaged; remove {partial} and convert again")
    return before


# ---- the work: one task is one shard


class _Done(NamedTuple):
    """A finished shard."""

    info: ShardInfo
    rows: np.ndarray
    skipped: list[SkippedFile]
    fixed: list[SkippedFile]
    changes: Counter[str]
    states: np.ndarray
    """Of the files that were read: sources.reading.states."""
    seconds: float
    was_found: bool
    """It was finished by an earlier conversion."""


@dataclass(frozen=True)
class _Task:
    path: Path
    """Of the shard to write."""
    root: Path
    samples: list[Sample]
    pictures: PictureSettings


class _Tasks(Sequence[_Task]):
    """The tasks, made when they are asked for: all samples at once would take gigabytes."""

    def __init__(self, source: Source, parts: Sequence[np.ndarray], folder: Path, pictures: PictureSettings) -> None:
        self._source, self._parts, self._folder, self._pictures = source, parts, folder, pictures

    def __len__(self) -> int:
        return len(self._parts)

    @overload
    def __getitem__(self, at: int) -> _Task: ...

    @overload
    def __getitem__(self, at: slice) -> list[_Task]: ...

    def __getitem__(self, at: int | slice) -> _Task | list[_Task]:
        if isinstance(at, slice):
            return [self[number] for number in range(*at.indices(len(self)))]
        return _Task(self.path(at), self._source.root, [self._source.samples[i] for i in self._parts[at]],
                     self._pictures)

    def path(self, number: int) -> Path:
        return self._folder / f"{number:06d}.tar"

    def images(self, number: int) -> int:
        return len(self._parts[number])


def _run(tasks: _Tasks, workers: int, executor: str, is_stopping: Callable[[], bool], folder: Path) -> list[_Done]:
    """The finished shards in task order, with a progress bar in images and bytes."""
    done: dict[int, _Done] = {}
    images = written = 0
    total = sum(map(tasks.images, range(len(tasks))))
    results = run_tasks(executor, _convert_shard, tasks, workers, is_stopping, folder.with_name(folder.name + SLURM))
    bar = tqdm(total=total, unit="img", mininterval=0.5 if sys.stderr.isatty() else 30)
    with closing(results), closing(bar):
        for number, shard in results:
            done[number] = shard
            images, written = images + tasks.images(number), written + shard.info.bytes
            bar.set_postfix_str(f"{written / 1e9:,.2f} of {written * total / images / 1e9:,.2f} GB", refresh=False)
            if shard.was_found:  # not a part of the rate
                bar.initial += tasks.images(number)
            bar.update(tasks.images(number))
    return [done[number] for number in range(len(tasks))]


def _convert_shard(task: _Task) -> _Done:
    found = _found(task)
    if found is not None:
        return found
    began = time.monotonic()
    before = states(task.root, task.samples)
    skipped: list[SkippedFile] = []
    fixed: list[SkippedFile] = []
    changes: Counter[str] = Counter()
    pictures = _pictures(task, skipped, fixed, changes)
    first = next(pictures, None)
    info, rows = ShardInfo(task.path.name, 0, 0, None), np.empty(0)
    try:
        if first is not None:
            with replacing(task.path) as temporary:
                info, rows = write_shard(temporary, itertools.chain([first], pictures))
        done = _Done(replace(info, name=task.path.name), rows, skipped, fixed, changes, before,
                     time.monotonic() - began, False)
        _mark(task.path.with_suffix(DONE), done)
    except OSError as error:
        raise DataError(f"cannot write {task.path}: {error.strerror}") from error
    return done


def _pictures(task: _Task, skipped: list[SkippedFile], fixed: list[SkippedFile], changes: Counter[str]
              ) -> Iterator[ShardSample]:
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
                skipped.append(SkippedFile(sample.filename, str(error)))
                continue
            if picture.change is not None:
                changes[picture.change] += 1
                if picture.is_fixed:
                    fixed.append(SkippedFile(sample.filename, picture.change))
            yield ShardSample(sample.key, picture.data, picture.extension, picture.width, picture.height, sample.label,
                              sample.filename)
    finally:
        reader.close()


def _bad_file(task: _Task, sample: Sample, reason: str) -> DataError:
    inside = f" at byte {sample.offset} of {task.root / sample.path}" if sample.offset else f" in {task.root}"
    return DataError(f"{sample.filename}{inside}: {reason}; mend the file, or leave out all such files with --on-error "
                     "skip, or mend what can be mended with --on-error fix")


def _mark(path: Path, done: _Done) -> None:
    about = {"info": vars(done.info), "skipped": [vars(file) for file in done.skipped],
             "fixed": [vars(file) for file in done.fixed], "changes": done.changes}
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, rows=done.rows, states=done.states, about=np.frombuffer(json.dumps(about).encode(), np.uint8))


def _found(task: _Task) -> _Done | None:
    """The shard of an earlier conversion, if it is whole.

    Raises:
        DataError: a file that went into it is another one now; or it has left out files, and none may be now.
    """
    try:
        with np.load(task.path.with_suffix(DONE), allow_pickle=False) as mark:
            rows, before, about = mark["rows"], mark["states"], json.loads(mark["about"].tobytes())
        info = ShardInfo(**about["info"])
        skipped = [SkippedFile(**file) for file in about["skipped"]]
        fixed = [SkippedFile(**file) for file in about["fixed"]]
        if len(rows) and task.path.stat().st_size != info.bytes:
            return None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise DataError(f"cannot read {task.path.with_suffix(DONE)}: {error}; remove it to write that shard again") \
            from error
    changed = np.flatnonzero((before != states(task.root, task.samples)).any(axis=1))
    if len(changed):
        path = task.root / task.samples[changed[0]].path
        raise DataError(f"the source has changed since its first shards were written: {path} has another size or time "
                        f"of change; give the source as it was, or remove {task.path.parent} to start over")
    if skipped and task.pictures.on_error == "fail":
        name, reason = skipped[0].filename, skipped[0].reason
        raise _bad_file(task, next(sample for sample in task.samples if sample.filename == name), reason)
    return _Done(info, rows, skipped, fixed, Counter(about["changes"]), before, 0.0, True)


# ---- after the work


def _write_manifest(partial: Path, source: Source, done: Sequence[_Done], split: str, settings: Settings,
                    record: Mapping[str, Any]) -> None:
    """Index and manifest. Shards without samples, all of which were skipped, leave no gap in the numbers."""
    skipped = sorted((file for shard in done for file in shard.skipped), key=lambda file: file.filename)
    fixed = sorted((file for shard in done for file in shard.fixed), key=lambda file: file.filename)
    full = [shard for shard in done if len(shard.rows)]
    if not full:
        raise DataError(f"no whole image in {source.root}: all {len(skipped)} were skipped, {skipped[0].filename} "
                        f"because {skipped[0].reason}")
    shards = [(replace(shard.info, name=f"{settings.name}-{split}-{number:06d}.tar"), shard.rows)
              for number, shard in enumerate(full)]
    changes = sum((shard.changes for shard in done), Counter[str]())
    try:
        write_split(partial, shards, name=settings.name, split=split, classes=source.classes, seed=settings.seed,
                    samples_per_shard=settings.samples_per_shard, skipped=skipped, fixed=fixed,
                    conversion={**record, "changes": dict(sorted(changes.items()))})
    except OSError as error:
        raise DataError(f"cannot write in {partial}: {error.strerror}; free some space") from error


def _name_shards(partial: Path) -> None:
    """Gives the shards the names in the manifest. A kill at any moment leaves what the next call can finish: names are
    given in order, so the shards without theirs belong to the names without a shard, in order."""
    names = [shard.name for shard in read_manifest(partial).shards]
    missing = [name for name in names if not (partial / name).exists()]
    for path, name in zip(sorted(partial.glob("[0-9]*.tar")), missing, strict=True):
        os.rename(path, partial / name)


def _publish(partial: Path, folder: Path) -> None:
    """Removes what only the conversion needed, and gives the folder its name."""
    for path in [*partial.glob(f"*{DONE}"), *partial.glob(f".*{TEMPORARY}"), partial / JOURNAL, partial / LOCK]:
        path.unlink(missing_ok=True)
    flush(partial)
    try:
        os.rename(partial, folder)
    except OSError as error:
        raise DataError(f"cannot rename {partial} to {folder}: {error.strerror}") from error
    flush(folder.parent)


def _summary(folder: Path, source: Source, manifest: SplitManifest, began: float, found: int) -> ConversionSummary:
    assert manifest.conversion is not None  # it was written by a conversion
    return ConversionSummary(
        folder=folder, source=source.kind, images=manifest.num_samples, shards=len(manifest.shards),
        bytes=sum(shard.bytes for shard in manifest.shards), classes=len(manifest.classes),
        seconds=time.monotonic() - began, skipped=manifest.skipped, fixed=manifest.fixed,
        changes=manifest.conversion["changes"], ignored=source.ignored, found_shards=found)


def _numbers_of(manifest: SplitManifest, source: Source, parts: Sequence[np.ndarray], names: Sequence[str]
                ) -> list[int]:
    """Of the parts that the shards were made of: a part whose images were all skipped has no shard."""
    skipped = {file.filename for file in manifest.skipped}
    full = [number for number, part in enumerate(parts)
            if not skipped or any(source.samples[i].filename not in skipped for i in part)]
    number_of = dict(zip((shard.name for shard in manifest.shards), full))
    if unknown := [name for name in names if name not in number_of]:
        raise DataError(f"the source does not have the images of {unknown[0]}; give the source as it was converted")
    return [number_of[name] for name in names]


def _remove(made: Sequence[Path]) -> None:
    """What this conversion has made and nothing was written to: a partial folder and those above it."""
    for path in made:
        if path.name.endswith(PARTIAL):
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):  # something else lies there
                path.rmdir()


@contextmanager
def _scratch(place: Path) -> Iterator[Path]:
    try:
        with tempfile.TemporaryDirectory(prefix=".vir-convert-", dir=place) as scratch:
            yield Path(scratch)
    except OSError as error:
        raise DataError(f"cannot write in {place}: {error.strerror}") from error


def _shards(count: int) -> str:
    return f"{count:,} {'shard' if count == 1 else 'shards'}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


if __name__ == "__main__":
    raise SystemExit("vir.data.convert is a part of the library; the program is vir-convert")
