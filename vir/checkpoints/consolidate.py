"""From a ZeRO checkpoint to whole float32 weights, without deepspeed, a GPU or the training world."""

from __future__ import annotations

from pathlib import Path
from typing import Iterator

import torch
from torch import Tensor

from vir.checkpoints.info import FOLDER, CheckpointInfo, newest, read_info, verify
from vir.checkpoints.partitions import WEIGHT, Partitions
from vir.engine.ema import KEY as EMA
from vir.errors import DataError, SettingsError
from vir.models.weights import WeightsMetadata, save_weights
from vir.reports.metrics import FILE as METRICS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def consolidate(source: Path, output: Path, *, ema: bool = False, dtype: str = "fp32",
                force: bool = False) -> WeightsMetadata:
    """Write the weights of a checkpoint, or their average, as one safetensors file that names its model.

    Args:
        source: a run folder (its newest complete checkpoint is taken) or one checkpoint folder.
        dtype: fp32, bf16 or fp16, of the tensors in the file.
        force: replace an existing file.

    Raises:
        SettingsError: the file exists, the checkpoint has no EMA.
        DataError: no complete checkpoint, or one that is damaged.
    """
    if output.exists() and not force:
        raise SettingsError(f"{output} exists; give another --output, or --force to replace it")
    if not source.is_dir():
        raise DataError(f"{source}: no such folder; give a run folder or one of its {FOLDER}/step-… folders")
    is_run = (source / FOLDER).is_dir() or (source / METRICS).is_file()
    folder = newest(source) if is_run else source
    if folder is None:
        raise DataError(f"{source} has no complete checkpoint yet; let the run reach one (--checkpoint.every_epochs)")
    info = read_info(folder)
    if ema and not info.ema:
        raise SettingsError(f"{folder} was trained without an average of weights (--ema.decay 0); leave --ema out")
    verify(folder, info)
    metadata = WeightsMetadata(
        model_name=info.model_name, model_args=info.model_args, classes=tuple(info.classes),
        input_size=tuple(info.model_input["size"]), mean=tuple(info.model_input["mean"]),
        std=tuple(info.model_input["std"]), interpolation=info.model_input["interpolation"],
        crop_pct=info.model_input["crop_pct"], step=info.step, samples_seen=info.samples_seen, ema=ema, dtype=dtype)
    save_weights(output, {name: tensor.to(DTYPES[dtype]) if tensor.is_floating_point() else tensor
                          for name, tensor in full_tensors(folder, info, ema)}, metadata)
    return metadata


def full_tensors(folder: Path, info: CheckpointInfo, ema: bool) -> Iterator[tuple[str, Tensor]]:
    """Name and whole tensor of each weight (float32 masters, or their average) and each saved buffer."""
    found = Partitions(folder, info)
    yield from ({**found.buffers, **found.ema_buffers} if ema else found.buffers).items()
    for name in found.shapes:
        yield name, found.whole(name, EMA if ema else WEIGHT)
