"""Where a run's settings, data, engine and loop meet."""

from __future__ import annotations

import fcntl
import os
import secrets
from dataclasses import asdict
from pathlib import Path

import timm
import torch
from tqdm import tqdm

from vir import distributed
from vir import log as logs
from vir.config import dump_yaml, plan_accumulation
from vir.data.loader import eval_batches, train_batches
from vir.data.order import SampleOrder
from vir.data.transforms import model_input_of
from vir.errors import EXIT_STOPPED_BY_SIGNAL, SettingsError
from vir.evaluation.classify import classify
from vir.files import replace_text
from vir.log import log
from vir.training import checkpoint
from vir.training.checkpoint_info import CheckpointInfo, newest, read_info
from vir.training.curves import plot_runs
from vir.training.engine import Engine
from vir.training.loop import Plan, Progress, Trainer, steps_every
from vir.training.metrics import MetricsWriter
from vir.training.prepare import CONFIG_FILE, Prepared
from vir.training.schedule import total_steps

DEEPSPEED_FILE = "ds_config.json"


def run(prepared: Prepared) -> int:
    """Train, and return the exit code: 0 when done, EXIT_STOPPED_BY_SIGNAL when a signal ended it after saving."""
    config = prepared.config
    world = distributed.start()
    folder = Path(config.output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"--output {folder} cannot be made: {error.strerror}; give another folder") from error
    _check_shared(folder, world)
    lock = _lock(folder, world)
    logs.start(world.rank, folder)
    try:
        job = _Job(prepared, world, folder)
        try:
            done = job.train()
        finally:
            job.close()
    finally:
        if lock is not None:
            os.close(lock)
    if world.is_main:
        plot_runs([folder], folder / "curves.png")
        log.info("done: %s" if done else "stopped by a signal; the same command continues: %s", folder)
    distributed.barrier()
    return 0 if done else EXIT_STOPPED_BY_SIGNAL


def _check_shared(folder: Path, world: distributed.World) -> None:
    """Rank 0 writes a token that every rank must be able to read: checkpoints need one folder for all nodes."""
    token = distributed.broadcast(secrets.token_hex(8))
    path = folder / f".shared-{token}"
    if world.is_main:
        path.write_text(token)
    distributed.barrier()
    blind = [rank for rank, sees in enumerate(distributed.gather(path.is_file())) if not sees]
    distributed.barrier()
    if world.is_main:
        path.unlink()
    if blind:
        raise SettingsError(f"--output {folder}: ranks {blind[:8]} do not see what rank 0 writes there; give a folder "
                            "that all nodes share")


def _lock(folder: Path, world: distributed.World) -> int | None:
    """Keep a second run out of the folder while this one lives; rank 0 holds the lock, a descriptor."""
    descriptor, taken = None, False
    if world.is_main:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            taken = True
        except OSError:  # a file system without locks
            pass
    if distributed.broadcast(taken):
        raise SettingsError(f"--output {folder}: another run is writing there; wait for it, end it, or give another "
                            "folder")
    return descriptor


