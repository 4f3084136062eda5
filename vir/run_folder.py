"""The folder of a run: the names in it, and the claim to it that keeps other runs out."""

from __future__ import annotations

import secrets
import socket
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Iterator

from vir import files
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
LOCK = ".lock"


@contextmanager
def claim(folder: Path, world: World, stays: bool = True) -> Iterator[None]:
    """Make the folder, check that all ranks share it, and keep a second run out while the block runs. Collective.

    Args:
        stays: False removes in the end what this has made.

    Raises:
        SettingsError: it cannot be made or written to, a rank does not see it, another run is writing there.
    """
    from vir import distributed

    made = distributed.broadcast([path for path in (folder / LOCK, folder, *folder.parents) if not path.exists()])
    lock = None
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SettingsError(f"--output {folder} cannot be made: {error.strerror}; give another folder") from error
        _check_shared(folder, world)
        lock = _lock(folder, world)
        yield
    finally:
        is_ours = files.is_held(lock)  # not so in a forked process
        if world.is_main and not stays:
            _remove([path for path in made if is_ours or path != folder / LOCK])
        files.unlock(lock)


def _remove(made: list[Path]) -> None:
    """A file and empty folders, each before the one that it lies in."""
    for path in made:
        with suppress(OSError):  # it is not there, or another run has begun in it
            path.rmdir() if path.is_dir() else path.unlink()


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
    told = distributed.gather((path.is_file(), socket.gethostname()))
    blind = [f"{rank} ({host})" for rank, (sees, host) in enumerate(told) if not sees]
    distributed.barrier()
    if world.is_main:
        path.unlink()
    if blind:
        raise SettingsError(f"--output {folder}: ranks {', '.join(blind[:8])} do not see what rank 0 ({told[0][1]}) "
                            "writes there; give a folder that all nodes share")


def _lock(folder: Path, world: World) -> int | None:
    """Lock the folder on rank 0 and return the descriptor that holds the lock."""
    from vir import distributed

    descriptor, problem = None, None
    if world.is_main:
        try:
            descriptor = files.lock(folder / LOCK)
        except BlockingIOError:
            problem = "another run is writing there; wait for it, end it, or give another folder"
        except OSError as error:
            problem = f"its {LOCK} cannot be opened: {error.strerror}; give another folder"
    if problem := distributed.broadcast(problem):
        raise SettingsError(f"--output {folder}: {problem}")
    return descriptor
