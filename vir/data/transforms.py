"""What happens to an image in a loader process: timm's transforms up to uint8, and the numbers for the device.

Workers crop, flip and colour. Where to erase and how to mix is drawn here, out of (seed, position), and done by
vir.data.device.
"""

# Dimension key: C channels, H height, W width.

from __future__ import annotations

import functools
import importlib
import random
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from vir.config import AugmentConfig
from vir.data.jpeg import Box
from vir.errors import SettingsError
from vir.streams import ERASE, MIX, NOISE, SAMPLE, generator
from vir.weights.spec import InputSpec

_OF_TORCH = ("bilinear", "bicubic")


@functools.cache
def _generator() -> random.Random:
    """What timm's transforms draw from in this process: the global one is drawn from by threads that read, too, for the
    pause before a retry."""
    own = random.Random()
    for name in ("timm.data.auto_augment", "timm.data.transforms"):
        setattr(importlib.import_module(name), "random", own)
    return own


def seed_draws(seed: int, position: int) -> None:
    """Let the transforms draw what belongs to one sample; only ever called in a loader process."""
    numbers = generator(seed, position, SAMPLE).integers(2**63, size=2)
    _generator().seed(int(numbers[0]))
    np.random.seed(int(numbers[1]) & 0xFFFFFFFF)
    torch.default_generator.manual_seed(int(numbers[1]))


class Crop(NamedTuple):
    """What of an image becomes a sample's pixels."""

    box: Box
    interpolation: str
    flip: bool = False


class Transform(Protocol):
    """What makes an image a sample, in two steps, so that only what is needed is decoded between them."""

    def crop(self, width: int, height: int) -> Crop:
        """What is needed of an image of this size, in pixels."""

    def apply(self, pixels: np.ndarray, crop: Crop) -> Tensor:
        """[C, H, W] uint8 from the pixels of the crop's box, [h, w, C] uint8."""


class TrainTransform:
    """timm's training transform up to uint8; it draws what seed_draws has decided, and in timm's order.

    Raises:
        SettingsError: a policy string that timm does not know.
    """

    def __init__(self, augment: AugmentConfig, model_input: InputSpec) -> None:
        from timm.data import create_transform

        jitter: Any = augment.color_jitter or None  # timm's hint forgets None, its code does not
        try:
            primary, secondary, _ = create_transform(
                model_input.size, is_training=True, use_prefetcher=True, scale=augment.scale, ratio=augment.ratio,
                hflip=augment.hflip, color_jitter=jitter, auto_augment=augment.auto_augment,
                interpolation=augment.interpolation, mean=model_input.mean, std=model_input.std, separate=True)
        except (AssertionError, ValueError, KeyError) as error:
            raise SettingsError(f"--augment.auto_augment {augment.auto_augment!r}: {error}; for example "
                                "rand-m9-mstd0.5-inc1, or null for none") from error
        self._resized_crop = primary.transforms[0]
        self._augment, self._size = augment, model_input.size[1:]
        self.policy: Any = secondary if secondary.transforms else None
        """timm's transforms that follow on the resized pixels, from one Pillow image to another; None: none follow."""

    def crop(self, width: int, height: int) -> Crop:
        augment = self._augment
        image = torch.empty((0, height, width), dtype=torch.uint8)  # timm asks for nothing but its size
        box = Box(*self._resized_crop.get_params(image, augment.scale, augment.ratio))
        interpolation = augment.interpolation
        if interpolation == "random":
            interpolation = _generator().choice(self._resized_crop.interpolation).value
        return Crop(box, interpolation, flip=augment.hflip > 0 and bool(torch.rand(1) < augment.hflip))

    def apply(self, pixels: np.ndarray, crop: Crop) -> Tensor:
        sample = resize(pixels, self._size, crop.interpolation)
        if crop.flip:
            sample = sample.flip(-1)
        return sample if self.policy is None else _from_pillow(self.policy(_to_pillow(sample)))


