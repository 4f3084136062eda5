"""A run that is planned, and what all parts of a plan say of it together."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from vir.config import RunConfig, parse_bytes, plan_accumulation
from vir.engine import ds_config, optimizer
from vir.errors import SettingsError
from vir.planning.activations import NotMeasuredError
from vir.planning.checkpoints import (
    COPY_RATE,
    DAYS,
    GPUS,
    INTERRUPTIONS,
    CheckpointPlan,
    default_mtbf,
    plan_checkpoints,
)
from vir.planning.efficiency import Mfu, mfu_range
from vir.planning.hardware import Cluster, Range
from vir.planning.images import Images
from vir.planning.loading import DECODER, RATES, Loading, augmentation, loading
from vir.planning.memory import CheckpointBytes, Memory, MemoryPlanner, check_host_memory, checkpoint_bytes
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
    """Of a node; None where unknown."""
    storage: float | None = None
    """Bytes/s that a node reads of shards; None where unknown."""
    disk: float
    """Bytes/s that all write of a checkpoint."""
    mtbf: float | None = None
    """Seconds between failures of one node; None: as published."""
    restart: float
    """Seconds from a failure to the first step after it."""
    price: float | None = None
    """Of a GPU hour."""
    teacher: int = 0
    """Bytes of a model that teaches, on each rank."""
    host_memory: float | None = None
    """Bytes that the copies of a checkpoint may take of a node; None where unknown."""

    @property
    def accumulation(self) -> int:
        train = self.config.train
        return plan_accumulation(train.global_batch_size, train.micro_batch_size, self.cluster.world)

    @property
    def cache(self) -> float | None:
        """Bytes that each node may keep of shards; None: it keeps none. It is assumed to where the images are."""
        data = self.config.data
        size = float(parse_bytes(data.cache_bytes, "--data.cache_bytes"))
        return size if data.cache or self.images.is_assumed else None


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What one DeepSpeed JSON would make of the run."""

    name: str
    stage: int
    recomputes: bool
    offloads: bool
    quantizes: bool
    """It rounds weights or gradients before they are sent."""
    memory: Memory | None
    unknown: str
    """Why the memory is not known; empty where it is."""
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
    args: dict[str, Any]
    """Of timm.create_model."""
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
    recommended: Traffic | None
    """With the lanes and the window that a run would choose, where others are asked for."""
    shuffle: ShuffleQuality | None
    checkpoint_bytes: int
    copied_bytes: int
    """Of the memory of the node of rank 0, for the copies from which checkpoints are written; 0: none are made."""
    host_memory: float | None
    """Bytes that they may take; None where unknown."""
    checkpoints: CheckpointPlan | None
    """None where the time of a step is not known."""
    wall_seconds: Range | None
    """With checkpoints as they are set, and failures; None also where failures let nothing get done."""
    price: float | None
    cost: Range | None
    basis: tuple[str, ...]
    """What the estimates rest on, in words."""
    remedy: str
    """Where no shipped JSON makes it fit: by how much, and what would; else empty."""

    def to_json(self, command: str) -> str:
        """All numbers, in bytes, seconds and images/s; a range is a list of two."""
        return json.dumps({"command": command, **asdict(self), "chosen": self.chosen.to_dict(),
                           "choices": [choice.to_dict() for choice in self.choices]}, indent=1,
                          allow_nan=False) + "\n"

    def check_that_something_fits(self) -> None:
        """Raises SettingsError where no shipped JSON makes the run fit, or copies of checkpoints do not fit into the
        memory of the node; it says by how much, and what would."""
        if self.remedy:
            raise SettingsError(self.remedy)
        if self.host_memory is not None:
            check_host_memory(self.copied_bytes, self.host_memory, self.cluster.gpus_per_node, self.chosen.stage)


