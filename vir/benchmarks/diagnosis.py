"""Where the time of a run's loader goes, measured with its own settings: stages, storage, and the model without it."""

from __future__ import annotations

import itertools
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from vir import arithmetic, distributed, launcher
from vir.benchmarks.stopwatch import machine
from vir.benchmarks.tables import markdown
from vir.config import RunConfig
from vir.data import worker
from vir.data.batch import Batch
from vir.data.decode import BadSampleError, open_image
from vir.data.device import Preparation
from vir.data.diagnosis import STAGES, Diagnosis, Figures, diagnose
from vir.data.loader import Batches, Request, requests_of, train_batches
from vir.data.order import SampleOrder
from vir.data.reader import Reader, ShardReader
from vir.data.remote_shards import CachedShards, RemoteShards
from vir.data.stages import Spent
from vir.distributed import World
from vir.engine import ds_config
from vir.engine.engine import Engine
from vir.errors import SettingsError
from vir.files import replace_text
from vir.flags import parse
from vir.models.build import build
from vir.output_folder import check_file
from vir.reports.throughput import Stopwatch
from vir.training.guard import FiniteGuard
from vir.training.loop import GlobalStep
from vir.training.plan import Plan, make_plan
from vir.training.prepare import Prepared, prepare
from vir.weights.spec import ModelSpec

_PREFETCH = 2
"""Batches that each process reads ahead where they are read alone."""
_HAND_OVERS = 5
_SIZES = 32
"""Images whose sizes are looked at."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags of tools/benchmark_loader.py --diagnose that are not those of vir-train."""

    seconds: float = 10.0
    """About; of each of the three measurements."""
    loader_only: bool = False
    """The model is not trained, so that nothing is known of what the loader must give."""
    json: Path | None = None

    def __post_init__(self) -> None:
        if not 0 < self.seconds < math.inf:
            raise SettingsError(f"--seconds must be more than 0 and finite, got {self.seconds:g}")


class Loaded(NamedTuple):
    """What the loader gave."""

    spent: Spent
    rate: float
    """Images/s."""
    trainer: float
    """CPU seconds per second of this process."""
    hand_over: float
    """Seconds per image; the least, for on busy cores it waits for one."""
    next_step: int
    """Of which nothing has been read."""
    batch: Batch


class Read(NamedTuple):
    """What was read without being decoded."""

    rate: float
    """Bytes/s."""
    requests: int
    requested: int
    """Of servers: their number and bytes."""
    total: int
    """Bytes of samples."""

    def from_server(self) -> str:
        if not self.requests:
            return ""
        cached = max(0.0, 1 - self.requested / max(1, self.total))
        return (f"{self.requests:,} requests of {self.requested / self.requests / 1e3:,.0f} KB to the server"
                + (f", {100 * cached:.0f} % of the bytes from the cache" if cached else ""))


def run(argv: Sequence[str], settings: Settings, command: str) -> str:
    """Diagnose the run that these flags of vir-train would start; what rank 0 has to say, nothing on other ranks.

    Nothing of the run is read or written but its data. Under a launcher each rank measures, at the same time.

    Raises:
        VirError: as vir-train.
    """
    launcher.enter_folder()
    if launcher.adopt().rank == 0:
        check_file("--json", settings.json)
    config = parse([word for word in argv if not word.startswith("--local_rank=")])
    if launcher.wants_cpu(config.device):
        launcher.hide_gpus()
    with tempfile.TemporaryDirectory(prefix="diagnose-") as folder:
        prepared = prepare(replace(config, output=folder, resume="none"))
        config = prepared.config
        arithmetic.set_up(config.train.tf32, config.train.deterministic)
        world = distributed.start()
        figures, read = measure(prepared, world, settings)
    if not world.is_main:
        return ""
    found = diagnose(figures)
    if settings.json is not None:
        replace_text(settings.json, json.dumps({
            "command": command, "machine": machine(world.device), "figures": asdict(figures),
            "storage": read._asdict(), "bound": found.bound.name.lower(), "why": found.why, "change": found.change},
            indent=1) + "\n")
    return report(figures, read, found)


