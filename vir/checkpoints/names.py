"""The names of a run's checkpoints, and which of them is the newest or the best; no file of theirs is read here."""

from __future__ import annotations

from pathlib import Path

from vir.errors import CheckpointError
from vir.run_folder import CHECKPOINTS

LATEST = "latest"
BEST = "best"
STEPS = "step-" + 8 * "[0-9]"
"""Pattern of the names of checkpoints."""
REPLACED = ".replaced.part"
"""Ends the name of one while another of the same step takes its place: whole, but no longer wanted."""


def name_of(step: int) -> str:
    return f"step-{step:08d}"


def part_of(folder: Path) -> Path:
    """Where a checkpoint is written until it is whole."""
    return folder.with_name(folder.name + ".part")


def step_of(folder: Path) -> int:
    """From the name of a checkpoint, replaced or not."""
    return int(folder.name.removeprefix("step-").removesuffix(REPLACED))


def newest(run: Path) -> Path | None:
    """The checkpoint that `latest` names, whole or not; None where no checkpoint was ever completed."""
    return named_by(run, LATEST)


def named_by(run: Path, pointer: str) -> Path | None:
    """The checkpoint that a run's `latest` or `best` names, whole or not; None where there is no such pointer.

    Raises:
        CheckpointError: the pointer cannot be read.
    """
    path = run / CHECKPOINTS / pointer
    if not path.is_file():
        return None
    try:
        return run / CHECKPOINTS / Path(path.read_text().strip()).name
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; remove it, or write the name of a checkpoint into it, "
                              f"such as {name_of(1000)}") from error


def pointed(path: Path) -> tuple[Path, str | None]:
    """The run folder and the pointer of RUN/checkpoints/latest or RUN/checkpoints/best; of any other path itself."""
    root = path.parent if path.parent.name == CHECKPOINTS else path.parent.resolve()
    if path.name in (LATEST, BEST) and root.name == CHECKPOINTS and not path.is_dir():
        return root.parent, path.name
    return path, None


def candidates(run: Path) -> list[Path]:
    """The checkpoints to take, in the order of trying: what `latest` names, then the others, the last step first.

    Among them is one that a kill caught after its renaming and before `latest` moved, or while it was replaced: that
    one comes after the one of its step. File times say nothing: copying a run sets them anew.
    """
    root, named = run / CHECKPOINTS, newest(run)
    found = [*root.glob(STEPS), *root.glob(STEPS + REPLACED)]
    first = [named, *(path for path in found if path.name == named.name + REPLACED)] if named else []
    return first + sorted((path for path in found if path not in first), key=lambda path: (-step_of(path), path.name))
