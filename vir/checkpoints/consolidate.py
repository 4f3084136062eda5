"""From a ZeRO checkpoint to whole float32 weights, without deepspeed, a GPU or the training world."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Iterator

from torch import Tensor

from vir.checkpoints.info import CheckpointInfo, read_info
from vir.checkpoints.names import BEST, LATEST, pointed
from vir.checkpoints.partitions import EMA, WEIGHT, Partitions
from vir.checkpoints.store import select
from vir.errors import CheckpointError, SettingsError
from vir.files import try_to_write
from vir.models.metadata import DTYPES, WeightsMetadata
from vir.models.weights import save_weights
from vir.run_folder import CHECKPOINTS, METRICS

ENDING = ".safetensors"


def consolidate(source: Path, output: Path, *, which: str = LATEST, ema: bool = False, dtype: str = "fp32",
                force: bool = False) -> WeightsMetadata:
    """Write the weights of a checkpoint, or their average, as one safetensors file that names its model.

    Args:
        source, which: as of `select`: what a resume would take.
        output: NAME.safetensors; folders are made as needed.
        dtype: fp32, bf16 or fp16, of the tensors in the file.
        force: replace an existing file.

    Raises:
        SettingsError: the file exists, cannot be written or has another ending; the checkpoint has no EMA; `which`
            does not fit.
        CheckpointError: no complete checkpoint, or only damaged ones.
    """
    _check_output(output, force)
    folder, info = _checkpoint(source, which)
    if ema and not info.ema:
        raise SettingsError(f"{folder} was trained without an average of weights (--ema.decay 0); leave --ema out")
    metadata = WeightsMetadata(model=info.model, step=info.step, samples_seen=info.samples_seen, ema=ema, dtype=dtype)
    save_weights(output, {name: tensor.to(DTYPES[dtype]) if tensor.is_floating_point() else tensor
                          for name, tensor in full_tensors(folder, info, ema)}, metadata)
    return metadata


def _check_output(output: Path, force: bool) -> None:
    """At the door: gathering the weights of a large model takes minutes."""
    if output.suffix != ENDING:
        is_other = output.suffix.lower() in (".pt", ".pth", ".bin", ".ckpt", ENDING)
        better = output.parent / ((output.stem if is_other else output.name) or "weights")
        raise SettingsError(f"--output {output} does not end in {ENDING}, the format of the file, by which timm knows "
                            f"it; give --output {better}{ENDING}")
    there = next(folder for folder in output.absolute().parents if os.path.lexists(folder))
    try:
        if output.is_file() and not force:
            raise SettingsError(f"{output} exists; give another --output, or --force to replace it")
        try_to_write(output if output.exists() else there / output.name)
    except OSError as error:
        raise SettingsError(f"--output {output} cannot be written: {error.strerror}; give another file") from error


def _checkpoint(source: Path, which: str) -> tuple[Path, CheckpointInfo]:
    selected = select(source, which=which)
    if selected is not None:
        return selected
    source, _ = pointed(source)
    if not source.is_dir():
        raise CheckpointError(f"{source}: {'a file, and ' if source.exists() else ''}no such folder; give a run "
                              f"folder, one of its {CHECKPOINTS}/step-… folders or its {CHECKPOINTS}/{BEST}")
    if (source / CHECKPOINTS).is_dir() or (source / METRICS).is_file():
        raise CheckpointError(f"{source} has no complete checkpoint yet; let the run reach one "
                              "(--checkpoint.every_epochs)")
    return source, read_info(source)  # raises: it is neither a run nor a checkpoint


def full_tensors(folder: Path, info: CheckpointInfo, ema: bool) -> Iterator[tuple[str, Tensor]]:
    """Name and whole tensor of each weight (float32 masters, or their average) and each saved buffer."""
    partitions = Partitions(folder, info)
    yield from ({**partitions.buffers, **partitions.ema_buffers} if ema else partitions.buffers).items()
    for name in partitions.shapes:
        yield name, partitions.whole(name, EMA if ema else WEIGHT)


if __name__ == "__main__":
    raise SystemExit("vir.checkpoints.consolidate is a part of the library; the program is vir-consolidate")
