"""What a checkpoint says of itself, and whether it is whole. Imports no deepspeed: consolidation reads it as well."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vir.errors import DataError

FOLDER = "checkpoints"
DESCRIPTION = "checkpoint.json"
LATEST = "latest"
BEST = "best"
FORMAT = 2


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
    loss_scaler: dict[str, float]
    """State of the fp16 loss scale, by DeepSpeed's names; empty in other precisions."""
    metrics: dict[str, float]
    """Of the evaluation at this step, e.g. top1; empty where there was none."""
    config: dict[str, Any]
    """The settings of the run."""
    model_name: str
    model_args: dict[str, Any]
    """For timm.create_model, the class count included."""
    model_input: dict[str, Any]
    """size, mean, std, interpolation, crop_pct."""
    classes: list[str]
    data_fingerprint: str
    """Of the training shards and their class list."""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """bytes and sha256 of every file."""


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


def candidates(run: Path) -> list[Path]:
    """The checkpoints to continue from, in the order of trying: what `latest` names, then the others, newest first.

    One that a kill caught between its renaming and the moving of `latest`, or while it was replaced, is among them.
    """
    latest = run / FOLDER / LATEST
    named = [run / FOLDER / Path(latest.read_text().strip()).name] if latest.is_file() else []
    whole = [*(run / FOLDER).glob("step-????????"), *(run / FOLDER).glob("step-????????.replaced.part")]
    return named + sorted((path for path in whole if path not in named), reverse=True,
                          key=lambda path: (path.stat().st_mtime, path.name))


def read_info(folder: Path) -> CheckpointInfo:
    """The description of a checkpoint, after checking that every file it lists is there at its full size.

    Raises:
        DataError: no checkpoint, an incomplete one, or one of another format.
    """
    try:
        found = json.loads((folder / DESCRIPTION).read_text())
        version = found.pop("format")
        if version != FORMAT:
            raise DataError(f"{folder}: format {version} is not known here ({FORMAT}); use the version that wrote it")
        info = CheckpointInfo(**found)
        sizes = {name: int(entry["bytes"]) for name, entry in info.files.items()}
    except FileNotFoundError:
        raise DataError(f"{folder} holds no {DESCRIPTION}: it is not a complete checkpoint; name a run folder or one "
                        f"of its {FOLDER}/step-… folders") from None
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{folder / DESCRIPTION} cannot be read: {error!r}") from error
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            raise DataError(f"{folder} is incomplete: {name} is missing")
        if path.stat().st_size != size:
            raise DataError(f"{path} has {path.stat().st_size} bytes, {size} were written; take another checkpoint")
    return info


def verify(folder: Path, info: CheckpointInfo, share: int = 0, of: int = 1) -> None:
    """Compare the checksums of every `of`-th file from number `share` on with those that were written.

    Raises:
        DataError: a file that has changed since, or cannot be read.
    """
    for name in sorted(info.files)[share::of]:
        if sha256(folder / name) != info.files[name]["sha256"]:
            raise DataError(f"{folder / name} has changed since it was written (sha256 differs); take another "
                            "checkpoint")


def sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            digest = hashlib.sha256()
            while block := file.read(1 << 22):
                digest.update(block)
            return digest.hexdigest()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
