"""Our engine beside timm's own training script: the same shards, augmentation, batch and ranks, from command to steps.

Ours is `torchrun --module vir.train`, the peer is train.py of timm's repository under torchrun (timm_script.py), with
timm's reader of shards, its Mixup, optimizer, schedule and DistributedDataParallel.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event, Thread
from typing import Any, NamedTuple

import psutil
import timm
import torch

from vir.benchmarks.conversion import PICTURES, make_images
from vir.benchmarks.launching import TORCHRUN, launch
from vir.benchmarks.photographs import SIZE, make_jpegs
from vir.benchmarks.plot import plot_bars
from vir.benchmarks.program import check_folder
from vir.benchmarks.stopwatch import device, machine
from vir.benchmarks.tables import end_to_end_bars, end_to_end_table
from vir.benchmarks.training import train_events
from vir.config import AugmentConfig
from vir.data import convert
from vir.data.reader import ShardReader
from vir.data.sidecars import write_sidecars
from vir.engine import ds_config
from vir.errors import DataError, SettingsError
from vir.files import replace_text
from vir.output_folder import check_file
from vir.run_folder import METRICS

_SHARDS_OF_WORKER = 4
"""At least: timm's reader deals whole shards to the workers."""
_STEP = re.compile(r"(?P<time>\d+\.\d+) Train: .* Data: (?P<waited>[\d.]+) ")
_AUGMENT = AugmentConfig()
_LR, _WEIGHT_DECAY, _CLIP, _SMOOTHING, _SEED = "1e-3", "0.05", "1.0", "0.1", "42"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to measure: the flags of tools/benchmark_end_to_end.py, whose --help tells each of them."""

    timm_script: Path
    folder: Path
    """Everything is written in a new folder in it, and removed again."""
    models: Sequence[str]
    ranks: int
    workers: int
    batch: int
    steps: int
    warmup: int
    images: int
    image_bytes: int
    deepspeed_config: str
    repeats: int
    json: Path | None
    plot: Path | None

    def __post_init__(self) -> None:
        for flag, least in (("ranks", 1), ("workers", 1), ("batch", 2), ("warmup", 2), ("steps", self.warmup + 1),
                            ("image_bytes", 1), ("repeats", 1), ("images", self.steps * self.global_batch)):
            if (value := getattr(self, flag)) < least:
                raise SettingsError(f"--{flag} is {value}; it must be at least {least}" +
                                    (": an epoch of timm's script has the steps that are measured"
                                     if flag == "images" else ""))
        if unknown := [name for name in self.models if not timm.is_model(name)]:
            raise SettingsError(f"--models: timm knows no {', '.join(unknown)}")

    @property
    def global_batch(self) -> int:
        return self.batch * self.ranks


class Step(NamedTuple):
    time: float
    """When it was done, by the clock."""
    waited: float
    """Seconds of it spent waiting for data."""


class Side(NamedTuple):
    engine: str
    """`ours` or `timm`."""
    model: str


def benchmark(settings: Settings, command: str) -> str:
    """Measure all sides in turns, write the raw numbers where the settings ask for them; the table, in Markdown.

    Raises:
        SettingsError, DataError: a folder or script that is not there, a model that does not train, and the like.
    """
    check_folder(settings.folder)
    if not settings.timm_script.is_file():
        raise DataError(f"--timm_script {settings.timm_script}: no such file; it is train.py of timm's repository, "
                        f"for timm {timm.__version__}, which --help tells how to get")
    check_file("--json", settings.json)
    check_file("--plot", settings.plot)
    zero = ds_config.read(settings.deepspeed_config)
    sides = sides_of(settings.models)
    with _shards(settings) as shards:
        turns = []
        for turn in range(settings.repeats):
            first = turn % len(sides)
            turns.append({side: _measured(side, settings, shards) for side in (*sides[first:], *sides[:first])})
    torch.set_num_threads(1)  # as each rank has
    result: dict[str, Any] = {
        "title": f"Training from {settings.images:,} JPEGs of {SIZE[0]} x {SIZE[1]} pixels in shards",
        "command": command, "machine": machine(device()), "cores": len(os.sched_getaffinity(0)),
        "ranks": settings.ranks, "workers": settings.workers, "global_batch_size": settings.global_batch,
        "deepspeed_config": Path(settings.deepspeed_config).stem, "precision": _precision(zero)[0],
        "steps": settings.steps, "warmup": settings.warmup,
        "end_to_end": [{**side._asdict(), "turns": [of_turn[side] for of_turn in turns]} for side in sides]}
    if settings.json is not None:
        replace_text(settings.json, json.dumps(result, indent=1) + "\n")
    if settings.plot is not None:
        plot_bars(end_to_end_bars(result["end_to_end"]), settings.plot, f"{result['title']}\n{result['machine']}")
    return f"{result['title']}. {result['machine']}\n\n{end_to_end_table(result['end_to_end'])}"


def sides_of(models: Sequence[str]) -> list[Side]:
    """Ours are trained by our engine alone, every other model by both."""
    own = timm.list_models(module="vision_retention")
    return [Side(engine, model) for model in models for engine in (("ours",) if model in own else ("ours", "timm"))]


@contextmanager
def _shards(settings: Settings) -> Iterator[Path]:
    """A folder of shards, in a folder that takes whatever is written and is removed again."""
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=settings.folder) as name:
        place = Path(name)
        make_images(place / "src", settings.images, 0, pictures=make_jpegs(
            min(PICTURES, settings.images), settings.image_bytes, SIZE))
        count = _SHARDS_OF_WORKER * settings.ranks * settings.workers
        shards = convert.convert(place / "src", "train", place / "shards", convert.Settings(
            samples_per_shard=max(1, settings.images // count)), workers=1).folder
        write_sidecars(shards, ["timm"])
        yield shards


def _measured(side: Side, settings: Settings, shards: Path) -> dict[str, Any]:
    """One run of a side."""
    with tempfile.TemporaryDirectory(dir=shards.parent.parent) as name:
        run = Path(name)
        if side.engine == "ours":
            words, read = ours(side.model, settings, shards, run), partial(our_steps, run)
        else:
            lines = run / "steps.log"
            words = ["--module", "vir.benchmarks.timm_script", str(lines), str(settings.timm_script.resolve()),
                     *timms(side.model, settings, shards, run)]
            read = partial(timms_steps, lines)
        began = time.time()
        with _Memory(read, settings.warmup) as memory:
            launch(TORCHRUN, settings.ranks, words, f"change --models or the settings of {side.engine}")
        steps = read()
    if len(steps) != settings.steps or not memory.peak:
        raise SettingsError(
            f"{side.engine} with {side.model} tells of {len(steps)} steps instead of {settings.steps}, and its memory "
            f"was {'seen' if memory.peak else 'never seen'}; raise --steps or --batch, or give the train.py of "
            f"timm {timm.__version__} as --timm_script")
    timed = steps[settings.warmup - 1:]
    seconds = [after.time - before.time for before, after in zip(timed, timed[1:])]
    rate, first = settings.global_batch / statistics.median(seconds), steps[0].time - began
    waited = sum(step.waited for step in timed[1:]) / sum(seconds)
    print(f"{side.engine}, {side.model}: {rate:.4g} images/s, waiting for data {100 * waited:.1f} %, first step after "
          f"{first:.1f} s, {memory.peak / 2**20:,.0f} MiB", file=sys.stderr, flush=True)
    return {"step_seconds": seconds, "images_per_second": rate, "data_wait": waited, "first_step_seconds": first,
            "peak_bytes": memory.peak}


def ours(model: str, settings: Settings, shards: Path, run: Path) -> list[str]:
    """The words of a launcher by which our engine trains."""
    return ["--module", "vir.train", "--model.name", model, "--data.train", str(shards),
            "--data.workers", str(settings.workers), "--train.steps", str(settings.steps),
            "--train.global_batch_size", str(settings.global_batch), "--train.micro_batch_size", str(settings.batch),
            "--train.log_every", "1", "--train.smoothing", _SMOOTHING, "--train.seed", _SEED, "--optim.lr", _LR,
            "--optim.weight_decay", _WEIGHT_DECAY, "--optim.clip_grad", _CLIP, "--schedule.warmup_epochs", "0",
            "--ema.decay", "0", "--checkpoint.every_epochs", "1e6", "--checkpoint.every_minutes", "null",
            "--deepspeed_config", settings.deepspeed_config, "--output", str(run)]


def timms(model: str, settings: Settings, shards: Path, run: Path) -> list[str]:
    """The same for timm's script: an epoch of so many steps, without a validation, and the augmentation of ours."""
    return ["--device", device().type, "--model", model, "--dataset", "wds/train", "--data-dir", str(shards),
            "--val-split", "", "--num-classes", str(len(ShardReader(shards).classes)),
            "--train-num-samples", str(settings.steps * settings.global_batch), "--epochs", "1",
            "--batch-size", str(settings.batch), "--workers", str(settings.workers), "--log-interval", "1",
            "--opt", "adamw", "--lr", _LR, "--weight-decay", _WEIGHT_DECAY, "--clip-grad", _CLIP, "--sched", "cosine",
            "--sched-on-updates", "--warmup-epochs", "0", "--seed", _SEED, "--smoothing", _SMOOTHING,
            "--scale", *map(str, _AUGMENT.scale), "--ratio", *map(str, _AUGMENT.ratio), "--hflip", str(_AUGMENT.hflip),
            "--color-jitter", str(_AUGMENT.color_jitter), "--aa", str(_AUGMENT.auto_augment),
            "--train-interpolation", _AUGMENT.interpolation, "--reprob", str(_AUGMENT.reprob),
            "--remode", _AUGMENT.remode, "--mixup", str(_AUGMENT.mixup), "--cutmix", str(_AUGMENT.cutmix),
            *_precision(ds_config.read(settings.deepspeed_config))[1], "--output", str(run)]


