"""Images per second of an evaluation beside a loop like that of timm's validate.py, on the same images and weights."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import create_dataset, create_loader, resolve_model_data_config
from timm.utils import AverageMeter, accuracy
from torch import nn
from tqdm import tqdm

from vir.benchmarks.conversion import make_images
from vir.benchmarks.program import check_folder
from vir.benchmarks.stopwatch import device, machine
from vir.benchmarks.tables import markdown
from vir.data import convert
from vir.data.folder_reader import FolderReader
from vir.data.reader import Reader, ShardReader
from vir.distributed import World
from vir.errors import DataError, SettingsError
from vir.evaluation.run import How, evaluate
from vir.files import replace_text
from vir.models import load
from vir.weights.metadata import WeightsMetadata
from vir.weights.portable import save_weights
from vir.weights.spec import ModelSpec, input_of

HOW = How(mode="auto", compare_modes=False, dtype="fp32", hflip_tta=False, img_size=None, crop_pct=None,
          crop_mode=None, batch_size=0, workers=None)


@dataclass(frozen=True, kw_only=True)
class Settings:
    folder: Path
    """Everything is written in a new folder in it, and removed again."""
    models: Sequence[str] = ("test_vit", "vir_small_patch16_224")
    """Names that timm knows."""
    images: int = 384
    image_bytes: int = 110_000
    workers: int = 1
    batch_size: int = 64
    rounds: int = 3
    json: Path | None = None


Found = tuple[float, float]
"""Images/s, and the accuracy in percent."""


def benchmark(settings: Settings, command: str) -> str:
    """The table, in Markdown: for each model the medians over the rounds, in which all ways take turns.

    Raises:
        SettingsError, DataError: numbers that are too small, no such model or folder; other results than timm's.
    """
    if min(settings.images, settings.image_bytes, settings.workers, settings.batch_size, settings.rounds) < 1:
        raise SettingsError("--images, --image_bytes, --workers, --batch_size and --rounds must be at least 1")
    if unknown := [name for name in settings.models if not timm.is_model(name)]:
        raise SettingsError(f"--models: timm knows no {', '.join(unknown)}")
    check_folder(settings.folder)
    here = device()
    rows = []
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=settings.folder) as place:
        make_images(Path(place) / "src", settings.images, settings.image_bytes)
        shards = convert.convert(Path(place) / "src", "train", Path(place) / "shards", convert.Settings(), workers=1)
        readers = {"shards": ShardReader(shards.folder), "folder": FolderReader(Path(place) / "src" / "train")}
        for name in settings.models:
            weights = _write_weights(Path(place) / f"{name}.safetensors", name, readers["folder"].classes)
            ways: dict[str, Callable[[], Found]] = {
                f"vir-evaluate, {kind}": partial(_ours, weights, reader, settings, here)
                for kind, reader in readers.items()}
            ways["timm's loop, folder"] = partial(_timms, weights, Path(place) / "src" / "train", settings, here)
            rows += _rows(name, ways, settings)
    columns = ("model", "evaluation", "images/s (least to most)", "of timm's")
    if settings.json is not None:
        replace_text(settings.json, json.dumps({
            "title": f"Evaluation of {settings.images} images", "command": command, "machine": machine(here),
            "columns": columns, "rows": rows}, indent=1) + "\n")
    return markdown(columns, rows)


def _rows(name: str, ways: dict[str, Callable[[], Found]], settings: Settings) -> list[list[str]]:
    turns = [{way: measure() for way, measure in ways.items()} for _ in range(settings.rounds)]
    if len(found := {accuracy for turn in turns for _, accuracy in turn.values()}) > 1:
        raise DataError(f"{name}: the ways of evaluation disagree, they found {sorted(found)} % right")
    rates = {way: [turn[way][0] for turn in turns] for way in ways}
    peer = rates["timm's loop, folder"]
    return [[name, way, f"{statistics.median(of_way):.4g} ({min(of_way):.4g}–{max(of_way):.4g})",
             f"{statistics.median(ours / timms for ours, timms in zip(of_way, peer)):.2f}"]
            for way, of_way in rates.items()]


def _write_weights(path: Path, name: str, classes: Sequence[str]) -> Path:
    torch.manual_seed(0)
    args: dict[str, Any] = {"num_classes": len(classes)}
    model = timm.create_model(name, **args)
    spec = ModelSpec(name=name, args=args, input=input_of(model), classes=tuple(classes))
    save_weights(path, model.state_dict(),
                 WeightsMetadata(model=spec, step=0, samples_seen=0, ema=False, dtype="fp32"))
    return path


def _ours(weights: Path, reader: Reader, settings: Settings, device: torch.device) -> Found:
    how = replace(HOW, batch_size=settings.batch_size, workers=settings.workers)
    found = evaluate(weights, reader, how, World(rank=0, size=1, device=device), no_bar)
    return found.fields["images_per_second"], found.fields["top1"]


def no_bar(total: int, title: str) -> tqdm[Any]:
    return tqdm(total=total, disable=True)


def _timms(weights: Path, folder: Path, settings: Settings, device: torch.device) -> Found:
    """From the start of the loader to the last result, as ours: the model is loaded before."""
    model, criterion = load(weights, device), nn.CrossEntropyLoss().to(device)
    config = resolve_model_data_config(model)
    dataset, began = create_dataset("", str(folder)), time.monotonic()
    loader = create_loader(
        dataset, batch_size=settings.batch_size, num_workers=settings.workers,
        use_prefetcher=device.type == "cuda", device=device, pin_memory=device.type == "cuda",
        **{key: config[key] for key in ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")})
    losses, top1, top5 = AverageMeter(), AverageMeter(), AverageMeter()
    with torch.inference_mode():
        for images, target in loader:
            images, target = images.to(device), target.to(device)
            output = model(images)
            loss = criterion(output, target)
            first, fifth = accuracy(output, target, topk=(1, min(5, output.shape[1])))
            losses.update(loss.item(), len(images))
            top1.update(first.item(), len(images))
            top5.update(fifth.item(), len(images))
    seconds = time.monotonic() - began
    return top1.count / seconds, round(top1.sum / 100) * 100 / top1.count
