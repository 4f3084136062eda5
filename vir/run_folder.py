"""The folder of a run: the names in it, and the claim to it that keeps other runs out."""

from __future__ import annotations

import fcntl
import os
import secrets
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Iterator

from vir.errors import SettingsError

if TYPE_CHECKING:  # the names are read by what does without torch
    from vir.distributed import World

CONFIG = "config.yaml"
DS_CONFIG = "ds_config.json"
METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
WANDB_ID = "wandb-id.txt"
CURVES = "curves.png"
LOG = "log.txt"
PROFILE = "profile"
CHECKPOINTS = "checkpoints"


@contextmanager
def claim(folder: Path, world: World) -> Iterator[None]:
    """Make the folder, check that all ranks share it, and keep a second run out while the block runs. Collective.

    Raises:
        SettingsError: it cannot be made or written to, a rank does not see it, another run is writing there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"--output {folder} cannot be made: {error.strerror}; give another folder") from error
    _check_shared(folder, world)
    lock = _lock(folder, world)
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


def _check_shared(folder: Path, world: World) -> None:
    """Rank 0 writes a token that every rank must be able to read: checkpoints need one folder for all nodes."""
    from vir import distributed

    token, problem = distributed.broadcast(secrets.token_hex(8)), None
    path = folder / f".shared-{token}"
    if world.is_main:
        try:
            path.write_text(token)
        except OSError as error:
            problem = error.strerror
    if problem := distributed.broadcast(problem):
        raise SettingsError(f"--output {folder} cannot be written to: {problem}; give another folder")
    blind = [rank for rank, sees in enumerate(distributed.gather(path.is_file())) if not sees]
    distributed.barrier()
    if world.is_main:
        path.unlink()
    if blind:
        raise SettingsError(f"--output {folder}: ranks {blind[:8]} do not see what rank 0 writes there; give a folder "
                            "that all nodes share")


def _lock(folder: Path, world: World) -> int | None:
    """Lock the folder on rank 0 and return the descriptor that holds the lock."""
    from vir import distributed

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
