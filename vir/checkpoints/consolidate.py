"""From a ZeRO checkpoint to whole float32 weights, without deepspeed, a GPU or the training world."""

from __future__ import annotations

from pathlib import Path
from typing import Iterator

from torch import Tensor

from vir.checkpoints.info import CheckpointInfo, read_info
from vir.checkpoints.partitions import EMA, WEIGHT, Partitions
from vir.checkpoints.store import select
from vir.errors import CheckpointError, SettingsError
from vir.models.weights import DTYPES, WeightsMetadata, save_weights
from vir.run_folder import CHECKPOINTS, METRICS


def consolidate(source: Path, output: Path, *, ema: bool = False, dtype: str = "fp32",
                force: bool = False) -> WeightsMetadata:
    """Write the weights of a checkpoint, or their average, as one safetensors file that names its model.

    Args:
        source: a run folder (the checkpoint that a resume would take) or one checkpoint folder.
        dtype: fp32, bf16 or fp16, of the tensors in the file.
        force: replace an existing file.

    Raises:
        SettingsError: the file exists, the checkpoint has no EMA.
        CheckpointError: no complete checkpoint, or only damaged ones.
    """
    if output.exists() and not force:
        raise SettingsError(f"{output} exists; give another --output, or --force to replace it")
    folder, info = _checkpoint(source)
    if ema and not info.ema:
        raise SettingsError(f"{folder} was trained without an average of weights (--ema.decay 0); leave --ema out")
    metadata = WeightsMetadata(model=info.model, step=info.step, samples_seen=info.samples_seen, ema=ema, dtype=dtype)
    save_weights(output, {name: tensor.to(DTYPES[dtype]) if tensor.is_floating_point() else tensor
                          for name, tensor in full_tensors(folder, info, ema)}, metadata)
    return metadata


def _checkpoint(source: Path) -> tuple[Path, CheckpointInfo]:
    if not source.is_dir():
        raise CheckpointError(f"{source}: no such folder; give a run folder or one of its {CHECKPOINTS}/step-… folders")
    selected = select(source)
    if selected is not None:
        return selected
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
