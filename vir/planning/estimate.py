"""A run that is planned, and what all parts of a plan say of it together."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from vir.config import RunConfig, plan_accumulation
from vir.engine import ds_config, optimizer
from vir.errors import SettingsError
from vir.planning.activations import NotMeasuredError
from vir.planning.checkpoints import DAYS, GPUS, INTERRUPTIONS, CheckpointPlan, default_mtbf, plan_checkpoints
from vir.planning.efficiency import Mfu, mfu_range
from vir.planning.hardware import Cluster, Range
from vir.planning.images import Images
from vir.planning.loading import DECODER, RATES, Loading, augmentation, loading
from vir.planning.memory import Memory, checkpoint_bytes, largest_micro_batch, plan_memory
from vir.planning.time import Communication, Step, Work, communicate, count_work, step_time
from vir.planning.traffic import ShuffleQuality, Traffic, shuffle_quality, simulate
from vir.weights.spec import ModelSpec

_FEWER_LIVE = 10_000_000
"""Numbers that stage 3 may keep gathered where nothing else fits, for more communication."""


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
    cache: float | None = None
    """Bytes that each machine may keep of shards; None: it keeps none."""
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
    quantizes: bool
    """It rounds weights or gradients before they are sent."""
    memory: Memory | None
    """None: unknown, the network cannot be measured without data."""
    fits: bool
    largest_micro_batch: int
    """0: none fits."""
    communication: Communication
    step: Step | None
    """None where FLOPs or the peak of the device are not known."""

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "memory_total": self.memory and self.memory.total,
                "sent_bytes": self.communication.sent}


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
    """The one of these that fits with the least communication, of those that round nothing; None: no one does."""
    work: Work | None
    mfu: Mfu | None
    rates: dict[str, Range]
    """Images/s of all ranks that each part allows by itself: computing, links, cores, storage; those that are known."""
    bound: str | None
    """The part that allows least, in the best case."""
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
    shuffle: ShuffleQuality | None
    checkpoint_bytes: int
    checkpoints: CheckpointPlan | None
    """None where the time of a step is not known."""
    wall_seconds: Range | None
    """With checkpoints and failures."""
    cost: Range | None
    basis: tuple[str, ...]
    """What the estimates rest on, in words."""

    def to_json(self, command: str) -> str:
        """All numbers, in bytes, seconds and images/s; a range is a list of two."""
        return json.dumps({"command": command, **asdict(self), "chosen": self.chosen.to_dict(),
                           "choices": [choice.to_dict() for choice in self.choices]}, indent=1) + "\n"

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
        mfu = Mfu(range=asked.mfu, basis="as given", measurements=()) if asked.mfu else mfu_range(
            cluster.gpu, precision, parameters, config.model.compile)
    chosen = _choice(asked, asked.ds_name, asked.ds_config, work, mfu)
    choices = tuple(_choice(asked, name, content, work, mfu) for name, content in _shipped(asked, precision))
    fitting = [choice for choice in choices if choice.fits and not choice.quantizes]
    best = min(fitting, key=_preference, default=None)
    traffic = shuffle = None
    if images.shard_bytes:
        traffic = simulate(images.shard_sizes, images.shard_bytes, nodes=cluster.nodes, global_batch_size=size,
                           cache_bytes=asked.cache, lanes=config.data.lanes, window=config.data.window,
                           seed=config.train.seed)
        shuffle = shuffle_quality(images.shard_sizes, traffic.lanes, traffic.window, config.train.seed)
    rates = _rates(asked, chosen.step)
    speed = epoch = seconds = loads = checkpoints = wall = None
    written = _checkpoint_bytes(asked, parameters, trained)
    if chosen.step is not None:
        limit = min([rate.low for part, rate in rates.items() if part in ("cores", "storage")], default=math.inf)
        speed = Range(*(min(rate, limit) for rate in chosen.step.images_per_second))
        epoch, step = _over(images.count, speed), _over(size, speed)
        seconds = Range(*(asked.total_steps * one for one in step))
        loads = loading(chosen.step.images_per_second.high, nodes=cluster.nodes, image_bytes=images.image_bytes,
                        augment=config.augment, traffic=traffic, img_size=max(asked.spec.input.size[1:]))
        checkpoints = _checkpoints(asked, written, middle(step), middle(epoch))
        wall = Range(*(one / checkpoints.as_set.goodput for one in seconds))
    return Estimate(
        model=asked.spec.name, parameters=parameters, trained=trained, image=asked.spec.input.size,
        global_batch_size=size, micro_batch_size=config.train.micro_batch_size, accumulation=asked.accumulation,
        total_steps=asked.total_steps, epochs=asked.total_steps * size / images.count, cluster=cluster,
        on_gpu=asked.on_gpu, room=cluster.gpu.memory, chosen=chosen, choices=choices,
        best=best.name if best else None, work=work, mfu=mfu, rates=rates,
        bound=min(rates, key=lambda part: rates[part].high, default=None), images_per_second=speed,
        epoch_seconds=epoch, seconds=seconds, loading=loads, images=images.name, num_images=images.count,
        image_bytes=images.image_bytes, traffic=traffic, shuffle=shuffle, checkpoint_bytes=written,
        checkpoints=checkpoints, wall_seconds=wall, cost=None if wall is None or asked.price is None else Range(
            *(asked.price * cluster.world * one / 3600 for one in wall)),
        basis=tuple(_basis(asked, chosen, mfu)), remedy=_remedy(asked, [chosen, *choices]))


def middle(ends: Range) -> float:
    """Of an estimate, where one number is needed."""
    return (ends.low + ends.high) / 2


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
        sum(size for size, _ in sizes if size <= zero.stage3_param_persistence_threshold), zero, precision, cluster,
        asked.accumulation, recomputes)
    step = None
    if work is not None and mfu is not None:
        step = step_time(work, mfu.range, cluster, precision, micro_batch=config.train.micro_batch_size,
                         accumulation=asked.accumulation, recomputes=recomputes, communication=communication)
    memory, largest = None, 0
    try:
        memory = plan_memory(asked.network, asked.spec, config, content, cluster.world, asked.on_gpu,
                             teacher=asked.teacher)
        largest = largest_micro_batch(asked.network, asked.spec, config, content, cluster.world, asked.on_gpu,
                                      cluster.gpu.memory)
    except NotMeasuredError:
        pass
    return Choice(name=name, recomputes=recomputes, offloads=zero.offload_optimizer or zero.offload_param,
                  quantizes=zero.zero_quantized_weights or zero.zero_quantized_gradients,
                  memory=memory, fits=memory is not None and memory.total <= cluster.gpu.memory,
                  largest_micro_batch=largest, communication=communication, step=step)


def _preference(choice: Choice) -> tuple[Any, ...]:
    """The least communication; of those with as much the one that works on the GPU, computes least, shards least."""
    return round(choice.communication.sent), choice.offloads, choice.recomputes, choice.name


def _rates(asked: Question, step: Step | None) -> dict[str, Range]:
    """Images/s of all ranks that each part allows by itself."""
    size, found = asked.config.train.global_batch_size, {}
    if step is not None:
        found["computing"] = _over(size, step.compute)
        if step.communication > 0:
            found["links"] = _over(size, Range(step.communication, step.communication))
    for part, per_node in (
            ("cores", asked.cores and asked.cores * RATES[augmentation(asked.config.augment)[0], DECODER]),
            ("storage", asked.storage and asked.storage / asked.images.image_bytes)):
        if per_node:
            found[part] = Range(asked.cluster.nodes * per_node, asked.cluster.nodes * per_node)
    return found


def _checkpoints(asked: Question, size: int, step_seconds: float, epoch_seconds: float) -> CheckpointPlan:
    often = asked.config.checkpoint
    every = epoch_seconds * often.every_epochs if often.every_steps is None else step_seconds * often.every_steps
    mtbf = default_mtbf(asked.cluster.world) if asked.mtbf is None else asked.mtbf / asked.cluster.nodes
    return plan_checkpoints(size, disk_rate=asked.disk, mtbf_seconds=mtbf, step_seconds=step_seconds,
                            epoch_seconds=epoch_seconds, every_seconds=min(every, asked.total_steps * step_seconds),
                            restart_seconds=asked.restart)


def _checkpoint_bytes(asked: Question, parameters: int, trained: int) -> int:
    states = optimizer.states_per_number(asked.config.optim) + (asked.config.ema.decay > 0)
    return checkpoint_bytes(parameters, parameters - trained, ds_config.zero_stage(asked.ds_config),
                            4 if ds_config.precision(asked.ds_config) == "fp32" else 2, states)


def _remedy(asked: Question, choices: Sequence[Choice]) -> str:
    """By how much no shipped JSON makes the run fit, and what would; empty where one does, also with smaller
    micro-batches."""
    if any(choice.largest_micro_batch or choice.memory is None for choice in choices):
        return ""
    room, smallest = asked.cluster.gpu.memory, 2 if asked.config.augment.mixes else 1

    def needed(content: dict[str, Any]) -> int:
        return plan_memory(asked.network, asked.spec, asked.config, content, asked.cluster.world, asked.on_gpu,
                           micro_batch=smallest, teacher=asked.teacher).total

    contents = {choice.name: ds_config.read(choice.name) for choice in choices[1:]} or {asked.ds_name: asked.ds_config}
    least, name = min((needed(content), name) for name, content in contents.items())
    ways = [f"a GPU of {math.ceil(least / 1e8) / 10:g} GB", "a smaller model or smaller images"]
    if ds_config.zero_stage(contents[name]) == 3:  # more machines shard more, but as much is gathered on each
        fewer = {**contents[name], "zero_optimization": {**contents[name]["zero_optimization"], **dict.fromkeys(
            ("stage3_max_live_parameters", "stage3_max_reuse_distance"), _FEWER_LIVE)}}
        if needed(fewer) <= room:
            ways.insert(0, f"{name} with stage3_max_live_parameters and stage3_max_reuse_distance of {_FEWER_LIVE}, "
                           f"which needs {needed(fewer) / 1e9:.3g} GB")
    return (f"{asked.spec.name} fits into {asked.cluster.gpu.name} with no shipped --deepspeed_config: {name} needs "
            f"{least / 1e9:.3g} GB of {room / 1e9:.3g} GB with micro-batches of {smallest}, {(least - room) / 1e9:.3g} "
            f"GB too many; what would do: {', or '.join(ways)}")


def _basis(asked: Question, chosen: Choice, mfu: Mfu | None) -> Iterator[str]:
    """What the estimates rest on."""
    gpu, config = asked.cluster.gpu, asked.config
    if chosen.memory is not None:
        yield (f"memory: shapes of a forward and backward pass {'as on a GPU' if asked.on_gpu else 'on CPU'}, and "
               f"DeepSpeed's buffers; of a GPU {chosen.memory.reserved / 1e9:.3g} GB are assumed to be taken by CUDA, "
               "NCCL and gaps")
    yield f"{gpu.name}: {gpu.source}"
    if mfu is not None:
        yield f"MFU: {mfu.basis}"
        yield ("communication: ring algorithms at the bandwidth of data sheets; the best case hides behind computing "
               "what the DeepSpeed JSON overlaps, the worst hides nothing")
    if config.model.compile:
        yield "--model.compile: memory is planned as without it, which takes more"
    if config.distill.teacher and not asked.teacher:
        yield "--distill.teacher: its memory and its time are not counted"
    if asked.images.is_assumed:
        yield (f"{asked.images.name}: {asked.images.count:,} images of {asked.images.image_bytes / 1000:.0f} KB in "
               f"{len(asked.images.shard_sizes):,} shards are assumed; --data names others")
    if chosen.step is not None:
        yield (f"loader: {RATES[augmentation(config.augment)[0], DECODER]:.0f} images per second and core, measured on "
               "JPEGs of 72 KB on one core of an AMD EPYC (docs/benchmarks.md)")
        yield (f"checkpoints: {asked.disk / 1e9:.3g} GB/s of disk" + (
            f"; each machine fails every {asked.mtbf / 3600:.4g} hours" if asked.mtbf is not None else
            f"; failures as often as those of {GPUS:,} H100s in the training of Llama 3 (arXiv:2407.21783), "
            f"{INTERRUPTIONS} in {DAYS} days") + f"; {asked.restart / 60:.3g} minutes to start again")
        yield "evaluations are not counted, nor the time of an optimizer in the machine's memory"
