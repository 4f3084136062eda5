"""From a decoded image to a training pixel: timm's transforms in the worker, arithmetic on the device.

Workers crop, flip and colour, and hand over uint8. Normalising, erasing and mixing happen on the device, from numbers
drawn per sample out of (seed, position): the same pixels on every topology.
"""

# Dimension key: B batch, C channels, H height, W width, K classes.

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vir.config import AugmentConfig
from vir.data.order import generator
from vir.errors import SettingsError

# One stream per use, so that a new consumer of numbers never shifts another.
_ERASE, _MIX, _NOISE, SAMPLE_STREAM = 1, 2, 3, 4  # not 0: a seed sequence takes (a, b, 0) for (a, b), an epoch's


@dataclass(frozen=True, kw_only=True)
class InputConfig:
    """What the model expects of an image; its home is the model's timm default_cfg."""

    size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float


def train_transform(augment: AugmentConfig, model_input: InputConfig) -> Callable[[Image.Image], np.ndarray]:
    """timm's training transform up to uint8 [C, H, W]; it draws from the global random generators.

    Raises:
        SettingsError: a policy string that timm does not know.
    """
    from timm.data import create_transform

    try:
        return create_transform(
            model_input.size, is_training=True, use_prefetcher=True, scale=augment.scale, ratio=augment.ratio,
            hflip=augment.hflip, color_jitter=augment.color_jitter or None, auto_augment=augment.auto_augment,
            interpolation=augment.interpolation, mean=model_input.mean, std=model_input.std)
    except (AssertionError, ValueError, KeyError) as error:
        raise SettingsError(f"--augment.auto_augment {augment.auto_augment!r}: {error}; for example "
                            "rand-m9-mstd0.5-inc1, or null for none") from error


def check_augmentation(augment: AugmentConfig) -> None:
    """Raises SettingsError for what train_transform would refuse, before anything is built."""
    train_transform(augment, InputConfig(size=(3, 8, 8), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic",
                                         crop_pct=1.0))


def eval_transform(model_input: InputConfig) -> Callable[[Image.Image], np.ndarray]:
    """timm's evaluation transform (resize, centre crop) up to uint8 [C, H, W]."""
    from timm.data import create_transform

    return create_transform(
        model_input.size, is_training=False, use_prefetcher=True, interpolation=model_input.interpolation,
        crop_pct=model_input.crop_pct, mean=model_input.mean, std=model_input.std)


def erase_box(seed: int, position: int, augment: AugmentConfig, height: int, width: int) -> tuple[int, int, int, int]:
    """Random erasing's rectangle (top, left, height, width) for one sample; all zero where nothing is erased.

    Area 2 % to 1/3 of the image, aspect log-uniform in [0.3, 3.3], ten tries, as in timm and arXiv:1708.04896.
    """
    rng = generator(seed, position, _ERASE)
    if rng.random() >= augment.reprob:
        return 0, 0, 0, 0
    for _ in range(10):
        area = rng.uniform(0.02, 1 / 3) * height * width
        aspect = np.exp(rng.uniform(np.log(0.3), np.log(1 / 0.3)))
        h, w = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if 0 < h < height and 0 < w < width:
            return int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1)), h, w
    return 0, 0, 0, 0


def mix_parameters(seed: int, position: int, augment: AugmentConfig, height: int,
                   width: int) -> tuple[float, tuple[int, int, int, int]]:
    """How a pair is mixed: (lam, box). Each member keeps share `lam` of itself and takes the rest of its partner.

    A box (top, left, height, width) that is not empty is CutMix (arXiv:1905.04899), lam its remaining area; otherwise
    it is mixup (arXiv:1710.09412). `position` is that of the pair's first member.
    """
    empty = (0, 0, 0, 0)
    rng = generator(seed, position, _MIX)
    if rng.random() >= augment.mixup_prob or not (augment.mixup or augment.cutmix):
        return 1.0, empty
    switched = rng.random() < augment.mixup_switch_prob
    if not augment.cutmix or (augment.mixup and not switched):
        return float(rng.beta(augment.mixup, augment.mixup)), empty
    side = np.sqrt(1 - rng.beta(augment.cutmix, augment.cutmix))
    half_h, half_w = int(height * side) // 2, int(width * side) // 2
    y, x = int(rng.integers(height)), int(rng.integers(width))
    top, bottom = max(y - half_h, 0), min(y + half_h, height)
    left, right = max(x - half_w, 0), min(x + half_w, width)
    lam = 1 - (bottom - top) * (right - left) / (height * width)
    return lam, (top, left, bottom - top, right - left)


