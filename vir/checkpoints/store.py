"""The checkpoints of a run: published whole under their name, kept, chosen.

A folder without checkpoint.json, or whose files are not those that it lists, is not a checkpoint.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, NamedTuple

from vir import distributed
from vir.checkpoints.info import DESCRIPTION, CheckpointInfo, read_info, verify
from vir.checkpoints.names import BEST, LATEST, REPLACED, STEPS, candidates, name_of, named_by, pointed, step_of
from vir.distributed import World
from vir.errors import CheckpointError, SettingsError, VirError
from vir.files import flush, replace_text
from vir.log import log
from vir.run_folder import CHECKPOINTS
from vir.weights.fields import some

REMOVED = ".removed.part"


@dataclass(frozen=True)
class Kept:
    """Which checkpoints outlive the next ones."""

    newest: int
    """Of those at planned steps, and of all the last two, or the last one where this is 1."""
    every_samples: float | None
    """Also the first after each so many samples, for good."""
    is_planned: Callable[[int], bool] = lambda step: True
    """Whether it is of a planned step, not one by the clock or of a stop."""


def make_room(root: Path, part: Path) -> None:
    """Remove what kills have left, except for checkpoints that were being replaced: this run may continue from one."""
    if not root.is_dir():
        root.mkdir()
        flush(root.parent)
    if part.exists():
        shutil.rmtree(part)
    for stale in root.glob(STEPS + "*.part"):
        if not stale.name.endswith(REPLACED):
            _discard(stale)


def _discard(folder: Path) -> None:
    """Remove it, or warn: that takes space, but is no reason to end a run."""
    try:
        shutil.rmtree(folder)
    except OSError as error:
        log.warning("%s could not be removed: %s", folder, error)


def publish(part: Path, folder: Path, info: CheckpointInfo, is_best: bool) -> None:
    """Give what is whole under a temporary name its own, and move `latest` to it. Raises OSError."""
    root, replaced = folder.parent, folder.with_name(folder.name + REPLACED)
    replace_text(part / DESCRIPTION, info.to_json())
    if folder.exists():
        if replaced.exists():  # a kill came before its removal: the folder is newer, and whole
            _remove(replaced)
        folder.rename(replaced)
    part.rename(folder)
    flush(root)
    if is_best:
        replace_text(root / BEST, folder.name)
    replace_text(root / LATEST, folder.name)


def remove_old(root: Path, step: int, kept: Kept) -> None:
    """Remove what the checkpoint of this step, now published, has made superfluous, or warn."""
    try:
        superfluous = [*root.glob(STEPS + REPLACED), *_outlived(root, step, kept)]
    except OSError as error:
        log.warning("no old checkpoint was removed: %s", error)
        return
    for folder in superfluous:
        _remove(folder)


def _outlived(root: Path, step: int, kept: Kept) -> list[Path]:
    best = (root / BEST).read_text().strip() if (root / BEST).is_file() else None
    every = _firsts(root, kept.every_samples) if kept.every_samples else set()
    # Later steps than this one are of a future that the run went back from: they count as the oldest.
    by_age = sorted(root.glob(STEPS), key=lambda path: (step_of(path) <= step, step_of(path)))
    newest = [path.name for path in by_age if kept.is_planned(step_of(path))][-kept.newest:]
    last = [path.name for path in by_age[-min(2, kept.newest):]]
    return [old for old in by_age if old.name not in {name_of(step), best, *newest, *last} | every]


def _remove(checkpoint: Path) -> None:
    """Rename it first: a kill while its files go leaves no half of it where checkpoints are looked for."""
    try:
        removed = checkpoint.rename(checkpoint.with_name(name_of(step_of(checkpoint)) + REMOVED))
    except OSError as error:
        log.warning("%s could not be removed: %s", checkpoint, error)
    else:
        _discard(removed)


def _firsts(root: Path, every_samples: float) -> set[str]:
    """The checkpoints that are the first after each multiple of so many samples."""
    seen = []
    for path in root.glob(STEPS):
        try:
            seen.append((read_info(path).samples_seen, path.name))
        except CheckpointError:  # damaged: not worth keeping
            continue
    firsts, reached = set(), 0
    for samples, name in sorted(seen):
        if (interval := int(samples / every_samples + 1e-9)) > reached:
            firsts.add(name)
            reached = interval
    return firsts


def select(source: Path, world: World | None = None, which: str = LATEST,
           verified: Path | None = None) -> tuple[Path, CheckpointInfo] | None:
    """The checkpoint that a path means, for every use: resume, validation, consolidation.

    Args:
        source: a checkpoint folder, which means itself; a run folder; or a pointer of a run, RUN/checkpoints/latest or
            RUN/checkpoints/best, which means that one of the run folder.
        world: ranks that all ask this together, share the reading and get the same answer; None for this process alone.
        which: of a run folder. latest: the newest whose files are as written; damaged ones are passed over, with a
            warning. best, or the number of a step: that one and no other.
        verified: a checkpoint whose files were just compared with their checksums.

    Returns:
        None where `source` is no checkpoint and holds none.

    Raises:
        CheckpointError: the one that is meant is damaged or not there, but others are; or all are damaged.
        SettingsError: `which` is none of these, or contradicts `source`.
    """
    if which not in (LATEST, BEST) and not (which.isdecimal() and len(which) <= 18):
        raise SettingsError(f"--which {some([which])} is not {LATEST}, {BEST} or the number of a step, such as 1000")
    meant = _meant_for_all(source, world, which)
    damaged: list[str] = []
    for folder in meant.folders:
        info, problem = (read_info(folder), "") if folder == verified else read_whole(folder, world)
        if info is not None:
            for said in damaged:
                log.warning("DAMAGED CHECKPOINT PASSED OVER: %s", said)
            if damaged:
                log.warning("continuing from the one before: %s", folder)
            return folder, info
        damaged.append(problem)
    if damaged:
        raise CheckpointError(f"{meant.if_damaged}: {'; '.join(damaged)}; {meant.way_out}")
    return None


class _Meant(NamedTuple):
    """What a path means."""

    folders: list[Path]
    """In the order of trying; none where there are no checkpoints at all."""
    if_damaged: str
    """Begins the message where none of these is whole."""
    way_out: str


def _meant_for_all(source: Path, world: World | None, which: str) -> _Meant:
    """What rank 0 finds, or refuses, on every rank. Collective where there is a world."""
    meant: _Meant | VirError | None = None
    if world is None or world.is_main:
        try:
            meant = _meant(source, which)
        except VirError as error:
            meant = error
    if world is not None:
        meant = distributed.broadcast(meant)
    if isinstance(meant, VirError):
        raise meant
    assert meant is not None  # it is what rank 0 has found
    return meant


def _meant(source: Path, which: str) -> _Meant:
    if (source / DESCRIPTION).is_file():
        if which != LATEST:
            raise SettingsError(f"{source} is one checkpoint, of which --which {which} cannot choose; leave --which "
                                "out, or give the run folder")
        return _Meant([source], f"no checkpoint of {source} is whole", "restore one, or give another folder")
    run, pointer = pointed(source)
    if pointer is not None:
        if which not in (LATEST, pointer):
            raise SettingsError(f"{source} and --which {which} contradict each other; give the run folder {run} with "
                                "--which")
        which = pointer
    found = candidates(run)
    if which == LATEST or not found:
        return _Meant(found, f"no checkpoint of {run} is whole", "restore one, or give another folder")
    there = _whats_there(run, found)
    if which == BEST:
        best = named_by(run, BEST)
        if best is None:
            raise CheckpointError(f"{run} has no best checkpoint: none was saved after a validation; {there}")
        name, called = best.name, f"the best checkpoint of {run}"
    else:
        name, called = name_of(int(which)), f"the checkpoint of step {int(which)} of {run}"
    folders = [path for path in found if path.name.removesuffix(REPLACED) == name and path.is_dir()]
    if not folders:
        raise CheckpointError(f"{called} is not there: no folder {run / CHECKPOINTS / name}; {there}")
    return _Meant(folders, f"{called} is not whole", f"restore it, or take another: {there}")


def _whats_there(run: Path, found: list[Path]) -> str:
    """The steps of a run to choose from, for messages; of many the last."""
    steps = sorted({step_of(path) for path in found if path.match(STEPS) and path.is_dir()})
    best = named_by(run, BEST)
    listed = ", ".join([*(["…"] if len(steps) > 12 else []), *(
        f"{step} (best)" if best is not None and best.name == name_of(step) else str(step) for step in steps[-12:])])
    return f"there are the steps {listed or 'none'}; --which {LATEST} takes the newest that is whole"


def read_whole(folder: Path, world: World | None) -> tuple[CheckpointInfo | None, str]:
    """Its description, or None and what is wrong with it. The ranks share the work of reading its files."""
    try:
        info = read_info(folder)
        verify(folder, info, *((world.rank, world.size) if world else (0, 1)))
        problem = ""
    except CheckpointError as error:
        problem = str(error)
    if world is not None:
        problem = next((one for one in distributed.gather(problem) if one), "")
    return (None, problem) if problem else (info, "")


def best_so_far(run: Path, metric: str | None) -> float:
    """The best value of a metric among the checkpoints that were kept for it; -inf where there is none."""
    try:
        best = named_by(run, BEST)
        if metric is None or best is None:
            return float("-inf")
        return read_info(best).metrics.get(metric, float("-inf"))
    except CheckpointError:
        return float("-inf")
