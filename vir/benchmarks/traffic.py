"""How often a shard is downloaded in an epoch: measured on one node by what a server sends, and simulated for many."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from vir.benchmarks.conversion import make_images
from vir.benchmarks.file_server import Answer, answers, serving
from vir.benchmarks.program import check_folder
from vir.benchmarks.tables import markdown
from vir.config import AugmentConfig
from vir.data import convert
from vir.data.loader import train_batches
from vir.data.opening import Places, open_reader
from vir.data.order import SampleOrder
from vir.data.reader import Reader
from vir.data.traffic import LANES, WINDOW, choose, downloads, working_set
from vir.errors import SettingsError
from vir.files import replace_text
from vir.planning.images import IMAGE_BYTES, imagenet
from vir.weights.spec import InputSpec

_CACHE_BYTES = 200e9
_SHARE = 0.8
"""Of a cache may be the working set."""
_BATCH_OF_NODE, _LARGEST_BATCH = 1024, 8192

_BATCH = 48
_WORKERS = 2
_INPUT = InputSpec(size=(3, 8, 8), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", crop_pct=1.0)
_AUGMENT = AugmentConfig(auto_augment=None, color_jitter=0.0, reprob=0.0)

COLUMNS = ("", "shards", "cache of a node", "nodes", "global batch", "lanes", "window", "shards in use on a node",
           "downloads per shard", "read in parts %", "bytes / data set")


@dataclass(frozen=True, kw_only=True)
class Settings:
    folder: Path
    """Everything is written in a new folder in it, and removed again."""
    images: int = 6_000
    image_bytes: int = IMAGE_BYTES
    """Of each file; its picture is tiny, for pixels do not matter here."""
    samples_per_shard: int = 50
    step_ms: float = 300.0
    """From one global batch of 48 to the next, at least: a trainer is slower than a loader of tiny pictures."""
    nodes: Sequence[int] = (1, 2, 3, 4, 8, 16, 24, 32, 64, 128)
    """Simulated."""
    json: Path | None = None


@dataclass(frozen=True)
class _Epoch:
    """What all nodes fetch in one epoch, as shares of the data set."""

    downloads: float
    """Of whole shards, for each shard."""
    in_parts: float
    all: float
    """With what else is sent: the index."""

    def cells(self) -> list[str]:
        return [f"{self.downloads:.3f}", f"{100 * self.in_parts:.2f}", f"{self.all:.3f}"]


def benchmark(settings: Settings, command: str) -> str:
    """The table, in Markdown: measured rows, each above the simulation of the same, and ImageNet's.

    Raises:
        SettingsError, DataError: numbers that are too small, or no such folder.
    """
    if min(settings.images, settings.image_bytes, settings.samples_per_shard, *settings.nodes) < 1:
        raise SettingsError("--images, --image_bytes, --samples_per_shard and --nodes must be at least 1")
    if not 0 <= settings.step_ms < float("inf"):
        raise SettingsError(f"--step_ms must be at least 0 and finite, got {settings.step_ms:g}")
    check_folder(settings.folder)
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=settings.folder) as place:
        rows = list(_measured_rows(Path(place), settings))
    for samples_per_shard in (1251, 1000):
        rows += _imagenet_rows(samples_per_shard, settings.nodes)
    if settings.json is not None:
        replace_text(settings.json, json.dumps({
            "title": f"{settings.images:,} files of {settings.image_bytes / 1000:.0f} KB, and ImageNet simulated",
            "command": command, "machine": f"{os.cpu_count()} cores", "columns": COLUMNS, "rows": rows},
            indent=1) + "\n")
    return markdown(COLUMNS, rows)


def _measured_rows(place: Path, settings: Settings) -> Iterator[list[str]]:
    make_images(place / "src", settings.images, settings.image_bytes, size=(8, 8))
    converted = convert.convert(place / "src", "train", place / "shards",
                                convert.Settings(samples_per_shard=settings.samples_per_shard), workers=2)
    shutil.rmtree(place / "src")
    total = sum(path.stat().st_size for path in converted.folder.glob("*.tar"))
    with serving(converted.folder, place / "log") as url:
        for name, budget, epochs in (("none", None, 1), ("a third", total // 3, 1), ("all", 2 * total, 2)):
            reader = open_reader(f"{url}/0", _places(place, budget), first=True)
            lanes, window = choose(reader.shard_sizes, total / len(reader.shard_sizes), budget, 1, _BATCH)
            order = SampleOrder(0, reader.shard_sizes, lanes, window)
            cells = _settings_cells(reader.shard_sizes, name, 1, _BATCH, lanes, window)
            simulated = [_simulated(order, reader.shard_sizes, reader.shard_bytes, 1, _BATCH, budget or 0),
                         _Epoch(0.0, 0.0, 0.0)]  # of a cache that has all by then
            for epoch, measured in enumerate(_measured(reader, order, place / "log", epochs, settings.step_ms / 1000)):
                label = f", epoch {epoch + 1}" if epochs > 1 else ""
                yield [f"measured{label}", *cells, *measured.cells()]
                yield [f"simulated{label}", *cells, *simulated[epoch].cells()]
            (place / "log").unlink()
            for old in ("cache", "index"):
                shutil.rmtree(place / old, ignore_errors=True)


def _places(place: Path, budget: int | None) -> Places:
    return Places(index_dir=place / "index", timeout=60.0, cache=place / "cache" if budget else None,
                  cache_bytes=budget or 0)


def _measured(reader: Reader, order: SampleOrder, log: Path, epochs: int, step_s: float) -> list[_Epoch]:
    """Of each epoch in turn what the server has sent, with the step in which two epochs meet in the earlier one."""
    last_steps = [-(-epoch * order.num_samples // _BATCH) for epoch in range(1, epochs + 1)]
    batches = train_batches(
        reader, order, _AUGMENT, _INPUT, seed=0, first_step=0, last_step=last_steps[-1], global_batch_size=_BATCH,
        micro_batch_size=_BATCH, rank=0, world_size=1, workers=_WORKERS, prefetch=2, device=torch.device("cpu"))
    ends = []
    for step, _ in enumerate(batches, 1):
        time.sleep(step_s)
        if step in last_steps:
            ends.append(len(answers(log)))
    batches.close()
    sent = answers(log)
    return [_epoch_of(sent[first:last], reader.shard_bytes) for first, last in zip([0, *ends], ends)]


def _epoch_of(sent: Sequence[Answer], shard_bytes: Sequence[int]) -> _Epoch:
    shards = [answer for answer in sent if answer.name.endswith(".tar")]
    in_parts = sum(answer.sent_bytes for answer in shards if answer.sent_bytes < answer.file_bytes)
    whole = sum(answer.sent_bytes == answer.file_bytes for answer in shards)
    total = sum(shard_bytes)
    return _Epoch(whole / len(shard_bytes), in_parts / total, sum(answer.sent_bytes for answer in sent) / total)


def _simulated(order: SampleOrder, shard_sizes: Sequence[int], shard_bytes: Sequence[int], nodes: int,
               global_batch_size: int, budget_bytes: float) -> _Epoch:
    found = downloads(order, shard_sizes, shard_bytes, nodes=nodes, global_batch_size=global_batch_size,
                      budget_bytes=budget_bytes)
    of_shards = sum(node.shards for node in found) / len(shard_sizes)
    in_parts = sum(node.samples for node in found) / sum(shard_sizes)
    return _Epoch(of_shards, in_parts, of_shards + in_parts)


def _imagenet_rows(samples_per_shard: int, all_nodes: Sequence[int]) -> Iterator[list[str]]:
    """With a cache of 200 GB, and with one that has just room for the working set of the usual lanes and window."""
    images = imagenet(samples_per_shard)
    sizes, shard_bytes = images.shard_sizes, images.shard_bytes
    average = sum(shard_bytes) / len(sizes)
    for nodes in all_nodes:
        tight = working_set(max(LANES, nodes) / nodes, WINDOW, sizes) * average / _SHARE + 1
        for budget in (_CACHE_BYTES, tight):
            batch = min(_BATCH_OF_NODE * nodes, _LARGEST_BATCH) // nodes * nodes
            lanes, window = choose(sizes, average, budget, nodes, batch)
            order = SampleOrder(0, sizes, lanes, window)
            yield ["simulated", *_settings_cells(sizes, f"{budget / 1e9:.3g} GB", nodes, batch, lanes, window),
                   *_simulated(order, sizes, shard_bytes, nodes, batch, budget).cells()]


def _settings_cells(sizes: Sequence[int], cache: str, nodes: int, batch: int, lanes: int, window: int) -> list[str]:
    return [f"{len(sizes):,} × {sizes[0]:,}", cache, str(nodes), f"{batch:,}", str(lanes), f"{window:,}",
            f"{working_set(lanes / nodes, window, sizes):.1f}"]
