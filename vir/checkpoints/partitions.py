"""The files of a ZeRO checkpoint as whole, named tensors of which any range can be read; without deepspeed.

The files are memory-mapped: a rank of another world, or consolidation, reads only the numbers that it needs. They are
torch archives that name a few of DeepSpeed's classes. An allow-list puts inert stand-ins in the place of these, so
nothing in the files can run code.
"""

from __future__ import annotations

import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Container, Iterable, Sequence

import torch
from torch import Tensor

from vir.checkpoints.info import CheckpointInfo
from vir.errors import CheckpointError

WEIGHT = "weight"
"""The key of the float32 master weights; the others are those of the optimizer's state."""
EMA = "ema"
"""The key of the average of the weights in the optimizer's state."""
EMA_BUFFERS = "ema_buffers"
FROZEN = "frozen"
"""The names of the parameters that are not trained: no optimizer holds them."""


class _Inert:
    """Stands in for a DeepSpeed class whose values are not needed here."""

    def __init__(self, *args: Any) -> None:
        pass


_ALLOWED: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [(_Inert, name) for name in (
    "deepspeed.utils.tensor_fragment.fragment_address", "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler", "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler")]


@dataclass(frozen=True)
class _Place:
    """Where a parameter lies and what the optimizer keeps for it."""

    shape: torch.Size
    read: Callable[[str, int, int], Tensor]
    keys: list[str]
    scalars: dict[str, Any]
    counters: dict[str, Any]


class Partitions:
    """The parameters of a checkpoint, their optimizer state and the model's saved buffers.

    Args:
        folder: a checkpoint whose files are known to be whole.

    Raises:
        CheckpointError: a file that cannot be read, refers to code, or does not hold what the others say.
    """

    def __init__(self, folder: Path, info: CheckpointInfo) -> None:
        model = read_file(_model_file(folder, 0 if info.zero_stage == 3 else None))
        self.buffers: dict[str, Tensor] = {name: model["module"][name] for name in model["buffer_names"]}
        self.ema_buffers: dict[str, Tensor] = model.get(EMA_BUFFERS, {})
        self.frozen: frozenset[str] = frozenset(model.get(FROZEN, ()))
        if info.zero_stage == 0:
            self._places = _unsharded(model, info)
        else:
            ranks = [read_file(path)["optimizer_state_dict"] for path in _optimizer_files(folder, info.world_size)]
            self._places = (_stage3 if info.zero_stage == 3 else _stage1_2)(model["param_shapes"], ranks)
        if info.zero_stage == 3 and self.frozen:
            others = [read_file(_model_file(folder, rank)) for rank in range(1, info.world_size)]
            self._places |= _frozen_stage3(self.frozen, [model, *others])
        else:
            self._places |= _frozen(self.frozen, model["module"])
        self.shared: dict[str, str] = _shared(model, self._places)
        """Of each further name of a parameter that several modules share, the one by which it is known here."""

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Of each parameter, by name."""
        return {name: place.shape for name, place in self._places.items()}

    def keys(self, name: str) -> list[str]:
        """Of the state that the optimizer keeps for each number of a parameter, e.g. exp_avg, exp_avg_sq, ema."""
        return self._places[name].keys

    def scalars(self, name: str) -> dict[str, Any]:
        """What it keeps once for a parameter, e.g. step; without ZeRO also tensors of another shape (Adafactor)."""
        return self._places[name].scalars

    def counters(self, name: str) -> dict[str, Any]:
        """What it keeps once for the group of a parameter, e.g. the step of LAMB."""
        return self._places[name].counters

    def read(self, name: str, key: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Numbers [start, stop) of a parameter's weight or state, flat. An average not yet begun is the weight."""
        place = self._places[name]
        stop = place.shape.numel() if stop is None else stop
        if key == EMA and key not in place.keys:
            key = WEIGHT
        return place.read(key, start, stop)

    def whole(self, name: str, key: str) -> Tensor:
        return self.read(name, key).view(self._places[name].shape)


