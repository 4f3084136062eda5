"""Checkpoints that a kill cannot break: written under a temporary name, complete on every rank, flushed, renamed.

RUN/checkpoints/step-00001000/ holds DeepSpeed's files (weights, optimizer state with the EMA, one part per rank) and
checkpoint.json with their checksums; RUN/checkpoints/latest names the newest, best the one with the best validation
accuracy. A folder without checkpoint.json, or whose files are not those that it lists, is not a checkpoint.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from vir import distributed
from vir.checkpoints.info import (
    BEST,
    DESCRIPTION,
    FOLDER,
    FORMAT,
    LATEST,
    CheckpointInfo,
    candidates,
    name_of,
    read_info,
    sha256,
    verify,
)
from vir.distributed import World
from vir.engine.engine import Engine
from vir.errors import DataError
from vir.files import flush, replace_text
from vir.log import log


@dataclass(frozen=True)
class Kept:
    """Which checkpoints outlive the next ones."""

    newest: int
    every_samples: float | None
    """Also the first after each so many samples, for good."""


def save(engine: Engine, run: Path, info: CheckpointInfo, world: World, kept: Kept, is_best: bool) -> float:
    """Write a checkpoint at the end of a step, move `latest` to it, remove what is not kept. Collective.

    Returns:
        The seconds it took.

    Raises:
        DataError: it could not be written; the checkpoints before it are as they were.
    """
    began = time.monotonic()
    root, name = run / FOLDER, name_of(info.step)
    part = name + ".part"
    wrong: list[str] = []
    if world.is_main:
        try:
            root.mkdir(exist_ok=True)
            for stale in root.glob("*.part"):  # of a run that was killed while it wrote
                shutil.rmtree(stale)
        except OSError as error:
            wrong = [f"rank 0: {error}"]
    if wrong := distributed.broadcast(wrong):
        _give_up(root / part, wrong, world)
    wrong = engine.save(root, part)
    written: dict[str, dict] = {}
    try:
        for path in _files_of(root / part, world):
            flush(path)
            written[path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    except (OSError, DataError) as error:
        wrong.append(str(error))
    files: dict[str, dict] = {}
    found = distributed.gather((wrong, written))
    for _, of_rank in found:
        files |= of_rank
    if wrong := [f"rank {rank}: {said[0]}" for rank, (said, _) in enumerate(found) if said]:
        _give_up(root / part, wrong, world)
    try:
        if world.is_main:
            _publish(root, name, info, files, is_best)
            _remove_old(root, name, kept)
    except OSError as error:
        wrong = [f"rank 0: {error}"]
    if wrong := distributed.broadcast(wrong):
        _give_up(root / part, wrong, world)
    seconds = time.monotonic() - began
    log.info("checkpoint %s: %.1f MB in %.1f s%s", root / name, sum(file["bytes"] for file in files.values()) / 1e6,
             seconds, ", the best so far" if is_best else "")
    return seconds


def _files_of(folder: Path, world: World) -> list[Path]:
    """What this rank has written: its part of the optimizer and, on rank 0, everything that carries no rank."""
    own = f"_pp_rank_{world.rank}_"
    return [path for path in folder.iterdir() if own in path.name or (world.is_main and "_pp_rank_" not in path.name)]


def _give_up(part: Path, wrong: list[str], world: World) -> None:
    distributed.barrier()
    if world.is_main:
        shutil.rmtree(part, ignore_errors=True)
    raise DataError(f"the checkpoint {part.with_suffix('')} could not be written: {wrong[0]}; those before it are "
                    "whole: free some space and run the same command again")


def _publish(root: Path, name: str, info: CheckpointInfo, files: dict[str, dict], is_best: bool) -> None:
    part = root / (name + ".part")
    description = {"format": FORMAT, **asdict(info), "files": dict(sorted(files.items()))}
    replace_text(part / DESCRIPTION, json.dumps(description, indent=1))
    if (root / name).exists():
        (root / name).rename(root / (name + ".replaced.part"))
    part.rename(root / name)
    flush(root)
    if is_best:
        replace_text(root / BEST, name)
    replace_text(root / LATEST, name)
    shutil.rmtree(root / (name + ".replaced.part"), ignore_errors=True)


def _remove_old(root: Path, name: str, kept: Kept) -> None:
    best = (root / BEST).read_text().strip() if (root / BEST).is_file() else None
    every = _firsts(root, kept.every_samples) if kept.every_samples else set()
    for old in sorted(root.glob("step-????????"), key=lambda path: path.stat().st_mtime)[:-kept.newest]:
        if old.name not in {name, best} | every:
            shutil.rmtree(old)


def _firsts(root: Path, every_samples: float) -> set[str]:
    """The checkpoints that are the first after each multiple of so many samples."""
    seen = []
    for path in root.glob("step-????????"):
        try:
            seen.append((read_info(path).samples_seen, path.name))
        except DataError:  # damaged: not worth keeping
            continue
    found, reached = set(), 0
    for samples, name in sorted(seen):
        if (interval := int(samples / every_samples + 1e-9)) > reached:
            found.add(name)
            reached = interval
    return found


def find(run: Path, world: World) -> tuple[Path, CheckpointInfo] | None:
    """The newest whole checkpoint of a run, the same on every rank; None where it has none. Collective."""
    return _first_whole(candidates(run) if world.is_main else [], run, world)


def find_named(path: Path, world: World) -> tuple[Path, CheckpointInfo]:
    """The newest whole checkpoint of a run folder, or a checkpoint folder itself. Collective.

    Raises:
        DataError: there is none.
    """
    is_one = (path / DESCRIPTION).is_file()
    found = _first_whole(([path] if is_one else candidates(path)) if world.is_main else [], path, world)
    if found is None:
        raise DataError(f"--resume {path} is neither a run folder with a checkpoint nor a checkpoint folder; give "
                        f"auto, none, or a path such as runs/a or runs/a/{FOLDER}/{name_of(1000)}")
    return found


def _first_whole(folders: list[Path], run: Path, world: World) -> tuple[Path, CheckpointInfo] | None:
    """The first whose files are as written. The ranks share the work; damaged ones are passed over, with a warning.

    Raises:
        DataError: there are some, but all are damaged.
    """
    said: list[str] = []
    for folder in distributed.broadcast(folders):
        try:
            info = read_info(folder)
            verify(folder, info, world.rank, world.size)
            wrong = None
        except DataError as error:
            wrong = str(error)
        wrong = next((one for one in distributed.gather(wrong) if one), None)
        if wrong is None:
            for damaged in said:
                log.warning("DAMAGED CHECKPOINT PASSED OVER: %s", damaged)
            if said:
                log.warning("continuing from the one before: %s", folder)
            return folder, info
        said.append(wrong)
    if said:
        raise DataError(f"no checkpoint of {run} is whole: {'; '.join(said)}; restore one, or give another --output")
    return None


def best_so_far(run: Path, metric: str | None) -> float:
    """The best value of a metric among the checkpoints that were kept for it; -inf where there is none."""
    pointer = run / FOLDER / BEST
    if metric is None or not pointer.is_file():
        return float("-inf")
    try:
        return read_info(run / FOLDER / pointer.read_text().strip()).metrics.get(metric, float("-inf"))
    except DataError:
        return float("-inf")
