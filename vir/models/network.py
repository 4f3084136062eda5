"""Networks by their names and arguments: built, compared with tensors and with each other, resampled."""

from __future__ import annotations

import os
import pickle
import reprlib
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from timm.layers import DropBlock2d, DropPath, PatchDropout, PatchDropoutWithIndices
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from vir.errors import DataError, SettingsError
from vir.weights.fields import some
from vir.weights.spec import ModelSpec

UNREADABLE = (OSError, RuntimeError, EOFError, ValueError, TypeError, LookupError, AttributeError, AssertionError,
              pickle.UnpicklingError, SafetensorError)
"""What readers of weights raise on a file that is missing, damaged or of another kind."""

FORBIDDEN_ARGS = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}
"""Arguments of timm.create_model with which a file could make its reader fetch or open other weights."""

_NETWORK_TIMES = 4
_NETWORK_NUMBERS = 1 << 22
_NETWORK_TENSORS = 1000
"""A network may register so many times the numbers and tensors of its file, and so many beside, while it is built: some
replace layers as they go on, and masks and tables of indices are not in files."""

_BUFFERS = 1 << 28
"""Numbers of buffers that any network may have: Swin's indexes of large windows are more than its weights."""

_ARGS_SUM = (1 << 16, 1 << 22)
"""Of the integers in model_args: as many as the file has numbers, within these two. timm makes a list as long as the
network is deep before it makes a layer."""

_REGULARISATION = (nn.Identity, nn.modules.dropout._DropoutNd, DropPath, DropBlock2d, PatchDropout,
                   PatchDropoutWithIndices)

_COMPARED = ("eps", "num_heads", "dims", "groups", "num_groups", "stride", "dilation", "approximate")
"""What modules of one kind compute by, and no shape shows."""


class NotBuiltError(SettingsError):
    """timm cannot create a model with the arguments that were given."""


def create(name: str, args: Mapping[str, Any], **more: Any) -> nn.Module:
    """The timm model of that name with random weights.

    Raises:
        NotBuiltError: timm, or the model, refuses the arguments.
    """
    try:
        return timm.create_model(name, **args, **more)
    except (TypeError, ValueError, AssertionError, RuntimeError, ArithmeticError, LookupError, AttributeError,
            MemoryError) as error:
        raise NotBuiltError(str(error).partition("\nException raised from")[0]) from error  # without torch's own stack


def network_of(path: str | os.PathLike[str], spec: ModelSpec) -> nn.Module:
    """The network that a file of ours says it holds, with random weights; of whatever size it says.

    Raises:
        DataError: it cannot be created here, or would fetch other weights.
    """
    if not timm.is_model(spec.name):
        raise DataError(f"{path} holds a {spec.name[:200]!r}, which timm {timm.__version__} does not know; install "
                        f"the timm that wrote it, or import the package that registers this model first")
    if forbidden := sorted(FORBIDDEN_ARGS & spec.args.keys()):
        raise DataError(f"{path} has model_args {forbidden}, which would fetch other weights; remove them where the "
                        f"file is made")
    if own := sorted({"device", "dtype"} & spec.args.keys()):
        raise DataError(f"{path} has model_args {own}, which are for its reader to choose; remove them where the file "
                        "is made")
    try:
        return create(spec.name, spec.args, pretrained_cfg_overlay=timm_cfg(spec))
    except NotBuiltError as error:
        raise DataError(f"{path}: timm {timm.__version__} cannot create {spec.name!r} with model_args "
                        f"{_shown(spec.args)} ({error}); install the versions of vir and timm that wrote it") from error


def timm_cfg(spec: ModelSpec) -> dict[str, Any]:
    """The fields of timm's pretrained_cfg that a file knows better than timm."""
    return spec.input.timm_cfg() | {key: spec.args[key] for key in {"num_classes"} & spec.args.keys()}


