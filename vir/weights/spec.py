"""What a model is, apart from its weights: its name, its arguments, the images it takes, the classes it tells apart."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

from torch import nn

from vir.config import CropMode
from vir.errors import SettingsError
from vir.weights.fields import Rules, check_fields, is_count

INTERPOLATIONS = ("bicubic", "bilinear", "box", "hamming", "lanczos", "nearest")
"""Filters that timm resizes images with in evaluation."""

CROP_MODES = get_args(CropMode)

_LARGEST_SIDE = 1 << 16


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e30  # and so neither NaN nor too large for a tensor


def _is_size(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 3 and all(
        is_count(side) and 0 < side <= _LARGEST_SIDE for side in value)


def _are_numbers(value: Any, least: float = -math.inf) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(_is_number(x) and x > least for x in value)


INPUT_RULES: Rules = {
    "size": (_is_size, f"[channels, height, width], three whole numbers from 1 to {_LARGEST_SIDE}"),
    "mean": (_are_numbers, "a list of numbers, one of each channel"),
    "std": (lambda value: _are_numbers(value, least=0), "a list of numbers above 0, one of each channel"),
    "interpolation": (lambda value: value in INTERPOLATIONS, f"one of {', '.join(INTERPOLATIONS)}"),
    "crop_pct": (lambda value: _is_number(value) and 0.01 <= value <= 10, "a number from 0.01 to 10"),
    "crop_mode": (lambda value: value in CROP_MODES, f"one of {', '.join(CROP_MODES)}")}


@dataclass(frozen=True, kw_only=True)
class InputSpec:
    """What a model expects of an image. Its home is the model's timm default_cfg; settings of a run may override it."""

    size: tuple[int, int, int]
    """Channels, height and width."""
    mean: tuple[float, ...]
    """Of each channel, for pixels in [0, 1]."""
    std: tuple[float, ...]
    """Of each channel."""
    interpolation: str
    """Filter with which images are resized: bilinear, bicubic, …"""
    crop_pct: float
    """Side of the crop / side of the resized image, the shorter one unless crop_mode says otherwise."""
    crop_mode: str = "center"
    """timm's: `center` resizes the shorter side and crops, `squash` resizes both sides to the crop's, `border` resizes
    the longer side and fills up."""

    @classmethod
    def from_json(cls, **fields: Any) -> InputSpec:
        """From the fields as JSON has them: lists in the place of tuples, crop_mode not in files of old.

        Raises:
            ValueError: a sentence on the field that is missing, unknown or wrong.
        """
        check_fields(fields, INPUT_RULES, optional={"crop_mode"})
        channels, height, width = fields.pop("size")
        mean, std = tuple(fields.pop("mean")), tuple(fields.pop("std"))
        if not len(mean) == len(std) == channels:
            raise ValueError(f"mean has {len(mean)} and std has {len(std)} numbers for {channels} channels")
        return cls(size=(channels, height, width), mean=mean, std=std, **fields)

    def with_crop(self, crop_pct: float | None, crop_mode: str | None) -> InputSpec:
        """The same with these in the place of its own, where they are given."""
        return replace(self, crop_pct=self.crop_pct if crop_pct is None else crop_pct,
                       crop_mode=self.crop_mode if crop_mode is None else crop_mode)

    def timm_cfg(self) -> dict[str, Any]:
        """The fields by the names that they have in timm's pretrained_cfg."""
        fields = asdict(self)
        return {"input_size": fields.pop("size"), **fields}


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """All that timm.create_model and the preparation of images need to know; checkpoints and weights files hold it."""

    name: str
    """As timm knows it."""
    args: dict[str, Any]
    """Keyword arguments for timm.create_model beside the name, the class count included."""
    input: InputSpec
    classes: tuple[str, ...]
    """The class of each logit, in order; empty where unknown."""


def input_of(model: nn.Module) -> InputSpec:
    """What a timm model expects: its default_cfg, at the size it was built for.

    Raises:
        SettingsError: the model does not take three channels.
    """
    from timm.data import resolve_model_data_config

    data_config = resolve_model_data_config(model)
    channels, height, width = data_config["input_size"]
    if getattr(model, "in_chans", channels) != 3:
        raise SettingsError(f"the model takes {model.in_chans} channels; images are RGB: leave in_chans at 3")
    embed = getattr(model, "patch_embed", None)
    if img_size := getattr(embed, "img_size", None):
        height, width = img_size
    return InputSpec(size=(channels, height, width), mean=tuple(data_config["mean"]), std=tuple(data_config["std"]),
                     interpolation=data_config["interpolation"], crop_pct=data_config["crop_pct"],
                     crop_mode=data_config["crop_mode"])
