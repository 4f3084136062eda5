"""A source of images -> one split of shards, in parallel, with the same bytes for any number of workers."""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from vir.data.deal import SAMPLES_PER_SHARD, SEED, deal
from vir.data.executors import check_executor, run_tasks
from vir.data.picture import PictureSettings, encoder_versions
from vir.data.shards import (
    MANIFEST,
    MAX_SHARDS,
    NAME,
    PARTIAL,
    ShardInfo,
    SkippedFile,
    SplitManifest,
    count_of,
    read_manifest,
    write_split,
)
from vir.data.sources.choose import open_source
from vir.data.sources.listing import Source
from vir.data.tasks import DoneShard, ShardTasks, convert_shard
from vir.data.work_folder import (
    claimed,
    complete,
    dealt_numbers,
    found_before,
    name_shards,
    new_token,
    publish,
    scratch_folder,
)
from vir.errors import DataError, SettingsError
from vir.files import flush
from vir.log import progress_bar

SLURM = ".slurm"
"""The end of the name of the folder beside OUTPUT/SPLIT that keeps the logs of Slurm jobs that failed."""

_COUNTS = ("samples_per_shard", "bytes_per_shard")

_DRY_RUN_SAMPLES = 256
"""Of each worker."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the bytes of the shards depend on, beside the source and the split."""

    name: str = "imagenet1k"
    """First part of the shards' names."""
    samples_per_shard: int = SAMPLES_PER_SHARD
    """The most samples in a shard; they are spread evenly, so that no last shard is tiny."""
    bytes_per_shard: int | None = None
    """If given, it takes the place of samples_per_shard: shards of about this size."""
    seed: int = SEED
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
    """Shards that an earlier, interrupted conversion had finished."""
    found_images: int
    was_complete: bool
    """The split was there; nothing was written."""

    def __str__(self) -> str:
        if self.was_complete:
            left_out = f"; {len(self.skipped):,} files were left out" if self.skipped else ""
            return f"{self.folder} is complete already: {self.images:,} images in {count_of(self.shards)}{left_out}"
        lines = [f"{self.images:,} images of {self.classes:,} classes in {count_of(self.shards)}, "
                 f"{self.bytes / 1e6:,.1f} MB, in {self.seconds:.1f} s "
                 f"({(self.images - self.found_images) / self.seconds:,.0f} images/s), from: {self.source}"]
        if self.found_shards:
            lines.append(f"continued: {count_of(self.found_shards)} had been finished before")
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
    found_shards: int
    """What an earlier conversion has finished."""
    skipped: tuple[SkippedFile, ...]

    def __str__(self) -> str:
        lines = [f"source: {self.source}, {self.images:,} images of {self.classes:,} classes",
                 f"would write {count_of(self.shards)}, about {self.bytes / 1e9:,.3g} GB, to {self.folder} "
                 f"({self.free_bytes / 1e9:,.3g} GB free)",
                 f"in about {_duration(self.images / self.images_per_second)}: {self.images_per_second:,.0f} images/s "
                 f"with {self.workers} workers, measured on {self.tried:,} images; nothing was written"]
        if self.found_shards:
            lines.append(f"{count_of(self.found_shards)} of these are finished already")
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
        Stopped: `is_stopping` returned True. After any exception finished shards are kept; worker processes of this
            machine have ended, tasks on a cluster may go on for a while, which does no harm.
    """
    began = time.monotonic()
    source, folder = Path(source).absolute(), Path(output).absolute() / split
    _check_settings(source, split, folder, settings, workers)
    check_executor(executor)
    listed, parts, record = _plan(source, folder, settings, classes)
    if os.path.lexists(folder):
        return _summary(folder, listed, complete(folder, record), began, was_complete=True)
    with claimed(folder, record, len(parts)) as (partial, token):
        done: list[DoneShard] | None = None
        if not (partial / MANIFEST).exists():  # else it was killed when all was written
            tasks = ShardTasks(listed, parts, partial, token, settings.pictures, record["encoders"])
            done = _run(tasks, min(workers, len(tasks)), executor, is_stopping, folder.with_name(folder.name + SLURM))
            _write_manifest(partial, listed, done, split, settings, record)
        manifest = read_manifest(partial)
        try:
            name_shards(partial, token, manifest)
            publish(partial, folder)
        except OSError as error:
            raise DataError(f"cannot rename what is in {partial}, or itself to {folder}: {error.strerror}") from error
    found = manifest.shards if done is None else [shard.info for shard in done if shard.was_found and len(shard.rows)]
    return _summary(folder, listed, manifest, began, found)


def dry_run(source: Path, split: str, output: Path, settings: Settings = Settings(), *, workers: int = 8,
            executor: str = "local", classes: Sequence[str] | None = None,
            is_stopping: Callable[[], bool] = lambda: False) -> DryRun:
    """What `convert` with these arguments would write, and in which time: measured on a few images of each worker,
    which are written beside `output` and removed again. Raises as `convert`."""
    source, folder = Path(source).absolute(), Path(output).absolute() / split
    _check_settings(source, split, folder, settings, workers)
    check_executor(executor)
    listed, parts, record = _plan(source, folder, settings, classes)
    found = found_before(folder, record)
    place = next(path for path in folder.parents if path.is_dir())
    pictures = replace(settings.pictures, on_error="skip") if settings.pictures.on_error == "fail" else \
        settings.pictures
    with scratch_folder(place) as scratch:
        tasks = ShardTasks(listed, [part[:_DRY_RUN_SAMPLES] for part in parts[:workers]], scratch, new_token(),
                           pictures, record["encoders"])
        done = _run(tasks, len(tasks), executor, is_stopping, scratch / "jobs")
    written = sum(len(shard.rows) for shard in done)
    skipped = tuple(file for shard in done for file in shard.skipped)
    if not written:
        raise DataError(f"none of the {len(skipped)} images that were tried is whole: {skipped[0].filename}: "
                        f"{skipped[0].reason}")
    return DryRun(source=listed.kind, folder=folder, images=len(listed.samples), classes=len(listed.classes),
                  shards=len(parts), bytes=len(listed.samples) * sum(shard.info.bytes for shard in done) // written,
                  images_per_second=sum(len(shard.rows) / shard.seconds for shard in done), tried=written,
                  workers=workers, free_bytes=shutil.disk_usage(place).free, found_shards=found, skipped=skipped)


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
    if (before := manifest.conversion.get("encoders")) != (now := encoder_versions(settings.pictures)):
        raise DataError(f"{folder} was encoded with {before}, here is {now}: other versions give other bytes; install "
                        "those")
    listed = open_source(Path(source).absolute(), manifest.split, manifest.classes,
                         settings.bytes_per_shard is not None)
    parts = _deal(listed, settings)
    numbers = _numbers_of(manifest, len(parts), names)
    with scratch_folder(folder) as scratch:
        tasks = ShardTasks(listed, [parts[number] for number in numbers], scratch, new_token(), settings.pictures,
                           now)
        done = _run(tasks, min(workers, len(tasks)), "local", is_stopping, scratch / "jobs")
        expected = {shard.name: shard.sha256 for shard in manifest.shards}
        for name, shard in zip(names, done):
            if shard.info.sha256 != expected[name]:
                raise DataError(f"{source} gives other bytes for {name} than those that were converted: an image, a "
                                "setting in the manifest, or the version of a library has changed since; give the "
                                "source as it was")
        try:
            for number, name in enumerate(names):
                os.replace(tasks.path(number), folder / name)
            flush(folder)
        except OSError as error:
            raise DataError(f"cannot write in {folder}: {error.strerror}") from error


# ---- before the work


def _check_settings(source: Path, split: str, folder: Path, settings: Settings, workers: int) -> None:
    for flag, value in (("--split", split), ("--name", settings.name)):
        if not NAME.fullmatch(value) or value.endswith(PARTIAL):
            raise SettingsError(f"{flag} {value!r} cannot be part of a file name; use letters, digits, '_', '-', '.'")
    for flag, number in (("--workers", workers), ("--samples-per-shard", settings.samples_per_shard),
                         ("--bytes-per-shard", settings.bytes_per_shard)):
        if number is not None and number < 1:
            raise SettingsError(f"{flag} must be at least 1, got {number}")
    if not 0 <= settings.seed < 2 ** 64:
        raise SettingsError(f"--seed must be from 0 to 2^64 - 1, got {settings.seed}")
    if len(f"{settings.name}-{split}".encode()) > 200:
        raise SettingsError(f"--name and --split have {len(settings.name) + len(split)} characters: too long for the "
                            "names of files; the limit is 200")
    # Unlike resolve, realpath says nothing of links that go round in circles: reading or writing them does.
    if Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(source / split)):
        raise SettingsError(f"--output {folder.parent} would write into the folder to convert; choose another")


def _plan(source: Path, folder: Path, settings: Settings, classes: Sequence[str] | None
          ) -> tuple[Source, list[np.ndarray], dict[str, Any]]:
    """The source, which of its samples go into which shard, and what the bytes depend on."""
    if folder.parent.exists() and not folder.parent.is_dir():
        raise DataError(f"--output {folder.parent} is a file; give a folder")
    listed = open_source(source, folder.name, _class_list(folder.parent, classes), settings.bytes_per_shard is not None)
    if listed.holds(folder):
        raise SettingsError(f"--output {folder.parent} would write among the images of {listed.root}; choose another")
    parts = _deal(listed, settings)
    if len(parts) > MAX_SHARDS:
        raise SettingsError(f"these settings make {len(parts):,} shards, the limit is {MAX_SHARDS:,}; give more "
                            "--samples-per-shard, or --bytes-per-shard")
    return listed, parts, _record(listed, folder.name, settings)


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


def _deal(source: Source, settings: Settings) -> list[np.ndarray]:
    return deal(len(source.samples), source.sizes, seed=settings.seed, samples_per_shard=settings.samples_per_shard,
                bytes_per_shard=settings.bytes_per_shard)


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
        if not all(isinstance(record[name], int) and record[name] > 0 for name in _COUNTS if record[name] is not None):
            raise ValueError(f"one of {', '.join(_COUNTS)} is no count")
        return Settings(
            name=record["name"], samples_per_shard=record["samples_per_shard"], seed=record["seed"],
            bytes_per_shard=record["bytes_per_shard"],
            pictures=PictureSettings(on_error="fix" if record["fix"] else "skip", check=record["check"],
                                     resize_short=record["resize_short"], quality=record["quality"],
                                     transcode=record["transcode"]))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"the manifest does not say with which settings the split was converted ({error}); convert it "
                        "again") from error


# ---- the work


def _run(tasks: ShardTasks, workers: int, executor: str, is_stopping: Callable[[], bool], jobs: Path
         ) -> list[DoneShard]:
    """The finished shards in task order, with a progress bar in images and bytes."""
    done: dict[int, DoneShard] = {}
    images = written = 0
    total = sum(map(tasks.images, range(len(tasks))))
    results = run_tasks(executor, convert_shard, tasks, workers, is_stopping, jobs)
    bar = progress_bar(total, "img")
    with closing(results), closing(bar):
        for number, shard in results:
            done[number] = shard
            images, written = images + tasks.images(number), written + shard.info.bytes
            bar.set_postfix_str(f"{written / 1e9:,.2f} of {written * total / images / 1e9:,.2f} GB", refresh=False)
            if shard.was_found:  # not a part of the rate
                bar.initial += tasks.images(number)
            bar.update(tasks.images(number))
    return [done[number] for number in range(len(tasks))]


# ---- after the work


def _write_manifest(partial: Path, source: Source, done: Sequence[DoneShard], split: str, settings: Settings,
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
    empty = [number for number, shard in enumerate(done) if not len(shard.rows)]
    try:
        write_split(partial, shards, name=settings.name, split=split, classes=source.classes, seed=settings.seed,
                    samples_per_shard=settings.samples_per_shard, skipped=skipped, fixed=fixed,
                    conversion={**record, "changes": dict(sorted(changes.items())), "empty_shards": empty})
    except OSError as error:
        raise DataError(f"cannot write in {partial}: {error.strerror}; free some space") from error


def _summary(folder: Path, source: Source, manifest: SplitManifest, began: float, found: Sequence[ShardInfo] = (),
             was_complete: bool = False) -> ConversionSummary:
    changes = (manifest.conversion or {}).get("changes", {})
    return ConversionSummary(
        folder=folder, source=source.kind, images=manifest.num_samples, shards=len(manifest.shards),
        bytes=sum(shard.bytes for shard in manifest.shards), classes=len(manifest.classes),
        seconds=time.monotonic() - began, skipped=manifest.skipped, fixed=manifest.fixed,
        changes=changes, ignored=source.ignored, found_shards=len(found),
        found_images=sum(shard.num_samples for shard in found), was_complete=was_complete)


def _numbers_of(manifest: SplitManifest, count: int, names: Sequence[str]) -> list[int]:
    """Of the dealt shards that have these names."""
    number_of = dict(zip((shard.name for shard in manifest.shards), dealt_numbers(manifest, count)))
    if unknown := [name for name in names if name not in number_of]:
        raise DataError(f"the source does not have the images of {unknown[0]}; give the source as it was converted")
    return [number_of[name] for name in names]


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


if __name__ == "__main__":
    raise SystemExit("vir.data.convert is a part of the library; the program is vir-convert")