def described(path: str | os.PathLike[str], spec: ModelSpec, given: Mapping[str, Tensor],
              is_filtered: bool = False) -> nn.Module:
    """The network that a file of ours says it holds, on the meta device: its tensors have shapes and no numbers.

    Args:
        given: the file's tensors; those on the meta device do.
        is_filtered: whether timm's filter of the family goes over them first, for names and tensors of old.

    Raises:
        DataError: the network cannot be created here, would fetch other weights, or is not one of those tensors. That
            of a network far too large is told before it takes memory or time.
    """
    numbers = sum(tensor.numel() for tensor in given.values())
    least, most = _ARGS_SUM
    if (named := sum(_integers(spec.args))) > min(max(numbers, least), most):
        raise DataError(f"{path} holds {numbers} numbers in all, and its model_args ask for depths and sizes of "
                        f"{reprlib.repr(named)} in sum; it was not made from a model: make it anew with "
                        "vir-consolidate")
    try:
        with _counted(numbers, len(given)):
            try:
                with torch.device("meta"):
                    network = network_of(path, spec)
            except DataError:  # some networks compute with numbers while they are built
                network = network_of(path, spec)
    except _TooLargeError:
        raise DataError(f"{path} does not fit {spec.name} with model_args {_shown(spec.args)}: it holds {numbers} "
                        f"numbers in {len(given)} tensors, and that network has several times as many; correct the "
                        "model_args where the file is made") from None
    if problems := mismatches(filtered(given, network) if is_filtered else given, network.state_dict()):
        raise DataError(f"{path} does not fit {spec.name} with model_args {_shown(spec.args)}: {problems}; "
                        f"correct the model_args where the file is made")
    return network


class _TooLargeError(Exception):
    """A network that is being built has more tensors than its file."""


@contextmanager
def _counted(numbers: int, tensors: int) -> Iterator[None]:
    """Networks that this thread builds meanwhile end with _TooLargeError where they are not of that many."""
    allowed = _NETWORK_TIMES * numbers + _NETWORK_NUMBERS
    left = {"parameters": allowed, "buffers": max(allowed, _BUFFERS),
            "tensors": _NETWORK_TIMES * tensors + _NETWORK_TENSORS}
    thread = threading.get_ident()

    def count(kind: str, module: nn.Module, name: str, tensor: Tensor | None) -> None:
        if tensor is not None and threading.get_ident() == thread:
            left[kind] -= tensor.numel()
            left["tensors"] -= 1
            if min(left.values()) < 0:
                raise _TooLargeError

    hooks = (register_module_parameter_registration_hook(partial(count, "parameters")),
             register_module_buffer_registration_hook(partial(count, "buffers")))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _integers(value: Any) -> Iterator[int]:
    """All that stand in arguments as JSON has them; depth by depth, for lists in lists have no end."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, int):
            yield abs(one)
        elif isinstance(one, Mapping):
            waiting += one.values()
        elif isinstance(one, (list, tuple)):
            waiting += one


def _shown(args: Mapping[str, Any]) -> str:
    """As far as an error takes them."""
    text = str(args)
    return text if len(text) <= 1000 else f"{text[:1000]}…"


def resampled(state_dict: dict[str, Tensor], model: nn.Module, source: nn.Module | None = None) -> dict[str, Tensor]:
    """The tensors with position tables and patches at the model's sizes, where its family knows how.

    Args:
        source: a network that takes the tensors as they are, maybe on the meta device, so that it knows the grid that
            they come from: 4x4 and 2x8 places are as many. It is used up. None where there is none: timm assumes the
            grid of its pretrained weights, or a square.

    Raises:
        SettingsError: the grids differ, and the family knows no way from one to the other.
    """
    own, embed = model.state_dict(), getattr(model, "patch_embed", None)
    grids = [_grid(network) for network in (source, model) if network is not None]
    if source is not None and hasattr(source, "set_input_size") and hasattr(embed, "img_size"):
        patch = getattr(embed, "patch_size")
        is_kept = patch == getattr(source, "patch_embed").patch_size  # not every family can change it
        try:
            source.load_state_dict({name: x.float() if x.is_floating_point() else x for name, x in state_dict.items()},
                                   assign=True)
            getattr(source, "set_input_size")(
                img_size=getattr(embed, "img_size"), **{} if is_kept else {"patch_size": patch})
        except UNREADABLE:  # not of this family or of these sizes; mismatches tells it
            found = {}
        else:
            found = source.state_dict()
        if found and not any(tensor.is_meta for tensor in found.values()) and all(
                found[name].shape == own[name].shape for name in found.keys() & own.keys()
                if found[name].shape != state_dict[name].shape):
            return found  # else it resized what `model` has not, like the windows of Swin
    fitted = filtered(state_dict, model)
    if len(grids) == 2 and None not in grids and grids[0] != grids[1]:
        _check_tables(state_dict, fitted, own, *grids)
    return fitted


def filtered(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The tensors as timm's filter of the model's family makes them, which also resamples; as they are without one."""
    of_family = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    return dict(of_family(dict(state_dict), model)) if of_family else dict(state_dict)


