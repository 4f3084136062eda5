"""From uint8 batches to what a model trains on: normalising, erasing and mixing on the device.

All numbers follow from what was drawn per sample out of (seed, position): the same pixels on every topology.
"""

# Dimension key: B batch, C channels, H height, W width, K classes.

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from vir.config import AugmentConfig
from vir.data.loader import Batch
from vir.data.noise import normal_noise
from vir.models.spec import InputSpec


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """From a training batch of the loader to pixels and targets."""

    model_input: InputSpec
    augment: AugmentConfig
    smoothing: float
    num_classes: int

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Pixels [B, C, H, W] float32, normalised, erased and mixed, and soft targets [B, K]."""
        images = normalize(batch.images, self.model_input)
        if self.augment.reprob:
            images = erase(images, batch.erase, batch.noise, self.augment.remode)
        if self.augment.mixes:
            images = mix(images, batch.lam, batch.cut)
        return images, soft_targets(batch.labels, batch.lam, self.num_classes, self.smoothing)


def _inside(boxes: Tensor, height: int, width: int) -> Tensor:
    """[B, 4] boxes to a [B, 1, H, W] mask of the pixels inside."""
    top, left, h, w = (side.view(-1, 1, 1, 1) for side in boxes.unbind(1))
    rows = torch.arange(height, device=boxes.device).view(1, 1, -1, 1)
    columns = torch.arange(width, device=boxes.device).view(1, 1, 1, -1)
    return (rows >= top) & (rows < top + h) & (columns >= left) & (columns < left + w)


@lru_cache
def _mean_and_std(model_input: InputSpec, device: torch.device) -> tuple[Tensor, Tensor]:
    """Each [1, C, 1, 1], put on the device once: a copy per batch would make the host wait for it."""
    mean, std = (torch.tensor(values, device=device) for values in (model_input.mean, model_input.std))
    return mean.view(1, -1, 1, 1), std.view(1, -1, 1, 1)


def normalize(images: Tensor, model_input: InputSpec) -> Tensor:
    """uint8 [B, C, H, W] to float32, as (x / 255 - mean) / std."""
    mean, std = _mean_and_std(model_input, images.device)
    return (images.float() / 255 - mean) / std


def erase(images: Tensor, boxes: Tensor, noise: Tensor, mode: str) -> Tensor:
    """Fill each sample's box in normalised [B, C, H, W]: by zeros, one colour or noise per pixel.

    Args:
        boxes: [B, 4], top, left, height and width, which may be 0.
        noise: [B] int32, a seed for each sample.
        mode: const, rand or pixel, as of timm's RandomErasing.
    """
    _, channels, height, width = images.shape
    inside = _inside(boxes, height, width)
    if mode == "const":
        return images.masked_fill(inside, 0)
    size = (height, width) if mode == "pixel" else (1, 1)
    return torch.where(inside, normal_noise(noise, channels, *size), images)


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
