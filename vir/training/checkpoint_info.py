"""What a checkpoint says of itself, and whether it is whole. Imports no deepspeed: consolidation reads it as well."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vir.errors import DataError

FOLDER = "checkpoints"
DESCRIPTION = "checkpoint.json"
LATEST = "latest"
FORMAT = 1


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
        if version != FORMAT:
            raise DataError(f"{folder}: format {version} is not known here ({FORMAT}); use the version that wrote it")
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
