"""The folder of a run: the names in it, and the claim to it that keeps other runs out."""

from __future__ import annotations

import fcntl
import os
import secrets
from contextlib import contextmanager, suppress
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
LOCK = ".lock"

_held: set[int] = set()
"""Descriptors that hold the locks of this process."""


def _let_go() -> None:
    """Close what a fork has inherited: a lock lasts as long as any copy of its descriptor, and loader workers can
    outlive a trainer that was killed."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_let_go)


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
        is_ours = lock in _held  # not so in a forked process
        if world.is_main and not stays:
            _remove([path for path in made if is_ours or path != folder / LOCK])
        if lock is not None and is_ours:
            _held.remove(lock)
            os.close(lock)


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

    descriptor, problem = None, None
    if world.is_main:
        try:
            descriptor = _locked(folder / LOCK)
        except BlockingIOError:
            problem = "another run is writing there; wait for it, end it, or give another folder"
        except OSError as error:
            problem = f"its {LOCK} cannot be opened: {error.strerror}; give another folder"
    if problem := distributed.broadcast(problem):
        raise SettingsError(f"--output {folder}: {problem}")
    return descriptor


def _locked(path: Path) -> int:
    """A descriptor of the file with its lock, where the file system has locks.

    A file that is open for writing, not the folder: NFS refuses a lock to any other descriptor. It stays after the
    run; where a dry run removes it while it holds it, whoever has opened the old file finds that out and takes the new.

    Raises:
        BlockingIOError: another process has the lock.
        OSError: the file cannot be opened.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    _held.add(descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        _held.remove(descriptor)
        os.close(descriptor)
        raise
    except OSError:  # no locks here
        pass
    if not path.exists() or not os.path.samestat(os.fstat(descriptor), os.stat(path)):
        _held.remove(descriptor)
        os.close(descriptor)
        return _locked(path)
    return descriptor
