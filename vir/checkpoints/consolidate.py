"""From a ZeRO checkpoint to whole float32 weights, without deepspeed, a GPU or the training world."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from vir.checkpoints.info import CheckpointInfo, read_info
from vir.checkpoints.names import BEST, LATEST, pointed
from vir.checkpoints.partitions import EMA, WEIGHT, Partitions
from vir.checkpoints.store import select
from vir.errors import CheckpointError, SettingsError
from vir.files import try_to_write
from vir.log import progress_bar, shows_bars
from vir.run_folder import CHECKPOINTS, METRICS
from vir.weights.metadata import DTYPES, WeightsMetadata
from vir.weights.portable import write_weights
from vir.weights.tensor_files import ENDING, TensorEntry, existing, of_tensor

MAX_SHARD_BYTES = 5 * 10**9
"""What Hugging Face's tools take."""


def consolidate(source: Path, output: Path, *, which: str = LATEST, ema: bool = False, dtype: str = "fp32",
                max_shard_bytes: int | None = MAX_SHARD_BYTES, force: bool = False) -> WeightsMetadata:
    """Write the weights of a checkpoint, or their average, as a safetensors file that names its model.

    They go from memory-mapped files to the file in pieces: memory does not grow with the model.

    Args:
        source, which: as of `select`: what a resume would take.
        output: NAME.safetensors; folders are made as needed.
        dtype: fp32, bf16 or fp16, of the tensors in the file.
        max_shard_bytes: more than this becomes several files with an index, as `write_tensors` names them.
        force: replace what is there under this name.

    Raises:
        SettingsError: the file exists, cannot be written or has another ending; the checkpoint has no EMA; `which`
            does not fit.
        CheckpointError: no complete checkpoint, or only damaged ones.
        DataError: too little space, or the file did not read back.
    """
    _check_output(output, force)
    folder, info = _checkpoint(source, which)
    if ema and not info.ema:
        raise SettingsError(f"{folder} was trained without an average of weights (--ema.decay 0); leave --ema out")
    metadata = WeightsMetadata(
        model=info.model, step=info.step, samples_seen=info.samples_seen, ema=ema, dtype=dtype,
        config_hash=hashlib.sha256(json.dumps(info.config, sort_keys=True).encode()).hexdigest(),
        data_fingerprint=info.data_fingerprint)
    entries = full_tensors(folder, info, ema, DTYPES[dtype])
    with progress_bar(sum(entry.nbytes for entry in entries), "B", unit_scale=True, desc=output.name, leave=False,
                      disable=not shows_bars()) as progress:
        write_weights(output, entries, metadata, max_file_bytes=max_shard_bytes, progress=progress)
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
        found = existing(output)
        for path in found or [there / output.name]:
            try_to_write(path)
            if path in found and not force:
                raise SettingsError(f"{path} exists; give another --output, or --force to replace it")
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


def full_tensors(folder: Path, info: CheckpointInfo, ema: bool, dtype: torch.dtype) -> list[TensorEntry]:
    """Each weight (its float32 master, or its average), under each of its names, and each saved buffer."""
    partitions, key = Partitions(folder, info), EMA if ema else WEIGHT
    buffers = {**partitions.buffers, **partitions.ema_buffers} if ema else partitions.buffers
    entries = []
    for entry in (of_tensor(name, buffer) for name, buffer in buffers.items()):
        entries.append(_rounded(entry, dtype) if entry.dtype.is_floating_point else entry)
    for name, known in {**{name: name for name in partitions.shapes}, **partitions.shared}.items():
        read = partial(partitions.read, known, key)
        entries.append(_rounded(TensorEntry(name, tuple(partitions.shapes[known]), torch.float32, read), dtype))
    return entries


def _rounded(entry: TensorEntry, dtype: torch.dtype) -> TensorEntry:
    """The same in another type; reading it raises SettingsError where that cannot hold a number."""
    def read(start: int, stop: int) -> Tensor:
        exact = entry.read(start, stop)
        found = exact.to(dtype)
        if dtype == torch.float16 and (found.isinf() & exact.isfinite()).any():
            raise SettingsError(f"--dtype fp16 holds no more than 65504, and {entry.name} has {exact.abs().max():g}; "
                                "give --dtype bf16")
        return found

    return replace(entry, dtype=dtype, read=read)


if __name__ == "__main__":
    raise SystemExit("vir.checkpoints.consolidate is a part of the library; the program is vir-consolidate")