def measure(prepared: Prepared, world: World, settings: Settings) -> tuple[Figures, Read]:
    """All figures of this rank. Collective."""
    config, reader = prepared.config, prepared.train
    torch.manual_seed(config.train.seed)
    network, spec = build(config.model, reader.classes)
    plan = make_plan(config, reader, spec, world, ds_config.precision(prepared.ds_config))
    order = SampleOrder(config.train.seed, reader.shard_sizes, *config.data.order, prepared.exclusion)
    figures = Figures.of_run(config)
    distributed.barrier()
    loaded = _load(config, reader, order, spec, plan, world, figures.workers, settings.seconds)
    distributed.barrier()
    requests = _requests(order, loaded.next_step, plan.global_batch_size, config.train.micro_batch_size, world)
    read = _read(reader, requests, figures.workers, settings.seconds)
    distributed.barrier()
    needed = None
    if not settings.loader_only:
        engine = Engine(network.to(world.device), config, prepared.ds_config, plan.accumulation)
        with closing(engine):
            needed = _train(config, plan, engine, spec, FiniteGuard(order, reader), loaded.batch, world,
                            settings.seconds)
    return replace(
        figures, spent=loaded.spent, rate=loaded.rate, trainer=loaded.trainer, needed=needed,
        hand_over=loaded.hand_over, copy=_copy(loaded.batch, world.device), storage=read.rate,
        side=_side(reader, order)), read


def _load(config: RunConfig, reader: Reader, order: SampleOrder, spec: ModelSpec, plan: Plan, world: World,
          workers: int, seconds: float) -> Loaded:
    """Take batches as fast as they come, then some that are ready."""
    is_cached = isinstance(reader, ShardReader) and isinstance(reader.access, CachedShards)
    batches = train_batches(
        reader, order, config.augment, spec.input, seed=config.train.seed, first_step=0,
        last_step=plan.total_steps if is_cached else 1 << 40, global_batch_size=plan.global_batch_size,
        micro_batch_size=config.train.micro_batch_size, rank=world.rank, world_size=world.size, workers=workers,
        prefetch=config.data.prefetch, device=world.device)
    taken = 0

    def take() -> Batch:
        nonlocal taken
        batch = next(batches, None)
        if batch is None:
            raise SettingsError(f"the run has {plan.total_steps} steps, too few to measure; raise --train.epochs")
        taken += 1
        return batch

    try:
        for _ in range(workers):  # they have just started
            take()
        spent, cpu, began = Spent(), time.process_time(), time.perf_counter()
        while time.perf_counter() < began + seconds:
            for _ in range(workers):  # which give theirs at about the same time
                spent += (batch := take()).spent
        passed, cpu = time.perf_counter() - began, time.process_time() - cpu
        hand_overs: list[float] = []
        while len(hand_overs) < _HAND_OVERS:
            time.sleep(1.5 * spent.total / spent.images * config.train.micro_batch_size)
            for _ in range(min(workers, _HAND_OVERS)):  # each has made one meanwhile
                asked = time.perf_counter()
                batch = take()
                hand_overs.append(time.perf_counter() - asked)
    finally:
        batches.close()
    # What the processes have read ahead is in the system's memory: no more than this.
    taken += workers * (config.data.prefetch + 2) + plan.accumulation
    return Loaded(spent, spent.images / passed, cpu / passed, min(hand_overs) / len(batch.images),
                  -(-taken // plan.accumulation), batch)


def _requests(order: SampleOrder, first_step: int, global_batch_size: int, micro_batch_size: int, world: World
              ) -> Iterator[Request]:
    """This rank's micro-batches from a step on, without end."""
    for step in itertools.count(first_step):
        yield from requests_of(order, step, global_batch_size, micro_batch_size, world.rank, world.size)


def _read(reader: Reader, requests: Iterator[Request], workers: int, seconds: float) -> Read:
    """Read what is requested, without decoding."""

    def make(positions: np.ndarray, samples: np.ndarray) -> Any:
        total = sum(len(bytes_of()) for bytes_of in worker.here().read(reader, samples.tolist()))
        return os.getpid(), total, _requests_so_far(reader)

    batches: Any = Batches(make, lambda: requests, workers, _PREFETCH, torch.device("cpu"), None)
    total, of_process = 0, {}
    try:
        for _ in range(workers):
            process, _, so_far = next(batches)
            of_process[process] = so_far
        before, began = dict(of_process), time.perf_counter()
        while time.perf_counter() < began + seconds:
            for _ in range(workers):
                process, of_batch, of_process[process] = next(batches)
                total += of_batch
        passed = time.perf_counter() - began
    finally:
        batches.close()
    count, requested = (sum(of_process[process][place] - before[process][place] for process in before)
                        for place in (0, 1))
    return Read(total / passed, count, requested, total)


def _requests_so_far(reader: Reader) -> tuple[int, int]:
    """To servers, of this process: how many, and of how many bytes."""
    access = reader.access if isinstance(reader, ShardReader) else None
    if isinstance(access, (RemoteShards, CachedShards)):
        return access.traffic.ranged_reads, access.traffic.ranged_bytes
    return 0, 0


def _train(config: RunConfig, plan: Plan, engine: Engine, spec: ModelSpec, guard: FiniteGuard, batch: Batch,
           world: World, seconds: float) -> float:
    """Images/s of this rank, where all micro-batches are the same one, which is on the device. Collective."""
    preparation = Preparation(model_input=spec.input, augment=config.augment, smoothing=config.train.smoothing,
                              num_classes=plan.num_classes, device=world.device)
    global_step = GlobalStep(config.train, plan, engine, preparation, guard, Stopwatch(world.device), world.rank)

    def train(step: int) -> None:
        global_step([batch] * plan.accumulation, 0.0, min(step, plan.total_steps - 1))
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)

    train(0)  # kernels are compiled, and memory is reserved
    began, done, enough = time.perf_counter(), 0, False
    while not enough:
        done += 1
        train(done)
        enough = distributed.broadcast(time.perf_counter() >= began + seconds)
    return done * plan.accumulation * len(batch.images) / (time.perf_counter() - began)


def _copy(batch: Batch, device: torch.device) -> float:
    """Seconds per image to a GPU, from page-locked memory."""
    if device.type != "cuda":
        return 0.0
    pinned, times = batch.to(torch.device("cpu")).pin_memory(), []
    for _ in range(_HAND_OVERS):
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        pinned.to(device)
        torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times) / len(batch.images)


