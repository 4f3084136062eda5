"""A run that is planned, and what all parts of a plan say of it together."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from vir.config import RunConfig, parse_bytes, plan_accumulation
from vir.engine import ds_config
from vir.errors import SettingsError
from vir.planning.activations import NotMeasuredError
from vir.planning.checkpoints import CheckpointPlan, plan_checkpoints
from vir.planning.efficiency import Mfu, mfu_range
from vir.planning.hardware import Cluster, Range
from vir.planning.images import Images
from vir.planning.loading import Loading, loading
from vir.planning.memory import Memory, checkpoint_bytes, largest_micro_batch, plan_memory
from vir.planning.time import Communication, Step, Work, communicate, count_work, step_time
from vir.planning.traffic import CacheRow, ShuffleQuality, Traffic, cache_table, shuffle_quality, simulate
from vir.weights.spec import ModelSpec

_MORE_NODES = (2, 4, 8, 16, 32, 64, 128)
"""By how many times more machines are tried, where nothing fits."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """A run that is planned."""

    config: RunConfig
    ds_name: str
    """Of the DeepSpeed JSON."""
    ds_config: dict[str, Any]
    """It, as ds_config.read gives it."""
    network: nn.Module
    """Of shapes alone; see models.build.sketch."""
    spec: ModelSpec
    images: Images
    cluster: Cluster
    on_gpu: bool
    total_steps: int
    mfu: Range | None = None
    """None: as measured elsewhere."""
    cores: int | None = None
    """Of a machine; None where unknown."""
    storage: float | None = None
    """Bytes/s that a machine reads of shards; None where unknown."""
    disk: float
    """Bytes/s that all write of a checkpoint."""
    mtbf: float | None = None
    """Seconds between failures of one machine; None: as published."""
    restart: float
    """Seconds from a failure to the first step after it."""
    price: float | None = None
    """Of a GPU hour."""
    teacher: int = 0
    """Bytes of a model that teaches, on each rank."""

    @property
    def accumulation(self) -> int:
        train = self.config.train
        return plan_accumulation(train.global_batch_size, train.micro_batch_size, self.cluster.world)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What one DeepSpeed JSON would make of the run."""

    name: str
    recomputes: bool
    offloads: bool
    memory: Memory | None
    """None: unknown, the network cannot be measured without data."""
    fits: bool
    largest_micro_batch: int
    """0: none fits."""
    communication: Communication
    step: Step | None
    """None where FLOPs or the peak of the device are not known."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """All that is told of a run before it begins."""

    model: str
    parameters: int
    trained: int
    image: tuple[int, int, int]
    global_batch_size: int
    micro_batch_size: int
    accumulation: int
    total_steps: int
    epochs: float
    cluster: Cluster
    on_gpu: bool
    room: int
    """Bytes of a rank's device, of which a plan may use all."""
    chosen: Choice
    """Of the JSON that was asked for."""
    choices: tuple[Choice, ...]
    """Of the shipped ones in its precision."""
    best: str | None
    """The one of these that fits with the least communication; None: no one does."""
    work: Work | None
    mfu: Mfu | None
    rates: dict[str, Range]
    """Images/s of all ranks that each part allows: compute, links, cores, storage; those that are known."""
    bound: str | None
    """The part that allows least."""
    images_per_second: Range | None
    epoch_seconds: Range | None
    seconds: Range | None
    """Of the whole run, without evaluations, checkpoints and failures."""
    loading: Loading | None
    images: str
    num_images: int
    image_bytes: float
    traffic: Traffic | None
    """None: the images are files of their own."""
    caches: tuple[CacheRow, ...]
    shuffle: ShuffleQuality | None
    checkpoints: CheckpointPlan
    wall_seconds: Range | None
    """With checkpoints and failures."""
    cost: Range | None
    basis: tuple[str, ...]
    """What the estimates rest on, in words."""

    def to_json(self, command: str) -> str:
        return json.dumps({"command": command, **asdict(self)}, indent=1) + "\n"

    remedy: str
    """Where no shipped JSON makes it fit: by how much, and what would; else empty."""

    def check_that_something_fits(self) -> None:
        """Raises SettingsError where no shipped JSON makes the run fit; it says by how much, and what would."""
        if self.remedy:
            raise SettingsError(self.remedy)


