"""From uint8 batches to what a model trains on: normalising, erasing and mixing on the device.

All numbers follow from what was drawn per sample out of (seed, position): the same pixels on every topology. Nothing
here makes the host wait for the device.
"""

# Dimension key: B batch, C channels, H height, W width, K classes.

from __future__ import annotations

from functools import lru_cache
from typing import Any, Callable

import torch
from torch import Tensor

from vir.config import AugmentConfig
from vir.data.batch import Batch
from vir.data.noise import normal_noise
from vir.log import log
from vir.weights.spec import InputSpec


class Preparation:
    """From a training batch of the loader to pixels and targets.

    On a GPU the first batch waits until a few kernels are compiled that take the place of about 60.
    """

    def __init__(self, *, model_input: InputSpec, augment: AugmentConfig, smoothing: float, num_classes: int,
                 device: torch.device) -> None:
        self._model_input = model_input
        remode = augment.remode if augment.reprob else None

        def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:  # Dynamo counts the graphs of all partials together
            return prepare(*tensors, remode=remode, mixes=augment.mixes, smoothing=smoothing, num_classes=num_classes)

        self._prepare = Compiled(function) if device.type == "cuda" else function

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Pixels [B, C, H, W] float32, normalised, erased and mixed, and soft targets [B, K]."""
        scale, shift = _scale_and_shift(self._model_input, batch.images.device)
        return self._prepare(batch.images, batch.labels, batch.erase, batch.noise, batch.lam, batch.cut, scale, shift)


class Compiled:
    """A function of tensors of fixed shapes, compiled as one graph; itself, after a warning, where that fails.

    An error after the first success is no failure of the compiler: a run does not go on with other roundings.
    """

    def __init__(self, function: Callable[..., Any], backend: str | Callable[..., Any] = "inductor") -> None:
        self._function = function
        self._chosen: Callable[..., Any] = torch.compile(function, fullgraph=True, dynamic=False, backend=backend)
        self._is_settled = False

    def __call__(self, *tensors: Tensor) -> Any:
        if self._is_settled:
            return self._chosen(*tensors)
        try:
            result = self._chosen(*tensors)
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except Exception as error:  # of Dynamo, of Triton, or of the C compiler that Triton calls
            log.warning("torch.compile fails here (%s); batches are prepared without it, milliseconds slower a step",
                        " ".join(str(error).splitlines()[:2]))  # the second one is the cause
            self._chosen = self._function
            result = self._function(*tensors)
        self._is_settled = True
        return result


def prepare(images: Tensor, labels: Tensor, boxes: Tensor, noise: Tensor, lam: Tensor, cut: Tensor, scale: Tensor,
            shift: Tensor, *, remode: str | None, mixes: bool, smoothing: float,
            num_classes: int) -> tuple[Tensor, Tensor]:
    """The fields of a Batch to pixels and targets; scale and shift normalise, a remode of None erases nothing."""
    pixels = images * scale + shift
    if remode is not None:
        pixels = erase(pixels, boxes, noise, remode)
    if mixes:
        pixels = mix(pixels, lam, cut)
    return pixels, soft_targets(labels, lam, num_classes, smoothing)


@lru_cache
def _scale_and_shift(model_input: InputSpec, device: torch.device) -> tuple[Tensor, Tensor]:
    """Each [C, 1, 1], with which uint8 * scale + shift is (uint8 / 255 - mean) / std. Put on the device once."""
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in (model_input.mean, model_input.std))
    both = torch.stack([1 / (255 * std), -mean / std]).float().view(2, -1, 1, 1).to(device, non_blocking=True)
    return both[0], both[1]


def normalize(images: Tensor, model_input: InputSpec) -> Tensor:
    """uint8 [B, C, H, W] to float32, as (x / 255 - mean) / std."""
    scale, shift = _scale_and_shift(model_input, images.device)
    return images * scale + shift


def _inside(boxes: Tensor, height: int, width: int) -> Tensor:
    """[B, 4] boxes to a [B, 1, H, W] mask of the pixels inside."""
    top, left, h, w = (side.view(-1, 1, 1, 1) for side in boxes.unbind(1))
    rows = torch.arange(height, device=boxes.device).view(1, 1, -1, 1)
    columns = torch.arange(width, device=boxes.device).view(1, 1, 1, -1)
    return (rows >= top) & (rows < top + h) & (columns >= left) & (columns < left + w)


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
    keep = torch.where(boxes[:, 2] > 0, 1, lam).view(-1, 1, 1, 1)  # CutMix keeps all outside its box
    return torch.lerp(_partners(images), images, torch.where(_inside(boxes, *images.shape[2:]), 0, keep))


def _partners(of_pairs: Tensor) -> Tensor:
    """[B, ...] with samples 2i and 2i+1 in each other's place."""
    return of_pairs.view(-1, 2, *of_pairs.shape[1:]).flip(1).view_as(of_pairs)


def soft_targets(labels: Tensor, lam: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """[B, K] float32 targets: smoothed one-hot, mixed like the images (pairs 2i, 2i+1; an odd batch is not mixed)."""
    off = smoothing / num_classes
    classes = torch.arange(num_classes, device=labels.device)
    targets = torch.where(labels.view(-1, 1) == classes, 1 - smoothing + off, off)
    return targets if len(labels) % 2 else torch.lerp(_partners(targets), targets, lam.view(-1, 1))