def _side(reader: Reader, order: SampleOrder) -> float | None:
    """Pixels of the shorter side, the median over some images."""
    sides = []
    for sample in order.samples(order.global_batch(0, min(_SIZES, order.num_samples))).tolist():
        with suppress(BadSampleError):
            image = open_image(reader.read(sample))
            sides.append(min(image.width, image.height))
    return statistics.median(sides) if sides else None


def report(figures: Figures, read: Read, found: Diagnosis) -> str:
    """A table of the stages, lines about the rest, and what to do."""
    total = figures.each("total")

    def row(name: str, seconds: float, share: str = "") -> list[str]:
        return [name, f"{1e3 * seconds:.3g}", share]

    rows = [row(stage, figures.each(stage), f"{100 * figures.each(stage) / total:.0f} %") for stage in STAGES]
    rows += [row("in all", total, "100 %"), row("CPU time of that, reading threads included", figures.each("cpu")),
             row("check, within or beside read", figures.each("check")),
             row("hand-over, in the trainer's process", figures.hand_over),
             row("copy to the device", figures.copy)]
    free = "" if figures.needed is None else f"; if it cost nothing, training would take {figures.needed:,.0f} images/s"
    need = "" if figures.needed_bytes is None else f"; {figures.needed_bytes / 1e6:,.1f} MB/s are needed"
    lines = [f"Loader: {figures.rate:,.0f} images/s{free}.",
             f"Storage: {read.rate / 1e6:,.1f} MB/s of images read alone{need}."]
    if said := read.from_server():
        lines.append(f"Server: {said}.")
    lines.append(f"Cores: {figures.cores} of {figures.share} that are this rank's share of the machine, "
                 f"{figures.workers} loader processes, {figures.busy:.1f} cores busy.")
    return "\n".join([markdown(("stage", "ms an image", "of a loader process"), rows).rstrip(), "", *lines, "",
                      f"What bounds it is {found}."])
