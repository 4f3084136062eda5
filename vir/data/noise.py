"""Normal numbers that are a function of a seed and a place, the same on every device.

The numbers of a generator depend on the kind of device and on how many were drawn before. These are computed by
elementwise operators from where they stand: for a whole batch at once, without a loop or a wait, and torch.compile
makes one kernel of them.
"""

# Dimension key: B batch, C channels, H height, W width.

from __future__ import annotations

import torch
from torch import Tensor


def _hash(x: Tensor) -> Tensor:
    """Of int32, elementwise and one to one. In place but for the first step: on CPU memory is what takes the time.

    Source: lowbias32 of https://github.com/skeeto/hash-prospector, which is of uint32. Products wrap as there; `>>`
    copies the sign, so what it moves in is masked out; the second factor is 0x846ca68b as int32.
    """
    x = x ^ (x >> 16).bitwise_and_(0xFFFF)
    x *= 0x7FEB352D
    x ^= (x >> 15).bitwise_and_(0x1FFFF)
    x *= -0x7B935975
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    return x


def normal_noise(seeds: Tensor, channels: int, height: int, width: int) -> Tensor:
    """float32 [B, C, H, W] of standard normal numbers within 5.5, each a function of seeds[b] and (c, h, w).

    Args:
        seeds: [B] int32, themselves random.
    """
    places = torch.arange(channels * height * width, dtype=torch.int32, device=seeds.device)
    bits = _hash(_hash(places).view(1, channels, height, width) ^ seeds.view(-1, 1, 1, 1))
    # 24 bits with a sign, and a half: exact in float32, symmetric, never -1, 0 or 1. Their normal quantile follows.
    return ((bits >> 8) + 0.5).mul_(2 ** -23).erfinv_().mul_(2 ** 0.5)
