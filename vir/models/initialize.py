"""The weights that training begins from: a file of ours, a file that timm reads, or timm's own pretrained weights."""

from __future__ import annotations

import os
import pickle
import reprlib
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from timm.layers import DropBlock2d, DropPath, PatchDropout, PatchDropoutWithIndices
from timm.models import PretrainedCfg
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from vir.errors import DataError, SettingsError, VirError
from vir.log import log
from vir.models.spec import ModelSpec, input_of, some
from vir.models.weights import outline, read, stated_metadata

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

_ARGS_SUM = (1 << 16, 1 << 22)
"""Of the integers in model_args: as many as the file has numbers, within these two. timm makes a list as long as the
network is deep before it makes a layer."""

_REGULARISATION = (nn.Identity, nn.modules.dropout._DropoutNd, DropPath, DropBlock2d, PatchDropout,
                   PatchDropoutWithIndices)

_COMPARED = ("num_heads", "dims", "groups", "num_groups", "stride", "dilation", "approximate")
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


@dataclass(frozen=True, kw_only=True)
class _Source:
    """What is known of weights apart from their tensors."""

    title: str
    model: str = ""
    """As timm knows it; empty where unknown."""
    args: Mapping[str, Any] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    """Empty where unknown."""
    size: tuple[int, ...] = ()
    """Height and width of the images; empty where unknown."""
    network: nn.Module | None = None
    """One that takes the tensors as they are, on the meta device where no more is needed; None where unknown."""


def initialize_from(model: nn.Module, path: str | os.PathLike[str], classes: Sequence[str] = ()) -> None:
    """Begin training from weights in a file: one of ours, or any that timm reads (weights only, no code is run).

    Position tables and patches are resampled where the model's family knows how; from the grid of a file of ours, and
    from that of timm's pretrained weights or a square where a file does not say it. The head is taken where the file's
    classes are those of this run; where they are more, its rows are taken by name; else it keeps its random start. A
    file that names no classes is judged by their count. Everything else must be there. The log says what was done.

    Args:
        classes: of the model's logits, in order; empty where unknown.

    Raises:
        DataError: a file that cannot be read, or that holds weights of another architecture.
    """
    if metadata := stated_metadata(path):
        spec = metadata.model
        title = f"{path}, a {spec.name} ({'EMA' if metadata.ema else 'raw'} weights of step {metadata.step})"
        network = described(path, spec, outline(path)[1])
        source = _Source(title=title, model=spec.name, args=spec.args, classes=spec.classes, size=spec.input.size[1:],
                         network=network)
        _begin(model, classes, read(path)[1], source)
        return
    if not os.path.isfile(path):
        raise DataError(f"no weights file at {path}; vir-consolidate makes one from a run folder")
    try:
        state_dict = timm.models.load_state_dict(str(path), use_ema=True, device="cpu", weights_only=True)
    except UNREADABLE as error:
        raise DataError(f"{path} cannot be read as weights: {_reason(error)}; give a .safetensors file, or one that "
                        "torch.save wrote of a model's state_dict()") from error
    _begin(model, classes, state_dict, _Source(title=str(path)))


def initialize_pretrained(model: nn.Module, name: str, classes: Sequence[str] = ()) -> None:
    """Begin training from timm's own weights of that model, from its cache or the network; as initialize_from.

    Raises:
        SettingsError: timm has none.
        DataError: they are not in the cache and cannot be fetched, or do not fit `model`.
    """
    cfg = check_pretrained(name)
    place = f"huggingface.co/{cfg.hf_hub_id}" if cfg.hf_hub_id else cfg.url
    full_name = f"{cfg.architecture}.{cfg.tag}" if cfg.tag else cfg.architecture
    try:
        # As they were trained: timm checks every tensor then, and with another class count it would check none.
        source = timm.create_model(name, pretrained=True)
    except UNREADABLE as error:
        raise DataError(
            f"--model.pretrained: the weights of {full_name} ({place}) come neither from the network nor from "
            f"{_cache(bool(cfg.hf_hub_id))}: {' '.join(str(error).split())}; where there is a network, run `python -c "
            f"\"import timm; timm.create_model('{name}', pretrained=True)\"` and copy that folder, or give a file by "
            "--model.init_from FILE") from error
    _begin(model, classes, source.state_dict(), _Source(
        title=f"timm's pretrained {full_name}", model=name, size=input_of(source).size[1:], network=source))


def _cache(is_on_hub: bool) -> str:
    """Where timm keeps what it fetched, and what moves it."""
    if is_on_hub:
        from huggingface_hub.constants import HF_HUB_CACHE

        return f"the cache {HF_HUB_CACHE} (HF_HOME moves it)"
    return f"the cache {torch.hub.get_dir()}/checkpoints (TORCH_HOME moves it)"


def check_pretrained(name: str) -> PretrainedCfg:
    """Where timm has the weights of that model.

    Raises:
        SettingsError: nowhere; it names models that have some.
    """
    cfg = timm.get_pretrained_cfg(name)
    if cfg is not None and cfg.has_weights:
        return cfg
    architecture = name.partition(".")[0]
    near = timm.list_pretrained(architecture) or timm.list_pretrained(f"{architecture.partition('_')[0]}_*")
    raise SettingsError(f"--model.pretrained: timm has no pretrained weights of {name}; " + (
        f"there are some of {some(near)}" if near else
        "timm.list_pretrained() tells what has some; a file of your own is given by --model.init_from"))