class EvalTransform:
    """timm's evaluation transform (resize, crop or border) up to uint8."""

    def __init__(self, model_input: InputSpec) -> None:
        from timm.data import create_transform

        self._interpolation, self._size = model_input.interpolation, model_input.size[1:]
        resizing, self._cut, *_ = create_transform(
            model_input.size, is_training=False, use_prefetcher=True, crop_pct=model_input.crop_pct,
            crop_mode=model_input.crop_mode, mean=model_input.mean, std=model_input.std).transforms
        self._resized = functools.lru_cache(functools.partial(_resized, resizing))

    def crop(self, width: int, height: int) -> Crop:
        return Crop(Box(0, 0, height, width), self._interpolation)

    def apply(self, pixels: np.ndarray, crop: Crop) -> Tensor:
        height, width = self._resized(*pixels.shape[:2])
        sample = resize(pixels, (height, width), crop.interpolation)
        if height >= self._size[0] and width >= self._size[1]:
            return self._cut(sample)
        return _from_pillow(self._cut(_to_pillow(sample)))  # a border in three colours is drawn on Pillow images alone


def _resized(resizing: Any, height: int, width: int) -> tuple[int, int]:
    """The size that timm's transform makes of this one; at least 1, where a border leaves it no row of a flat image."""
    from timm.data.transforms import ResizeKeepRatio

    image = torch.empty((1, height, width), device="meta")
    if isinstance(resizing, ResizeKeepRatio):
        height, width = resizing.get_params(image, resizing.size, resizing.longest)
        return max(height, 1), max(width, 1)
    _, height, width = resizing(image).shape
    return height, width


def resize(pixels: np.ndarray, size: tuple[int, int], interpolation: str) -> Tensor:
    """[C, *size] from [h, w, C], both uint8, by an antialiased filter; timm's name of it.

    torch's numbers are the same on every processor, and Pillow's but for one level in 0.3 % of them (where bicubic
    overshoots, two in one of a million).
    """
    if interpolation in _OF_TORCH:
        image = torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0)
        return functional.interpolate(image, size, mode=interpolation, antialias=True)[0]
    return _from_pillow(Image.fromarray(pixels).resize(size[::-1], Image.Resampling[interpolation.upper()]))


def _to_pillow(sample: Tensor) -> Image.Image:
    """Of [3, H, W] uint8."""
    return Image.merge("RGB", [Image.fromarray(channel) for channel in sample.numpy()])


def _from_pillow(image: Image.Image) -> Tensor:
    """[3, H, W] uint8."""
    return torch.from_numpy(np.stack([np.asarray(channel) for channel in image.split()]))


def check_augmentation(augment: AugmentConfig) -> None:
    """Raises SettingsError for what TrainTransform would refuse, before anything is built."""
    TrainTransform(augment, InputSpec(size=(3, 8, 8), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic",
                                      crop_pct=1.0))


def erase_box(seed: int, position: int, augment: AugmentConfig, height: int, width: int) -> tuple[int, int, int, int]:
    """Random erasing's rectangle (top, left, height, width) for one sample; all zero where nothing is erased.

    Area 2 % to 1/3 of the image, aspect log-uniform in [0.3, 3.3], ten tries, as in timm and arXiv:1708.04896.
    """
    if not augment.reprob or (rng := generator(seed, position, ERASE)).random() >= augment.reprob:
        return 0, 0, 0, 0
    for _ in range(10):
        area = rng.uniform(0.02, 1 / 3) * height * width
        aspect = np.exp(rng.uniform(np.log(0.3), np.log(1 / 0.3)))
        h, w = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if 0 < h < height and 0 < w < width:
            return int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1)), h, w
    return 0, 0, 0, 0


def noise_seed(seed: int, position: int) -> int:
    """What one sample's box is filled with follows from it, see vir.data.noise. An int32."""
    return int(generator(seed, position, NOISE).integers(-2**31, 2**31))


def mix_parameters(seed: int, position: int, augment: AugmentConfig, height: int,
                   width: int) -> tuple[float, tuple[int, int, int, int]]:
    """How a pair is mixed: (lam, box). Each member keeps share `lam` of itself and takes the rest of its partner.

    A box (top, left, height, width) that is not empty is CutMix (arXiv:1905.04899), lam its remaining area; otherwise
    it is mixup (arXiv:1710.09412). `position` is that of the pair's first member.
    """
    empty = (0, 0, 0, 0)
    if not augment.mixes or (rng := generator(seed, position, MIX)).random() >= augment.mixup_prob:
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