def _inside(boxes: Tensor, height: int, width: int) -> Tensor:
    """[B, 4] boxes to a [B, 1, H, W] mask of the pixels inside."""
    top, left, h, w = (side.view(-1, 1, 1, 1) for side in boxes.unbind(1))
    rows = torch.arange(height, device=boxes.device).view(1, 1, -1, 1)
    columns = torch.arange(width, device=boxes.device).view(1, 1, 1, -1)
    return (rows >= top) & (rows < top + h) & (columns >= left) & (columns < left + w)


@lru_cache
def _mean_and_std(model_input: InputConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Each [1, C, 1, 1], put on the device once: a copy per batch would make the host wait for it."""
    mean, std = (torch.tensor(values, device=device) for values in (model_input.mean, model_input.std))
    return mean.view(1, -1, 1, 1), std.view(1, -1, 1, 1)


def normalize(images: Tensor, model_input: InputConfig) -> Tensor:
    """uint8 [B, C, H, W] to float32, as (x / 255 - mean) / std."""
    mean, std = _mean_and_std(model_input, images.device)
    return (images.float() / 255 - mean) / std


def erase(images: Tensor, boxes: Tensor, positions: Tensor, seed: int, mode: str) -> Tensor:
    """Fill each sample's box in normalised [B, C, H, W] with zeros, one colour or noise per pixel, in place."""
    _, channels, _, _ = images.shape
    numbers = torch.Generator(device=images.device)
    for i, (position, (top, left, h, w)) in enumerate(zip(positions.tolist(), boxes.tolist())):
        if not h:
            continue
        box = images[i, :, top:top + h, left:left + w]
        if mode == "const":
            box.zero_()
            continue
        numbers.manual_seed(int(generator(seed, position, _NOISE).integers(2**63)))
        shape = (channels, h, w) if mode == "pixel" else (channels, 1, 1)
        box.copy_(torch.randn(shape, generator=numbers, device=images.device).expand_as(box))
    return images


def mix(images: Tensor, lam: Tensor, boxes: Tensor) -> Tensor:
    """Mix samples 2i and 2i+1 of [B, C, H, W]; lam [B] and boxes [B, 4] are equal within a pair."""
    partner = images.view(-1, 2, *images.shape[1:]).flip(1).view_as(images)
    cut = (boxes[:, 2] > 0) & (boxes[:, 3] > 0)
    keep = torch.where(cut, 1.0, lam.float()).view(-1, 1, 1, 1)
    keep = keep * ~_inside(boxes, *images.shape[2:])
    return images * keep + partner * (1 - keep)


def soft_targets(labels: Tensor, lam: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """[B, K] float32 targets: smoothed one-hot, mixed like the images (pairs 2i, 2i+1; an odd batch is not mixed)."""
    off = smoothing / num_classes
    targets = torch.full((len(labels), num_classes), off, device=labels.device)
    targets.scatter_(1, labels.view(-1, 1), 1 - smoothing + off)
    if len(labels) % 2:
        return targets
    share = lam.float().view(-1, 1)
    return targets * share + targets.view(-1, 2, num_classes).flip(1).view_as(targets) * (1 - share)


def model_input_of(model: Any) -> InputConfig:
    """What a timm model expects: its default_cfg, at the size it was built for.

    Raises:
        SettingsError: the model does not take three channels.
    """
    from timm.data import resolve_model_data_config

    found = resolve_model_data_config(model)
    size = tuple(found["input_size"])
    if getattr(model, "in_chans", size[0]) != 3:
        raise SettingsError(f"the model takes {model.in_chans} channels; images are RGB: leave in_chans at 3")
    embed = getattr(model, "patch_embed", None)
    if getattr(embed, "img_size", None):
        size = (size[0], *embed.img_size)
    return InputConfig(size=size, mean=tuple(found["mean"]), std=tuple(found["std"]),
                       interpolation=found["interpolation"], crop_pct=found["crop_pct"])
