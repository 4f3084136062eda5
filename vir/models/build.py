"""The one builder of models: for training, evaluation, planning and benchmarks."""

from __future__ import annotations

import os
import pickle
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import timm
from safetensors import SafetensorError
from torch import Tensor, nn

from vir.config import ModelConfig
from vir.errors import DataError, SettingsError
from vir.models.spec import InputSpec, ModelSpec, input_of

FORBIDDEN_ARGS = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}
"""Arguments of timm.create_model with which a file could make its reader fetch or open other weights."""


class NotBuiltError(SettingsError):
    """timm cannot create a model with the arguments that were given."""


def create(name: str, args: Mapping[str, Any], **more: Any) -> nn.Module:
    """The timm model of that name with random weights.

    Raises:
        NotBuiltError: timm, or the model, refuses the arguments.
    """
    try:
        return timm.create_model(name, **args, **more)
    except (TypeError, ValueError, AssertionError, RuntimeError, ArithmeticError, LookupError) as error:
        raise NotBuiltError(str(error)) from error


def build(model: ModelConfig, classes: Sequence[str]) -> tuple[nn.Module, ModelSpec]:
    """The network of a run, with random weights or those of model.init_from, and what it is.

    Raises:
        SettingsError: it cannot be built with these arguments, or model.freeze does not fit it.
        DataError: model.init_from cannot be read, or holds weights of another architecture.
    """
    args = architecture(model, len(classes))
    try:
        network = create(model.name, args, drop_path_rate=model.drop_path_rate)
    except NotBuiltError as error:
        raise SettingsError(f"--model.name {model.name} cannot be built with {args}: {error}") from error
    if model.init_from:
        initialize_from(network, model.init_from)
    if model.freeze is not None:
        freeze(network, model.freeze)
    if hasattr(network, "set_retention_mode"):
        getattr(network, "set_retention_mode")(model.retention_mode, model.chunk_size)
    spec = ModelSpec(name=model.name, args=args, input=_input_as_set(model, input_of(network)), classes=tuple(classes))
    return network, spec


def architecture(model: ModelConfig, num_classes: int) -> dict[str, Any]:
    """Arguments for timm.create_model beside the name, without those that act in training alone."""
    args = {**model.args, "num_classes": num_classes}
    if model.img_size is not None and getattr(timm.get_pretrained_cfg(model.name), "fixed_input_size", False):
        args["img_size"] = model.img_size  # other models take images of any size
    return args


def _input_as_set(model: ModelConfig, own: InputSpec) -> InputSpec:
    """What the network's default_cfg says of images, with what the settings say instead."""
    side = model.img_size
    given: dict[str, Any] = {"mean": model.mean, "std": model.std, "interpolation": model.interpolation,
                             "crop_pct": model.crop_pct, "size": side and (own.size[0], side, side)}
    return replace(own, **{name: value for name, value in given.items() if value is not None})


def freeze(model: nn.Module, pattern: str) -> None:
    """Keep the parameters whose name matches from its start as they are; batch norms' running statistics go on.

    Raises:
        SettingsError: it matches no parameter, or leaves none to train.
    """
    parameters = dict(model.named_parameters())
    frozen = [name for name in parameters if re.match(pattern, name)]
    if not frozen:
        raise SettingsError(f"--model.freeze {pattern!r} matches no parameter of {type(model).__name__} from the start "
                            f"of its name; it has {_some(parameters)}")
    for name in frozen:
        parameters[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise SettingsError(f"--model.freeze {pattern!r} leaves no parameter of {type(model).__name__} to train; it "
                            f"matches {_some(frozen)}")


def initialize_from(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Begin training from weights in a file: one of ours, or any that timm reads (weights only, no code is run).

    Position tables and patches are resampled where the model's family knows how. A classifier of another class count
    keeps its random start; everything else must be there.

    Raises:
        DataError: a file that cannot be read, or that holds weights of another architecture.
    """
    try:
        state_dict = timm.models.load_state_dict(str(path), use_ema=True, device="cpu", weights_only=True)
        resample = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
        state_dict = resample(state_dict, model) if resample else state_dict
    except (OSError, RuntimeError, EOFError, ValueError, TypeError, LookupError, pickle.UnpicklingError,
            SafetensorError) as error:
        raise DataError(f"{path} cannot be read as weights: {error}") from error
    own = model.state_dict()
    heads = (getattr(model, "default_cfg", None) or {}).get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    for name in [name for name in state_dict if name.rsplit(".", 1)[0] in heads]:
        if name in own and own[name].shape != state_dict[name].shape:
            state_dict[name] = own[name]
    if problems := mismatches(state_dict, own):
        raise DataError(f"{path} does not fit {type(model).__name__} as it is built here: {problems}; give weights of "
                        "the same architecture")
    model.load_state_dict(state_dict)


def mismatches(given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """What keeps tensors from being a model's state_dict; empty where nothing does."""
    shapes = [f"{name} is {list(given[name].shape)}, not {list(expected[name].shape)}"
              for name in given.keys() & expected.keys() if given[name].shape != expected[name].shape]
    missing, unexpected = expected.keys() - given.keys(), given.keys() - expected.keys()
    problems: dict[str, Iterable[str]] = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    return "; ".join(f"{len(list(names))} tensors {kind} ({_some(names)})" for kind, names in problems.items() if names)


def _some(names: Iterable[str]) -> str:
    first = sorted(names)
    return ", ".join(first[:3]) + (", …" if len(first) > 3 else "")