def files_of_rank(folder: Path, rank: int) -> list[Path]:
    """What a rank has written: its part of the optimizer and, of rank 0, everything that carries no rank."""
    own = f"_pp_rank_{rank}_"
    return [path for path in folder.iterdir() if own in path.name or (rank == 0 and "_pp_rank_" not in path.name)]


def read_file(path: Path) -> dict[str, Any]:
    """The content of one file, memory-mapped. Raises CheckpointError where it is damaged or would run code."""
    try:
        with torch.serialization.safe_globals(_ALLOWED):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).split("GLOBAL ")[-1].split(" ")[0]
        raise CheckpointError(f"{path} refers to {reason}, which no checkpoint of ours does; it was not loaded, "
                              "because loading it could run code") from error
    except (RuntimeError, EOFError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; take another checkpoint") from error


def _model_file(folder: Path, rank: int | None) -> Path:
    """Of a rank under ZeRO 3, else of all."""
    return folder / f"{'' if rank is None else f'zero_pp_rank_{rank}_'}mp_rank_00_model_states.pt"


def _optimizer_files(folder: Path, ranks: int) -> list[Path]:
    """Of each rank; the folder is listed once."""
    found: dict[int, list[Path]] = {rank: [] for rank in range(ranks)}
    for path in folder.iterdir():
        if name := re.search(r"zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt$", path.name):
            found.setdefault(int(name[1]), []).append(path)
    for rank in range(ranks):
        if len(found[rank]) != 1:
            raise CheckpointError(f"{folder} has {len(found[rank])} optimizer files of rank {rank}, it must have one; "
                                  "take another checkpoint")
    return [found[rank][0] for rank in range(ranks)]


def _shared(model: dict[str, Any], places: Container[str]) -> dict[str, str]:
    """As DeepSpeed has listed them; without ZeRO it lists none, but there the module holds the same numbers twice."""
    if model.get("shared_params") is not None:
        shared: dict[str, str] = {}
        for name, first in model["shared_params"].items():
            if (first := shared.get(first, first)) in places:
                shared[name] = first
        return shared
    module = {name: (value.data_ptr(), value.shape, value.stride()) for name, value in model["module"].items()
              if isinstance(value, Tensor) and name not in model["buffer_names"]}
    known = {place: name for name, place in module.items() if name in places}
    return {name: known[place] for name, place in module.items() if name not in places and place in known}


def _unsharded(model: dict[str, Any], info: CheckpointInfo) -> dict[str, _Place]:
    """Without ZeRO rank 0 holds everything: fp32 in the module, bf16 and fp16 with masters in the optimizer."""
    saved = model["optimizer"]
    optimizer = saved if info.precision == "fp32" else saved["optimizer_state_dict"]
    masters = None if info.precision == "fp32" else saved["fp32_groups"]
    places = {}
    for index, group in enumerate(optimizer["param_groups"]):
        for place, (name, number) in enumerate(zip(group["names"], group["params"])):
            weight = (model["module"][name] if masters is None else masters[index][place]).detach()
            state = optimizer["state"].get(number, {})

            def read(key: str, start: int, stop: int, weight: Tensor = weight, state: dict[str, Any] = state) -> Tensor:
                return (weight if key == WEIGHT else state[key]).reshape(-1)[start:stop]

            keys = [key for key, value in state.items() if isinstance(value, Tensor) and value.shape == weight.shape]
            places[name] = _Place(weight.shape, read, keys, {key: state[key] for key in state.keys() - set(keys)},
                                  _counters(group))
    return places


def _counters(group: dict[str, Any]) -> dict[str, Any]:
    return {"step": group["step"]} if "step" in group else {}


def _flat(state: dict[str, Any], group: dict[str, Any]) -> tuple[list[str], dict[str, Any], dict[str, Any]]:
    """keys, scalars and counters of a flat group: what has as many numbers as the group is kept for each of them."""
    keys = [key for key, value in state.items() if isinstance(value, Tensor) and value.ndim]
    return keys, {key: state[key] for key in state.keys() - set(keys)}, _counters(group)


def _stage1_2(shapes: Sequence[dict[str, torch.Size]], ranks: Sequence[dict[str, Any]]) -> dict[str, _Place]:
    """Each group of parameters is one flat vector, cut into one partition per rank."""
    places = {}
    for index, group in enumerate(shapes):
        saved = [rank["base_optimizer_state"] for rank in ranks]
        states = [one["state"].get(index, {}) for one in saved]
        weights = [rank["single_partition_of_fp32_groups"][index] for rank in ranks]
        offset = 0
        for (name, shape), padding in zip(group.items(), ranks[0]["param_alignment_paddings"][index]):

            def read(key: str, start: int, stop: int, offset: int = offset, weights: list[Tensor] = weights,
                     states: list[dict[str, Any]] = states) -> Tensor:
                parts = weights if key == WEIGHT else [state[key] for state in states]
                return _slice(parts, offset + start, stop - start)

            places[name] = _Place(shape, read, *_flat(states[0], saved[0]["param_groups"][index]))
            offset += shape.numel() + padding
    return places


def _stage3(shapes: Sequence[dict[str, torch.Size]], ranks: Sequence[dict[str, Any]]) -> dict[str, _Place]:
    """Each parameter is cut into one piece per rank, the last padded; a rank keeps its pieces one after another."""
    saved = [rank["optimizer_state_dict"]["state"] for rank in ranks]
    states = [[state[index] for index in sorted(state)] for state in saved]
    places, offset = {}, 0
    for name, shape in (item for group in shapes for item in group.items()):
        piece = -(-shape.numel() // len(ranks))

        def read(key: str, start: int, stop: int, offset: int = offset, piece: int = piece) -> Tensor:
            slices = []
            for rank in range(start // piece, -(-stop // piece)) if piece else ():
                flat = ranks[rank]
                first, last = max(start - rank * piece, 0), min(stop - rank * piece, piece)
                if first < last:
                    parts = flat["fp32_flat_groups"] if key == WEIGHT else [part[key] for part in states[rank]]
                    slices.append(_slice(parts, offset + first, last - first))
            return slices[0] if len(slices) == 1 else torch.cat(slices) if slices else torch.empty(0)

        places[name] = _Place(shape, read, *_flat(states[0][0] if states[0] else {}, {}))
        offset += piece
    return places


def _frozen(names: Iterable[str], module: dict[str, Tensor]) -> dict[str, _Place]:
    """Outside stage 3 the module's state_dict holds them, in the training precision."""
    return {name: _without_state(module[name].shape, [module[name].reshape(-1)]) for name in names}


def _frozen_stage3(names: Iterable[str], models: Sequence[dict[str, Any]]) -> dict[str, _Place]:
    """Cut into one piece per rank, the last padded, in the training precision."""
    return {name: _without_state(models[0]["frozen_param_shapes"][name],
                                 [model["frozen_param_fragments"][name] for model in models]) for name in names}


def _without_state(shape: torch.Size, parts: Sequence[Tensor]) -> _Place:
    def read(key: str, start: int, stop: int) -> Tensor:
        return _slice(parts, start, stop - start).float()

    return _Place(shape, read, [], {}, {})


def _slice(parts: Sequence[Tensor], start: int, length: int) -> Tensor:
    """[start, start + length) of the concatenation of flat tensors, copying no more than that."""
    overlaps, before = [], 0
    for part in parts:
        first, last = max(start - before, 0), min(start + length - before, part.numel())
        if first < last:
            overlaps.append(part.detach()[first:last])
        before += part.numel()
    whole = overlaps[0] if len(overlaps) == 1 else torch.cat(overlaps) if overlaps else torch.empty(0)
    if whole.numel() != length:
        raise CheckpointError(f"a checkpoint's partitions hold {before} numbers, {start + length} are needed; take "
                              "another")
    return whole
