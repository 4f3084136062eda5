"""What a run is going to do: the numbers that follow from its settings, and a few lines about them for people."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator

from vir import launcher
from vir.config import DataConfig, OptimConfig, RunConfig, ScheduleConfig, plan_accumulation
from vir.data.reader import Reader
from vir.data.traffic import working_set
from vir.distributed import World
from vir.engine.engine import Engine
from vir.planning.memory import Memory, checkpoint_bytes, count_numbers, plan_states
from vir.reports.throughput import forward_flops, peak_flops
from vir.run_folder import CHECKPOINTS
from vir.training.distill import Teacher
from vir.training.schedule import cooldown_steps, learning_rate, total_steps, warmup_steps, weight_decay
from vir.weights.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Numbers of a run that follow from its settings, the data and the world."""

    num_samples: int
    num_classes: int
    global_batch_size: int
    accumulation: int
    total_steps: int
    eval_steps: frozenset[int]
    """Numbers of steps done after which the run is evaluated."""
    checkpoint_steps: frozenset[int]
    """Numbers of steps done after which a checkpoint is due."""
    forward_flops: int | None
    """Of one image; None where they cannot be counted."""
    peak_flops: float | None
    """Of one device; None where unknown, or of no use."""
    optim: OptimConfig
    schedule: ScheduleConfig

    @property
    def steps_per_epoch(self) -> float:
        return self.num_samples / self.global_batch_size

    def samples(self, done: int) -> int:
        """Positions consumed after so many steps."""
        return done * self.global_batch_size

    def epoch(self, done: int) -> float:
        """Passes over the training set after so many steps."""
        return self.samples(done) / self.num_samples

    def learning_rate(self, step: int) -> float:
        """Of global batch `step`, from 0."""
        return learning_rate(step, self.total_steps, self.steps_per_epoch, self.optim.peak_lr(self.global_batch_size),
                             self.schedule)

    def weight_decay(self, step: int) -> float:
        """Of global batch `step`, from 0."""
        return weight_decay(step, self.total_steps, self.optim)


def make_plan(config: RunConfig, train: Reader, spec: ModelSpec, world: World, precision: str) -> Plan:
    """Raises SettingsError where the global batch does not divide by micro batch times ranks."""
    num_samples, size = len(train), config.train.global_batch_size
    total = total_steps(config.train, num_samples)

    def moments(every_steps: int | None, every_epochs: float) -> frozenset[int]:
        if every_steps is None:
            return steps_every(every_epochs, num_samples, size, total)
        return frozenset(range(every_steps, total, every_steps)) | {total}

    return Plan(
        num_samples=num_samples, num_classes=len(spec.classes), global_batch_size=size,
        accumulation=plan_accumulation(size, config.train.micro_batch_size, world.size), total_steps=total,
        eval_steps=moments(config.eval.every_steps, config.eval.every_epochs) if config.data.val else frozenset(),
        checkpoint_steps=moments(config.checkpoint.every_steps, config.checkpoint.every_epochs),
        forward_flops=forward_flops(spec),
        # An MFU counts a backward pass through the whole model, and a linear probe has none.
        peak_flops=None if config.train.linear_probe else peak_flops(world.device, precision, config.train.peak_tflops),
        optim=config.optim, schedule=config.schedule)