def _grid(network: nn.Module) -> tuple[int, int] | None:
    """Rows and columns of patches; None where no module tells them."""
    for module in network.modules():
        size, patch = getattr(module, "img_size", None), getattr(module, "patch_size", None)
        grid: Any = getattr(module, "grid_size", None) or getattr(module, "tokens_spatial_shape", None)  # ViTs, Hiera
        if grid is None and isinstance(size, tuple) and isinstance(patch, tuple):  # CrossViT
            grid = [side // step for side, step in zip(size, patch)]
        if isinstance(grid, (tuple, list)) and len(grid) == 2:
            return grid[0], grid[1]
    return None


def _check_tables(given: Mapping[str, Tensor], fitted: Mapping[str, Tensor], own: Mapping[str, Tensor],
                  there: Any, here: Any) -> None:
    """Raises SettingsError where a table of places in a row was taken from another grid as if that were a square, or as
    if it were the model's."""
    for name in given.keys() & fitted.keys() & own.keys():
        is_table = "pos" in name.rsplit(".", 1)[-1] and given[name].ndim == 3  # [1, places, width]
        is_kept = fitted[name].shape == given[name].shape
        if is_table and fitted[name].shape == own[name].shape and (is_kept or there[0] != there[1]):
            raise SettingsError(f"{name} is of {there[0]}x{there[1]} patches, not of {here[0]}x{here[1]}, and timm "
                                "resamples no positions between them for this family; take the img_size of the file")


def mismatches(given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """What keeps tensors from being a model's state_dict; empty where nothing does."""
    shapes = [f"{name} is {list(given[name].shape)}, not {list(expected[name].shape)}"
              for name in given.keys() & expected.keys() if given[name].shape != expected[name].shape]
    kinds = [f"{name} is {given[name].dtype}, not {expected[name].dtype}" for name in given.keys() & expected.keys()
             if expected[name].is_floating_point() and not given[name].is_floating_point()]
    missing, unexpected = expected.keys() - given.keys(), given.keys() - expected.keys()
    problems: dict[str, Iterable[str]] = {"missing": missing, "unexpected": unexpected, "of another shape": shapes,
                                          "of another type": kinds}
    return "; ".join(f"{len(list(names))} tensors {kind} ({some(names)})" for kind, names in problems.items() if names)


def differences(there: nn.Module, here: nn.Module, heads: Sequence[str]) -> str:
    """In what modules of the same name compute otherwise, heads and regularisation aside; empty where in nothing."""
    own, found = dict(here.named_modules()), []
    for name, module in there.named_modules():
        other = own.get(name)
        if other is None or any(name == head or name.startswith(f"{head}.") for head in heads):
            continue
        title = name or "the network"
        if type(module) is not type(other):
            if not isinstance(module, _REGULARISATION) or not isinstance(other, _REGULARISATION):
                found.append(f"{title} is a {type(module).__name__} there, a {type(other).__name__} here")
            continue
        for key in _COMPARED:
            values = getattr(module, key, None), getattr(other, key, None)
            if values[0] != values[1]:
                found.append(f"{title} has {key} {values[0]} there, {values[1]} here")
    return "; ".join(found[:3]) + ("; …" if len(found) > 3 else "")
