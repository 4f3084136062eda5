"""A run from its settings to its summary, in a straight line: data, model, engine, resume, fit."""

from __future__ import annotations

import shutil
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable

import torch
from torch import Tensor

from vir import arithmetic, cli, distributed
from vir import log as logs
from vir import run_folder
from vir.checkpoints.local import LocalCopies
from vir.cluster import agreement
from vir.cluster.heartbeat import Heartbeat
from vir.cluster.signals import StopRequest
from vir.config import RunConfig, dump_yaml, to_dict, trains
from vir.data.device import Preparation
from vir.data.loader import Batches, Patience, train_batches
from vir.data.opening import check_agreement
from vir.data.order import SampleOrder
from vir.distributed import World
from vir.engine import ds_config
from vir.engine.engine import Engine
from vir.errors import EXIT_STOPPED_BY_SIGNAL, SettingsError, VirError
from vir.files import replace_text
from vir.log import log
from vir.models.build import build
from vir.planning import page
from vir.reports.curves import plot_runs
from vir.reports.environment import describe_environment
from vir.reports.metrics import MetricsWriter, read_metrics
from vir.startup import StartupTimer
from vir.training import features
from vir.training.distill import Teacher, load_teacher, make_student
from vir.training.features import FeatureBatches, FeaturePreparation
from vir.training.forecast import check_memory_of_nodes, forecast
from vir.training.guard import FiniteGuard
from vir.training.loop import Ending, GlobalStep, Trainer
from vir.training.meter import Meter
from vir.training.plan import Plan, describe, make_plan
from vir.training.prepare import Prepared, continues
from vir.training.profiler import Profiler
from vir.training.resume import resume
from vir.training.saver import Saver
from vir.training.validator import Validator
from vir.weights.spec import ModelSpec

_DEV_STEPS = 10
"""Of fast_dev_run."""


@dataclass(frozen=True, kw_only=True)
class _Context:
    """What a rank begins with: settings and data, its place, how it hears of a stop and tells where it is."""

    prepared: Prepared
    world: World
    stop: StopRequest
    heartbeat: Heartbeat
    startup: StartupTimer

    @property
    def config(self) -> RunConfig:
        return self.prepared.config

    @property
    def folder(self) -> Path:
        return Path(self.config.output)

    @property
    def patience(self) -> Patience:
        return Patience(seconds=self.config.train.rank_timeout, give_up=lambda: self.stop.asked,
                        tell=lambda said: log.warning("rank %d: %s", self.world.rank, said))


@dataclass(frozen=True, kw_only=True)
class _Built:
    """What is made of the settings, before anything is resumed."""

    plan: Plan
    engine: Engine
    spec: ModelSpec
    teacher: Teacher | None

    @property
    def teacher_fingerprint(self) -> str:
        return self.teacher.fingerprint if self.teacher else ""


def run(prepared: Prepared, stop: StopRequest, heartbeat: Heartbeat, startup: StartupTimer) -> int:
    """Train, and return the exit code: 0 when done, EXIT_STOPPED_BY_SIGNAL when a signal ended it after saving.

    With dry_run it only tells the plan, with validate_only it only evaluates; neither leaves anything. With
    fast_dev_run it does both halves of a short run.
    """
    config = prepared.config
    leaves_nothing = config.dry_run or config.validate_only or config.train.fast_dev_run
    heartbeat.at("waiting for all ranks to begin", counts=False)
    arithmetic.set_up(config.train.tf32, config.train.deterministic)
    world = distributed.start()
    agreement.check(config, prepared.ds_config)
    stop.join()
    startup.ended("process group")
    begin = _try_everything if config.train.fast_dev_run else _run
    ending = begin(_Context(prepared=prepared, world=world, stop=stop, heartbeat=heartbeat, startup=startup))
    if ending is Ending.STOPPED:
        goes_on = "" if leaves_nothing else f"; the same command continues: {config.output}"
        log.info(f"stopped by {stop.cause}{goes_on}")
        cli.report(f"stopped by {stop.cause}{goes_on}")
    heartbeat.at("waiting for all ranks to end", counts=False)
    distributed.barrier()
    return 0 if ending is Ending.DONE else EXIT_STOPPED_BY_SIGNAL


