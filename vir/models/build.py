"""The one builder of models: from settings for training, from a weights file for evaluation, from arguments alone."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import timm
import torch
from timm.layers import to_2tuple
from torch import Tensor, nn

from vir.config import ModelConfig
from vir.errors import DataError, SettingsError
from vir.models.initialize import UNREADABLE, initialize_from, initialize_pretrained, mismatches, resampled
from vir.models.spec import InputSpec, ModelSpec, input_of
from vir.models.weights import read

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


def build(model: ModelConfig, classes: Sequence[str], fresh: bool = True) -> tuple[nn.Module, ModelSpec]:
    """The network of a run, with random weights, those of model.init_from or timm's pretrained ones, and what it is.

    Args:
        fresh: False where the weights of a checkpoint follow: then none are read from elsewhere, so that a file that
            is gone or a network that is down since the run began does not keep it from going on.

    Raises:
        SettingsError: it cannot be built with these arguments, or model.freeze does not fit it.
        DataError: model.init_from or the pretrained weights cannot be had, or are of another architecture.
    """
    args = architecture(model, len(classes))
    try:
        network = create(model.name, args, drop_path_rate=model.drop_path_rate)
    except NotBuiltError as error:
        raise SettingsError(f"--model.name {model.name} cannot be built with {args}: {error}") from error
    if fresh and model.init_from:
        initialize_from(network, model.init_from, classes)
    if fresh and model.pretrained:
        initialize_pretrained(network, model.name, classes)
    if model.freeze is not None:
        freeze(network, model.freeze)
    if hasattr(network, "set_retention_mode"):
        getattr(network, "set_retention_mode")(model.retention_mode, model.chunk_size)
    spec = ModelSpec(name=model.name, args=args, input=_input_as_set(model, input_of(network)), classes=tuple(classes))
    return network, spec


def architecture(model: ModelConfig, num_classes: int) -> dict[str, Any]:
    """Arguments for timm.create_model beside the name, without those that act in training alone."""
    args = {**model.args, "num_classes": num_classes}
    if model.img_size is not None and _is_told_its_size(model.name):
        args["img_size"] = model.img_size
    return args


def _is_told_its_size(name: str) -> bool:
    """Whether a network is built for one size of images; others take any."""
    return getattr(timm.get_pretrained_cfg(name), "fixed_input_size", False)


def load(path: str | os.PathLike[str], device: str | torch.device = "cpu", **args: Any) -> nn.Module:
    """The model in a weights file, float32, in eval mode, on `device`; any model that timm knows, not only ViR.

    What it is and how it was trained is at `model.weights_metadata` (a WeightsMetadata); the preprocessing is
    also in `model.pretrained_cfg`, where timm.data.resolve_model_data_config finds it.

    Args:
        args: for timm.create_model, in the place of those that the file names, e.g. img_size=(8192, 256) or
            dynamic_img_size=True; position table and patches are resampled, everything else must fit.

    Raises:
        DataError: the file cannot be read or does not hold what it says.
        SettingsError: the model does not take `args`, or the file's weights do not fit it then.
    """
    metadata, state_dict = read(path)
    file_spec = metadata.model
    if not timm.is_model(file_spec.name):
        raise DataError(f"{path} holds a {file_spec.name!r}, which timm {timm.__version__} does not know; install the "
                        f"timm that wrote it, or import the package that registers this model first")
    if forbidden := sorted(FORBIDDEN_ARGS & file_spec.args.keys()):
        raise DataError(f"{path} has model_args {forbidden}, which would fetch other weights; remove them where the "
                        f"file is made")
    spec = _changed(path, file_spec, args)
    try:
        model = create(spec.name, spec.args, pretrained_cfg_overlay=_timm_cfg(spec))
    except NotBuiltError as error:
        if args:
            raise SettingsError(f"{path}: {spec.name} with model_args {file_spec.args} cannot be created with {args} "
                                f"in their place: {error}") from error
        raise DataError(f"{path}: timm {timm.__version__} cannot create {spec.name!r} with model_args {spec.args} "
                        f"({error}); install the versions of vir and timm that wrote it") from error
    if args:
        state_dict = _at_sizes_of(model, state_dict, path, file_spec, args)
    elif problems := mismatches(state_dict, model.state_dict()):
        raise DataError(f"{path} does not fit {spec.name} with model_args {spec.args}: {problems}; "
                        f"correct the model_args where the file is made")
    num_classes = getattr(model, "num_classes", None)
    if spec.classes and len(spec.classes) != num_classes:
        raise DataError(f"{path} names {len(spec.classes)} classes but its model has {num_classes} logits; "
                        f"save it with the classes that it was trained on, or with none")
    model.load_state_dict(state_dict)
    setattr(model, "weights_metadata", replace(metadata, model=spec))
    return model.to(device).eval()


def _at_sizes_of(model: nn.Module, state_dict: dict[str, Tensor], path: str | os.PathLike[str], spec: ModelSpec,
                 args: dict[str, Any]) -> dict[str, Tensor]:
    """A file's tensors with position table and patches as a model with `args` in the place of spec.args has them.

    Raises:
        SettingsError: other tensors do not fit it.
    """
    problems = ""
    try:
        if "img_size" in args and hasattr(model, "set_input_size"):
            # By its own hand, which knows the grid that it comes from: 4x4 and 2x8 places are as many.
            source = create(spec.name, spec.args | {key: args[key] for key in args.keys() - {"img_size"}})
            state_dict = resampled(state_dict, source)
            if not (problems := mismatches(state_dict, source.state_dict())):
                source.load_state_dict(state_dict)
                getattr(source, "set_input_size")(args["img_size"])
                state_dict = source.state_dict()
        else:
            state_dict = resampled(state_dict, model)
        problems = problems or mismatches(state_dict, model.state_dict())
    except UNREADABLE as error:
        problems = str(error)
    if problems:
        raise SettingsError(f"{path} does not fit {spec.name} with {args} in the place of its model_args {spec.args}: "
                            f"{problems}; only position table and patches are resampled: leave out what changes "
                            "other tensors")
    return state_dict


def _changed(path: str | os.PathLike[str], spec: ModelSpec, args: Mapping[str, Any]) -> ModelSpec:
    """What the file holds, with other arguments.

    Raises:
        SettingsError: one of them cannot be changed.
    """
    if forbidden := sorted(FORBIDDEN_ARGS & args.keys()):
        raise SettingsError(f"{path}: {', '.join(forbidden)} would fetch other weights than the file's; leave it out")
    own = spec.args.get("num_classes")
    if "num_classes" in args and args["num_classes"] != own:
        raise SettingsError(f"{path} has a head of {own} classes, not of num_classes={args['num_classes']}; leave it "
                            "out and call model.reset_classifier(…) after loading, or train a new head with "
                            "--model.init_from")
    changed, image = {**spec.args, **args}, spec.input
    if size := args.get("img_size"):
        height, width = to_2tuple(size)
        image = replace(image, size=(image.size[0], height, width))
        if not _is_told_its_size(spec.name):
            del changed["img_size"]
    return replace(spec, args=changed, input=image)


def _timm_cfg(spec: ModelSpec) -> dict[str, Any]:
    """The fields of timm's pretrained_cfg that the file knows better than timm."""
    return spec.input.timm_cfg() | {key: spec.args[key] for key in {"num_classes"} & spec.args.keys()}


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


def _some(names: Iterable[str]) -> str:
    first = sorted(names)
    return ", ".join(first[:3]) + (", …" if len(first) > 3 else "")