def estimate(asked: Question) -> Estimate:
    """All of it; a few seconds, whatever the size of the network."""
    config, cluster, images = asked.config, asked.cluster, asked.images
    precision, size = ds_config.precision(asked.ds_config), config.train.global_batch_size
    planner = MemoryPlanner(asked.network, asked.spec, config, cluster.world, asked.on_gpu, asked.teacher,
                            fused=cluster.gpu.fused)
    parameters, trained = planner.numbers.all, planner.numbers.trained
    work = count_work(asked.network, asked.spec, cluster.gpu.fused, precision)
    mfu = None
    if precision in cluster.gpu.tflops:
        mfu = Mfu(range=asked.mfu, basis="as given") if asked.mfu else mfu_range(
            cluster.gpu, precision, parameters, config.model.compile)
    contents, found = {**dict(_shipped(asked, precision)), asked.ds_name: asked.ds_config}, {}
    for name, content in contents.items():
        try:
            found[name] = _choice(asked, name, content, planner, work, mfu)
        except SettingsError:  # what this network or this optimizer does not have
            if name == asked.ds_name:
                raise
    chosen = found[asked.ds_name]
    best = min((choice for choice in found.values() if choice.fits and not choice.quantizes), key=_preference,
               default=None)
    traffic = recommended = shuffle = None
    if images.shard_bytes:
        traffic = _simulated(asked, config.data.lanes, config.data.window)
        if (traffic.lanes, traffic.window) != traffic.recommended:
            recommended = _simulated(asked, None, None)
        shuffle = shuffle_quality(images.shard_sizes, traffic.lanes, traffic.window, config.train.seed)
    speed = epoch = seconds = loads = checkpoints = wall = cost = None
    rates: dict[str, Range] = {}
    written = checkpoint_bytes(planner.numbers, asked.ds_config, cluster.world, config.optim, config.ema.decay > 0)
    copied = written.of(range(cluster.gpus_per_node)) if config.checkpoint.asynchronous else 0
    if chosen.step is not None:
        loads = loading(chosen.step.images_per_second.high, nodes=cluster.nodes, image_bytes=images.image_bytes,
                        augment=config.augment, traffic=traffic, img_size=max(asked.spec.input.size[1:]))
        rates = _rates(asked, chosen.step, loads)
        limits = [rates[part] for part in ("cores", "storage") if part in rates]
        speed = Range(*(min(ends) for ends in zip(chosen.step.images_per_second, *limits)))
        epoch, step = _over(images.count, speed), _over(size, speed)
        seconds = Range(*(asked.total_steps * one for one in step))
        checkpoints = _checkpoints(asked, written, _middle(step), _middle(epoch))
        if useful := checkpoints.as_set.goodput:
            wall = Range(*(one / useful for one in seconds))
            cost = asked.price and Range(*(asked.price * cluster.world * one / 3600 for one in wall))
    return Estimate(
        model=asked.spec.name, args=asked.spec.args, parameters=parameters, trained=trained,
        image=asked.spec.input.size, global_batch_size=size, micro_batch_size=config.train.micro_batch_size,
        accumulation=asked.accumulation, total_steps=asked.total_steps,
        epochs=asked.total_steps * size / images.count, cluster=cluster, on_gpu=asked.on_gpu, chosen=chosen,
        choices=tuple(found.values()), best=best.name if best else None, work=work, mfu=mfu, rates=rates,
        bound=min(rates, key=lambda part: rates[part].high, default=None), images_per_second=speed,
        epoch_seconds=epoch, seconds=seconds, loading=loads, images=images.name, num_images=images.count,
        image_bytes=images.image_bytes, traffic=traffic, recommended=recommended, shuffle=shuffle,
        checkpoint_bytes=written.total, copied_bytes=copied, host_memory=asked.host_memory, checkpoints=checkpoints,
        wall_seconds=wall, price=asked.price, cost=cost or None, basis=tuple(_basis(asked, chosen, mfu)),
        remedy=_remedy(asked, planner, contents, found))


def _simulated(asked: Question, lanes: int | None, window: int | None) -> Traffic:
    config, images = asked.config, asked.images
    return simulate(images.shard_sizes, images.shard_bytes, nodes=asked.cluster.nodes, cache_bytes=asked.cache,
                    global_batch_size=config.train.global_batch_size, lanes=lanes, window=window,
                    seed=config.train.seed)


def _middle(ends: Range) -> float:
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


