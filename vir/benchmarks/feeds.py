"""Batches without end, from our loader and from others on the same images, and how fast they come."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
import webdataset
from PIL import Image
from timm.data import create_dataset, create_loader, create_transform
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision.datasets.folder import ImageFolder, default_loader  # type: ignore[import-untyped]

from vir.config import AugmentConfig
from vir.data import jpeg, worker
from vir.data.loader import Batches, Request, requests_of, train_batches
from vir.data.order import SampleOrder
from vir.data.reader import Reader
from vir.weights.spec import InputSpec

BATCH = 64
PREFETCH = 2
"""Batches that each worker makes ahead."""
LANES, WINDOW = 64, 2500
MOST_SHARDS = 100
"""That webdataset shuffles."""
_INPUT = InputSpec(size=(3, 224, 224), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", crop_pct=0.875)
_ENDLESS = 1 << 40
_CPU = torch.device("cpu")

Batch = Any
Feed = Generator[Batch, None, None]
"""Batches; its loader processes start with the first one and end when it is closed."""


class Rate(NamedTuple):
    wall: float
    """Images per second."""
    cpu: float
    """Images per CPU second of the loader processes and of the one that takes their batches."""


def rate(start: Callable[[], Feed], workers: int, images: int) -> Rate:
    """Of about so many images, after a first few batches."""
    others, feed = multiprocessing.active_children(), start()
    warm = workers * (1 + PREFETCH)  # now as many are being made as there will be at the end
    count = -(-images // (BATCH * workers)) * workers  # workers in step give theirs at the same time
    try:
        for _ in range(warm):
            next(feed)
        loaders = [psutil.Process(child.pid) for child in multiprocessing.active_children() if child not in others]
        cpu, began = _cpu_seconds(loaders), time.perf_counter()
        for _ in range(count):
            next(feed)
        wall, cpu = time.perf_counter() - began, _cpu_seconds(loaders) - cpu
    finally:
        feed.close()
    return Rate(count * BATCH / wall, count * BATCH / cpu)


def _cpu_seconds(loaders: Sequence[psutil.Process]) -> float:
    """Of these and of this process."""
    times = [loader.cpu_times() for loader in loaders]
    return time.process_time() + sum(of_one.user + of_one.system for of_one in times)


# ---- whole samples


def ours(reader: Reader, augment: AugmentConfig, workers: int, decoder: str | None = None) -> Feed:
    """`decoder` is one of vir.data.jpeg; None: the one that a run would have."""
    order = SampleOrder(0, reader.shard_sizes, LANES, WINDOW)
    with _decoder(decoder):
        yield from train_batches(
            reader, order, augment, _INPUT, seed=0, first_step=0, last_step=_ENDLESS, global_batch_size=BATCH,
            micro_batch_size=BATCH, rank=0, world_size=1, workers=workers, prefetch=PREFETCH, device=_CPU)


def timm_wds(shards: Path, augment: AugmentConfig, workers: int) -> Feed:
    """timm's own reader of shards, with its shuffle and its collation, up to the uint8 batch that goes to the device.
    """
    dataset = create_dataset("wds/", root=str(shards), split="train", is_training=True, batch_size=BATCH,
                             num_samples=_ENDLESS)
    loader = create_loader(dataset, _INPUT.size, BATCH, is_training=True, num_workers=workers, device=_CPU,
                           **_arguments(augment))
    yield from loader.loader  # without what normalizes on the device


def webdataset_timm(shards: Path, augment: AugmentConfig, workers: int) -> Feed:
    """webdataset with timm's transforms."""
    samples = _samples_of(shards).shuffle(WINDOW).decode("pilrgb").to_tuple("jpg", "cls")
    yield from _loader(samples.map_tuple(_transform(augment)).repeat(), workers)


def image_folder(folder: Path, augment: AugmentConfig, workers: int, latency: float = 0) -> Feed:
    """torchvision's ImageFolder with timm's transforms.

    Args:
        latency: seconds that each read takes longer.
    """

    def load(path: str) -> Image.Image:
        time.sleep(latency)
        return default_loader(path)

    yield from _folder_loader(ImageFolder(str(folder), _transform(augment), loader=load), workers)


# ---- samples that are read, not decoded: a batch is the number of their bytes


def ours_read(reader: Reader, workers: int) -> Feed:
    order = SampleOrder(0, reader.shard_sizes, LANES, WINDOW)

    def requests() -> Iterator[Request]:
        for step in itertools.count():
            yield from requests_of(order, step, BATCH, BATCH, rank=0, world_size=1)

    def read(positions: np.ndarray, samples: np.ndarray) -> Any:
        return sum(len(bytes_of()) for bytes_of in worker.here().read(reader, samples.tolist()))

    yield from Batches(read, requests, workers, PREFETCH, _CPU, None)


def webdataset_read(shards: Path, workers: int, window: int = 0) -> Feed:
    """`window`: samples among which it shuffles."""
    samples = _samples_of(shards)
    samples = samples.shuffle(window) if window else samples
    yield from _loader(samples.to_tuple("jpg", "cls").repeat(), workers, collate_fn=_bytes_of)


def image_folder_read(folder: Path, workers: int) -> Feed:
    yield from _folder_loader(ImageFolder(str(folder), loader=_read_bytes), workers, collate_fn=_bytes_of)


def _samples_of(shards: Path) -> Any:
    return webdataset.WebDataset(sorted(map(str, shards.glob("*.tar"))), shardshuffle=MOST_SHARDS)


def _folder_loader(dataset: Dataset[Any], workers: int, **arguments: Any) -> DataLoader[Any]:
    sampler = RandomSampler(dataset, replacement=True, num_samples=1 << 20)  # type: ignore[arg-type]
    return _loader(dataset, workers, sampler=sampler, **arguments)


def _loader(dataset: Any, workers: int, **arguments: Any) -> DataLoader[Any]:
    return DataLoader(dataset, BATCH, num_workers=workers, prefetch_factor=PREFETCH, **arguments)


def _read_bytes(path: str) -> bytes:
    return Path(path).read_bytes()


def _bytes_of(samples: Sequence[tuple[bytes, Any]]) -> int:
    return sum(len(image) for image, _ in samples)


def _transform(augment: AugmentConfig) -> Any:
    """timm's, from a Pillow image to uint8 [C, H, W]."""
    return create_transform(_INPUT.size, is_training=True, use_prefetcher=True, **_arguments(augment))


def _arguments(augment: AugmentConfig) -> dict[str, Any]:
    """Of the config for timm; without erasing and mixing, which happen on the device."""
    return {"scale": augment.scale, "ratio": augment.ratio, "hflip": augment.hflip,
            "color_jitter": augment.color_jitter or None, "auto_augment": augment.auto_augment,
            "interpolation": augment.interpolation, "mean": _INPUT.mean, "std": _INPUT.std}


@contextmanager
def _decoder(name: str | None) -> Iterator[None]:
    """For the processes that are forked meanwhile."""
    before = os.environ.get(jpeg.VARIABLE)
    if name is not None:
        os.environ[jpeg.VARIABLE] = name
    try:
        yield
    finally:
        os.environ.pop(jpeg.VARIABLE, None)
        if before is not None:
            os.environ[jpeg.VARIABLE] = before


@contextmanager
def slow_reads(seconds: float) -> Iterator[None]:
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
