"""Where a run's settings, data, engine and loop meet."""

from __future__ import annotations

import fcntl
import os
import secrets
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Callable

import timm
import torch
from tqdm import tqdm

from vir import distributed
from vir import log as logs
from vir.checkpoints import store
from vir.checkpoints.info import CheckpointInfo
from vir.checkpoints.partitions import Partitions
from vir.cluster.signals import StopRequest
from vir.config import ModelConfig, differences, dump_yaml, plan_accumulation, to_dict
from vir.data.loader import eval_batches, train_batches
from vir.data.order import SampleOrder
from vir.data.transforms import InputConfig, model_input_of
from vir.engine.engine import Engine
from vir.errors import EXIT_STOPPED_BY_SIGNAL, SettingsError, VirError
from vir.evaluation.classify import Accuracy, classify
from vir.files import replace_text
from vir.log import log
from vir.models import initialize_from
from vir.reports.curves import plot_runs
from vir.reports.metrics import MetricsWriter, read_metrics
from vir.reports.throughput import forward_flops, peak_flops
from vir.training.loop import Plan, Trainer, steps_every
from vir.training.plan import describe
from vir.training.prepare import CONFIG_FILE, Prepared
from vir.training.schedule import total_steps

DEEPSPEED_FILE = "ds_config.json"


def run(prepared: Prepared, stop: StopRequest) -> int:
    """Train, and return the exit code: 0 when done, EXIT_STOPPED_BY_SIGNAL when a signal ended it after saving."""
    config = prepared.config
    world = distributed.start()
    stop.join(world.size)
    folder = Path(config.output)
    if config.dry_run or config.validate_only:
        logs.start(world.rank)
        job = _Job(prepared, world, folder, stop)
        try:
            done = job.show_plan() if config.dry_run else job.validate()
        finally:
            job.close()
        distributed.barrier()
        return 0 if done else EXIT_STOPPED_BY_SIGNAL
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"--output {folder} cannot be made: {error.strerror}; give another folder") from error
    _check_shared(folder, world)
    lock = _lock(folder, world)
    logs.start(world.rank, folder)
    try:
        job = _Job(prepared, world, folder, stop)
        try:
            done = job.train()
        finally:
            job.close()
    finally:
        if lock is not None:
            os.close(lock)
    if world.is_main:
        try:
            plot_runs([folder], folder / "curves.png")
        except (OSError, VirError, RuntimeError) as error:  # the run is done, with or without its picture
            log.warning("curves.png was not drawn: %s", error)
        log.info("done: %s" if done else "stopped by a signal; the same command continues: %s", folder)
    distributed.barrier()
    return 0 if done else EXIT_STOPPED_BY_SIGNAL