def _begin(model: nn.Module, classes: Sequence[str], state_dict: dict[str, Tensor], source: _Source) -> None:
    """Put tensors into a model and say what was done."""
    own, cfg = model.state_dict(), getattr(model, "default_cfg", None) or {}
    architecture = cfg.get("architecture") or type(model).__name__
    builds = f"this run builds a {architecture}"
    if source.model:
        builds = f"it holds a {source.model}{f' with {source.args}' if source.args else ''}, {builds}"
    try:
        fitted = resampled(state_dict, model, source.network)
    except UNREADABLE as error:
        raise DataError(f"{source.title} does not fit: {builds}: {_reason(error)}") from error
    heads = cfg.get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    head = _fit_head(fitted, own, heads, classes, source)
    problems = mismatches(fitted, own)
    if not problems and source.network is not None:
        problems = _differences(source.network, model, heads)
    if problems:
        raise DataError(f"{source.title} does not fit: {builds}: {problems}; give weights of the same architecture" + (
            f", or --model.name {source.model}" if source.model and source.model.partition(".")[0] != architecture
            else ", or the same --model.args" if source.args else ""))
    model.load_state_dict(fitted)
    log.info("initial weights: %d tensors from %s", len(fitted), source.title)
    changed = [f"{name} {list(state_dict[name].shape)} -> {list(fitted[name].shape)}" for name in fitted
               if name in state_dict and name not in head.names
               and not torch.equal(fitted[name], state_dict[name].to(fitted[name]))]
    if changed:
        sizes = " -> ".join("x".join(map(str, size)) for size in (source.size, input_of(model).size[1:]) if size)
        log.info("initial weights: resampled for images of %s pixels: %s", sizes, some(changed))
    if head.said:
        log.info("initial weights: the head %s", head.said)


@dataclass(frozen=True)
class _Head:
    names: tuple[str, ...]
    said: str


def _differences(there: nn.Module, here: nn.Module, heads: Sequence[str]) -> str:
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


def _fit_head(given: dict[str, Tensor], own: Mapping[str, Tensor], heads: Sequence[str], classes: Sequence[str],
              source: _Source) -> _Head:
    """Make the tensors of the classifier in `given` those of this run's classes, in place where possible.

    Returns:
        Their names, and what was done with them.
    """
    names = tuple(name for name in own if name.rsplit(".", 1)[0] in heads)
    if not names:
        return _Head((), "")
    if given.keys().isdisjoint(names):
        given |= {name: own[name] for name in names}
        return _Head(names, "begins at random: there is none in it")
    theirs, count = source.classes, given[names[0]].shape[0] if names[0] in given else 0
    if not theirs or not classes:
        differing = [name for name in names if name in given and given[name].shape != own[name].shape]
        given |= {name: own[name] for name in differing}
        return _Head(names, f"begins at random: {count} classes there, {own[names[0]].shape[0]} here" if differing else
                     f"is taken, for it has as many classes, {count}; whether they are the same is not known")
    if tuple(classes) == theirs:
        return _Head(names, f"is taken: the same {len(theirs)} classes")
    if unknown := sorted(set(classes) - set(theirs)):
        given |= {name: own[name] for name in names}
        return _Head(names, f"begins at random: {len(theirs)} classes there, {len(classes)} here, of which "
                            f"{len(unknown)} are not there ({some(unknown)})")
    if count == len(theirs):  # else mismatches tells it
        rows = [theirs.index(name) for name in classes]
        given |= {name: given[name][rows] for name in names if name in given}
    return _Head(names, f"is taken row by row: all {len(classes)} classes are among the {len(theirs)} there")


def described(path: str | os.PathLike[str], spec: ModelSpec, given: Mapping[str, Tensor]) -> nn.Module:
    """The network that a file of ours says it holds, on the meta device: its tensors have shapes and no numbers.

    Args:
        given: the file's tensors; those on the meta device do.

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
    if problems := mismatches(given, network.state_dict()):
        raise DataError(f"{path} does not fit {spec.name} with model_args {_shown(spec.args)}: {problems}; "
                        f"correct the model_args where the file is made")
    return network


class _TooLargeError(Exception):
    """A network that is being built has more tensors than its file."""


@contextmanager
def _counted(numbers: int, tensors: int) -> Iterator[None]:
    """Networks that this thread builds meanwhile end with _TooLargeError where they are not of that many."""
    left = [_NETWORK_TIMES * numbers + _NETWORK_NUMBERS, _NETWORK_TIMES * tensors + _NETWORK_TENSORS]
    thread = threading.get_ident()

    def count(module: nn.Module, name: str, tensor: Tensor | None) -> None:
        if tensor is not None and threading.get_ident() == thread:
            left[0] -= tensor.numel()
            left[1] -= 1
            if min(left) < 0:
                raise _TooLargeError

    hooks = register_module_parameter_registration_hook(count), register_module_buffer_registration_hook(count)
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
    resample = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    fitted = dict(resample(dict(state_dict), model)) if resample else dict(state_dict)
    if len(grids) == 2 and None not in grids and grids[0] != grids[1]:
        _check_tables(state_dict, fitted, own, *grids)
    return fitted


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


def _reason(error: BaseException) -> str:
    """What an error says; the name of its type too where it is none of ours, for many say a number or nothing."""
    if isinstance(error, VirError):
        return str(error)
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
