"""The recurrent form of a ViR as two graphs: one step for each token, and one that reads the logits.

Retention is causal, so a device that streams an image keeps a state of one size, however many tokens it has seen. With
2-D decay a step takes a row of patches, because a patch sees those above it.

Dimension key: B batch, L blocks, H heads, K key width, N tokens of a step (1, or the columns), D width, C channels.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from vir.errors import SettingsError
from vir.models.block import Block
from vir.models.retention import retention_step
from vir.models.retention_2d import chunkwise_retention_2d
from vir.models.vision_retention import VisionRetention

STREAMED_POOLS = ("token", "avg")


def check_streams(model: VisionRetention) -> None:
    """Raises SettingsError where the logits are not of a class token or a mean of the patches."""
    if model.global_pool not in STREAMED_POOLS:
        raise SettingsError(f"the recurrent form reads the class token or the mean of the patches, and global_pool is "
                            f"{model.global_pool!r}; export the parallel form")


class Step(nn.Module):
    """Patches of one step and the state before -> the state after them.

    For models that pool the patches also the sum of the normalised patches [B, D], `total`, from which `Read` has the
    mean. State and total begin as zeros.
    """

    def __init__(self, model: VisionRetention) -> None:
        super().__init__()
        self.model = model
        self.rows, self.columns = model.patch_embed.grid_size
        self.by_rows = _blocks(model)[0].retention.dims == 2

    @property
    def patches_shape(self) -> tuple[int, int, int]:
        """[C, height, width] of what a step takes: a patch, or a row of them."""
        height, width = self.model.patch_embed.patch_size
        return self.model.in_chans, height, width * (self.columns if self.by_rows else 1)

    def state_shape(self, batch: int) -> tuple[int, ...]:
        """[L, B, H, K, K], or [L, B, H, columns, K, K] with 2-D decay; float32."""
        heads = _blocks(self.model)[0].retention.num_heads
        width = self.model.embed_dim // heads
        return (len(self.model.blocks), batch, heads, *([self.columns] if self.by_rows else []), width, width)

    def forward(self, patches: Tensor, position: Tensor, state: Tensor, total: Tensor | None = None
                ) -> tuple[Tensor, ...]:
        """Args:
            patches: [B, C, height, width], normalised.
            position: [B] int64, the number of the patch in raster order, or of the row, from 0.
            state: See state_shape.
            total: [B, D] float32, of models without a class token.
        """
        tokens = 1 if not self.by_rows else self.columns
        table = self.model.pos_embed.unflatten(1, (-1, tokens))[0]  # [steps, N, D]
        x = self.model.patch_embed.proj(patches).flatten(2).mT + table[position]  # [B, N, D]
        states: list[Tensor] = []
        for block, before in zip(_blocks(self.model), state.unbind(0)):
            def retain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                if self.by_rows:
                    out, after = chunkwise_retention_2d(q, k, v, block.retention.decay, (1, tokens), 1, before)
                else:
                    out, after = _one(q, k, v, block.retention.decay, before)
                states.append(after)
                return out

            x = block.with_retention(x, retain)
        after = torch.stack(states)
        return (after,) if total is None else (after, total + self.model.norm(x).sum(dim=1))


class Read(nn.Module):
    """The state after all patches -> logits [B, classes]; or the total of models that pool the patches."""

    def __init__(self, model: VisionRetention) -> None:
        super().__init__()
        self.model = model

    def forward(self, seen: Tensor) -> tuple[Tensor]:
        if self.model.cls_token is None:
            return (self.model.head(seen / self.model.pos_embed.shape[1]),)
        x = self.model._last_tokens(seen[0])  # [B, T, D], T = 2 with a distillation token
        for block, state in zip(_blocks(self.model), seen.unbind(0)):
            last = state[:, :, -1] if block.retention.dims == 2 else state  # the class token stands in the last column
            x = block.with_retention(x, lambda q, k, v: _in_order(q, k, v, block.retention.decay, last))
        return (self.model.forward_head(self.model.norm(x)),)


def _blocks(model: VisionRetention) -> list[Block]:
    return list(cast(Iterable[Block], model.blocks))


def _in_order(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor) -> Tensor:
    """[B, H, T, K]: one token after the other."""
    outputs = []
    for token in zip(q.split(1, dim=2), k.split(1, dim=2), v.split(1, dim=2)):
        out, state = _one(*token, decay, state)
        outputs.append(out)
    return torch.cat(outputs, dim=2)


def _one(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """retention_step for tensors of one token, [B, H, 1, K]."""
    out, after = retention_step(q.squeeze(2), k.squeeze(2), v.squeeze(2), decay, state)
    return out.unsqueeze(2), after