def estimate(asked: Question) -> Estimate:
    """All of it; a few seconds, whatever the size of the network."""
    config, cluster, images = asked.config, asked.cluster, asked.images
    precision, size = ds_config.precision(asked.ds_config), config.train.global_batch_size
    parameters = sum(parameter.numel() for parameter in asked.network.parameters())
    trained = sum(parameter.numel() for parameter in asked.network.parameters() if parameter.requires_grad)
    work = count_work(asked.network, asked.spec, asked.on_gpu, precision)
    mfu = None
    if precision in cluster.gpu.tflops:
        mfu = Mfu(range=asked.mfu, basis="as given") if asked.mfu else mfu_range(
            cluster.gpu, precision, parameters, config.model.compile)
    chosen = _choice(asked, asked.ds_name, asked.ds_config, work, mfu)
    choices = tuple(_choice(asked, name, content, work, mfu) for name, content in _shipped(asked, precision))
    fitting = [choice for choice in choices if choice.fits]
    best = min(fitting, key=_preference, default=None)
    lanes, window = config.data.lanes, config.data.window
    cache = float(parse_bytes(config.data.cache_bytes, "--data.cache_bytes")) if config.data.cache else None
    traffic, caches, shuffle = None, (), None
    if images.shard_bytes:
        traffic = simulate(images.shard_sizes, images.shard_bytes, nodes=cluster.nodes, global_batch_size=size,
                           cache_bytes=cache, lanes=lanes, window=window, seed=config.train.seed)
        caches = tuple(cache_table(images.shard_sizes, images.shard_bytes, nodes=cluster.nodes, global_batch_size=size,
                                   lanes=traffic.lanes, window=traffic.window, seed=config.train.seed))
        shuffle = shuffle_quality(images.shard_sizes, traffic.lanes, traffic.window, config.train.seed)
    rates = _rates(asked, chosen.step)
    bound = min(rates, key=lambda part: rates[part].high, default=None)
    speed = step_seconds = epoch = seconds = loads = None
    if chosen.step is not None:
        speed = Range(*(min([ends, *(rate[at] for part, rate in rates.items() if part in ("cores", "storage"))])
                        for at, ends in enumerate(chosen.step.images_per_second)))
        epoch = _over(images.count, speed)
        step_seconds = _over(size, speed)
        seconds = Range(*(asked.total_steps * one for one in step_seconds))
        loads = loading(chosen.step.images_per_second.high, cluster.nodes, images.image_bytes, config.augment)
    checkpoints = plan_checkpoints()
    wall = None if seconds is None else Range(*(one / checkpoints.goodput for one in seconds))
    hours = None if wall is None or asked.price is None else [one / 3600 * cluster.world for one in wall]
    return Estimate(
        model=asked.spec.name, parameters=parameters, trained=trained, image=asked.spec.input.size,
        global_batch_size=size, micro_batch_size=config.train.micro_batch_size, accumulation=asked.accumulation,
        total_steps=asked.total_steps, epochs=asked.total_steps * size / images.count, cluster=cluster,
        on_gpu=asked.on_gpu, room=cluster.gpu.memory, chosen=chosen, choices=choices,
        best=best.name if best else None, work=work, mfu=mfu, rates=rates, bound=bound, images_per_second=speed,
        epoch_seconds=epoch, seconds=seconds, loading=loads, images=images.name, num_images=images.count,
        image_bytes=images.image_bytes, traffic=traffic, caches=caches, shuffle=shuffle, checkpoints=checkpoints,
        wall_seconds=wall, cost=None if hours is None or asked.price is None else Range(
            *(asked.price * one for one in hours)),
        basis=tuple(_basis(asked, chosen, mfu)), remedy=_remedy(asked, [chosen, *choices]))


def _over(number: float, rate: Range) -> Range:
    """Seconds of so many at these rates; the best first."""
    return Range(number / rate.high, number / rate.low)


def _shipped(asked: Question, precision: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The shipped JSONs in this precision that this world can have, by name."""
    for path in sorted(ds_config.SHIPPED.glob("*.json")):
        content = ds_config.read(path)
        if ds_config.precision(content) != precision:
            continue
        try:
            ds_config.check_zero3(path.stem, content, not asked.on_gpu, asked.cluster.world)
        except SettingsError:
            continue
        yield path.stem, content


def _choice(asked: Question, name: str, content: dict[str, Any], work: Work | None, mfu: Mfu | None) -> Choice:
    config, cluster = asked.config, asked.cluster
    complete = ds_config.complete(content, config, asked.accumulation)
    zero, precision = ds_config.zero_settings(complete), ds_config.precision(content)
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in asked.network.parameters()]
    recomputes = "activation_checkpointing" in content
    communication = communicate(
        sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains),
        sum(size for size, _ in sizes if size < zero.stage3_param_persistence_threshold), zero, precision, cluster,
        asked.accumulation, recomputes)
    step = None
    if work is not None and mfu is not None:
        step = step_time(work, mfu.range, cluster, precision, zero, config.train.micro_batch_size, asked.accumulation,
                         recomputes, communication)
    memory, largest = None, 0
    try:
        memory = plan_memory(asked.network, asked.spec, config, content, cluster.world, asked.on_gpu,
                             teacher=asked.teacher)
        largest = largest_micro_batch(asked.network, asked.spec, config, content, cluster.world, asked.on_gpu,
                                      cluster.gpu.memory)
    except NotMeasuredError:
        pass
    return Choice(name=name, recomputes=recomputes, offloads=zero.offload_optimizer or zero.offload_param,
                  memory=memory, fits=memory is not None and memory.total <= cluster.gpu.memory,
                  largest_micro_batch=largest, communication=communication, step=step)


def _preference(choice: Choice) -> tuple[Any, ...]:
    """The least communication; of those with as much the one that computes least and works on the GPU."""
    assert choice.memory is not None
    return round(choice.communication.wire), choice.offloads, choice.recomputes, choice.memory.total


def _rates(asked: Question, step: Step | None) -> dict[str, Range]:
    """Images/s of all ranks that each part allows."""
    size, found = asked.config.train.global_batch_size, {}
    if step is not None:
        found["compute"] = Range(size / step.compute.high, size / step.compute.low)
        if step.communication > 0:
            found["links"] = Range(size / step.communication, size / step.communication)
    if asked.cores is not None:
        rate = asked.cluster.nodes * asked.cores * loading.rate
        found["cores"] = Range(rate, rate)
    if asked.storage is not None:
        rate = asked.cluster.nodes * asked.storage / asked.images.image_bytes
        found["storage"] = Range(rate, rate)
    return found
