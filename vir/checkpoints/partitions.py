"""The files of a ZeRO checkpoint as whole, named tensors of which any range can be read; without deepspeed.

The files are memory-mapped: a rank of another world, or consolidation, reads only the numbers that it needs. They are
torch archives that name a few of DeepSpeed's classes. An allow-list puts inert stand-ins in the place of these, so
nothing in the files can run code.
"""

from __future__ import annotations

import pickle
import re
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Container, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from vir.checkpoints.info import DESCRIPTION, CheckpointInfo
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


def _inert_member(of: object, name: str) -> _Inert:
    """Stands for getattr, by which Python 3.11.0 to 3.11.3 write a member of an enum, and looks nothing up."""
    return _Inert()


_ALLOWED: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [(_Inert, name) for name in (
    "deepspeed.utils.tensor_fragment.fragment_address", "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler", "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler")]
_ALLOWED.append((_inert_member, "builtins.getattr"))


_WRONG = (AttributeError, IndexError, KeyError, TypeError, ValueError)
"""What comes of objects that are not what they should be."""


@dataclass(frozen=True)
class _Place:
    """Where a parameter lies and what the optimizer keeps for it."""

    shape: torch.Size
    read: Callable[[str, int, int], Tensor]
    keys: list[str]
    scalars: dict[str, Any]
    counters: dict[str, Any]


@dataclass(frozen=True)
class _Part:
    """What a rank keeps under ZeRO: flat vectors."""

    weights: list[Tensor]
    """float32, of each group."""
    states: list[dict[str, Any]]
    """Of the optimizer, of each group; empty where it never stepped."""
    counters: list[dict[str, Any]]
    """Of each group of parameters; not in stage 3."""
    paddings: list[list[int]]
    """Numbers behind each parameter of each group; not in stage 3."""


class Partitions:
    """The parameters of a checkpoint, their optimizer state and the model's saved buffers.

    Args:
        folder: a checkpoint whose files are known to be whole.
        info: its description; no file is opened that it does not list.

    Raises:
        CheckpointError: a file that cannot be read, refers to code, or does not hold what the others say.
    """

    def __init__(self, folder: Path, info: CheckpointInfo) -> None:
        self._folder = folder
        path = _model_file(folder, info, 0)
        model = read_file(path)
        with _holding_what_it_should(path):
            self.buffers: dict[str, Tensor] = _tensors(
                {name: model["module"][name] for name in model["buffer_names"]})
            self.ema_buffers: dict[str, Tensor] = _tensors(model.get(EMA_BUFFERS, {}))
            self.frozen: frozenset[str] = frozenset(model.get(FROZEN, ()))
            if info.zero_stage == 0:
                self._places = _unsharded(model, info)
            else:
                shapes = [_shapes(group) for group in model["param_shapes"]]
        if info.zero_stage:
            ranks = []
            for path_of_rank in _optimizer_files(folder, info):
                saved = read_file(path_of_rank)
                with _holding_what_it_should(path_of_rank):
                    ranks.append((_of_stage3 if info.zero_stage == 3 else _of_stage1_2)(saved, len(shapes)))
            with _holding_what_it_should(path):
                self._places = (_stage3 if info.zero_stage == 3 else _stage1_2)(shapes, ranks)
        if info.zero_stage == 3 and self.frozen:
            self._places |= _frozen_stage3(self.frozen, folder, info, model)
        with _holding_what_it_should(path):
            if info.zero_stage != 3:
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
        try:
            return place.read(key, start, stop)
        except _WRONG as error:
            reason = error if isinstance(error, ValueError) else repr(error)
            raise CheckpointError(f"{self._folder}: {key} of {name} cannot be read: {reason}; take another checkpoint"
                                  ) from error

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
    except (RuntimeError, EOFError, OSError, *_WRONG) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; take another checkpoint") from error


@contextmanager
def _holding_what_it_should(path: Path) -> Iterator[None]:
    """Raises CheckpointError where the content of a file, which is looked at within, is of another kind."""
    try:
        yield
    except (RuntimeError, *_WRONG) as error:
        raise CheckpointError(f"{path} does not hold what a file of a checkpoint must ({error!r}); take another "
                              "checkpoint") from error


def _tensors(found: dict[str, Any]) -> dict[str, Tensor]:
    """Raises TypeError where one is none."""
    if others := [name for name, value in found.items() if not isinstance(value, Tensor)]:
        raise TypeError(f"{others[0]} is no tensor")
    return found


def _shapes(found: dict[str, Any]) -> dict[str, torch.Size]:
    return {name: torch.Size(shape) for name, shape in found.items()}


def _model_file(folder: Path, info: CheckpointInfo, rank: int) -> Path:
    """Of a rank under ZeRO 3, else of all."""
    name = f"{f'zero_pp_rank_{rank}_' if info.zero_stage == 3 else ''}mp_rank_00_model_states.pt"
    if name not in info.files:
        raise CheckpointError(f"{folder} has no model file of rank {rank}: {DESCRIPTION} does not list {name}; take "
                              "another checkpoint")
    return folder / name


