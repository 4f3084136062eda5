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
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader, RandomSampler
from torchvision.datasets.folder import ImageFolder, default_loader  # type: ignore[import-untyped]

from vir.benchmarks.conversion import make_images
from vir.benchmarks.file_server import serving
from vir.benchmarks.tables import markdown
from vir.config import AugmentConfig
from vir.data import convert, transforms, worker
from vir.data.folder_reader import FolderReader
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
_INPUT = InputSpec(size=(3, 224, 224), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", crop_pct=0.875)

Run = Callable[[], Iterator[Any]]
"""Starts loader processes; the batches that they make, without end."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    folder: Path
    """Everything is written in a new folder in it, and removed again."""
    images: int = 2_000
    """Written; a measurement takes about as many, after a first few batches."""
    image_bytes: int = 110_000
    workers: Sequence[int] = (1, 2)
    latency: Sequence[float] = (0, 2, 20)
    """Milliseconds that are added to each read."""
    rounds: int = 3
    json: Path | None = None


@dataclass(frozen=True)
class _Row:
    name: str
    workers: int
    latency: float
    """Milliseconds."""
    whole: Run
    """Batches that are read, decoded and transformed."""
    reading: Run | None = None
    """Batches that are read alone."""


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
            rows = _rows(Path(place), shards, url, settings)
            rates = [[_rates(row, settings.images) for row in rows] for _ in range(settings.rounds)]
    columns = ("loader", "workers", "ms a read", "images/s (least to most)", "read alone, images/s")
    cells = [[row.name, str(row.workers), f"{row.latency:g}", *map(_spread, zip(*measured))]
             for row, measured in zip(rows, zip(*rates))]
    if settings.json is not None:
        replace_text(settings.json, json.dumps({
            "title": f"{settings.images:,} files of {total / settings.images / 1000:.0f} KB", "command": command,
            "machine": f"{os.cpu_count()} cores", "columns": columns, "rows": cells, "rates": rates}, indent=1) + "\n")
    return markdown(columns, cells)


def _convert(place: Path, images: int) -> Path:
    settings = convert.Settings(samples_per_shard=max(1, images // _SHARDS))
    return convert.convert(place / "src", "train", place / "shards", settings, workers=1).folder


def _rows(place: Path, shards: Path, url: str, settings: Settings) -> list[_Row]:
    transform = transforms.TrainTransform(AugmentConfig(), _INPUT)
    local = {"folder": FolderReader(place / "src" / "train"), "shards": ShardReader(shards)}
    places = Places(index_dir=place / "indexes", timeout=60)
    rows = []
    for workers, latency in itertools.product(settings.workers, settings.latency):
        readers = {**local, "http": open_reader(f"{url}/{latency:g}", places, first=True)}
        rows += [_Row(name, workers, latency, partial(_ours, reader, workers), partial(_read_alone, reader, workers))
                 for name, reader in readers.items()]
        rows.append(_Row("ImageFolder", workers, latency,
                         partial(_image_folder, place / "src" / "train", transform, workers, latency)))
        if not latency:  # it reads shards from end to end, not image by image
            rows.append(_Row("webdataset", workers, latency, partial(_webdataset, shards, transform, workers)))
    return rows


def _ours(reader: Reader, workers: int) -> Iterator[Any]:
    order = SampleOrder(0, reader.shard_sizes, _LANES, _WINDOW)
    return train_batches(
        reader, order, AugmentConfig(), _INPUT, seed=0, first_step=0, last_step=1 << 40, global_batch_size=_BATCH,
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


def _image_folder(folder: Path, transform: Callable[[Image.Image], np.ndarray], workers: int, latency: float
                  ) -> Iterator[Any]:
    def load(path: str) -> Any:
        time.sleep(latency / 1000)
        return default_loader(path)

    dataset = ImageFolder(str(folder), transform, loader=load)
    sampler = RandomSampler(dataset, replacement=True, num_samples=1 << 20)
    return iter(DataLoader(dataset, _BATCH, sampler=sampler, num_workers=workers, prefetch_factor=_PREFETCH))


def _webdataset(folder: Path, transform: Callable[[Image.Image], np.ndarray], workers: int) -> Iterator[Any]:
    dataset = webdataset.WebDataset(sorted(map(str, folder.glob("*.tar"))), shardshuffle=_SHARDS).shuffle(_WINDOW)
    dataset = dataset.decode("pilrgb").to_tuple("jpg", "cls").map_tuple(transform).repeat()
    return iter(DataLoader(dataset, _BATCH, num_workers=workers, prefetch_factor=_PREFETCH))


def _rates(row: _Row, images: int) -> tuple[float, float | None]:
    """Images/s of all the work, and of reading alone."""
    with _slow_reads(row.latency / 1000):
        return (_rate(row.whole, row.workers, images),
                None if row.reading is None else _rate(row.reading, row.workers, images))


def _rate(run: Run, workers: int, images: int) -> float:
    batches = run()
    warm = workers * (1 + _PREFETCH)  # now as many are being made as there will be at the end
    count = -(-images // (_BATCH * workers)) * workers  # workers in step give theirs at the same time
    for _ in range(warm):
        next(batches)
    began = time.perf_counter()
    for _ in range(count):
        next(batches)
    seconds = time.perf_counter() - began
    if isinstance(batches, Batches):
        batches.close()
    return count * _BATCH / seconds


@contextmanager
def _slow_reads(seconds: float) -> Iterator[None]:
    """Each read of our loader processes that are forked meanwhile takes so much longer."""
    read = os.pread

    def slow(descriptor: int, size: int, offset: int) -> bytes:
        time.sleep(seconds)
        return read(descriptor, size, offset)

    if seconds:
        setattr(os, "pread", slow)
    try:
        yield
    finally:
        setattr(os, "pread", read)


def _spread(rates: Sequence[float | None]) -> str:
    known = [rate for rate in rates if rate is not None]
    return f"{statistics.median(known):,.0f} ({min(known):,.0f}–{max(known):,.0f})" if known else ""
