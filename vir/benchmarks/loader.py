"""Images per second of the loader from each kind of source, by the latency of a read, beside the loaders of peers."""

from __future__ import annotations

import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
import webdataset
from PIL import Image
from timm.data import create_dataset, create_transform
from torch.utils.data import DataLoader, RandomSampler
from torchvision.datasets.folder import ImageFolder, default_loader  # type: ignore[import-untyped]

from vir.benchmarks.conversion import make_images
from vir.benchmarks.file_server import serving
from vir.benchmarks.tables import markdown
from vir.config import AugmentConfig
from vir.data import convert, jpeg, worker
from vir.data.folder_reader import FolderReader
from vir.data.jpeg import DECODERS, VARIABLE
from vir.data.loader import Batches, Request, train_batches
from vir.data.opening import Places, open_reader
from vir.data.order import SampleOrder
from vir.data.reader import Reader, ShardReader
from vir.errors import DataError, SettingsError
from vir.files import replace_text
from vir.weights.spec import InputSpec

_BATCH = 64
_PREFETCH = 2
"""Batches that each worker makes ahead."""
_SHARDS = 20
"""About; every worker of a peer must have some."""
_LANES, _WINDOW = 64, 2500
_READ_ALONE = 5
"""Times as many images are read alone: CPU time is counted in hundredths of a second."""
_INPUT = InputSpec(size=(3, 224, 224), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", crop_pct=0.875)

AUGMENTATIONS = {
    "crop and flip": AugmentConfig(auto_augment=None, color_jitter=0.0, reprob=0.0, mixup=0.0, cutmix=0.0),
    "RandAugment": AugmentConfig(),
}
_PEER = "webdataset"

Run = Callable[[], Iterator[Any]]
"""Starts loader processes; the batches that they make, without end."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    folder: Path
    """Everything is written in a new folder in it, and removed again."""
    images: int = 2_000
    """Written; a measurement takes about as many, after a first few batches."""
    image_bytes: int = 71_000
    workers: Sequence[int] = (1, 2)
    latency: Sequence[float] = (0, 2, 20)
    """Milliseconds that are added to each read."""
    rounds: int = 3
    json: Path | None = None


@dataclass(frozen=True)
class _Row:
    augmentation: str
    name: str
    workers: int
    latency: float
    """Milliseconds."""
    whole: Run
    """Batches that are read, decoded and transformed."""
    reading: Run | None = None
    """Batches that are read alone."""
    decoder: str | None = None
    """Of JPEGs, in our loader."""


class _Rate(NamedTuple):
    wall: float
    """Images a second."""
    cpu: float
    """Images a second of CPU time, of the loader processes and of the one that takes their batches."""


def benchmark(settings: Settings, command: str) -> str:
    """The table, in Markdown; each row with its medians over the rounds, in which all rows take turns.

    Raises:
        SettingsError, DataError: numbers that are too small, or no such folder.
    """
    if min(settings.images, settings.image_bytes, settings.rounds, *settings.workers) < 1:
        raise SettingsError("--images, --image_bytes, --workers and --rounds must be at least 1")
    if min(settings.latency) < 0:
        raise SettingsError(f"--latency must be at least 0 ms, got {min(settings.latency):g}")
    if not settings.folder.is_dir():
        raise DataError(f"no such folder: {settings.folder}")
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=settings.folder) as place:
        total = make_images(Path(place) / "src", settings.images, settings.image_bytes)
        shards = _convert(Path(place), settings.images)
        with serving(shards) as url:
            rows = list(_rows(Path(place), shards, url, settings))
            rates = [[_rates(row, settings.images) for row in rows] for _ in range(settings.rounds)]
    columns = ("augmentation", "loader", "workers", "ms a read", "images/s (least to most)", "of a CPU second",
               "× webdataset", "read alone, of a CPU second", "× webdataset")
    cells = list(_cells(rows, rates))
    if settings.json is not None:
        replace_text(settings.json, json.dumps({
            "title": f"{settings.images:,} files of {total / settings.images / 1000:.0f} KB", "command": command,
            "machine": f"{os.cpu_count()} cores", "columns": columns, "rows": cells, "rates": rates}, indent=1) + "\n")
    return markdown(columns, cells)


def _cells(rows: Sequence[_Row], rates: Sequence[Sequence[tuple[_Rate, _Rate | None]]]) -> Iterator[list[str]]:
    peers = {(row.augmentation, row.workers): at for at, row in enumerate(rows) if row.name == _PEER}
    for at, row in enumerate(rows):
        peer = peers.get((row.augmentation, row.workers))
        measured = [(turn[at], turn[at] if peer is None else turn[peer]) for turn in rates]
        whole = [(ours[0], theirs[0]) for ours, theirs in measured]
        alone = [(ours[1], theirs[1]) for ours, theirs in measured if ours[1] is not None and theirs[1] is not None]
        is_beside = peer not in (None, at) and not row.latency
        yield [row.augmentation, row.name, str(row.workers), f"{row.latency:g}",
               _spread([ours.wall for ours, _ in whole]), f"{statistics.median(ours.cpu for ours, _ in whole):,.0f}",
               _ratio(whole) if is_beside else "",
               f"{statistics.median(ours.cpu for ours, _ in alone):,.0f}" if alone else "",
               _ratio(alone) if alone and is_beside else ""]


def _ratio(pairs: Sequence[tuple[_Rate, _Rate]]) -> str:
    """Of CPU time, by rounds."""
    return f"{statistics.median(ours.cpu / theirs.cpu for ours, theirs in pairs):.2f}"


def _convert(place: Path, images: int) -> Path:
    settings = convert.Settings(samples_per_shard=max(1, images // _SHARDS))
    return convert.convert(place / "src", "train", place / "shards", settings, workers=1).folder


def _rows(place: Path, shards: Path, url: str, settings: Settings) -> Iterator[_Row]:
    readers: dict[str, Reader] = {"folder": FolderReader(place / "src" / "train"), "shards": ShardReader(shards)}
    decoders = [name for name in reversed(DECODERS) if name != "nvimgcodec" or jpeg.has_nvimgcodec()]
    for workers, (name, augment) in itertools.product(settings.workers, AUGMENTATIONS.items()):
        transform = _timms(augment)
        row = partial(_Row, name, workers=workers, latency=0)
        for decoder in decoders:
            reading = partial(_read_alone, readers["shards"], workers) if decoder == decoders[0] else None
            yield row(f"shards, {decoder}", whole=partial(_ours, readers["shards"], workers, augment), reading=reading,
                      decoder=decoder)
        yield row(_PEER, whole=partial(_webdataset, shards, transform, workers),
                  reading=partial(_webdataset, shards, None, workers))
        yield row("timm's reader of shards", whole=partial(_timm, shards, transform, workers))
        yield row("ImageFolder", whole=partial(_image_folder, place / "src" / "train", transform, workers, 0))
    name, augment = next(iter(AUGMENTATIONS.items()))
    for workers, latency in itertools.product(settings.workers, settings.latency):
        readers["http"] = open_reader(f"{url}/{latency:g}", Places(index_dir=place / "indexes", timeout=60), first=True)
        for source, reader in readers.items():
            yield _Row(name, source, workers, latency, partial(_ours, reader, workers, augment),
                       partial(_read_alone, reader, workers))
        if latency:
            yield _Row(name, "ImageFolder", workers, latency,
                       partial(_image_folder, place / "src" / "train", _timms(augment), workers, latency))


def _timms(augment: AugmentConfig) -> Callable[[Image.Image], Any]:
    jitter: Any = augment.color_jitter or None
    return create_transform(
        _INPUT.size, is_training=True, use_prefetcher=True, scale=augment.scale, ratio=augment.ratio,
        hflip=augment.hflip, color_jitter=jitter, auto_augment=augment.auto_augment,
        interpolation=augment.interpolation, mean=_INPUT.mean, std=_INPUT.std)


def _ours(reader: Reader, workers: int, augment: AugmentConfig) -> Iterator[Any]:
    order = SampleOrder(0, reader.shard_sizes, _LANES, _WINDOW)
    return train_batches(
        reader, order, augment, _INPUT, seed=0, first_step=0, last_step=1 << 40, global_batch_size=_BATCH,
        micro_batch_size=_BATCH, rank=0, world_size=1, workers=workers, prefetch=_PREFETCH, device=torch.device("cpu"))


def _read_alone(reader: Reader, workers: int) -> Iterator[Any]:
    order = SampleOrder(0, reader.shard_sizes, _LANES, _WINDOW)

    def requests() -> Iterator[Request]:
        for first in itertools.count(0, _BATCH):
            positions = order.global_batch(first, _BATCH)
            yield positions, order.samples(positions)

    def read(positions: np.ndarray, samples: np.ndarray) -> Any:
        return sum(len(bytes_of()) for bytes_of in worker.here().read(reader, samples.tolist()))

    return Batches(read, requests, workers, _PREFETCH, torch.device("cpu"), None)


def _image_folder(folder: Path, transform: Callable[[Image.Image], Any], workers: int, latency: float
                  ) -> Iterator[Any]:
    def load(path: str) -> Any:
        time.sleep(latency / 1000)
        return default_loader(path)

    dataset = ImageFolder(str(folder), transform, loader=load)
    sampler = RandomSampler(dataset, replacement=True, num_samples=1 << 20)
    return _served(dataset, workers, sampler=sampler)


def _webdataset(folder: Path, transform: Callable[[Image.Image], Any] | None, workers: int) -> Iterator[Any]:
    """Without a transform images are read alone, and only how many bytes they have is handed over, as by ours."""
    dataset = webdataset.WebDataset(sorted(map(str, folder.glob("*.tar"))), shardshuffle=_SHARDS).shuffle(_WINDOW)
    if transform is None:
        return _served(dataset.to_tuple("jpg").map_tuple(len).repeat(), workers)
    return _served(dataset.decode("pilrgb").to_tuple("jpg", "cls").map_tuple(transform).repeat(), workers)


def _timm(folder: Path, transform: Callable[[Image.Image], Any], workers: int) -> Iterator[Any]:
    shards = sorted(path.name for path in folder.glob("*.tar"))
    first, last = (Path(name).stem.rsplit("-", 1) for name in (shards[0], shards[-1]))
    name = f"{first[0]}-{{{first[1]}..{last[1]}}}.tar"
    dataset = create_dataset("wds/benchmark", str(folder), split=name, is_training=True, batch_size=_BATCH,
                             num_samples=1 << 20, target_key="label")
    dataset.transform = transform
    return _served(dataset, workers)


def _served(dataset: Any, workers: int, **options: Any) -> Iterator[Any]:
    return iter(DataLoader(dataset, _BATCH, num_workers=workers, prefetch_factor=_PREFETCH, **options))


def _rates(row: _Row, images: int) -> tuple[_Rate, _Rate | None]:
    """Of all the work, and of reading alone."""
    with _slow_reads(row.latency / 1000), _decoding_by(row.decoder):
        return (_rate(row.whole, row.workers, images),
                None if row.reading is None else _rate(row.reading, row.workers, _READ_ALONE * images))


def _rate(run: Run, workers: int, images: int) -> _Rate:
    batches = run()
    warm = workers * (1 + _PREFETCH)  # now as many are being made as there will be at the end
    count = -(-images // (_BATCH * workers)) * workers  # workers in step give theirs at the same time
    for _ in range(warm):
        next(batches)
    processes = [psutil.Process(), *psutil.Process().children()]
    began, cpu = time.perf_counter(), _cpu_seconds(processes)
    for _ in range(count):
        next(batches)
    seconds, cpu = time.perf_counter() - began, _cpu_seconds(processes) - cpu
    if isinstance(batches, Batches):
        batches.close()
    return _Rate(count * _BATCH / seconds, count * _BATCH / cpu)


def _cpu_seconds(processes: Sequence[psutil.Process]) -> float:
    return sum(times.user + times.system for times in (process.cpu_times() for process in processes))


@contextmanager
def _decoding_by(decoder: str | None) -> Iterator[None]:
    """Our loader processes that are forked meanwhile."""
    before = os.environ.pop(VARIABLE, None)
    if decoder is not None:
        os.environ[VARIABLE] = decoder
    try:
        yield
    finally:
        os.environ.pop(VARIABLE, None)
        if before is not None:
            os.environ[VARIABLE] = before


@contextmanager
def _slow_reads(seconds: float) -> Iterator[None]:
    """Each read of our loader processes that are forked meanwhile takes so much longer."""
    read, read_at_hand = os.pread, os.preadv

    def slow(descriptor: int, size: int, offset: int) -> bytes:
        time.sleep(seconds)
        return read(descriptor, size, offset)

    def not_at_hand(*arguments: Any) -> int:
        raise BlockingIOError

    if seconds:
        setattr(os, "pread", slow)
        setattr(os, "preadv", not_at_hand)
    try:
        yield
    finally:
        setattr(os, "pread", read)
        setattr(os, "preadv", read_at_hand)


def _spread(rates: Sequence[float]) -> str:
    return f"{statistics.median(rates):,.0f} ({min(rates):,.0f}–{max(rates):,.0f})"
