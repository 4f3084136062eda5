"""The operator of the authors' public code: a softmax over the scores that the decay was multiplied with.

A reference to compare with, in this package's own words: out = softmax((q k^T * K^-0.5) * D) v, where D[n, m] is
decay^(n - m) for m <= n and else 0 (models/vir.py of github.com/anom63931/ViR, commit d91fd8b). A score of 0 has the
weight e^0, so each token sees all others, and no recurrent or chunkwise form gives the same numbers.

Importing this module registers official_tiny_patch16_224 with timm; importing vir.models does not. Its parameters have
the names, the shapes and, for one seed, the initial values of vir_tiny_patch16_224.
"""

# Dimension key: B batch, H heads, N tokens, K key and value width.

from __future__ import annotations

from typing import Any, cast

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor

from vir.models import VisionRetention
from vir.models.block import Block, Retention

__all__ = ["OfficialRetention"]


def masked_softmax(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    """[B, H, N, K] of such tensors; decay is [H]."""
    places = torch.arange(q.shape[2], device=q.device)
    distance = places[:, None] - places  # [N, N]
    mask = torch.where(distance >= 0, decay[:, None, None] ** distance.clamp(min=0), 0).to(q.dtype)  # [H, N, N]
    return (q @ k.mT * q.shape[3] ** -0.5 * mask).softmax(dim=-1) @ v


class _MaskedSoftmax(Retention):
    def _retain(
        self, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int] | None, kept: Tensor | None
    ) -> Tensor:
        return masked_softmax(q, k, v, self.decay.to(q.device))


class OfficialRetention(VisionRetention):
    """VisionRetention with that operator in each block, for whole images; retention modes change nothing."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for block in self.blocks:
            retention = cast(Block, block).retention
            official = _MaskedSoftmax(self.embed_dim, retention.num_heads)
            official.load_state_dict(retention.state_dict())
            setattr(block, "retention", official)


default_cfgs = generate_default_cfgs({"official_tiny_patch16_224": dict(
    num_classes=1000, input_size=(3, 224, 224), pool_size=None, fixed_input_size=True, crop_pct=0.875,
    interpolation="bicubic", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5),
    first_conv="patch_embed.proj", classifier="head")})


@register_model
def official_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> OfficialRetention:
    """The size of vir_tiny_patch16_224."""
    return build_model_with_cfg(OfficialRetention, "official_tiny_patch16_224", pretrained,
                                **dict(embed_dim=192, depth=12, num_heads=3) | kwargs)
