"""A folder of images -> one split of shards, in parallel, with the same bytes for any number of workers."""

import multiprocessing
import multiprocessing.connection
import os
import re
import shutil
import signal
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Callable, Iterator, Sequence

import numpy as np
from tqdm import tqdm

from vir.data.decode import BadSampleError, decode_image, inspect_image
from vir.data.shards import (
    MANIFEST,
    PARTIAL,
    ShardInfo,
    ShardSample,
    SkippedFile,
    read_manifest,
    write_shard,
    write_split,
)
from vir.data.sources.choose import open_source
from vir.data.sources.listing import Sample
from vir.errors import DataError, SettingsError, VirError
from vir.files import flush

ON_ERROR = ("fail", "skip")
CHECKS = ("header", "decode")

_Shard = tuple[ShardInfo, np.ndarray]


_stop: Event | None = None
"""In a worker process: set when the conversion is to end."""


class Stopped(Exception):
    """The conversion was asked to stop; it has removed what it wrote."""


@dataclass(frozen=True)
class ConversionSummary:
    folder: Path
    images: int
    shards: int
    bytes: int
    """Of all shards."""
    classes: int
    seconds: float
    skipped: tuple[SkippedFile, ...]
    ignored: int
    """Files of the source whose names are not those of images."""

    def __str__(self) -> str:
        lines = [f"{self.images:,} images of {self.classes:,} classes in {self.shards:,} "
                 f"{'shard' if self.shards == 1 else 'shards'}, {self.bytes / 1e6:,.1f} MB, "
                 f"in {self.seconds:.1f} s ({self.images / self.seconds:,.0f} images/s)"]
        if self.ignored:
            lines.append(f"ignored: {self.ignored:,} files that are no images by name")
        if self.skipped:
            lines.append(f"skipped: {len(self.skipped):,} files that are no whole images, all listed in {MANIFEST}:")
            lines += [f"  {file.filename}: {file.reason}" for file in self.skipped[:20]]
        return "\n".join([*lines, f"written to {self.folder}"])


def convert(source: Path, split: str, output: Path, *, name: str = "imagenet1k", workers: int = 8,
            samples_per_shard: int = 1000, seed: int = 0, on_error: str = "fail", check: str = "header",
            classes: Sequence[str] | None = None,
            stopping: Callable[[], bool] = lambda: False) -> ConversionSummary:
    """Converts `source/split/<class>/<image>` into `output/split`, which appears when everything in it is complete.

    The images are shuffled over the whole split, so that each shard alone is a random sample of it. Image files go into
    the shards unchanged, byte for byte. Worker processes start by forkserver: a script that calls this needs the
    `if __name__ == "__main__"` guard.

    Args:
        samples_per_shard: the most samples in a shard; they are spread evenly, so that no last shard is tiny.
        on_error: "fail" stops at a file that is not a complete image, "skip" leaves it out and lists it in the
            manifest. A file that cannot be read at all always stops the conversion.
        check: "header" parses every header, and decodes the files that do not end as their format requires; "decode"
            decodes all files.
        classes: class list in label order. If None: that of the splits already in `output`, else the class folders of
            `source/train`, else those of the split; so a validation split with fewer classes keeps its labels.
        stopping: called several times a second; True ends the conversion. Signal handlers should use it: an exception
            raised in a handler can reach the process pool while it starts a worker, which may then wait for ever.

    Raises:
        DataError, SettingsError: each names the value and what to do.
        Stopped: `stopping` returned True. After any exception, what was written is removed and the workers have ended.
    """
    source, output = Path(source).absolute(), Path(output).absolute()
    _check_settings(source, split, output, name, workers, samples_per_shard, seed, on_error, check)
    _refuse_existing(output / split)
    began = time.monotonic()
    listing = open_source(source, split, _class_list(output, classes))
    parts = _deal(listing.samples, samples_per_shard, seed)
    with _partial_folder(output / split) as partial:
        tasks = [_Task(partial / f"{name}-{split}-{number:06d}.tar", listing.root, part, on_error == "skip",
                       check == "decode") for number, part in enumerate(parts)]
        results = _run(tasks, min(workers, len(tasks)), stopping)
        skipped = sorted((file for _, _, bad in results for file in bad), key=lambda file: file.filename)
        shards = _number_shards(partial, [(info, rows) for info, rows, _ in results])
        if not shards:
            raise DataError(f"no whole image in {listing.root}: all {len(skipped)} were skipped, "
                            f"{skipped[0].filename} because {skipped[0].reason}")
        try:
            write_split(partial, shards, name=name, split=split, classes=listing.classes, seed=seed,
                        samples_per_shard=samples_per_shard, skipped=skipped)
        except OSError as error:
            raise DataError(f"cannot write in {partial}: {error.strerror}; free some space, or choose another "
                            "--output") from error
    return ConversionSummary(folder=output / split, images=sum(info.num_samples for info, _ in shards),
                             shards=len(shards), bytes=sum(info.bytes for info, _ in shards),
                             classes=len(listing.classes), seconds=time.monotonic() - began, skipped=tuple(skipped),
                             ignored=listing.ignored)