def _precision(zero: dict[str, Any]) -> tuple[str, list[str]]:
    """Its name, and the flags by which timm's script computes in it: autocast over float32 weights."""
    for name, dtype in (("bf16", "bfloat16"), ("fp16", "float16")):
        if zero.get(name, {}).get("enabled"):
            return name, ["--amp", "--amp-dtype", dtype]
    return "fp32", []


def our_steps(run: Path) -> list[Step]:
    """That a run has logged, each with its share of waiting."""
    if not (run / METRICS).exists():
        return []
    return [Step(event["time"], event["data_wait_seconds"]) for event in train_events(run)]


def timms_steps(path: Path) -> list[Step]:
    """That timm's script has logged, by the lines of timm_script.py."""
    if not path.exists():
        return []
    return [Step(float(found["time"]), float(found["waited"])) for found in _STEP.finditer(path.read_text())]


class _Memory:
    """Watches the processes that this one starts, from their first step until the timed ones begin.

    To add up pages takes the kernel tens of milliseconds: not while steps are timed.
    """

    def __init__(self, steps: Callable[[], list[Step]], warmup: int) -> None:
        self.peak = 0
        """Bytes at once: of each page that is not a file's the share of the process, so that all together hold it once.
        """
        self._steps, self._warmup = steps, warmup
        self._ended = Event()
        self._thread = Thread(target=self._watch, daemon=True)

    def __enter__(self) -> _Memory:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.2):
            done = len(self._steps())
            if done and (done < self._warmup or not self.peak):
                self.peak = max(self.peak, held_bytes(psutil.Process()))
            if done >= self._warmup:
                return


def held_bytes(process: psutil.Process) -> int:
    """Of all processes below it, what is no file's, with pages that several share counted once."""
    total = 0
    for child in process.children(recursive=True):
        with suppress(OSError):  # it has ended
            for line in Path(f"/proc/{child.pid}/smaps_rollup").read_text().splitlines():
                if line.startswith(("Pss_Anon:", "Pss_Shmem:")):
                    total += 1024 * int(line.split()[1])
    return total
