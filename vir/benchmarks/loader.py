"""Our loader beside others on the same photographs: whole samples, samples read alone, slow disks, orders of epochs."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vir.benchmarks import feeds, order, photographs
from vir.benchmarks.conversion import PICTURES, make_images
from vir.benchmarks.feeds import Feed, Rate
from vir.benchmarks.file_server import serving
from vir.benchmarks.plot import plot_rates
from vir.benchmarks.program import check_folder
from vir.benchmarks.stopwatch import machine
from vir.benchmarks.tables import markdown
from vir.config import AugmentConfig
from vir.data import convert, jpeg
from vir.data.folder_reader import FolderReader
from vir.data.opening import Places, open_reader
from vir.data.reader import Reader, ShardReader
from vir.data.sidecars import write_sidecars
from vir.errors import SettingsError
from vir.files import replace_text
from vir.output_folder import check_file

_SHARDS = 20
"""About; every worker of a peer must have some."""
_READ = 20_000
"""Samples that are read at least where they are not decoded: CPU time is counted in ticks of 10 ms."""
AUGMENTATIONS = {
    "crop, flip": AugmentConfig(auto_augment=None, color_jitter=0, reprob=0, mixup=0, cutmix=0),
    "RandAugment": AugmentConfig()}
_LIBRARIES = ("pillow", "simplejpeg", "nvidia-nvimgcodec-cu13", "torchvision")


@dataclass(frozen=True, kw_only=True)
class Settings:
    kind: str = "pixels"
    """pixels, reading, latency or order."""
    folder: Path
    """Everything is written in a new folder in it, and removed again."""
    images: int = 2_000
    """Written; a measurement takes about as many, after a first few batches."""
    image_bytes: int = 71_000
    workers: Sequence[int] = (1, 2)
    latency: Sequence[float] = (0, 2, 20)
    """Milliseconds that are added to each read."""
    samples: Sequence[int] = (1_281_167, 14_197_122)
    """Of an epoch whose order is made."""
    rounds: int = 3
    json: Path | None = None
    plot: Path | None = None


class Row(NamedTuple):
    augmentation: str
    workers: int
    loader: str
    start: Callable[[], Feed]
    is_ours: bool


@dataclass(frozen=True)
class _Images:
    place: Path
    shards: Path
    title: str

    @property
    def folder(self) -> Path:
        return self.place / "src" / "train"


@dataclass(frozen=True)
class _Table:
    title: str
    columns: Sequence[str]
    cells: list[list[str]]
    rounds: Sequence[Any]
    """What was measured, as numbers."""


def benchmark(settings: Settings, command: str) -> str:
    """The table, in Markdown; each row with its medians over the rounds, in which all rows take turns.

    Raises:
        SettingsError, DataError: numbers that are too small, or no such folder.
    """
    if min(settings.images, settings.image_bytes, settings.rounds, *settings.workers, *settings.samples) < 1:
        raise SettingsError("--images, --image_bytes, --workers, --samples and --rounds must be at least 1")
    if min(settings.latency) < 0:
        raise SettingsError(f"--latency must be at least 0 ms, got {min(settings.latency):g}")
    if settings.plot is not None and settings.kind != "pixels":
        raise SettingsError(f"--plot shows the rates of pixels, not of {settings.kind}; leave it out")
    check_folder(settings.folder)
    check_file("--json", settings.json)
    table = {"pixels": _pixels, "reading": _reading, "latency": _latency, "order": _order}[settings.kind](settings)
    if settings.json is not None:
        replace_text(settings.json, json.dumps({
            "title": table.title, "command": command, "machine": f"{machine(torch.device('cpu'))}; {_versions()}",
            "columns": table.columns, "rows": table.cells, "rounds": table.rounds}, indent=1) + "\n")
    return f"{table.title}.\n\n{markdown(table.columns, table.cells)}"


def _versions() -> str:
    installed = {found.metadata["Name"].lower(): found.version for found in importlib.metadata.distributions()}
    return ", ".join(f"{name} {installed[name]}" for name in _LIBRARIES if name in installed)


@contextmanager
def _images(settings: Settings) -> Iterator[_Images]:
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=settings.folder) as name:
        place = Path(name)
        pictures = photographs.make_jpegs(min(PICTURES, settings.images), settings.image_bytes, photographs.SIZE)
        total = make_images(place / "src", settings.images, 0, pictures=pictures)
        shards = convert.convert(
            place / "src", "train", place / "shards",
            convert.Settings(samples_per_shard=max(1, settings.images // _SHARDS)), workers=1).folder
        write_sidecars(shards, ["timm"])
        width, height = photographs.SIZE
        yield _Images(place, shards, f"{settings.images:,} JPEGs of {width} x {height} pixels and "
                                     f"{total / settings.images / 1000:.0f} KB, of which Pillow decodes one in "
                                     f"{photographs.decoding_us(pictures):,.0f} us")


# ---- whole samples


def _pixels(settings: Settings) -> _Table:
    with _images(settings) as images:
        rows = _rows(images, settings.workers)
        rounds = [[feeds.rate(row.start, row.workers, settings.images) for row in rows]
                  for _ in range(settings.rounds)]
    if settings.plot is not None:
        rates = {(row.augmentation, row.workers, row.loader): [rate.wall for rate in measured]
                 for row, measured in zip(rows, zip(*rounds))}
        plot_rates(rates, settings.plot, "images/s", images.title)
    columns = ("augmentation", "workers", "loader", "images/s (least to most)", "images per CPU second",
               "× best other", "× best other, per CPU second", "× 1 worker")
    return _Table(images.title, columns, cells_of_pixels(rows, rounds), rounds)


def _rows(images: _Images, workers: Sequence[int]) -> list[Row]:
    reader = ShardReader(images.shards)
    rows = []
    for (name, augment), count in itertools.product(AUGMENTATIONS.items(), workers):
        found: dict[str, Callable[[], Feed]] = {
            f"ours, {decoder}": partial(feeds.ours, reader, augment, count, decoder) for decoder in _decoders()}
        peers: dict[str, Callable[[], Feed]] = {
            "timm's wds reader": partial(feeds.timm_wds, images.shards, augment, count),
            "webdataset, timm's transforms": partial(feeds.webdataset_timm, images.shards, augment, count),
            "ImageFolder, timm's transforms": partial(feeds.image_folder, images.folder, augment, count)}
        rows += [Row(name, count, loader, start, loader in found) for loader, start in {**found, **peers}.items()]
    return rows


def _decoders() -> tuple[str, ...]:
    """Those that are quicker than Pillow, up to the one that a run would have."""
    return jpeg.DECODERS[1:jpeg.DECODERS.index(jpeg.decoder()) + 1] or jpeg.DECODERS[:1]


def cells_of_pixels(rows: Sequence[Row], rounds: Sequence[Sequence[Rate]]) -> list[list[str]]:
    """Each ratio is the median of those in the single rounds; 'best other' is the quickest loader that is not ours, of
    the same augmentation and workers, in that round."""
    cells = []
    for place, row in enumerate(rows):
        others = [at for at, other in enumerate(rows)
                  if other[:2] == row[:2] and not other.is_ours]
        single = [at for at, other in enumerate(rows)
                  if (other.augmentation, other.workers, other.loader) == (row.augmentation, 1, row.loader)]
        measured = [of_round[place] for of_round in rounds]
        cells.append([
            row.augmentation, str(row.workers), row.loader, _spread([rate.wall for rate in measured]),
            f"{statistics.median(rate.cpu for rate in measured):,.0f}",
            _ratio([of_round[place].wall / max(of_round[at].wall for at in others) for of_round in rounds]),
            _ratio([of_round[place].cpu / max(of_round[at].cpu for at in others) for of_round in rounds]),
            _ratio([of_round[place].wall / of_round[at].wall for of_round in rounds for at in single])])
    return cells


# ---- samples that are read, not decoded


def _reading(settings: Settings) -> _Table:
    with _images(settings) as images:
        starts: dict[str, Callable[[int], Feed]] = {
            "ours, shards, crc32 checked": partial(feeds.ours_read, ShardReader(images.shards)),
            "ours, folder": partial(feeds.ours_read, FolderReader(images.folder)),
            "webdataset": partial(feeds.webdataset_read, images.shards),
            "webdataset, shuffled": partial(feeds.webdataset_read, images.shards, window=feeds.WINDOW),
            "ImageFolder, bytes": partial(feeds.image_folder_read, images.folder)}
        rows = list(itertools.product(settings.workers, starts))
        passes = -(-_READ // settings.images)  # whole ones: a shuffle that fills its buffer reads ahead in a pass
        rounds = [{(workers, name): feeds.rate(partial(starts[name], workers), workers, passes * settings.images)
                   for workers, name in rows} for _ in range(settings.rounds)]
    columns = ("workers", "reader", "samples/s (least to most)", "samples per CPU second (least to most)",
               "× webdataset, per CPU second")
    cells = [[str(workers), name, _spread([of_round[workers, name].wall for of_round in rounds]),
              _spread([of_round[workers, name].cpu for of_round in rounds]),
              _ratio([of_round[workers, name].cpu / of_round[workers, "webdataset"].cpu for of_round in rounds])]
             for workers, name in rows]
    return _Table(images.title, columns, cells, [list(of_round.values()) for of_round in rounds])


# ---- by what each read waits for


class _SlowRow(NamedTuple):
    loader: str
    workers: int
    latency: float
    """Milliseconds."""
    whole: Callable[[], Feed]
    reading: Callable[[], Feed] | None = None


def _latency(settings: Settings) -> _Table:
    with _images(settings) as images, serving(images.shards) as url:
        rows = _slow_rows(images, url, settings)
        rounds = [[_slow_rates(row, settings.images) for row in rows] for _ in range(settings.rounds)]
    columns = ("loader", "workers", "ms a read", "images/s (least to most)", "read alone, images/s")
    cells = [[row.loader, str(row.workers), f"{row.latency:g}", *map(_spread, zip(*measured))]
             for row, measured in zip(rows, zip(*rounds))]
    return _Table(images.title, columns, cells, rounds)


def _slow_rows(images: _Images, url: str, settings: Settings) -> list[_SlowRow]:
    augment = AUGMENTATIONS["RandAugment"]
    local: Mapping[str, Reader] = {"folder": FolderReader(images.folder), "shards": ShardReader(images.shards)}
    places = Places(index_dir=images.place / "indexes", timeout=60)
    rows = []
    for workers, latency in itertools.product(settings.workers, settings.latency):
        readers = {**local, "http": open_reader(f"{url}/{latency:g}", places, first=True)}
        rows += [_SlowRow(name, workers, latency, partial(feeds.ours, reader, augment, workers),
                          partial(feeds.ours_read, reader, workers)) for name, reader in readers.items()]
        rows.append(_SlowRow("ImageFolder", workers, latency,
                             partial(feeds.image_folder, images.folder, augment, workers, latency / 1000)))
        if not latency:  # it reads shards from end to end, not image by image
            rows.append(_SlowRow("webdataset", workers, latency,
                                 partial(feeds.webdataset_timm, images.shards, augment, workers)))
    return rows


def _slow_rates(row: _SlowRow, images: int) -> tuple[float, float | None]:
    """Images/s of all the work, and of reading alone."""
    with feeds.slow_reads(row.latency / 1000):
        return (feeds.rate(row.whole, row.workers, images).wall,
                None if row.reading is None else feeds.rate(row.reading, row.workers, images).wall)


# ---- orders


def _order(settings: Settings) -> _Table:
    rounds = [[order.measure(count, epoch) for count in settings.samples] for epoch in range(settings.rounds)]
    cells = [order.row(count, measured) for count, measured in zip(settings.samples, zip(*rounds))]
    return _Table("The order of an epoch", order.COLUMNS, cells, rounds)


def _spread(rates: Sequence[float | None]) -> str:
    known = [rate for rate in rates if rate is not None]
    return f"{statistics.median(known):,.0f} ({min(known):,.0f}–{max(known):,.0f})" if known else ""


def _ratio(of_rounds: Sequence[float]) -> str:
    return f"{statistics.median(of_rounds):.2f}" if of_rounds else ""