def _optimizer_files(folder: Path, info: CheckpointInfo) -> list[Path]:
    """Of each rank."""
    listed: dict[int, list[str]] = {}
    for name in info.files:
        if match := re.search(r"zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt$", name):
            listed.setdefault(int(match[1]), []).append(name)
    for rank in range(info.world_size):
        names = listed.get(rank, [])
        if len(names) != 1:
            raise CheckpointError(f"{folder} has {len(names)} optimizer files of rank {rank}, it must have one: "
                                  f"{DESCRIPTION} lists {', '.join(names) or 'none'}; take another checkpoint")
    return [folder / listed[rank][0] for rank in range(info.world_size)]


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


def _flat(state: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """keys and scalars of a flat group: what has as many numbers as the group is kept for each of them."""
    keys = [key for key, value in state.items() if isinstance(value, Tensor) and value.ndim]
    return keys, {key: state[key] for key in state.keys() - set(keys)}


def _of_stage1_2(saved: dict[str, Any], groups: int) -> _Part:
    saved = saved["optimizer_state_dict"]
    optimizer, every = saved["base_optimizer_state"], range(groups)
    return _Part([saved["single_partition_of_fp32_groups"][index] for index in every],
                 [dict(optimizer["state"].get(index, {})) for index in every],
                 [_counters(optimizer["param_groups"][index]) for index in every],
                 [[int(padding) for padding in saved["param_alignment_paddings"][index]] for index in every])


def _of_stage3(saved: dict[str, Any], groups: int) -> _Part:
    """Of its own groups, whose number is not that of the parameters' groups."""
    saved = saved["optimizer_state_dict"]
    state = saved["optimizer_state_dict"]["state"]
    return _Part(list(saved["fp32_flat_groups"]), [dict(state[index]) for index in sorted(state)], [], [])


def _stage1_2(shapes: Sequence[dict[str, torch.Size]], ranks: Sequence[_Part]) -> dict[str, _Place]:
    """Each group of parameters is one flat vector, cut into one partition per rank."""
    places = {}
    for index, group in enumerate(shapes):
        states = [rank.states[index] for rank in ranks]
        weights = [rank.weights[index] for rank in ranks]
        offset = 0
        for (name, shape), padding in zip(group.items(), ranks[0].paddings[index]):

            def read(key: str, start: int, stop: int, offset: int = offset, weights: list[Tensor] = weights,
                     states: list[dict[str, Any]] = states) -> Tensor:
                parts = weights if key == WEIGHT else [state[key] for state in states]
                return _slice(parts, offset + start, stop - start)

            places[name] = _Place(shape, read, *_flat(states[0]), ranks[0].counters[index])
            offset += shape.numel() + padding
    return places


def _stage3(shapes: Sequence[dict[str, torch.Size]], ranks: Sequence[_Part]) -> dict[str, _Place]:
    """Each parameter is cut into one piece per rank, the last padded; a rank keeps its pieces one after another."""
    places, offset = {}, 0
    for name, shape in (item for group in shapes for item in group.items()):
        piece = -(-shape.numel() // len(ranks))

        def read(key: str, start: int, stop: int, offset: int = offset, piece: int = piece) -> Tensor:
            slices = []
            for rank in range(start // piece, -(-stop // piece)) if piece else ():
                first, last = max(start - rank * piece, 0), min(stop - rank * piece, piece)
                if first < last:
                    own = ranks[rank]
                    parts = own.weights if key == WEIGHT else [state[key] for state in own.states]
                    slices.append(_slice(parts, offset + first, last - first))
            return slices[0] if len(slices) == 1 else torch.cat(slices) if slices else torch.empty(0)

        places[name] = _Place(shape, read, *_flat(ranks[0].states[0] if ranks[0].states else {}), {})
        offset += piece
    return places


def _frozen(names: Iterable[str], module: dict[str, Tensor]) -> dict[str, _Place]:
    """Outside stage 3 the module's state_dict holds them, in the training precision."""
    return {name: _without_state(module[name].shape, [module[name].reshape(-1)]) for name in names}


def _frozen_stage3(names: Iterable[str], folder: Path, info: CheckpointInfo, model: dict[str, Any]
                   ) -> dict[str, _Place]:
    """Cut into one piece per rank, the last padded, in the training precision; `model` is what rank 0 has written."""
    parts: dict[str, list[Tensor]] = {name: [] for name in names}
    for rank in range(info.world_size):
        path = _model_file(folder, info, rank)
        of_rank = read_file(path) if rank else model
        with _holding_what_it_should(path):
            for name, pieces in parts.items():
                pieces.append(of_rank["frozen_param_fragments"][name])
    with _holding_what_it_should(_model_file(folder, info, 0)):
        shapes = _shapes(model["frozen_param_shapes"])
        return {name: _without_state(shapes[name], pieces) for name, pieces in parts.items()}


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
        raise ValueError(f"the partitions hold {before} numbers, {start + length} are needed")
    return whole
