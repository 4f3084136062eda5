"""What a model is, apart from its weights: its name, its arguments, the images it takes, the classes it tells apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from vir.errors import SettingsError


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
    def from_json(cls, *, size: Sequence[int], mean: Sequence[float], std: Sequence[float], interpolation: str,
                  crop_pct: float, crop_mode: str = "center") -> InputSpec:
        """From the fields as JSON has them: lists in the place of tuples."""
        channels, height, width = size
        return cls(size=(channels, height, width), mean=tuple(mean), std=tuple(std), interpolation=interpolation,
                   crop_pct=crop_pct, crop_mode=crop_mode)

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
