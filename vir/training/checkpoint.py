"""Checkpoints that a kill cannot break: written under a temporary name, complete on every rank, flushed, renamed.

RUN/checkpoints/step-00001000/ holds DeepSpeed's files (weights, optimizer state with the EMA, one part per rank) and
checkpoint.json; RUN/checkpoints/latest names the newest. A folder without checkpoint.json, or whose files are not
those that it lists, is not a checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vir import distributed
from vir.distributed import World
from vir.errors import DataError, SettingsError
from vir.log import log
from vir.training.engine import Engine

FOLDER = "checkpoints"
DESCRIPTION = "checkpoint.json"
LATEST = "latest"
_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """What a checkpoint says of itself in checkpoint.json."""

    samples_seen: int
    """Positions of the training sequence consumed: the one number that says where training stands."""
    step: int
    """Global batches consumed."""
    updates: int
    """Steps whose update was applied."""
    world_size: int
    zero_stage: int
    precision: str
    ema: bool
    model_name: str
    model_args: dict[str, Any]
    """For timm.create_model, the class count included."""
    model_input: dict[str, Any]
    """size, mean, std, interpolation, crop_pct."""
    classes: list[str]
    data_fingerprint: str
    """Of the training shards and their class list."""


def name_of(step: int) -> str:
    return f"step-{step:08d}"


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
        _flush(path)
    distributed.barrier()
    if world.is_main:
        sizes = {path.name: path.stat().st_size for path in sorted((root / part).iterdir())}
        description = {"format": _FORMAT, **asdict(info), "files": sizes}
        _write(root / part / DESCRIPTION, json.dumps(description, indent=1))
        _flush(root / part)
        if (root / name).exists():
            shutil.rmtree(root / name)
        (root / part).rename(root / name)
        _write(root / LATEST, name)
        _flush(root)
        for old in sorted(root.glob("step-????????"))[:-keep]:
            if old.name != name:
                shutil.rmtree(old)
        log.info("checkpoint %s: %.1f MB in %.1f s", root / name, sum(sizes.values()) / 1e6, time.monotonic() - began)
    distributed.barrier()


def _files_of(folder: Path, world: World) -> list[Path]:
    """What this rank has written: its part of the optimizer and, on rank 0, everything that carries no rank."""
    own = f"_pp_rank_{world.rank}_"
    return [path for path in folder.iterdir() if own in path.name or (world.is_main and "_pp_rank_" not in path.name)]


def _write(path: Path, text: str) -> None:
    """Replace a small file: after a kill it holds the old text or the new."""
    part = path.with_name(path.name + ".new")
    with part.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def newest(run: Path) -> Path | None:
    """The checkpoint that `latest` names; None where no checkpoint was ever completed.

    Raises:
        DataError: `latest` names a folder that is not there.
    """
    latest = run / FOLDER / LATEST
    if not latest.is_file():
        return None
    folder = run / FOLDER / Path(latest.read_text().strip()).name
    if not folder.is_dir():
        others = sorted(path.name for path in (run / FOLDER).glob("step-????????"))
        raise DataError(f"{latest} names {folder.name!r}, which is not there; " + (
            f"write one of {', '.join(others)} into it" if others else "remove it to start anew"))
    return folder


def read_info(folder: Path) -> CheckpointInfo:
    """The description of a checkpoint, after checking that every file it lists is there at its full size.

    Raises:
        DataError: no checkpoint, an incomplete one, or one of a later format.
    """
    try:
        found = json.loads((folder / DESCRIPTION).read_text())
        version, sizes = found.pop("format"), found.pop("files")
        if version != _FORMAT:
            raise DataError(f"{folder}: format {version} is not known here ({_FORMAT}); use the version that wrote it")
        info = CheckpointInfo(**found)
    except FileNotFoundError:
        raise DataError(f"{folder} holds no {DESCRIPTION}: it is not a complete checkpoint; name a run folder or one "
                        f"of its {FOLDER}/step-… folders") from None
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{folder / DESCRIPTION} cannot be read: {error!r}") from error
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            raise DataError(f"{folder} is incomplete: {name} is missing")
        if path.stat().st_size != size:
            raise DataError(f"{path} has {path.stat().st_size} bytes, {size} were written; take another checkpoint")
    return info


def load(engine: Engine, folder: Path, world: World) -> CheckpointInfo:
    """Put a checkpoint back into an engine of the same world size, ZeRO stage and precision. Collective.

    Raises:
        SettingsError: the engine differs from the one that saved.
        DataError: see read_info.
    """
    info = read_info(folder)
    for what, saved, now, flag in (
            ("ranks", info.world_size, world.size, "start the same number of ranks"),
            ("ZeRO stage", info.zero_stage, engine.zero_stage, "use a --deepspeed_config of that stage"),
            ("precision", info.precision, engine.precision, "use a --deepspeed_config of that precision"),
            ("EMA", info.ema, engine.has_ema, "give the same --ema.decay")):
        if saved != now:
            raise SettingsError(f"{folder} was saved with {what} {saved}, this run has {now}; {flag}, or consolidate "
                                "it with tools/consolidate_checkpoint.py")
    loaded, _ = engine.deepspeed.load_checkpoint(str(folder.parent), tag=folder.name)
    if loaded is None:
        raise DataError(f"DeepSpeed could not load {folder}")
    return info