class _Job:
    """One run on one rank: model, engine, loaders, and what happens between steps."""

    def __init__(self, prepared: Prepared, world: distributed.World, folder: Path) -> None:
        config = self.config = prepared.config
        self.prepared, self.world, self.folder = prepared, world, folder
        size = config.train.global_batch_size
        accumulation = plan_accumulation(size, config.train.micro_batch_size, world.size)
        total = total_steps(config.train.epochs, len(prepared.train), size)
        self.plan = Plan(
            num_samples=len(prepared.train), num_classes=len(prepared.train.classes), accumulation=accumulation,
            total_steps=total,
            warmup_steps=total_steps(config.schedule.warmup_epochs, len(prepared.train), size),
            eval_steps=steps_every(config.eval.every_epochs, len(prepared.train), size, total),
            checkpoint_steps=steps_every(config.checkpoint.every_epochs, len(prepared.train), size, total))
        self.model_args = {**config.model.args, "num_classes": self.plan.num_classes}
        if config.model.img_size is not None:
            self.model_args["img_size"] = config.model.img_size
        torch.manual_seed(config.train.seed)
        model = self._build(config.model.drop_path_rate)
        self.model_input = model_input_of(model)
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.order = SampleOrder(config.train.seed, prepared.train.shard_sizes, config.data.lanes, config.data.window)
        self.engine = Engine(model, config, prepared.ds_config, accumulation)
        self.metrics: MetricsWriter | None = None

    def _build(self, drop_path_rate: float) -> torch.nn.Module:
        try:
            model = timm.create_model(self.config.model.name, drop_path_rate=drop_path_rate, **self.model_args)
        except (TypeError, ValueError, AssertionError, RuntimeError, ArithmeticError, LookupError) as error:
            raise SettingsError(f"--model.name {self.config.model.name} cannot be built with {self.model_args}: "
                                f"{error}") from error
        if hasattr(model, "set_retention_mode"):
            model.set_retention_mode(self.config.model.retention_mode, self.config.model.chunk_size)
        return model.to(self.world.device)

    def train(self) -> bool:
        config = self.config
        progress = Progress(samples_seen=0, updates=0)
        self._resume(progress)
        first = progress.samples_seen // config.train.global_batch_size
        if self.world.is_main:
            replace_text(self.folder / CONFIG_FILE, dump_yaml(config))
            replace_text(self.folder / DEEPSPEED_FILE, Path(config.deepspeed_config).read_text())
            self.metrics = MetricsWriter(self.folder, progress.samples_seen / self.plan.num_samples, first)
        self._announce(first)
        batches = train_batches(
            self.prepared.train, self.order, config.augment, self.model_input, seed=config.train.seed,
            first_step=first, last_step=self.plan.total_steps, global_batch_size=config.train.global_batch_size,
            micro_batch_size=config.train.micro_batch_size, rank=self.world.rank, world_size=self.world.size,
            workers=config.data.workers, prefetch=config.data.prefetch, device=self.world.device)
        trainer = Trainer(config, self.plan, self.engine, self.world, self.prepared.train, self.order,
                          self.model_input, self.metrics, self._evaluate, self._save)
        return trainer.fit(batches, progress)

    def _announce(self, first: int) -> None:
        config, plan = self.config, self.plan
        log.info("%s, %.2f M parameters, input %s; ZeRO %d, %s, %d ranks on %s", config.model.name,
                 self.parameters / 1e6, "x".join(map(str, self.model_input.size)), self.engine.zero_stage,
                 self.engine.precision, self.world.size, self.world.device.type)
        log.info("%d training and %d validation images, %d classes; %d steps of %d = %d x %d x %d ranks%s",
                 plan.num_samples, len(self.prepared.val), plan.num_classes, plan.total_steps,
                 config.train.global_batch_size, plan.accumulation, config.train.micro_batch_size, self.world.size,
                 f"; continuing after step {first}" if first else "")

    def _resume(self, progress: Progress) -> None:
        """Load the newest checkpoint of the run folder, where there is one; every rank loads the one rank 0 names."""
        found = distributed.broadcast(newest(self.folder) if self.world.is_main else None)
        if found is None:
            return
        info = read_info(found)
        if {**info.model_args, "name": info.model_name} != {**self.model_args, "name": self.config.model.name}:
            raise SettingsError(f"{found} holds a {info.model_name} with {info.model_args}, this run builds a "
                                f"{self.config.model.name} with {self.model_args}; give another --output")
        if info.data_fingerprint != self.prepared.train.fingerprint and not self.config.accept_config_change:
            raise SettingsError(f"{found} was trained on other shards than --data.train {self.config.data.train}; give "
                                "those, or --accept_config_change true")
        size = self.config.train.global_batch_size
        if info.samples_seen % size:
            raise SettingsError(f"{found} has seen {info.samples_seen} samples, not a multiple of "
                                f"--train.global_batch_size {size}; choose one that divides it")
        checkpoint.load(self.engine, found, info, self.world)
        progress.samples_seen, progress.updates = info.samples_seen, info.updates

    def _save(self, progress: Progress) -> None:
        info = CheckpointInfo(
            samples_seen=progress.samples_seen, step=progress.samples_seen // self.config.train.global_batch_size,
            updates=progress.updates, world_size=self.world.size, zero_stage=self.engine.zero_stage,
            precision=self.engine.precision, ema=self.engine.has_ema, model_name=self.config.model.name,
            model_args=self.model_args, model_input=asdict(self.model_input),
            classes=list(self.prepared.train.classes), data_fingerprint=self.prepared.train.fingerprint)
        checkpoint.save(self.engine, self.folder, info, self.world, self.config.checkpoint.keep)

    def _evaluate(self, step: int) -> None:
        """Accuracy of the weights and of their average, in the training precision, on every rank's share."""
        results: dict[str, float] = {}
        model = self._build(drop_path_rate=0.0).to(self.engine.dtype)
        state = model.state_dict()
        for prefix, averaged in (("", False), ("ema_", True)) if self.engine.has_ema else (("", False),):
            for name, weight in self.engine.full_weights(averaged):
                state[name].copy_(weight)
            for name, buffer in self.engine.module.named_buffers():
                if name in state:
                    state[name].copy_(buffer)
            batches = eval_batches(
                self.prepared.val, self.model_input, batch_size=self.config.eval.batch_size, rank=self.world.rank,
                world_size=self.world.size, workers=self.config.data.workers, device=self.world.device)
            with tqdm(total=len(self.prepared.val), desc=f"{prefix}eval", leave=False, unit="image",
                      disable=not self.world.is_main) as bar:
                found = classify(model, batches, self.model_input, self.world.device, bar)
            results |= {f"{prefix}top1": found.top1, f"{prefix}top5": found.top5, f"{prefix}loss": found.loss}
        if self.metrics is not None:
            self.metrics.write("eval", step, epoch=step * self.config.train.global_batch_size / self.plan.num_samples,
                               images=len(self.prepared.val), **results)
        log.info("step %d: %s", step, ", ".join(f"{name} {value:.3f}" for name, value in results.items()))

    def close(self) -> None:
        if self.metrics is not None:
            self.metrics.close()
        self.engine.close()