def _check_settings(source: Path, split: str, output: Path, name: str, workers: int, samples_per_shard: int, seed: int,
                    on_error: str, check: str) -> None:
    for flag, value in (("--split", split), ("--name", name)):
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", value) or value.endswith(PARTIAL):
            raise SettingsError(f"{flag} {value!r} cannot be part of a file name; use letters, digits, '_', '-', '.'")
    for flag, number in (("--workers", workers), ("--samples-per-shard", samples_per_shard)):
        if number < 1:
            raise SettingsError(f"{flag} must be at least 1, got {number}")
    if not 0 <= seed < 2 ** 64:
        raise SettingsError(f"--seed must be from 0 to 2^64 - 1, got {seed}")
    for flag, value, choices in (("--on-error", on_error, ON_ERROR), ("--check", check, CHECKS)):
        if value not in choices:
            raise SettingsError(f"{flag} must be one of {', '.join(choices)}, got {value!r}")
    # Unlike resolve, realpath says nothing of links that go round in circles: reading or writing them does.
    if Path(os.path.realpath(output / split)).is_relative_to(os.path.realpath(source / split)):
        raise SettingsError(f"--output {output} would write into the folder to convert; choose another")


def _refuse_existing(folder: Path) -> None:
    if folder.parent.exists() and not folder.parent.is_dir():
        raise DataError(f"--output {folder.parent} is a file; give a folder")
    if os.path.lexists(folder):
        raise DataError(f"{folder} exists already; remove it to convert again, or choose another --output")
    partial = folder.with_name(folder.name + PARTIAL)
    if partial.exists():
        raise DataError(f"{partial} exists: another conversion is running, or one was interrupted; if none is running, "
                        f"remove it (rm -r {partial}) and convert again")


def _class_list(output: Path, classes: Sequence[str] | None) -> Sequence[str] | None:
    """The class list that gives the labels; None for the split's own folders. All splits of one output share one list.
    """
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