def _check_shared(folder: Path, world: distributed.World) -> None:
    """Rank 0 writes a token that every rank must be able to read: checkpoints need one folder for all nodes."""
    token, wrong = distributed.broadcast(secrets.token_hex(8)), None
    path = folder / f".shared-{token}"
    if world.is_main:
        try:
            path.write_text(token)
        except OSError as error:
            wrong = error.strerror
    if wrong := distributed.broadcast(wrong):
        raise SettingsError(f"--output {folder} cannot be written to: {wrong}; give another folder")
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

    def __init__(self, prepared: Prepared, world: distributed.World, folder: Path, stop: StopRequest) -> None:
        config = self.config = prepared.config
        self.prepared, self.world, self.folder, self.stop = prepared, world, folder, stop
        self.accumulation = plan_accumulation(config.train.global_batch_size, config.train.micro_batch_size, world.size)
        self.model_args = {**config.model.args, "num_classes": len(prepared.train.classes)}
        if config.model.img_size is not None and getattr(
                timm.get_pretrained_cfg(config.model.name), "fixed_input_size", False):
            self.model_args["img_size"] = config.model.img_size  # others take images of any size
        torch.manual_seed(config.train.seed)
        network = _build(config.model, self.model_args)
        self.model_input = _input_of(network, config.model)
        self.order = SampleOrder(config.train.seed, prepared.train.shard_sizes, config.data.lanes, config.data.window)
        self.engine = Engine(network.to(world.device), config, prepared.ds_config, self.accumulation, world)
        self.plan = self._plan()
        self.metrics: MetricsWriter | None = None
        self.best = float("-inf")
        self.results: dict[str, float] = {}
        self.evaluated_at = -1
        self.saving: list[float] = []

    def _plan(self) -> Plan:
        config, num_samples = self.config, len(self.prepared.train)
        size = config.train.global_batch_size
        total = total_steps(config.train.epochs, num_samples, size)
        return Plan(
            num_samples=num_samples, num_classes=len(self.prepared.train.classes), accumulation=self.accumulation,
            total_steps=total, steps_per_epoch=num_samples / size,
            eval_steps=steps_every(config.eval.every_epochs, num_samples, size, total),
            checkpoint_steps=steps_every(config.checkpoint.every_epochs, num_samples, size, total),
            forward_flops=forward_flops(config.model.name, self.model_args, self.model_input.size),
            peak_flops=peak_flops(self.world.device, self.engine.precision, config.train.peak_tflops))

    def train(self) -> bool:
        config = self.config
        info = self._resume()
        size = config.train.global_batch_size
        seen = info.samples_seen if info else 0
        first = seen // size
        self.best = distributed.broadcast(store.best_so_far(self.folder, config.checkpoint.best))
        if self.world.is_main:
            replace_text(self.folder / CONFIG_FILE, dump_yaml(config))
            replace_text(self.folder / DEEPSPEED_FILE, Path(config.deepspeed_config).read_text())
            self.metrics = MetricsWriter(self.folder, seen / self.plan.num_samples, first, config.train.wandb,
                                         to_dict(config))
        for line in self._describe():
            log.info(line)
        if first:
            log.info("continuing after step %d", first)
        batches = train_batches(
            self.prepared.train, self.order, config.augment, self.model_input, seed=config.train.seed,
            first_step=first, last_step=self.plan.total_steps, global_batch_size=size,
            micro_batch_size=config.train.micro_batch_size, rank=self.world.rank, world_size=self.world.size,
            workers=config.data.workers, prefetch=config.data.prefetch, device=self.world.device)
        trainer = Trainer(config, self.plan, self.engine, self.world, self.prepared.train, self.order,
                          self.model_input, self.metrics, self.stop, self._evaluate_at, self._save,
                          self.folder / "profile" / f"rank{self.world.rank:05d}.json")
        done = trainer.fit(batches, first, evaluate_first=self._evaluation_is_due(first))
        self._summarise(trainer)
        return done

    def _describe(self) -> list[str]:
        return describe(self.config, self.prepared, self.plan, self.engine, self.world, self.model_input)

    def _summarise(self, trainer: Trainer) -> None:
        did = trainer.summary
        if not did.images:
            return
        log.info("%d images in %s of steps: %.0f images/s, %.1f %% of the time waiting for data; evaluation and "
                 "checkpoints %s%s; %d updates in all, %d bad samples replaced%s", did.images,
                 timedelta(seconds=round(did.seconds)), did.images / did.seconds, 100 * did.waited / did.seconds,
                 timedelta(seconds=round(did.paused)),
                 f" (a checkpoint {sum(self.saving) / len(self.saving):.1f} s)" if self.saving else "",
                 self.engine.updates, did.bad,
                 "".join(f"; {name} {value:.2f}" for name, value in self.results.items() if "top1" in name))

    def show_plan(self) -> bool:
        for line in self._describe():
            log.info(line)
        log.info("a dry run: nothing was trained and nothing written")
        return True

    def validate(self) -> bool:
        info = self._resume()
        if info is None and not self.config.model.init_from:
            raise SettingsError(f"--validate_only: --output {self.folder} has no checkpoint to evaluate; name a run "
                                "folder, or weights by --model.init_from")
        return self._evaluate(info.step if info else 0)

    def _resume(self) -> CheckpointInfo | None:
        """Load the newest whole checkpoint of the run folder, or of --resume; every rank takes the same."""
        config, found = self.config, store.find(self.folder, self.world)
        if found is None and config.resume not in ("auto", "none"):
            found = store.find_named(Path(config.resume), self.world)
            changed = differences(found[1].config, to_dict(config))
            if changed and not config.accept_config_change:
                raise SettingsError(f"--resume {config.resume} was trained with other settings: {'; '.join(changed)}; "
                                    "--accept_config_change true goes on with the new ones")
        if found is None:
            return None
        folder, info = found
        if {**info.model_args, "name": info.model_name} != {**self.model_args, "name": config.model.name}:
            raise SettingsError(f"{folder} holds a {info.model_name} with {info.model_args}, this run builds a "
                                f"{config.model.name} with {self.model_args}; give another --output")
        if config.validate_only:
            pass
        elif info.data_fingerprint != self.prepared.train.fingerprint and not config.accept_config_change:
            raise SettingsError(f"{folder} was trained on other shards than --data.train {config.data.train}; give "
                                "those, or --accept_config_change true")
        elif info.samples_seen % config.train.global_batch_size:
            raise SettingsError(f"{folder} has seen {info.samples_seen} samples, not a multiple of "
                                f"--train.global_batch_size {config.train.global_batch_size}; choose one that divides "
                                "it")
        if (before := info.config["optim"]["name"]) != config.optim.name:
            raise SettingsError(f"{folder} holds the state of {before}, which --optim.name {config.optim.name} cannot "
                                "continue; consolidate it and give the weights as --model.init_from")
        if info.precision != self.engine.precision and not config.accept_config_change:
            raise SettingsError(f"{folder} was trained in {info.precision}, --deepspeed_config "
                                f"{config.deepspeed_config} is {self.engine.precision}; --accept_config_change true "
                                "goes on in that")
        if (info.world_size, info.zero_stage) != (self.world.size, self.engine.zero_stage):
            log.info("%s is of %d ranks and ZeRO %d: sharding it anew for %d ranks and ZeRO %d", folder,
                     info.world_size, info.zero_stage, self.world.size, self.engine.zero_stage)
        log.info("taking up %s%s", folder, "" if folder.is_relative_to(self.folder) or not self.world.is_main else
                 ", as --output has no checkpoint of its own yet")
        self.engine.restore(Partitions(folder, info), info)
        return info

    def _save(self, step: int) -> None:
        config = self.config
        metrics = self.results if self.evaluated_at == step else {}
        value = metrics.get(config.checkpoint.best, float("-inf"))
        is_best = value > self.best
        self.best = max(self.best, value)
        info = CheckpointInfo(
            samples_seen=step * config.train.global_batch_size, step=step, updates=self.engine.updates,
            world_size=self.world.size, zero_stage=self.engine.zero_stage, precision=self.engine.precision,
            ema=self.engine.has_ema, loss_scaler=self.engine.loss_scaler_state(), metrics=metrics,
            config=to_dict(config), model_name=config.model.name, model_args=self.model_args,
            model_input=asdict(self.model_input), classes=list(self.prepared.train.classes),
            data_fingerprint=self.prepared.train.fingerprint)
        every = config.checkpoint.keep_every_epochs
        kept = store.Kept(config.checkpoint.keep, every and every * self.plan.num_samples)
        self.saving.append(store.save(self.engine, self.folder, info, self.world, kept, is_best))

    def _evaluation_is_due(self, step: int) -> bool:
        """Whether the run stopped between a step and its evaluation."""
        if step not in self.plan.eval_steps:
            return False
        events = read_metrics(self.folder) if self.world.is_main else []
        return distributed.broadcast(not any(event["kind"] == "eval" and event["step"] == step for event in events))

    def _evaluate_at(self, step: int) -> bool | None:
        """Evaluate and write the result; whether it is the best so far, None when a signal cut it short."""
        if not self._evaluate(step):
            return None
        if self.metrics is not None:
            self.metrics.write("eval", step, epoch=step * self.config.train.global_batch_size / self.plan.num_samples,
                               images=len(self.prepared.val), **self.results)
        return self.results.get(self.config.checkpoint.best, float("-inf")) > self.best

    def _evaluate(self, step: int) -> bool:
        """Accuracy of the weights and of their average, in the training precision; False when a signal cut it short."""
        results: dict[str, float] = {}
        for prefix, averaged in (("", False), ("ema_", True)) if self.engine.has_ema else (("", False),):
            with self.engine.evaluating(averaged) as forward:
                found = self._classify(forward, f"{prefix}eval")
            if found is None:
                return False
            results |= {f"{prefix}top1": found.top1, f"{prefix}top5": found.top5, f"{prefix}loss": found.loss}
        log.info("step %d: %s", step, ", ".join(f"{name} {value:.3f}" for name, value in results.items()))
        self.results, self.evaluated_at = results, step
        return True

    def _classify(self, forward: Callable[[torch.Tensor], torch.Tensor], title: str) -> Accuracy | None:
        batches = eval_batches(
            self.prepared.val, self.model_input, batch_size=self.config.eval.batch_size, rank=self.world.rank,
            world_size=self.world.size, workers=self.config.data.workers, device=self.world.device)
        with tqdm(total=len(self.prepared.val), desc=title, leave=False, unit="image",
                  disable=not (self.world.is_main and logs.shows_bars())) as bar:
            return classify(forward, batches, self.model_input, self.world.device, bar, self.stop.agreed)

    def close(self) -> None:
        if self.metrics is not None:
            self.metrics.close()
        self.engine.close()


def _build(model: ModelConfig, args: dict[str, Any]) -> torch.nn.Module:
    try:
        network = timm.create_model(model.name, drop_path_rate=model.drop_path_rate, **args)
    except (TypeError, ValueError, AssertionError, RuntimeError, ArithmeticError, LookupError) as error:
        raise SettingsError(f"--model.name {model.name} cannot be built with {args}: {error}") from error
    if model.init_from:
        initialize_from(network, model.init_from)
    if hasattr(network, "set_retention_mode"):
        network.set_retention_mode(model.retention_mode, model.chunk_size)
    return network


def _input_of(network: torch.nn.Module, model: ModelConfig) -> InputConfig:
    """What the network's default_cfg says of images, with what the settings say instead."""
    found, side = model_input_of(network), model.img_size
    given = {"mean": model.mean, "std": model.std, "interpolation": model.interpolation, "crop_pct": model.crop_pct,
             "size": side and (found.size[0], side, side)}
    return replace(found, **{name: value for name, value in given.items() if value is not None})