def _choice(asked: Question, name: str, content: dict[str, Any], planner: MemoryPlanner, work: Work | None,
            mfu: Mfu | None) -> Choice:
    config, cluster, numbers = asked.config, asked.cluster, planner.numbers
    optimizer.check_name(config.optim.name, ds_config.zero_stage(content))
    zero = ds_config.zero_settings(ds_config.complete(content, config, asked.accumulation))
    precision, recomputes = ds_config.precision(content), "activation_checkpointing" in content
    small = sum(size for size in numbers.each if size <= zero.stage3_param_persistence_threshold)
    communication = communicate(numbers.all, numbers.trained, small, zero, precision, cluster, asked.accumulation,
                                recomputes)
    step = None
    if work is not None and mfu is not None:
        step = step_time(work, mfu.range, cluster, precision, micro_batch=config.train.micro_batch_size,
                         accumulation=asked.accumulation, recomputes=recomputes, communication=communication,
                         backward=not config.train.linear_probe)
    memory, largest, unknown = None, 0, ""
    try:
        memory = planner.plan(content)
        largest = planner.largest_micro_batch(content, cluster.gpu.memory)
    except NotMeasuredError as error:
        unknown = str(error)
    return Choice(name=name, stage=zero.stage, recomputes=recomputes,
                  offloads=zero.offload_optimizer or zero.offload_param,
                  quantizes=zero.zero_quantized_weights or zero.zero_quantized_gradients, memory=memory,
                  unknown=unknown, fits=memory is not None and memory.total <= cluster.gpu.memory,
                  largest_micro_batch=largest, communication=communication, step=step)


def _preference(choice: Choice) -> tuple[Any, ...]:
    """The least communication; of those with as much the one that works on the GPU, computes least, shards least."""
    return round(choice.communication.sent), choice.offloads, choice.recomputes, choice.stage


def _rates(asked: Question, step: Step, loads: Loading) -> dict[str, Range]:
    """Images/s of all GPUs that each part allows by itself."""
    size, nodes = asked.config.train.global_batch_size, asked.cluster.nodes
    found = {"computing": _over(size, step.compute)}
    if step.communication > 0:
        found["links"] = _over(size, Range(step.communication, step.communication))
    if asked.cores is not None:
        rate = nodes * asked.cores * loads.rate
        found["cores"] = Range(rate * loads.cores / loads.cores_at_most, rate)
    if asked.storage is not None:
        found["storage"] = Range(*[nodes * asked.storage / asked.images.image_bytes] * 2)
    return found


def _checkpoints(asked: Question, size: CheckpointBytes, step_seconds: float, epoch_seconds: float) -> CheckpointPlan:
    often = asked.config.checkpoint
    every = epoch_seconds * often.every_epochs if often.every_steps is None else step_seconds * often.every_steps
    mtbf = default_mtbf(asked.cluster.world) if asked.mtbf is None else asked.mtbf / asked.cluster.nodes
    every = max(step_seconds, min(every, asked.total_steps * step_seconds))
    return plan_checkpoints(size.total, copied=size.first if often.asynchronous else None, disk_rate=asked.disk,
                            mtbf_seconds=mtbf, step_seconds=step_seconds, total_steps=asked.total_steps,
                            every_seconds=every, every_minutes=often.every_minutes, restart_seconds=asked.restart)


def _remedy(asked: Question, planner: MemoryPlanner, contents: dict[str, dict[str, Any]],
            found: dict[str, Choice]) -> str:
    """By how much nothing makes the run fit, and what would; empty where one does, also with smaller micro-batches."""
    if any(choice.largest_micro_batch or choice.memory is None for choice in found.values()):
        return ""
    room, smallest = asked.cluster.gpu.memory, 2 if asked.config.augment.mixes else 1
    least, name = min((planner.plan(content, smallest).total, name) for name, content in contents.items())
    ways = [f"a GPU of {math.ceil(least / 1e8) / 10:g} GB", "a smaller model or smaller images"]
    fewer = [(planner.plan(_keeping_less(content), smallest).total, other) for other, content in contents.items()
             if ds_config.zero_stage(content) == 3]  # more nodes shard more, but as much is gathered on each
    if fewer and min(fewer)[0] <= room:
        needed, other = min(fewer)
        ways.insert(0, f"{other} with stage3_max_live_parameters and stage3_max_reuse_distance of {_FEWER_LIVE}, which "
                       f"needs {needed / 1e9:.3g} GB")
    return (f"{asked.spec.name} fits into {asked.cluster.gpu.name} with no shipped --deepspeed_config: {name} needs "
            f"{least / 1e9:.3g} GB of {room / 1e9:.3g} GB with micro-batches of {smallest}, {(least - room) / 1e9:.3g} "
            f"GB too many; what would do: {', or '.join(ways)}")


