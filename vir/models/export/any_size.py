"""The parallel form of a ViR for images of any size, in operators whose shapes may be symbols while it is traced.

VisionRetention.forward cuts scores into blocks and powers into windows by the number of tokens, and asks timm to
resample positions: torch.export takes these for constants. Here distances between tokens come from their places, and
positions from one matrix for each side.

Dimension key: B batch, H heads, N tokens, D width, P patches.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from vir.errors import SettingsError
from vir.models.block import Block
from vir.models.strips import resample, resampling_weights
from vir.models.vision_retention import VisionRetention


class AnySize(nn.Module):
    """Images [B, C, height, width] -> logits [B, classes], as a model of that size. Sides are two or more patches long.
    """

    def __init__(self, model: VisionRetention) -> None:
        super().__init__()
        if model.global_pool == "":
            raise SettingsError("--dynamic-size gives logits of the whole image, and global_pool is ''; leave it out")
        self.model = model
        self.patch_size: tuple[int, int] = model.patch_embed.patch_size

    def forward(self, images: Tensor) -> Tensor:
        model = self.model
        rows, columns = images.shape[2] // self.patch_size[0], images.shape[3] // self.patch_size[1]
        x = model.patch_embed.proj(images).flatten(2).mT + self._positions(rows, columns)
        blocks = list(cast(Iterable[Block], model.blocks))
        if model.cls_token is not None:
            x = torch.cat([x, model._last_tokens(x)], dim=1)
        mask = self._mask(rows, columns, blocks[0])
        for block in blocks:
            x = block.with_retention(x, lambda q, k, v: (q @ k.mT * mask) @ v)
        return model.forward_head(model.norm(x))

    def _positions(self, rows: int, columns: int) -> Tensor:
        """[1, P, D]: the table resampled bicubic, antialiased, as timm's resample_abs_pos_embed does it."""
        old = self.model.patch_embed.grid_size
        return resample(self.model.pos_embed[0].unflatten(0, old), resampling_weights(rows, old[0]),
                        resampling_weights(columns, old[1]))

    def _mask(self, rows: int, columns: int, block: Block) -> Tensor:
        """[H, N, N]: decay to the distance where a token sees another, else 0; times the scale of q . k."""
        if block.retention.dims == 2:  # ONNX has no remainder of a division by a symbol
            grid, last = (rows, columns), (rows, columns - 1)
            places = [torch.arange(rows)[:, None].expand(grid).flatten(), torch.arange(columns).expand(grid).flatten()]
            if self.model.cls_token is not None:  # below the last patch
                places = [torch.cat([place, place.new_full((1,), end)]) for place, end in zip(places, last)]
        else:
            places = [torch.arange(rows * columns + self.model.num_prefix_tokens)]
        steps = torch.stack([place[:, None] - place for place in places])  # [1 or 2, N, N]
        powers = block.retention.decay[:, None, None] ** steps.sum(dim=0).clamp(min=0)
        width = self.model.embed_dim // block.retention.num_heads
        return torch.where((steps >= 0).all(dim=0), powers, 0.0) * width ** -0.5
