"""What happens to an image in a loader process: timm's transforms up to uint8, and the numbers for the device.

Workers crop, flip and colour. Where to erase and how to mix is drawn here, out of (seed, position), and done by
vir.data.device.
"""

# Dimension key: C channels, H height, W width.

from __future__ import annotations

import functools
import importlib
import random
from typing import Any, Callable

import numpy as np
import torch
from PIL import Image

from vir.config import AugmentConfig
from vir.errors import SettingsError
from vir.streams import ERASE, MIX, NOISE, SAMPLE, generator
from vir.weights.spec import InputSpec


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


def train_transform(augment: AugmentConfig, model_input: InputSpec) -> Callable[[Image.Image], np.ndarray]:
    """timm's training transform up to uint8 [C, H, W]; it draws what seed_draws has decided.

    Raises:
        SettingsError: a policy string that timm does not know.
    """
    from timm.data import create_transform

    jitter: Any = augment.color_jitter or None  # timm's hint forgets None, its code does not
    try:
        return create_transform(
            model_input.size, is_training=True, use_prefetcher=True, scale=augment.scale, ratio=augment.ratio,
            hflip=augment.hflip, color_jitter=jitter, auto_augment=augment.auto_augment,
            interpolation=augment.interpolation, mean=model_input.mean, std=model_input.std)
    except (AssertionError, ValueError, KeyError) as error:
        raise SettingsError(f"--augment.auto_augment {augment.auto_augment!r}: {error}; for example "
                            "rand-m9-mstd0.5-inc1, or null for none") from error


def check_augmentation(augment: AugmentConfig) -> None:
    """Raises SettingsError for what train_transform would refuse, before anything is built."""
    train_transform(augment, InputSpec(size=(3, 8, 8), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic",
                                       crop_pct=1.0))


def eval_transform(model_input: InputSpec) -> Callable[[Image.Image], np.ndarray]:
    """timm's evaluation transform (resize, crop or border) up to uint8 [C, H, W]."""
    from timm.data import create_transform

    return create_transform(
        model_input.size, is_training=False, use_prefetcher=True, interpolation=model_input.interpolation,
        crop_pct=model_input.crop_pct, crop_mode=model_input.crop_mode, mean=model_input.mean, std=model_input.std)


def erase_box(seed: int, position: int, augment: AugmentConfig, height: int, width: int) -> tuple[int, int, int, int]:
    """Random erasing's rectangle (top, left, height, width) for one sample; all zero where nothing is erased.

    Area 2 % to 1/3 of the image, aspect log-uniform in [0.3, 3.3], ten tries, as in timm and arXiv:1708.04896.
    """
    rng = generator(seed, position, ERASE)
    if rng.random() >= augment.reprob:
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
    rng = generator(seed, position, MIX)
    if rng.random() >= augment.mixup_prob or not augment.mixes:
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