def _deal(samples: Sequence[Sample], samples_per_shard: int, seed: int) -> Iterator[list[Sample]]:
    """Shuffles the samples and cuts them into shards whose lengths differ by one at most."""
    # Sorts Philox's raw output, because numpy promises the same raw output in all versions, but not the same results of
    # Generator methods.
    order = np.argsort(np.random.Philox(key=seed).random_raw(len(samples)), kind="stable")
    count = -(-len(samples) // samples_per_shard)
    for number in range(count):
        start, stop = len(samples) * number // count, len(samples) * (number + 1) // count
        yield [samples[i] for i in order[start:stop]]


@contextmanager
def _partial_folder(folder: Path) -> Iterator[Path]:
    """A new folder under a temporary name; renamed to `folder` at the end, removed after any exception."""
    partial = folder.with_name(folder.name + PARTIAL)
    made_output = not folder.parent.exists()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
    except FileExistsError:
        _refuse_existing(folder)
        raise
    except OSError as error:
        raise DataError(f"cannot write to {folder.parent}: {error.strerror}; choose another --output") from error
    try:
        yield partial
        try:
            os.rename(partial, folder)
        except OSError as error:
            raise DataError(f"cannot rename {partial} to {folder}: {error.strerror}") from error
        flush(folder.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if made_output:
            with suppress(OSError):
                folder.parent.rmdir()
        raise


def _number_shards(folder: Path, shards: Sequence[_Shard]) -> list[_Shard]:
    """Removes the shards without samples (all were skipped) and closes the gaps in the shard numbers."""
    full = [(info, rows) for info, rows in shards if info.num_samples]
    for info, _ in shards:
        if not info.num_samples:
            (folder / info.name).unlink()
    names = [info.name for info, _ in shards]
    numbered = []
    for name, (info, rows) in zip(names, full):
        if info.name != name:
            os.rename(folder / info.name, folder / name)
        numbered.append((replace(info, name=name), rows))
    return numbered


# ---- worker processes: one task is one shard


@dataclass(frozen=True)
class _Task:
    path: Path
    root: Path
    samples: list[Sample]
    skip: bool
    decode: bool


_Result = tuple[ShardInfo, np.ndarray, list[SkippedFile]]


def _run(tasks: Sequence[_Task], workers: int, stopping: Callable[[], bool]) -> list[_Result]:
    """The results in task order, with a progress bar in images. At most two tasks per worker wait in the queue."""
    # forkserver: workers start from a process without threads, which has imported the slow modules once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    stop = context.Event()
    results: dict[int, _Result] = {}
    waiting = iter(enumerate(tasks))
    running: dict[Future[_Result], int] = {}
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(stop,))
    bar = tqdm(total=sum(len(task.samples) for task in tasks), unit="img",
               mininterval=0.5 if sys.stderr.isatty() else 30)
    try:
        while True:
            while len(running) < 2 * workers and (item := next(waiting, None)):
                running[pool.submit(_convert_shard, item[1])] = item[0]
            if not running:
                return [results[number] for number in range(len(tasks))]
            if stopping():
                raise Stopped
            for future in wait(running, timeout=0.2, return_when=FIRST_COMPLETED).done:
                number = running.pop(future)
                results[number] = future.result()
                bar.update(len(tasks[number].samples))
    except BrokenProcessPool as error:
        raise VirError("a worker process died, perhaps out of memory; try fewer --workers") from error
    finally:
        stop.set()
        bar.close()
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(stop: Event) -> None:
    global _stop
    _stop = stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the main process ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ends this worker when the main process ends, even if that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a worker
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _convert_shard(task: _Task) -> _Result:
    skipped: list[SkippedFile] = []
    try:
        info, rows = write_shard(task.path, _checked_samples(task, skipped))
    except OSError as error:
        raise DataError(f"cannot write {task.path}: {error.strerror}") from error
    return info, rows, skipped


def _checked_samples(task: _Task, skipped: list[SkippedFile]) -> Iterator[ShardSample]:
    assert _stop is not None  # set by _start_worker
    for sample in task.samples:
        if _stop.is_set():
            raise Stopped
        path = task.root / sample.path
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}; mend it, or remove it from the source") from error
        try:
            extension, width, height = inspect_image(data)
            if task.decode:
                decode_image(data)
        except BadSampleError as error:
            if not task.skip:
                raise DataError(f"{path}: {error}; mend or remove the file, or leave out all such files with "
                                f"--on-error skip") from error
            skipped.append(SkippedFile(sample.filename, str(error)))
            continue
        yield ShardSample(sample.key, data, extension, width, height, sample.label, sample.filename)


if __name__ == "__main__":
    raise SystemExit("vir.data.convert is a part of the library; the program is vir-convert")
