"""From copies on the nodes' own disks back into the run folder: the newest complete one, where that has none as new."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from collections import defaultdict
from pathlib import Path
from typing import Callable, Iterator, NamedTuple, Sequence

from vir import distributed
from vir.checkpoints import store
from vir.checkpoints.info import DESCRIPTION, CheckpointInfo, read_description
from vir.checkpoints.names import LATEST, STEPS, name_of, newest, part_of, step_of
from vir.distributed import World
from vir.errors import CheckpointError
from vir.files import refused
from vir.log import log
from vir.run_folder import CHECKPOINTS
from vir.weights.fields import some

LOCAL = "local.json"
"""Beside checkpoint.json: after which checkpoint of the run folder the copy was made, and whether it is the best."""
NODES = "node-*"
_CHUNK = 1 << 24


class Copy(NamedTuple):
    """A folder on the disk of a node: some of a checkpoint's files."""

    node: int
    host: str
    folder: Path
    info: CheckpointInfo
    after: str
    """The name of the newest in the run folder when this one was made; empty where there was none."""
    is_best: bool
    names: frozenset[str]
    """Of the files that are there at their full size."""


def bring_back(root: Path, run: Path, world: World, nodes: Sequence[int]) -> Path | None:
    """Make the newest complete copy a checkpoint of the run folder, where that has none as new. Collective.

    A run that went back to an older checkpoint, by `latest`, is not sent forward again: a copy is of use only if it was
    made after the one that `latest` names, or is of the same step and that one is damaged.

    Args:
        root: the run's folder on a node's own disk.
        nodes: the node of each rank.

    Returns:
        The checkpoint of the run folder whose files were compared with their checksums on the way, if they are whole.

    Raises:
        CheckpointError: the run folder cannot be written to.
    """
    is_first = nodes.index(nodes[world.rank]) == world.rank
    here = _copies(root, nodes[world.rank]) if is_first else []
    sets: dict[tuple[str, str], list[Copy]] = defaultdict(list)
    for copy in (copy for of_rank in distributed.gather(here) for copy in of_rank):
        sets[copy.info.to_json(), copy.after].append(copy)
    latest = distributed.broadcast(_latest(run) if world.is_main else None)
    for copies in sorted(sets.values(), key=lambda copies: -copies[0].info.step):
        if not copies[0].info.files.keys() <= frozenset().union(*(copy.names for copy in copies)):
            continue
        if latest is not None and latest.name == name_of(copies[0].info.step):
            if store.read_whole(latest, world)[0] is not None:
                return latest
        elif not _follows(copies[0], latest):
            continue
        if _take(copies, run, latest, world, nodes):
            return None
    return None


def _latest(run: Path) -> Path | None:
    """What `latest` names, also where it cannot be read, which is told when the run is resumed."""
    try:
        return newest(run)
    except CheckpointError:
        return run / CHECKPOINTS / LATEST


def _copies(root: Path, node: int) -> list[Copy]:
    """Those that this node sees, whatever its number was when they were made; what cannot be read is none."""
    found = []
    for folder in sorted(root.glob(f"{NODES}/{STEPS}")):
        if not (folder / DESCRIPTION).is_file():  # a kill came while it was removed
            continue
        try:
            info, told = read_description(folder), json.loads((folder / LOCAL).read_text())
            names = frozenset(name for name, file in info.files.items()
                              if (folder / name).is_file() and (folder / name).stat().st_size == file["bytes"])
            found.append(Copy(node, socket.gethostname(), folder, info, str(told["after"]), bool(told["is_best"]),
                              names))
        except (CheckpointError, OSError, ValueError, KeyError, TypeError) as error:
            log.warning("LOCAL COPY PASSED OVER: %s", error)
    return found


def _follows(copy: Copy, latest: Path | None) -> bool:
    """Whether it was made after the one that `latest` names, of a later step."""
    if latest is None:
        return not copy.after
    return copy.after == latest.name and latest.match(STEPS) and copy.info.step > step_of(latest)


