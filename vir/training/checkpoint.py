"""Checkpoints that a kill cannot break: written under a temporary name, complete on every rank, flushed, renamed.

RUN/checkpoints/step-00001000/ holds DeepSpeed's files (weights, optimizer state with the EMA, one part per rank) and
checkpoint.json; RUN/checkpoints/latest names the newest. A folder without checkpoint.json, or whose files are not
those that it lists, is not a checkpoint.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict
from pathlib import Path

from vir import distributed
from vir.distributed import World
from vir.errors import DataError, SettingsError
from vir.files import flush, replace_text
from vir.log import log
from vir.training.checkpoint_info import DESCRIPTION, FOLDER, FORMAT, LATEST, CheckpointInfo, name_of
from vir.training.engine import Engine


def save(engine: Engine, run: Path, info: CheckpointInfo, world: World, keep: int) -> None:
    """Write a checkpoint at the end of a step, move `latest` to it, remove all but the newest `keep`. Collective."""
    began = time.monotonic()
    root, name = run / FOLDER, name_of(info.step)
    part = name + ".part"
    if world.is_main:
        root.mkdir(exist_ok=True)
        for stale in root.glob("*.part"):  # of a run that was killed while it wrote
            shutil.rmtree(stale)
    distributed.barrier()
    engine.deepspeed.save_checkpoint(str(root), tag=part, save_latest=False)
    for path in _files_of(root / part, world):
        flush(path)
    distributed.barrier()
    if world.is_main:
        sizes = {path.name: path.stat().st_size for path in sorted((root / part).iterdir())}
        description = {"format": FORMAT, **asdict(info), "files": sizes}
        replace_text(root / part / DESCRIPTION, json.dumps(description, indent=1))
        if (root / name).exists():
            shutil.rmtree(root / name)
        (root / part).rename(root / name)
        flush(root)
        replace_text(root / LATEST, name)
        for script in root.glob("zero_to_*.py"):  # DeepSpeed puts its converters there: data should hold no programs
            script.unlink()
        for old in sorted(root.glob("step-????????"), key=lambda path: path.stat().st_mtime)[:-keep]:
            if old.name != name:
                shutil.rmtree(old)
        log.info("checkpoint %s: %.1f MB in %.1f s", root / name, sum(sizes.values()) / 1e6, time.monotonic() - began)
    distributed.barrier()


def _files_of(folder: Path, world: World) -> list[Path]:
    """What this rank has written: its part of the optimizer and, on rank 0, everything that carries no rank."""
    own = f"_pp_rank_{world.rank}_"
    return [path for path in folder.iterdir() if own in path.name or (world.is_main and "_pp_rank_" not in path.name)]


def load(engine: Engine, folder: Path, info: CheckpointInfo, world: World) -> None:
    """Put a checkpoint back into an engine of the same world size, ZeRO stage and precision. Collective.

    Args:
        info: what read_info(folder) has found, every file being there.

    Raises:
        SettingsError: the engine differs from the one that saved.
    """
    for what, saved, now, flag in (
            ("ranks", info.world_size, world.size, "start the same number of ranks"),
            ("ZeRO stage", info.zero_stage, engine.zero_stage, "use a --deepspeed_config of that stage"),
            ("precision", info.precision, engine.precision, "use a --deepspeed_config of that precision"),
            ("EMA", info.ema, engine.has_ema, "give the same --ema.decay")):
        if saved != now:
            raise SettingsError(f"{folder} was saved with {what} {saved}, this run has {now}; {flag}, or consolidate "
                                "it with tools/consolidate_checkpoint.py")
    groups = engine.deepspeed.optimizer.param_groups
    settings = [{key: group[key] for key in ("betas", "eps", "weight_decay")} for group in groups]
    loaded, _ = engine.deepspeed.load_checkpoint(str(folder.parent), tag=folder.name)
    if loaded is None:
        raise DataError(f"DeepSpeed could not load {folder}")
    for group, own in zip(engine.deepspeed.optimizer.param_groups, settings):
        group.update(own)  # the run config owns them; the checkpoint brings those it was saved with
