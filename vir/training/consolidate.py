"""From a ZeRO checkpoint to whole float32 weights, without deepspeed, a GPU or the training world.

The files are torch archives that name a handful of DeepSpeed's classes. They are read with an allow-list that puts
inert stand-ins in their place, so nothing in them can run code.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, Iterator, Sequence

import torch
from torch import Tensor

from vir.errors import DataError, SettingsError
from vir.models.weights import WeightsMetadata, save_weights
from vir.training.checkpoint_info import FOLDER, CheckpointInfo, newest, read_info
from vir.training.ema import KEY as EMA
from vir.training.metrics import FILE as METRICS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class _Inert:
    """Stands in for a DeepSpeed class whose values are not needed here."""

    def __init__(self, *args: Any) -> None:
        pass


_ALLOWED = [(_Inert, name) for name in (
    "deepspeed.runtime.zero.config.ZeroStageEnum", "deepspeed.utils.tensor_fragment.fragment_address",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler", "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler")]


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
    model = _read(folder / ("zero_pp_rank_0_mp_rank_00_model_states.pt" if info.zero_stage == 3
                            else "mp_rank_00_model_states.pt"))
    for name in model["buffer_names"]:
        yield name, model["module"][name]
    if info.zero_stage == 0:
        yield from _unsharded(model, info, ema)
        return
    ranks = [_read(_optimizer_file(folder, rank))["optimizer_state_dict"] for rank in range(info.world_size)]
    if info.zero_stage == 3:
        yield from _stage3(model["param_shapes"], ranks, ema)
    else:
        yield from _stage1_2(model["param_shapes"], ranks, ema)


def _read(path: Path) -> dict[str, Any]:
    try:
        with torch.serialization.safe_globals(_ALLOWED):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).split("GLOBAL ")[-1].split(" ")[0]
        raise DataError(f"{path} refers to {reason}, which no checkpoint of ours does; it was not loaded, because "
                        "loading it could run code") from error
    except (RuntimeError, EOFError, OSError) as error:
        raise DataError(f"{path} cannot be read: {error}; take another checkpoint") from error


def _optimizer_file(folder: Path, rank: int) -> Path:
    found = [path for path in folder.glob("*_optim_states.pt") if f"zero_pp_rank_{rank}_mp_rank_00_" in path.name]
    if len(found) != 1:
        raise DataError(f"{folder} has {len(found)} optimizer files of rank {rank}, it must have one; take another "
                        "checkpoint")
    return found[0]


def _unsharded(model: dict[str, Any], info: CheckpointInfo, ema: bool) -> Iterator[tuple[str, Tensor]]:
    """Without ZeRO rank 0 holds everything: fp32 in the module, bf16 and fp16 with masters in the optimizer."""
    saved = model["optimizer"]
    state = saved if info.precision == "fp32" else saved["optimizer_state_dict"]
    masters = None if info.precision == "fp32" else saved["fp32_groups"]
    for index, group in enumerate(state["param_groups"]):
        for place, (name, number) in enumerate(zip(group["names"], group["params"])):
            if ema:
                yield name, state["state"][number][EMA]
            else:
                yield name, (model["module"][name] if masters is None else masters[index][place]).detach()


def _stage1_2(shapes: Sequence[dict], ranks: Sequence[dict], ema: bool) -> Iterator[tuple[str, Tensor]]:
    """Each group of parameters is one flat vector, cut into one partition per rank."""
    for index, group in enumerate(shapes):
        if ema:
            parts = [rank["base_optimizer_state"]["state"][index][EMA] for rank in ranks]
        else:
            parts = [rank["single_partition_of_fp32_groups"][index] for rank in ranks]
        paddings = ranks[0]["param_alignment_paddings"][index]
        offset = 0
        for (name, shape), padding in zip(group.items(), paddings):
            yield name, _slice(parts, offset, shape.numel()).view(shape)
            offset += shape.numel() + padding


def _stage3(shapes: Sequence[dict], ranks: Sequence[dict], ema: bool) -> Iterator[tuple[str, Tensor]]:
    """Each parameter is cut into one piece per rank, the last padded; a rank keeps its pieces one after another."""
    if ema:
        states = [rank["optimizer_state_dict"]["state"] for rank in ranks]
        parts = [[state[index][EMA] for index in sorted(state)] for state in states]
    else:
        parts = [rank["fp32_flat_groups"] for rank in ranks]
    offset = 0
    for name, shape in (item for group in shapes for item in group.items()):
        piece = -(-shape.numel() // len(ranks))
        whole = torch.cat([_slice(flat, offset, piece) for flat in parts])
        yield name, whole[:shape.numel()].view(shape)
        offset += piece


def _slice(parts: Sequence[Tensor], start: int, length: int) -> Tensor:
    """[start, start + length) of the concatenation of flat tensors, copying no more than that."""
    found, before = [], 0
    for part in parts:
        first, last = max(start - before, 0), min(start + length - before, part.numel())
        if first < last:
            found.append(part.detach()[first:last])
        before += part.numel()
    whole = torch.cat(found) if found else torch.empty(0)
    if whole.numel() != length:
        raise DataError(f"a checkpoint's partitions hold {before} numbers, {start + length} are needed; take another")
    return whole