def _take(copies: list[Copy], run: Path, latest: Path | None, world: World, nodes: Sequence[int]) -> bool:
    """Copy each file once, from a disk on which it is as it was written, and publish them. Collective.

    Returns:
        False where a file is on none.
    """
    info = copies[0].info
    checkpoints, folder = run / CHECKPOINTS, run / CHECKPOINTS / name_of(info.step)
    part = part_of(folder)

    def make_room() -> None:
        store.make_room(checkpoints, part)
        part.mkdir()

    _on_main(make_room, part, world)
    left = {name: [copy for copy in copies if name in copy.names] for name in sorted(info.files)}
    used = set()
    while left:
        if lost := [name for name, sources in left.items() if not sources]:
            log.warning("the local copies of step %d are left out: %s is whole on no disk", info.step, some(lost))
            _on_main(lambda: shutil.rmtree(part), part, world)
            return False
        chosen = shared_out({name: [copy.node for copy in sources] for name, sources in left.items()}, nodes)
        damaged, problem = {}, ""
        for name in (name for name, (_, rank) in chosen.items() if rank == world.rank):
            source = left[name][chosen[name][0]].folder / name
            try:
                if said := _copy(source, part / name, info.files[name]["sha256"]):
                    damaged[name] = said
            except OSError as error:
                problem = str(error)
                break
        everyone = distributed.gather((damaged, problem))
        _agree([problem for _, problem in everyone], part, world)
        damaged = {name: said for of_rank, _ in everyone for name, said in of_rank.items()}
        for name, (number, _) in chosen.items():
            if name in damaged:
                copy = left[name].pop(number)
                if world.is_main:
                    log.warning("DAMAGED LOCAL FILE PASSED OVER on %s: %s", copy.host, damaged[name])
            else:
                used.add(f"{left[name][number].host}:{left[name][number].folder}")
                del left[name]
    is_best = any(copy.is_best for copy in copies)
    _on_main(lambda: store.publish(part, folder, info, is_best), part, world)
    log.info("step %d is taken from the nodes' own disks, %.1f MB of %s: %s", info.step,
             info.bytes / 1e6, some(sorted(used)),
             f"{latest} is older or damaged" if latest else f"{checkpoints} has no checkpoint yet")
    return True


def shared_out(sources: dict[str, list[int]], nodes: Sequence[int]) -> dict[str, tuple[int, int]]:
    """Which of its sources a file is taken from, and by which rank: over sources and ranks of their nodes in turn.

    Args:
        sources: the nodes that have each file.
        nodes: the node of each rank.
    """
    chosen = {}
    for turn, (name, having) in enumerate(sources.items()):
        number = turn % len(having)
        ranks = [rank for rank, node in enumerate(nodes) if node == having[number]]
        chosen[name] = number, ranks[turn // len(having) % len(ranks)]
    return chosen


class _Unreadable(Exception):
    """The source, as against the target."""


def _copy(source: Path, target: Path, checksum: str) -> str:
    """Copy a file, flushed; what is wrong with the source. Raises OSError where the target cannot be written."""
    digest = hashlib.sha256()
    with target.open("wb") as file:
        try:
            for piece in _pieces(source):
                digest.update(piece)
                file.write(piece)
        except _Unreadable as error:
            return str(error)
        file.flush()
        os.fsync(file.fileno())
    return "" if digest.hexdigest() == checksum else f"{source} has changed since it was written (sha256 differs)"


def _pieces(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb", buffering=0) as file:
            while piece := file.read(_CHUNK):
                yield piece
    except OSError as error:
        raise _Unreadable(f"{path} cannot be read: {error.strerror}") from error


def _on_main(work: Callable[[], object], part: Path, world: World) -> None:
    """Have rank 0 do this. Collective."""
    _agree(distributed.gather(refused(work) if world.is_main else ""), part, world)


def _agree(problems: Sequence[str], part: Path, world: World) -> None:
    said = next((f"rank {rank}: {problem}" for rank, problem in enumerate(problems) if problem), "")
    if said:
        if world.is_main:
            shutil.rmtree(part, ignore_errors=True)
        raise CheckpointError(f"the newest checkpoint, on the nodes' own disks, could not be brought back as {part}: "
                              f"{said}; free some space and run the same command again, or leave --checkpoint.local "
                              "out to go on from an older one")
