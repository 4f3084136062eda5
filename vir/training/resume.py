"""From a checkpoint back into the engine: which one, whether it fits, what it says."""

from __future__ import annotations

from pathlib import Path

from vir.addresses import shown
from vir.checkpoints.info import CheckpointInfo
from vir.checkpoints.names import BEST, name_of
from vir.checkpoints.partitions import Partitions
from vir.checkpoints.store import select
from vir.config import RunConfig, differences, to_dict
from vir.distributed import World
from vir.engine.engine import Engine
from vir.errors import CheckpointError, SettingsError
from vir.log import log
from vir.run_folder import CHECKPOINTS
from vir.weights.spec import ModelSpec


def resume(config: RunConfig, engine: Engine, spec: ModelSpec, data_fingerprint: str, world: World,
           teacher: str = "", verified: Path | None = None) -> CheckpointInfo | None:
    """Load the checkpoint that --output means, or that --resume means where --output has none yet. Collective.

    With validate_only the one that --resume names comes first, `none` means none, and --which chooses among a run's.

    Args:
        teacher: fingerprint of the model that teaches; empty where none does.
        verified: as store.select takes it.

    Returns:
        What it says of itself; None where the run begins.

    Raises:
        CheckpointError: --resume names no checkpoint, or all are damaged.
        SettingsError: it does not fit the settings, the data, the model or the teacher of this run.
    """
    is_named = config.resume not in ("auto", "none")
    takes_own = not config.validate_only or config.resume == "auto"
    selected = select(Path(config.output), world, config.which, verified) if takes_own else None
    is_own = selected is not None
    if selected is None and is_named:
        selected = _named(config, world)
    if selected is None:
        return None
    folder, info = selected
    if not is_own:
        _check_settings(config, info)
    _check_model(folder, info, spec)
    if not config.validate_only:
        _check_data(config, folder, info, data_fingerprint)
        _check_teacher(config, folder, info, teacher)
    _check_engine(config, folder, info, engine)
    if (info.world_size, info.zero_stage) != (world.size, engine.zero_stage):
        log.info("%s is of %d ranks and ZeRO %d: sharding it anew for %d ranks and ZeRO %d", folder,
                 info.world_size, info.zero_stage, world.size, engine.zero_stage)
    log.info("taking up %s%s", folder, ", as --output has no checkpoint of its own yet"
             if takes_own and not is_own else "")
    engine.restore(Partitions(folder, info), info)
    return info


def _named(config: RunConfig, world: World) -> tuple[Path, CheckpointInfo]:
    if (selected := select(Path(config.resume), world, config.which)) is None:
        raise CheckpointError(f"--resume {config.resume} is neither a run folder with a checkpoint nor a checkpoint; "
                              f"give auto, none, or a path such as runs/a, runs/a/{CHECKPOINTS}/{BEST} or "
                              f"runs/a/{CHECKPOINTS}/{name_of(1000)}")
    return selected


def _check_settings(config: RunConfig, info: CheckpointInfo) -> None:
    changed = differences(info.config, to_dict(config))
    if changed and not config.accept_config_change:
        raise SettingsError(f"--resume {config.resume} was trained with other settings: {'; '.join(changed)}; "
                            "--accept_config_change true goes on with the new ones")


def _check_model(folder: Path, info: CheckpointInfo, spec: ModelSpec) -> None:
    if (info.model.name, info.model.args) != (spec.name, spec.args):
        raise SettingsError(f"{folder} holds a {info.model.name} with {info.model.args}, this run builds a "
                            f"{spec.name} with {spec.args}; give another --output")


def _check_data(config: RunConfig, folder: Path, info: CheckpointInfo, fingerprint: str) -> None:
    if info.data_fingerprint != fingerprint and not config.accept_config_change:
        raise SettingsError(f"{folder} was trained on other shards than --data.train {shown(config.data.train)}" + (
            f", or without other samples than --data.exclude {config.data.exclude or '(not given)'} names"
            if config.data.exclude or info.config.get("data", {}).get("exclude") else "") +
            "; give those, or --accept_config_change true")
    if info.samples_seen % config.train.global_batch_size:
        raise SettingsError(f"{folder} has seen {info.samples_seen} samples, not a multiple of "
                            f"--train.global_batch_size {config.train.global_batch_size}; choose one that divides it")


def _check_teacher(config: RunConfig, folder: Path, info: CheckpointInfo, fingerprint: str) -> None:
    if info.teacher != fingerprint and not config.accept_config_change:
        before, now = (f"{text[:12]}…" if text else "none" for text in (info.teacher, fingerprint))
        raise SettingsError(f"{folder} was trained with another teacher than --distill.teacher "
                            f"{shown(config.distill.teacher) or '(not given)'}: its fingerprint was {before}, that of "
                            f"this one is {now}; give the teacher of then, or --accept_config_change true")


def _check_engine(config: RunConfig, folder: Path, info: CheckpointInfo, engine: Engine) -> None:
    if (before := info.config["optim"]["name"]) != config.optim.name:
        raise SettingsError(f"{folder} holds the state of {before}, which --optim.name {config.optim.name} cannot "
                            "continue; consolidate it and give the weights as --model.init_from")
    if info.precision != engine.precision and not config.accept_config_change:
        raise SettingsError(f"{folder} was trained in {info.precision}, --deepspeed_config "
                            f"{config.deepspeed_config} is {engine.precision}; --accept_config_change true "
                            "goes on in that")