def steps_every(epochs: float, num_samples: int, global_batch_size: int, total: int) -> frozenset[int]:
    """The numbers of steps done at which each further `epochs` epochs are complete, and the last step."""
    every = max(epochs * num_samples, global_batch_size)  # not more often than each step
    count = int(total * global_batch_size / every)
    ends = (-(-int(round(k * every)) // global_batch_size) for k in range(1, count + 1))
    return frozenset(step for step in (*ends, total) if 0 < step <= total)


def describe(config: RunConfig, ds_config: dict[str, Any], plan: Plan, engine: Engine, spec: ModelSpec, train: Reader,
             val: Reader | None, world: World, teacher: Teacher | None = None) -> Iterator[str]:
    """Lines for people: model, teacher, parameter groups, data, batches, steps, learning rate, memory, disk."""
    numbers = count_numbers(engine.module, engine.groups)
    memory = plan_states(numbers, ds_config, world.size, config.optim, engine.has_ema, plan.accumulation)
    parameters, frozen = numbers.all, sum(numbers.frozen)
    groups = (f"{group['name']} {len(group['names'])}" +
              ("" if group["lr_scale"] == 1 else f" lr x{group['lr_scale']:.3g}") for group in engine.groups)
    yield (f"{spec.name}, {parameters / 1e6:.2f} M parameters{f', {frozen / 1e6:.2f} M frozen' if frozen else ''}, "
           f"{(plan.forward_flops or math.nan) / 1e9:.3g} GFLOP "
           f"forward per image of {'x'.join(map(str, spec.input.size))}; ZeRO {engine.zero_stage}, {engine.precision}, "
           f"{world.size} ranks on {world.device.type}")
    if teacher is not None:
        yield teacher.describe()
    yield (f"{config.optim.name}, peak lr {config.optim.peak_lr(plan.global_batch_size):.3g}, tensors per group: "
           + ", ".join(groups))
    yield (f"{len(train)} training images in {len(train.shard_sizes)} shards, "
           f"{len(val) if val else 'no'} validation images{'' if val else ' (--data.val): no evaluation'}, "
           f"{plan.num_classes} classes")
    yield _order(config.data, train)
    yield (f"{plan.total_steps} steps of {plan.global_batch_size} = {plan.accumulation} x "
           f"{config.train.micro_batch_size} x {world.size} ranks; {len(plan.eval_steps)} evaluations, "
           f"{len(plan.checkpoint_steps)} checkpoints{_also(config.checkpoint.every_minutes)}")
    yield _course(plan)
    written = checkpoint_bytes(numbers, ds_config, world.size, config.optim, engine.has_ema)
    copied = written.of(range(min(launcher.local_size(), world.size))) if config.checkpoint.asynchronous else 0
    yield _memory(memory, engine.has_ema, teacher.bytes if teacher else 0, copied)
    yield _disk(config, plan, written.total)


def _also(minutes: float | None) -> str:
    return "" if minutes is None else f", and one every {'minute' if minutes == 1 else f'{minutes:g} minutes'}"


def _memory(memory: Memory, averages: bool, teacher: int, copied: int) -> str:
    """What a rank holds in its device's memory; in the machine's where the JSON offloads, and for copies of all its
    ranks."""
    weights, state = memory.weights + memory.gradients, memory.masters + memory.optimizer + memory.average
    parts = [(weights, "weights and gradients")] * (weights > 0)
    parts += [(state, f"optimizer{' and EMA' if averages else ''}")] * (state > 0)
    parts += [(memory.buckets, "buckets of gradients")] * (memory.buckets > 0)
    parts += [(teacher, "teacher")] * (teacher > 0)
    said = " + ".join(f"{size / 1e6:.1f} {what}" for size, what in parts)
    host = f"; {memory.host / 1e6:.1f} MB of the machine's, to which it is offloaded" if memory.host else ""
    host += f"; {copied / 1e6:.1f} MB of the machine's for the copies of checkpoints" if copied else ""
    return f"memory per rank: {sum(size for size, _ in parts) / 1e6:.1f} MB = {said}, without activations{host}"


def _order(config: DataConfig, train: Reader) -> str:
    """How samples are shuffled, and what of the shards that has in use on each machine."""
    lanes, window = config.order
    shards = working_set(lanes / launcher.nodes(), window, train.shard_sizes)
    share = shards / len(train.shard_sizes) * sum(train.shard_bytes)
    line = f"order: {lanes} lanes, window {window}"
    if not train.shard_bytes:
        return line
    line += f"; about {shards:.0f} shards of {share / 1e9:.3g} GB in use at a time on each machine"
    if train.budget_bytes is None:
        return line
    few = ", too little: shards are read in parts, or again; give more, or fewer --data.lanes in a new run"
    return f"{line}, of a cache of {train.budget_bytes / 1e9:.3g} GB{few if share > train.budget_bytes else ''}"


def _course(plan: Plan) -> str:
    """Of the learning rate."""
    total, schedule = plan.total_steps, plan.schedule
    warmup = warmup_steps(total, plan.steps_per_epoch, schedule)
    cooldown = cooldown_steps(plan.steps_per_epoch, schedule)
    parts = [f"from {plan.learning_rate(0):.3g} to {plan.learning_rate(warmup):.3g} over {warmup} steps of warm-up"] * (
        warmup > 0)
    decay = total - warmup - cooldown
    parts.append(f"{schedule.name} from {plan.learning_rate(warmup):.3g} to "
                 f"{plan.learning_rate(warmup + decay - 1):.3g} over {decay}")
    parts += [f"{schedule.min_lr:.3g} over {cooldown} of cool-down"] * (cooldown > 0)
    return "learning rate: " + ", ".join(parts)


def _disk(config: RunConfig, plan: Plan, size: int) -> str:
    """What is kept in the run folder beside what its disk has, in words."""
    has_best, every = bool(config.checkpoint.best and plan.eval_steps), config.checkpoint.keep_every_epochs
    newest = min(config.checkpoint.keep, len(plan.checkpoint_steps | plan.eval_steps))
    for_good = int(plan.epoch(plan.total_steps) / every) if every else 0
    by_clock = min(2, config.checkpoint.keep) if config.checkpoint.every_minutes is not None else 0
    count = newest + by_clock + has_best + for_good + 1
    kept = (f"{newest} newest{f', {by_clock} by the clock' if by_clock else ''}{', the best' * has_best}"
            f"{f', {for_good} for good' if for_good else ''}, one being written")
    folder = Path(config.output).absolute()
    there = next(path for path in (folder, *folder.parents) if path.is_dir())
    try:
        free = shutil.disk_usage(there).free
        present = sum(path.stat().st_size for path in (folder / CHECKPOINTS).rglob("*") if path.is_file())
    except OSError as error:
        return f"disk: {there} does not tell its free space: {error.strerror}"
    lacking = count * size - present - free
    return (f"disk: {count} checkpoints of {size / 1e6:.1f} MB ({kept}) take {count * size / 1e9:.3g} GB; "
            f"{present / 1e9:.3g} GB are there, {free / 1e9:.3g} GB are free" +
            (f": {lacking / 1e9:.3g} GB TOO FEW, lower --checkpoint.keep or free some space" if lacking > 0 else ""))