def _run(context: _Context) -> Ending:
    config, world = context.config, context.world
    context.heartbeat.at("building model and engine, compiling", counts=False)
    is_run = trains(config)
    with nullcontext() if config.validate_only else run_folder.claim(context.folder, world, stays=is_run):
        logs.start(world.rank, context.folder / run_folder.LOG if is_run else None)
        for line in describe_environment(world):
            log.info(line)
        _check_agreement(context.prepared)
        built = _build(context)
        with closing(built.engine):
            goes_about = _show_plan if config.dry_run else _validate if config.validate_only else _train
            ending = goes_about(context, built)
        if is_run and world.is_main:
            _draw_curves(context.folder)
            if ending is Ending.DONE:
                log.info("done: %s", context.folder)
    return ending


def _build(context: _Context) -> _Built:
    """Model, teacher, plan and engine. Collective."""
    config, prepared, world = context.config, context.prepared, context.world
    torch.manual_seed(config.train.seed)
    fresh = not distributed.broadcast(continues(config))
    network, spec = build(config.model, prepared.train.classes, fresh, config.train.linear_probe)
    # After the model: what a teacher draws while it is built changes no initial weight.
    teacher = None if config.validate_only else load_teacher(config.distill, spec, world.device)
    make_student(network, spec.name, config.distill)
    context.startup.ended("model")
    plan = make_plan(config, prepared.train, spec, world, ds_config.precision(prepared.ds_config))
    engine = Engine(network.to(world.device), config, prepared.ds_config, plan.accumulation)
    context.startup.ended("engine")
    return _Built(plan=plan, engine=engine, spec=spec, teacher=teacher)


def _check_agreement(prepared: Prepared) -> None:
    """Each rank has listed the images, or found their index, by itself: the order must be the same. Collective."""
    check_agreement("--data.train", prepared.train)
    if prepared.val is not None:
        check_agreement("--data.val", prepared.val)
    fingerprints = distributed.gather(prepared.fingerprint)
    if unlike := [rank for rank, fingerprint in enumerate(fingerprints) if fingerprint != fingerprints[0]]:
        raise SettingsError(f"--data.exclude {prepared.config.data.exclude} names other samples for rank {unlike[0]} "
                            "than for rank 0; see that the file is the same on all machines")
    orders = distributed.gather(prepared.config.data.order)
    if other := set(orders) - {orders[0]}:
        raise SettingsError(f"lanes and window are {orders[0]} for rank 0 and {min(other)} for another: as many ranks "
                            "on each machine choose the same; give --data.lanes and --data.window")