def _keeping_less(content: dict[str, Any]) -> dict[str, Any]:
    return {**content, "zero_optimization": {**content["zero_optimization"], **dict.fromkeys(
        ("stage3_max_live_parameters", "stage3_max_reuse_distance"), _FEWER_LIVE)}}


def _basis(asked: Question, chosen: Choice, mfu: Mfu | None) -> Iterator[str]:
    """What the estimates rest on, with the numbers that went in."""
    gpu, config, network = asked.cluster.gpu, asked.config, asked.cluster.network
    precision = ds_config.precision(asked.ds_config)
    if chosen.memory is not None:
        yield (f"memory: shapes of a forward and backward pass{' as on a GPU' if asked.on_gpu else ''}, and the "
               f"buffers of DeepSpeed 0.19" + (
                   f"; {chosen.memory.reserved / 1e9:.3g} GB are assumed for CUDA, NCCL and fragmentation"
                   if chosen.memory.reserved else ""))
    peak = f"{gpu.tflops[precision]:g} TFLOP/s in {precision}, " if precision in gpu.tflops else ""
    usual = gpu.network_source if network == gpu.network else "as given"
    links = (f"; {gpu.bandwidth / 1e9:.4g} GB/s to the others of its node ({gpu.link_source}), "
             f"{network / 1e9:.4g} GB/s to other nodes ({usual})" if peak else "")
    yield f"{gpu.name}: {peak}{gpu.memory / 1e9:.4g} GB ({gpu.source}){links}"
    if mfu is not None:
        yield (f"MFU: {mfu.basis}; with micro-batches of few images less is reached, for the time to launch kernels "
               "and the latency of links are not counted")
        yield ("communication: ring algorithms at these bandwidths; the best case hides behind computing what the "
               "DeepSpeed JSON overlaps, the worst hides nothing")
    if config.model.compile:
        yield "--model.compile: memory is planned as without it, which takes more"
    if config.model.freeze is not None or config.train.linear_probe:
        yield ("not counted: what frozen layers spare in the backward pass, and what a linear probe spares whose "
               "features are kept, where nothing is drawn in --augment")
    if config.distill.teacher:
        yield f"--distill.teacher: {'beside its weights nothing of it is' if asked.teacher else 'it is not'} counted"
    if asked.images.is_assumed:
        yield (f"{asked.images.name}: {asked.images.count:,} images of {asked.images.image_bytes / 1000:.0f} KB in "
               f"{len(asked.images.shard_sizes):,} shards on a server are assumed; --data names others")
    if chosen.step is not None:
        rate = RATES[augmentation(config.augment)[0], DECODER]
        yield (f"loader: {rate:.0f} images per second and core, measured on JPEGs of 72 KB on a core of an AMD EPYC "
               "(docs/benchmarks.md)" + (f"; {asked.cores} cores of each node" if asked.cores else "") +
               (f"; {asked.storage / 1e9:.3g} GB/s read by each node" if asked.storage else ""))
        copies = f", {COPY_RATE / 1e9:g} GB/s from each GPU into the memory of its node (assumed)"
        yield (f"checkpoints: {asked.disk / 1e9:.3g} GB/s of disk{copies * config.checkpoint.asynchronous}" + (
            f"; each node fails every {asked.mtbf / 3600:.4g} hours" if asked.mtbf is not None else
            f"; failures as often as those of {GPUS:,} H100s in the training of Llama 3 (arXiv:2407.21783), "
            f"{INTERRUPTIONS} in {DAYS} days") + f"; {asked.restart / 60:.3g} minutes to start again")
        if config.checkpoint.local:
            yield "--checkpoint.local: not counted; with it less is lost where the shared disk is slow"
        yield "not counted: evaluations, and the time of an optimizer in the memory of the node (offload)"
