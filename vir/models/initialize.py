"""The weights that training begins from: a file of ours, a file that timm reads, or timm's own pretrained weights."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.models import PretrainedCfg
from torch import Tensor, nn

from vir.errors import DataError, SettingsError, VirError
from vir.log import log
from vir.models.network import UNREADABLE, described, differences, filtered, mismatches, resampled
from vir.weights.fields import some
from vir.weights.hub import class_names_of, is_folder, read_config, weights_of
from vir.weights.portable import is_there, outline, read, stated_metadata
from vir.weights.spec import input_of
from vir.weights.tensor_files import INDEX_ENDING


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


def initialize_from(model: nn.Module, path: str | os.PathLike[str], classes: Sequence[str] = (), *,
                    reset_head: bool = False) -> None:
    """Begin training from weights in a file: one of ours, or any that timm reads (weights only, no code is run).

    Or in a folder of Hugging Face: a config.json of timm, which says of what model they are, and the weights.

    Position tables and patches are resampled where the model's family knows how; from the grid of a file of ours, and
    from that of timm's pretrained weights or a square where a file does not say it. The head is taken where the file's
    classes are those of this run; else its rows are taken by name, and classes that the file does not know begin at
    random. A
    file that names no classes is judged by their count. Everything else must be there. The log says what was done.

    Args:
        classes: of the model's logits, in order; empty where unknown.
        reset_head: begin with a head at random in any case.

    Raises:
        DataError: a file that cannot be read, or that holds weights of another architecture.
        SettingsError: reset_head of a model that does not say which of its layers is the head.
    """
    folder = path if is_folder(path) else None
    path = path if folder is None else weights_of(folder)
    if metadata := stated_metadata(path):
        spec = metadata.model
        title = f"{path}, a {spec.name} ({'EMA' if metadata.ema else 'raw'} weights of step {metadata.step})"
        network = described(path, spec, outline(path)[1])
        source = _Source(title=title, model=spec.name, args=spec.args, classes=spec.classes, size=spec.input.size[1:],
                         network=network)
        _begin(model, classes, read(path)[1], source, reset_head)
        return
    if is_there(path) and (not os.path.isfile(path) or os.fspath(path).endswith(INDEX_ENDING)):
        raise DataError(f"{path} stands for weights in several files that do not say which model they hold; join them "
                        "into one, which timm can read")
    if not os.path.isfile(path):
        raise DataError(f"no weights file at {path}; vir-consolidate makes one from a run folder")
    try:
        state_dict = timm.models.load_state_dict(str(path), use_ema=True, device="cpu", weights_only=True)
    except UNREADABLE as error:
        raise DataError(f"{path} cannot be read as weights: {_reason(error)}; give a .safetensors file, or one that "
                        "torch.save wrote of a model's state_dict()") from error
    if folder is None:
        _begin(model, classes, state_dict, _Source(title=str(path)), reset_head)
    else:
        _begin_from_folder(model, classes, state_dict, folder, reset_head)


def _begin_from_folder(model: nn.Module, classes: Sequence[str], state_dict: dict[str, Tensor],
                       folder: str | os.PathLike[str], reset_head: bool) -> None:
    """As initialize_from, with what a config.json says of the tensors."""
    spec = read_config(folder)
    try:
        network = described(folder, spec, state_dict, is_filtered=True)
        native = filtered(state_dict, network)
    except VirError:
        raise
    except UNREADABLE as error:
        raise DataError(f"{folder} holds no weights of the {spec.name} that its config.json describes: "
                        f"{_reason(error)}; copy both files again") from error
    source = _Source(title=f"{folder}, a {spec.name}", model=spec.name, args=spec.args, classes=spec.classes,
                     size=input_of(network).size[1:], network=network)
    _begin(model, classes, native, source, reset_head)


def initialize_pretrained(model: nn.Module, name: str, classes: Sequence[str] = (), *,
                          reset_head: bool = False) -> None:
    """Begin training from timm's own weights of that model, from its cache or the network; as initialize_from.

    Raises:
        SettingsError: timm has none.
        DataError: they are not in the cache and cannot be fetched, or do not fit `model`.
    """
    source, full_name = pretrained_network(name)
    _begin(model, classes, source.state_dict(), _Source(
        title=f"timm's pretrained {full_name}", model=name, classes=classes_of_timm(source, classes),
        size=input_of(source).size[1:], network=source), reset_head)


def classes_of_timm(network: nn.Module, classes: Sequence[str]) -> tuple[str, ...]:
    """The classes of a network with weights of timm: where these name them, or where they are ImageNet's and some of
    `classes`, those of the run, are wnids of it. Empty where unknown."""
    if named := class_names_of(network):
        return named
    subset = infer_imagenet_subset(getattr(network, "pretrained_cfg"))
    wnids = tuple(ImageNetInfo(subset).label_names()) if subset else ()
    return () if set(wnids).isdisjoint(classes) or len(wnids) != getattr(network, "num_classes") else wnids


def pretrained_network(name: str, flag: str = "--model.pretrained",
                       way_out: str = "--model.init_from FILE") -> tuple[nn.Module, str]:
    """A network of timm with its own weights, as they were trained, and its name with theirs, e.g. resnet18.a1_in1k.

    Args:
        flag: that asks for them, for messages.
        way_out: the flag by which a file can be given.

    Raises:
        SettingsError: timm has none.
        DataError: they are neither in its cache nor can they be fetched.
    """
    cfg = check_pretrained(name, flag, way_out.partition(" ")[0])
    place = f"huggingface.co/{cfg.hf_hub_id}" if cfg.hf_hub_id else cfg.url
    full_name = ".".join(filter(None, (cfg.architecture, cfg.tag)))
    try:
        # As they were trained: timm checks every tensor then, and with another class count it would check none.
        return timm.create_model(name, pretrained=True), full_name
    except UNREADABLE as error:
        raise DataError(
            f"{flag}: the weights of {full_name} ({place}) come neither from the network nor from "
            f"{_cache(bool(cfg.hf_hub_id))}: {' '.join(str(error).split())}; where there is a network, run `python -c "
            f"\"import timm; timm.create_model('{name}', pretrained=True)\"` and copy that folder, or give a file by "
            f"{way_out}") from error


def _cache(is_on_hub: bool) -> str:
    """Where timm keeps what it fetched, and what moves it."""
    if is_on_hub:
        from huggingface_hub.constants import HF_HUB_CACHE

        return f"the cache {HF_HUB_CACHE} (HF_HOME moves it)"
    return f"the cache {torch.hub.get_dir()}/checkpoints (TORCH_HOME moves it)"


def check_pretrained(name: str, flag: str = "--model.pretrained",
                     way_out: str = "--model.init_from") -> PretrainedCfg:
    """Where timm has the weights of that model.

    Args:
        flag: that asks for them, for messages.
        way_out: the flag by which a file can be given.

    Raises:
        SettingsError: nowhere; it names models that have some.
    """
    cfg = timm.get_pretrained_cfg(name)
    if cfg is not None and cfg.has_weights:
        return cfg
    architecture = name.partition(".")[0]
    near = timm.list_pretrained(architecture) or timm.list_pretrained(f"{architecture.partition('_')[0]}_*")
    raise SettingsError(f"{flag}: timm has no pretrained weights of {name}; " + (
        f"there are some of {some(near)}" if near else
        f"timm.list_pretrained() tells what has some; a file of your own is given by {way_out}"))


def _begin(model: nn.Module, classes: Sequence[str], state_dict: dict[str, Tensor], source: _Source,
           reset_head: bool) -> None:
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
    if reset_head and not any(name.rsplit(".", 1)[0] in heads for name in own):
        raise SettingsError(f"--model.reset_head: a {architecture} does not say which of its layers is the head; leave "
                            "it out")
    head = _fit_head(fitted, own, heads, classes, source, reset_head)
    problems = mismatches(fitted, own)
    if not problems and source.network is not None:
        problems = differences(source.network, model, heads)
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


def _fit_head(given: dict[str, Tensor], own: Mapping[str, Tensor], heads: Sequence[str], classes: Sequence[str],
              source: _Source, is_reset: bool) -> _Head:
    """Make the tensors of the classifier in `given` those of this run's classes, in place where possible.

    Returns:
        Their names, and what was done with them.
    """
    names = tuple(name for name in own if name.rsplit(".", 1)[0] in heads)
    if not names:
        return _Head((), "")
    if is_reset:
        given |= {name: own[name] for name in names}
        return _Head(names, "begins at random, as --model.reset_head says")
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
    rows = {place: theirs.index(name) for place, name in enumerate(classes) if name in theirs}
    unknown = sorted(set(classes) - set(theirs))
    if not rows:
        given |= {name: own[name] for name in names}
        return _Head(names, f"begins at random: none of the {len(classes)} classes is among the {len(theirs)} there "
                            f"({some(unknown)})")
    if count == len(theirs):  # else mismatches tells it
        given |= {name: _with_rows(own[name], given[name], rows) for name in names if name in given}
    if unknown:
        return _Head(names, f"is taken row by row: {len(rows)} of {len(classes)} classes are among the {len(theirs)} "
                            f"there, the others begin at random ({some(unknown)})")
    return _Head(names, f"is taken row by row: all {len(classes)} classes are among the {len(theirs)} there")


def _with_rows(own: Tensor, given: Tensor, rows: Mapping[int, int]) -> Tensor:
    """`own` with rows of `given` in their places, {place: its number in `given`}; in the type of `given`."""
    mixed = own.to(given.dtype, copy=True)
    mixed[list(rows)] = given[list(rows.values())]
    return mixed


def _reason(error: BaseException) -> str:
    """What an error says; the name of its type too where it is none of ours, for many say a number or nothing."""
    if isinstance(error, VirError):
        return str(error)
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
