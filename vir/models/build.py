"""The one builder of models: from settings for training, from a weights file for evaluation, from arguments alone."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import timm
import torch
from timm.layers import to_2tuple
from torch import Tensor, nn

from vir.config import ModelConfig
from vir.errors import DataError, SettingsError
from vir.log import log
from vir.models.initialize import initialize_from, initialize_pretrained
from vir.models.linear_probe import make_probe
from vir.models.network import (
    FORBIDDEN_ARGS,
    UNREADABLE,
    NotBuiltError,
    create,
    described,
    mismatches,
    network_of,
    resampled,
    timm_cfg,
)
from vir.weights.fields import some
from vir.weights.metadata import DTYPES
from vir.weights.portable import outline, read
from vir.weights.spec import InputSpec, ModelSpec, input_of

__all__ = ["FORBIDDEN_ARGS", "NotBuiltError", "architecture", "build", "create", "freeze", "input_for", "load",
           "sketch"]


def build(model: ModelConfig, classes: Sequence[str], fresh: bool = True,
          linear_probe: bool = False) -> tuple[nn.Module, ModelSpec]:
    """The network of a run, with random weights, those of model.init_from or timm's pretrained ones, and what it is.

    Args:
        fresh: False where the weights of a checkpoint follow: then none are read from elsewhere, so that a file that
            is gone or a network that is down since the run began does not keep it from going on.
        linear_probe: only its classifier is to be trained.

    Raises:
        SettingsError: it cannot be built with these arguments, model.freeze does not fit it, or linear_probe finds no
            classifier.
        DataError: model.init_from or the pretrained weights cannot be had, or are of another architecture.
    """
    network = _created(model, len(classes), drop_path_rate=model.drop_path_rate)
    if fresh and model.init_from:
        initialize_from(network, model.init_from, classes, reset_head=model.reset_head)
    if fresh and model.pretrained:
        initialize_pretrained(network, model.name, classes, reset_head=model.reset_head)
    if linear_probe and fresh and not (model.init_from or model.pretrained):
        log.warning("--train.linear_probe: the classifier is trained on what random weights make of the images; give "
                    "weights by --model.init_from or --model.pretrained")
    return network, _made_ready(network, model, classes, linear_probe)


def sketch(model: ModelConfig, classes: Sequence[str], linear_probe: bool = False) -> tuple[nn.Module, ModelSpec]:
    """What build makes, on the meta device: shapes that take no memory, whatever the size. No weights are read.

    Raises:
        SettingsError: as build.
    """
    try:
        with torch.device("meta"):
            network = _created(model, len(classes), drop_path_rate=model.drop_path_rate)
    except SettingsError:  # some networks compute with numbers while they are built
        network = _created(model, len(classes), drop_path_rate=model.drop_path_rate).to("meta")
    return network, _made_ready(network, model, classes, linear_probe)


def _created(model: ModelConfig, num_classes: int, **more: Any) -> nn.Module:
    args = architecture(model, num_classes)
    try:
        return create(model.name, args, **more)
    except NotBuiltError as error:
        raise SettingsError(f"--model.name {model.name} cannot be built with {args}: {error}") from error


def _made_ready(network: nn.Module, model: ModelConfig, classes: Sequence[str], linear_probe: bool) -> ModelSpec:
    """Choose what is trained, and the form of retention; what the network is."""
    if model.freeze is not None:
        freeze(network, model.freeze)
    if linear_probe:
        make_probe(network)
    if hasattr(network, "set_retention_mode"):
        getattr(network, "set_retention_mode")(model.retention_mode, model.chunk_size)
    return ModelSpec(name=model.name, args=architecture(model, len(classes)),
                     input=_input_as_set(model, input_of(network)), classes=tuple(classes))


def input_for(model: ModelConfig, num_classes: int) -> InputSpec:
    """The images that the network of a run takes. It is built without memory for its numbers, where that can be.

    Raises:
        SettingsError: it cannot be built.
    """
    return sketch(replace(model, freeze=None), [""] * num_classes)[1].input


def architecture(model: ModelConfig, num_classes: int) -> dict[str, Any]:
    """Arguments for timm.create_model beside the name, without those that act in training alone."""
    args = {**model.args, "num_classes": num_classes}
    if model.img_size is not None and _is_told_its_size(model.name):
        args["img_size"] = model.img_size
    return args


def _is_told_its_size(name: str) -> bool:
    """Whether a network is built for one size of images; others take any."""
    return getattr(timm.get_pretrained_cfg(name), "fixed_input_size", False)


def load(path: str | os.PathLike[str], device: str | torch.device = "cpu", dtype: str | torch.dtype = torch.float32,
         **args: Any) -> nn.Module:
    """The model in a weights file, in eval mode, on `device`; any model that timm knows, not only ViR.

    What it is and how it was trained is at `model.weights_metadata` (a WeightsMetadata); the preprocessing is
    also in `model.pretrained_cfg`, where timm.data.resolve_model_data_config finds it. Names, shapes and types of the
    tensors are compared with the network before any memory is taken for either.

    Args:
        path: also of weights in several files: their index, or the name that it is the index of.
        dtype: of the model's floating-point numbers, whichever the file has: one of torch, or fp32, bf16 or fp16.
        args: for timm.create_model, in the place of those that the file names, e.g. img_size=(8192, 256) or
            dynamic_img_size=True; position table and patches are resampled, everything else must fit. Some models of
            timm take no img_size, yet images of their own size alone (efficientformer_l1): these fail when called.

    Raises:
        DataError: the file cannot be read or does not hold what it says.
        SettingsError: the model does not take `args`, or the file's weights do not fit it then; or no such dtype.
    """
    of_model = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if of_model not in {*DTYPES.values(), torch.float64}:
        raise SettingsError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}, or such a dtype of torch")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SettingsError(f"device is {device!r}, which torch cannot use here: {str(error).splitlines()[0]}"
                            ) from error
    metadata, outlines = outline(path)
    spec = metadata.model
    network = described(path, spec, outlines)
    num_classes = getattr(network, "num_classes", None)
    if spec.classes and len(spec.classes) != num_classes:
        raise DataError(f"{path} names {len(spec.classes)} classes but its model has {num_classes} logits; "
                        f"save it with the classes that it was trained on, or with none")
    state_dict = read(path)[1]
    if args:
        model, spec, state_dict = _changed(path, network, spec, state_dict, args)
    else:
        model = network_of(path, spec)
    model.load_state_dict(state_dict)
    setattr(model, "weights_metadata", replace(metadata, model=spec))
    return model.to(device, of_model).eval()


def _changed(path: str | os.PathLike[str], source: nn.Module, spec: ModelSpec, state_dict: dict[str, Tensor],
             args: Mapping[str, Any]) -> tuple[nn.Module, ModelSpec, dict[str, Tensor]]:
    """The network of a file with other arguments, what it is, and the file's tensors at its sizes.

    Args:
        source: the network of the file, on the meta device; it is used up.

    Raises:
        SettingsError: one of them cannot be changed, or other tensors than position table and patches do not fit.
    """
    if forbidden := sorted(FORBIDDEN_ARGS & args.keys()):
        raise SettingsError(f"{path}: {', '.join(forbidden)} would fetch other weights than the file's; leave it out")
    own = getattr(source, "num_classes", None)
    if args.get("num_classes", own) != own:
        raise SettingsError(f"{path} has a head of {own} classes, not of num_classes={args['num_classes']}; leave it "
                            "out and call model.reset_classifier(…) after loading, or train a new head with "
                            "--model.init_from")
    changed, image = {**spec.args, **args}, spec.input
    if "img_size" in args:
        height, width = _sides(path, args["img_size"])
        image = replace(image, size=(image.size[0], height, width))
        if not _is_told_its_size(spec.name):
            del changed["img_size"]
    new = replace(spec, args=changed, input=image)
    try:
        model = create(new.name, new.args, pretrained_cfg_overlay=timm_cfg(new))
    except NotBuiltError as error:
        raise SettingsError(f"{path}: {spec.name} with model_args {spec.args} cannot be created with {args} "
                            f"in their place: {error}") from error
    try:
        fitted = resampled(state_dict, model, source)
        problems = mismatches(fitted, model.state_dict())
    except SettingsError as error:
        raise SettingsError(f"{path} does not fit {spec.name} with {args} in the place of its model_args {spec.args}: "
                            f"{error}") from error
    except UNREADABLE as error:
        problems = str(error) or type(error).__name__
    if problems:
        raise SettingsError(f"{path} does not fit {spec.name} with {args} in the place of its model_args {spec.args}: "
                            f"{problems}; " + (
                                "timm resamples no positions for this family; leave img_size out"
                                if args.keys() == {"img_size"} else
                                "only position table and patches are resampled: leave out what changes other tensors"))
    return model, new, fitted


def _sides(path: str | os.PathLike[str], size: Any) -> tuple[int, int]:
    """Height and width of images; SettingsError where `size` tells none."""
    sides = to_2tuple(size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise SettingsError(f"{path}: img_size={size!r} is no size of images; give the pixels of one side or of "
                            "(height, width), or leave it out for the size in the file")
    return sides[0], sides[1]


def _input_as_set(model: ModelConfig, own: InputSpec) -> InputSpec:
    """What the network's default_cfg says of images, with what the settings say instead."""
    side = model.img_size
    given: dict[str, Any] = {"mean": model.mean, "std": model.std, "interpolation": model.interpolation,
                             "crop_pct": model.crop_pct, "crop_mode": model.crop_mode,
                             "size": side and (own.size[0], side, side)}
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
                            f"of its name; it has {some(parameters)}")
    for name in frozen:
        parameters[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise SettingsError(f"--model.freeze {pattern!r} leaves no parameter of {type(model).__name__} to train; it "
                            f"matches {some(frozen)}")