def _try_everything(context: _Context) -> Ending:
    """Half of the steps, with an evaluation and a checkpoint, then the other half after a resume; remove it all."""
    config, world = context.config, context.world
    folder = Path(f"{context.folder}.fast_dev_run")  # beside it, also where it was given as runs/a/
    with run_folder.claim(folder, world, stays=False):  # it is no other's that goes on
        if world.is_main:
            for left in folder.iterdir():  # by an attempt that was killed
                shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
    for steps in (_DEV_STEPS // 2, _DEV_STEPS):
        short = replace(
            config, output=str(folder), resume="auto", accept_config_change=True,
            train=replace(config.train, steps=steps, log_every=1, wandb=""),
            checkpoint=replace(config.checkpoint, local=""),  # nothing stays of this run
            schedule=replace(config.schedule, warmup_epochs=0.0, cooldown_epochs=0.0))
        ending = _run(replace(context, prepared=replace(context.prepared, config=short)))
        context = replace(context, startup=StartupTimer())
        if ending is Ending.STOPPED:
            break
    logs.start(world.rank)  # no longer to a file there
    if world.is_main:
        shutil.rmtree(folder, ignore_errors=True)
    log.info("fast_dev_run: %s; %s is removed", "stopped before its end" if ending is Ending.STOPPED else
             f"{_DEV_STEPS} steps were trained, evaluated, saved and resumed", folder)
    return ending


def _show_plan(context: _Context, built: _Built) -> Ending:
    info = resume(context.config, built.engine, built.spec, context.prepared.fingerprint, context.world,
                  built.teacher_fingerprint)
    if context.stop.agree():
        return Ending.STOPPED
    _describe(context, built)
    problem = ""
    if context.world.is_main:
        try:
            found = forecast(context.prepared, built.plan, context.world, built.teacher)
            for line in page.lines(found):
                log.info(line)
            found.check_that_something_fits()
        except SettingsError as error:
            problem = str(error)
    if problem := distributed.broadcast(problem):
        raise SettingsError(problem)
    done = info.samples_seen // built.plan.global_batch_size if info else 0
    log.info("a dry run: nothing was trained and nothing is left; the run would %s of %d",
             f"go on after step {done}" if done else "begin at step 1", built.plan.total_steps)
    return Ending.DONE


def _describe(context: _Context, built: _Built) -> None:
    config, prepared, plan, engine = context.config, context.prepared, built.plan, built.engine
    if context.world.is_main:  # it looks at the disk
        for line in describe(config, prepared.ds_config, plan, engine, built.spec, prepared.train, prepared.val,
                             context.world, built.teacher):
            log.info(line)
        if config.train.linear_probe:
            log.info(features.describe(config.augment, plan, engine))
        if prepared.exclusion:
            log.info("%d samples are left out, as --data.exclude %s says", len(prepared.exclusion),
                     config.data.exclude)


def _validate(context: _Context, built: _Built) -> Ending:
    config, prepared = context.config, context.prepared
    info = resume(config, built.engine, built.spec, prepared.fingerprint, context.world)
    if info is None and not (config.model.init_from or config.model.pretrained):
        raise SettingsError(f"--validate_only: --output {config.output} has no checkpoint to evaluate; name a run "
                            "folder by it or by --resume, or weights by --model.init_from")
    assert prepared.val is not None, "RunConfig has refused validate_only without data.val"
    validator = Validator(config, built.engine, prepared.val, built.spec.input, context.world, context.stop,
                          context.patience, context.heartbeat)
    results = validator.evaluate(info.step if info else 0)
    return Ending.STOPPED if results is None else Ending.DONE


def _train(context: _Context, built: _Built) -> Ending:
    config, prepared, world, heartbeat = context.config, context.prepared, context.world, context.heartbeat
    plan, engine, spec = built.plan, built.engine, built.spec
    check_memory_of_nodes(config, prepared.ds_config, engine, world)
    local, verified = None, None
    if config.checkpoint.local:
        heartbeat.at("looking for checkpoints on the nodes' own disks", counts=False)
        local = LocalCopies(Path(config.checkpoint.local), context.folder, world)
        verified = local.bring_back()
    info = resume(config, engine, spec, prepared.fingerprint, world, built.teacher_fingerprint, verified)
    first = info.samples_seen // plan.global_batch_size if info else 0
    context.startup.ended("checkpoint")
    saver = Saver(config, plan, engine, spec, prepared.fingerprint, world, heartbeat, first, built.teacher_fingerprint,
                  local)
    writer = _begin_writing(prepared, plan, first, world)
    with closing(writer) if writer else nullcontext():
        _describe(context, built)
        if first:
            log.info("continuing after step %d", first)
        order = SampleOrder(config.train.seed, prepared.train.shard_sizes, *config.data.order, prepared.exclusion)
        loading = _begin_loading(context, built, order, first)
        if loading is None:
            return Ending.STOPPED
        batches, preparation = loading
        meter = Meter(config, plan, engine, world, writer, heartbeat, first)
        guard = FiniteGuard(order, prepared.train)
        global_step = GlobalStep(config.train, plan, engine, preparation, guard, meter.forward_clock, world.rank,
                                 built.teacher)
        validator = None if prepared.val is None else Validator(
            config, engine, prepared.val, spec.input, world, context.stop, context.patience, heartbeat, saver)
        profiler = Profiler(config.train.profile, first, plan.total_steps, context.folder / run_folder.PROFILE, world)
        trainer = Trainer(plan, global_step, meter, validator, saver, profiler, context.stop, heartbeat,
                          context.startup)
        ending = trainer.fit(batches, first, evaluate_first=_evaluation_is_due(plan, first, context.folder, world))
        meter.summarise(saver.saved, saver.waited)
        return ending


def _begin_loading(context: _Context, built: _Built, order: SampleOrder, first: int) -> \
        tuple[Batches | FeatureBatches, Callable[[Any], tuple[Tensor, Tensor]]] | None:
    """Batches from step `first` on, and what makes of one what the engine takes and its targets.

    A linear probe's features are computed here where they can be kept; None where a signal ended that. Collective.
    """
    config, reader, world = context.config, context.prepared.train, context.world
    plan, spec = built.plan, built.spec
    probes = config.train.linear_probe
    if probes and first < plan.total_steps and features.can_be_kept(config, built.engine, spec.input, world):
        kept = features.compute(config, plan, built.engine, reader, order, spec.input, world, context.patience,
                                context.stop, context.heartbeat)
        if kept is None:
            return None
        context.startup.ended("features")
        return (FeatureBatches(kept, order, plan, config.train.micro_batch_size, first, world),
                FeaturePreparation(config.train.smoothing, plan.num_classes))
    batches = train_batches(
        reader, order, config.augment, spec.input, seed=config.train.seed, first_step=first,
        last_step=plan.total_steps, global_batch_size=plan.global_batch_size,
        micro_batch_size=config.train.micro_batch_size, rank=world.rank, world_size=world.size,
        workers=config.data.workers, prefetch=config.data.prefetch, device=world.device,
        patience=context.patience, as_in_evaluation=probes and not config.augment.draws)
    return batches, Preparation(model_input=spec.input, augment=config.augment, smoothing=config.train.smoothing,
                                num_classes=plan.num_classes, device=world.device)


def _begin_writing(prepared: Prepared, plan: Plan, first: int, world: World) -> MetricsWriter | None:
    """Leave the settings in the run folder and open its metrics, on rank 0. Collective.

    Raises:
        SettingsError: they cannot be written.
    """
    config, folder = prepared.config, Path(prepared.config.output)
    writer, problem = None, ""
    if world.is_main:
        try:
            replace_text(folder / run_folder.CONFIG, dump_yaml(config))
            replace_text(folder / run_folder.DS_CONFIG, ds_config.locate(config.deepspeed_config).read_text())
            writer = MetricsWriter(folder, plan.epoch(first), first, config.train.wandb, to_dict(config))
        except SettingsError as error:
            problem = str(error)
        except OSError as error:
            problem = (f"--output {folder}: {error.filename or 'it'} cannot be written: {error.strerror}; free some "
                       "space or give another folder")
    if problem := distributed.broadcast(problem):
        raise SettingsError(problem)
    return writer


def _evaluation_is_due(plan: Plan, step: int, folder: Path, world: World) -> bool:
    """Whether the run stopped between a step and its evaluation. Collective."""
    if step not in plan.eval_steps:
        return False
    events = read_metrics(folder) if world.is_main else []
    return distributed.broadcast(not any(event["kind"] == "eval" and event["step"] == step for event in events))


def _draw_curves(folder: Path) -> None:
    try:
        plot_runs([folder], folder / run_folder.CURVES)
    except (OSError, VirError, RuntimeError) as error:  # the run is done, with or without its picture
        log.warning("%s was not drawn: %s", run_folder.CURVES, error)


if __name__ == "__main__":
    raise SystemExit("vir.training.run is a part of the library; the program is vir-train")
