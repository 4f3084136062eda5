"""ViR: a vision backbone of retention blocks (arXiv:2310.19731), with timm's names and registered with timm.

Dimension key: B batch, P patches, N tokens (P patches in raster order, then the class token), D width.

The class token comes last: retention is causal, so only the last token sees every patch. A distilled model has its
distillation token after it.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from timm.layers import (
    LayerScale,
    PatchDropoutWithIndices,
    PatchEmbed,
    resample_abs_pos_embed,
    resample_patch_embed,
    to_2tuple,
    trunc_normal_,
)
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model, resolve_pretrained_cfg
from timm.models._features import feature_take_indices
from timm.models._features_fx import register_notrace_function, register_notrace_module
from torch import Tensor, nn
from torch.nn import functional as F

from vir.errors import SettingsError
from vir.models.block import NORM_EPS, Block, Retention
from vir.models.strips import cut_strips, resample, resampling_weights

__all__ = ["VisionRetention"]

GLOBAL_POOLS = ("", "token", "avg", "max", "avgmax")
INIT_STD = 0.02
STREAM_TOKENS = 1024
"""The number of patches that forward_stream computes at a time; at least one row of them."""

Intermediates = list[Tensor] | list[tuple[Tensor, Tensor]]
"""The patches after each chosen block, or pairs of patches and class token."""

register_notrace_module(Retention)  # its form depends on sizes, which torch.fx does not know


class VisionRetention(nn.Module):
    """Images [B, in_chans, height, width] -> logits [B, num_classes].

    Args, where they mean more than in timm:
        img_size: One side, or (height, width); each divisible by patch_size. set_input_size changes it later.
        dynamic_img_size: Take images of any size; the position embedding is resampled in each call.
        dynamic_img_pad: Pad such images with zeros at the bottom and right to whole patches.
        global_pool: `token` reads the class token; `avg`, `max` and `avgmax` (their mean) pool the patches; '' keeps
            all tokens. A model built to pool patches has no class token, because nothing would read it.
        retention_dims: 1 for decay along the sequence; 2 for decay over rows and columns, where a patch sees the
            patches that are not below and not right of it.
        retention_norm: The layers between retention and its output layer: `none` as in the authors' code, `layernorm`,
            or `layernorm_gelu` as in the first version of the paper. docs/benchmarks.md compares them.
        init_values: The initial value of the layer scales; None for no layer scale.
        class_token_std: The standard deviation of the class token at the start. These two defaults trained better than
            the authors' 1e-5 and 1e-6 (docs/benchmarks.md): without a softmax or a norm, a class token with tiny
            queries gets almost no signal.
        distilled: Add a distillation token after the class token, with a head of its own (DeiT, arXiv:2012.12877). The
            logits are the mean of both heads'; in training set_distilled_training gives them apart.
        drop_rate, pos_drop_rate, proj_drop_rate: Dropout before the head, after the position embedding, and after
            the linear layers of each block.
        patch_drop_rate: The share of patches that training leaves out, drawn anew for each image and step.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0 in the first block.
        retention_mode, chunk_size: See set_retention_mode.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        retention_dims: int = 1,
        retention_norm: str = "none",
        init_values: float | None = 0.1,
        class_token_std: float = 0.02,
        distilled: bool = False,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        patch_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        dynamic_img_size: bool = False,
        dynamic_img_pad: bool = False,
        retention_mode: str = "auto",
        chunk_size: int = 64,
    ) -> None:
        super().__init__()
        _check_pool(global_pool)
        size: tuple[int, int] = to_2tuple(img_size)
        patch: tuple[int, int] = to_2tuple(patch_size)
        check_patches(size, patch)
        if distilled and (global_pool != "token" or retention_dims != 1):
            raise SettingsError(f"distilled=True with global_pool={global_pool!r} and retention_dims={retention_dims}: "
                                "the distillation token follows the class token in one sequence; it needs "
                                "global_pool='token' and retention_dims=1, for 2-D decay has no place for it")
        if dynamic_img_pad and not dynamic_img_size:
            raise SettingsError("dynamic_img_pad pads images of any size; it needs dynamic_img_size=True")
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.global_pool = global_pool
        self.embed_dim = self.num_features = self.head_hidden_size = embed_dim
        self.class_token_std = class_token_std
        self.grad_checkpointing = False
        self.dynamic_img_size = dynamic_img_size
        self.patch_embed = PatchEmbed(
            size, patch, in_chans, embed_dim,  # type: ignore[arg-type]  # takes pairs too
            strict_img_size=not dynamic_img_size, dynamic_img_pad=dynamic_img_pad)
        self.pos_embed = nn.Parameter(torch.empty(1, self.patch_embed.num_patches, embed_dim))
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim)) if global_pool in ("", "token") else None
        self.dist_token = nn.Parameter(torch.empty(1, 1, embed_dim)) if distilled else None
        self.distilled_training = False
        self.patch_drop = PatchDropoutWithIndices(patch_drop_rate, num_prefix_tokens=0, ordered=True) \
            if patch_drop_rate else None
        self.pos_drop = nn.Dropout(pos_drop_rate)
        self.blocks = nn.Sequential(*[
            Block(embed_dim, num_heads, mlp_ratio, retention_dims, retention_norm, init_values, proj_drop_rate,
                  drop_path=drop_path_rate * i / max(depth - 1, 1))
            for i in range(depth)
        ])
        self.feature_info = [dict(module=f"blocks.{i}", num_chs=embed_dim, reduction=max(patch))
                             for i in range(depth)]
        self.norm: nn.Module = nn.LayerNorm(embed_dim, eps=NORM_EPS)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = _classifier(embed_dim, num_classes)
        self.head_dist = _classifier(embed_dim, num_classes) if distilled else None

        self.set_retention_mode(retention_mode, chunk_size)
        self.init_weights()

    @property
    def num_prefix_tokens(self) -> int:
        """How many there are of class and distillation token. timm's name for tokens that are no patches; here these
        are the last ones."""
        return int(self.cls_token is not None) + int(self.dist_token is not None)

    def init_weights(self) -> None:
        """Give all weights new random values."""
        trunc_normal_(self.pos_embed, std=INIT_STD)
        if self.cls_token is not None:
            trunc_normal_(self.cls_token, std=self.class_token_std)
        if self.dist_token is not None:
            trunc_normal_(self.dist_token, std=self.class_token_std)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                _init_linear(module)
            elif isinstance(module, nn.Conv2d):
                module.reset_parameters()  # scaled by fan-in: patches may be 4x4x1 or 16x16x3
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, LayerScale):
                nn.init.constant_(module.gamma, module.init_values)

    def set_retention_mode(self, mode: str, chunk_size: int | None = None) -> None:
        """Choose how retention is computed; weights and results are the same in every mode.

        Args:
            mode: `parallel` (memory grows with N^2), `chunkwise` (with N * chunk_size), `recurrent` (token by token:
                a check and a reference, slow here) or `auto` (parallel for short sequences, else chunkwise).
            chunk_size: Tokens in a chunk of the chunkwise form, with 2-D decay as whole rows of patches; unchanged
                when None. `auto` chooses its own.
        """
        for block in cast(Iterable[Block], self.blocks):
            block.retention.set_mode(mode, chunk_size)

    def set_input_size(self, img_size: int | tuple[int, int], patch_size: int | tuple[int, int] | None = None) -> None:
        """Take images of this size from now on, in patches of that size; positions and patches are resampled, bicubic.
        """
        size: tuple[int, int] = to_2tuple(img_size)
        patch: tuple[int, int] = to_2tuple(self.patch_embed.patch_size if patch_size is None else patch_size)
        check_patches(size, patch)
        old_grid = self.patch_embed.grid_size
        self.patch_embed.set_input_size(img_size=size, patch_size=patch)
        for info in self.feature_info:
            info["reduction"] = max(patch)
        if self.patch_embed.grid_size != old_grid:
            resampled = resample_abs_pos_embed(
                self.pos_embed.detach(), self.patch_embed.grid_size, old_grid, num_prefix_tokens=0)
            self.pos_embed = nn.Parameter(resampled, requires_grad=self.pos_embed.requires_grad)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the inputs of blocks for the backward pass and compute the rest again, with bit-equal results."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "cls_token", "dist_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, str | list[tuple[str, tuple[int] | None]]]:
        """Patterns of parameter names from input to output, for timm's layer-wise lr decay; coarse: one for all blocks.
        """
        blocks: str | list[tuple[str, tuple[int] | None]]
        blocks = r"^blocks" if coarse else [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^(?:cls_token|dist_token|pos_embed|patch_embed)", "blocks": blocks}

    def set_distilled_training(self, enable: bool = True) -> None:
        """Give the logits of class and distillation token as a pair in training mode, instead of their mean.

        Raises:
            SettingsError: The model has no distillation token.
        """
        if enable and self.dist_token is None:
            raise SettingsError("this model has no distillation token; build it with distilled=True")
        self.distilled_training = enable

    def get_classifier(self) -> nn.Module | tuple[nn.Module, nn.Module]:
        """The head; of a distilled model both heads, as in timm's."""
        return self.head if self.head_dist is None else (self.head, self.head_dist)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head (no head for 0 classes). A global_pool of patches also removes the class token.

        Raises:
            SettingsError: The model has no class token for this global_pool, or is distilled and would lose its tokens.
        """
        if global_pool is not None:
            _check_pool(global_pool)
            if global_pool not in ("", "token") and self.dist_token is not None:
                raise SettingsError(f"a distilled model reads its class and distillation tokens; global_pool="
                                    f"{global_pool!r} needs a model built with distilled=False")
            if global_pool == "token" and self.cls_token is None:
                raise SettingsError("this model has no class token to pool; build it with global_pool='token'")
            self.global_pool = global_pool
        if self.global_pool in ("avg", "max", "avgmax"):
            self.cls_token = None
        self.num_classes = num_classes
        self.head = _classifier(self.embed_dim, num_classes).to(self.pos_embed)
        self.head.train(self.training)
        if self.head_dist is not None:
            self.head_dist = _classifier(self.embed_dim, num_classes).to(self.pos_embed)
            self.head_dist.train(self.training)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what forward_intermediates does not need for these blocks; returns their indices.

        prune_head removes the head with the class and distillation tokens: no patch sees these, only the head does.
        """
        take_indices, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[:last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
            self.cls_token = self.dist_token = self.head_dist = None
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, height, width] -> normalised tokens [B, N, D]: patches, class and distillation token."""
        x, grid, kept = self._embed(x)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, grid, kept, use_reentrant=False)
            else:
                x = block(x, grid, kept)
        return self.norm(x)

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """Tokens [B, N, D] -> [B, D] by pool_type or else global_pool; '' returns the tokens."""
        pool_type = self.global_pool if pool_type is None else pool_type
        _check_pool(pool_type)
        if pool_type == "token":
            if self.cls_token is None:
                raise SettingsError("this model has no class token to pool; build it with global_pool='token'")
            return x[:, -self.num_prefix_tokens]
        if pool_type == "avg":
            return self._patches(x).mean(dim=1)
        if pool_type == "max":
            return self._patches(x).amax(dim=1)
        if pool_type == "avgmax":
            return 0.5 * (self._patches(x).mean(dim=1) + self._patches(x).amax(dim=1))
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens [B, N, D] -> logits [B, num_classes], or with pre_logits the head's input, [B, D].

        Of a distilled model the mean of both tokens', or after set_distilled_training a pair of logits in training.
        """
        if self.head_dist is not None and self.global_pool == "token":
            own, distilled = self.head_drop(x[:, -2]), self.head_drop(x[:, -1])
            if pre_logits:
                return (own + distilled) / 2
            own, distilled = self.head(own), self.head_dist(distilled)
            if self.distilled_training and self.training and not torch.jit.is_scripting():
                return cast(Tensor, (own, distilled))  # as timm's does: all else is a Tensor, to TorchScript too
            return (own + distilled) / 2
        x = self.head_drop(self.pool(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> Intermediates | tuple[Tensor, Intermediates] | dict[str, Tensor | list[Tensor]]:
        """The patches after chosen blocks, with the same arguments and results as in timm's ViT.

        Args:
            indices: The last n blocks, these blocks, or all when None.
            return_prefix_tokens: Return pairs (patches, class token); a class token is [B, 1, D], with a distillation
                token [B, 2, D].
            norm: Apply the final norm to each.
            stop_early: Run no block after the last chosen one.
            output_fmt: `NCHW` for maps [B, D, rows, columns], `NLC` for [B, P, D]. While patch dropout is active, only
                `NLC` is possible.
            intermediates_only: Leave out the final tokens.
            output_dict: A dict of image_features, image_intermediates and image_intermediates_prefix.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise SettingsError(f"unknown output_fmt {output_fmt!r}; choose NCHW or NLC")
        take_indices, last = feature_take_indices(len(self.blocks), indices)
        x, grid, kept = self._embed(x)
        if output_fmt == "NCHW" and kept is not None:
            raise SettingsError("patch dropout leaves no map of all patches; call model.eval() or use output_fmt='NLC'")
        taken = []
        for i, block in enumerate(self.blocks[:last + 1] if stop_early else self.blocks):
            if self.grad_checkpointing:
                x = checkpoint(block, x, grid, kept, use_reentrant=False)
            else:
                x = block(x, grid, kept)
            if i in take_indices:
                taken.append(self.norm(x) if norm else x)

        patches = [self._patches(y) for y in taken]
        if output_fmt == "NCHW":
            patches = [y.mT.unflatten(2, grid).contiguous() for y in patches]
        count = self.num_prefix_tokens
        class_tokens = [y[:, -count:] for y in taken] if return_prefix_tokens and count else None

        if output_dict:
            result: dict[str, Tensor | list[Tensor]] = {"image_intermediates": patches}
            if class_tokens is not None:
                result["image_intermediates_prefix"] = class_tokens
            if not intermediates_only:
                result["image_features"] = self.norm(x)
            return result
        intermediates: Intermediates = patches if class_tokens is None else list(zip(patches, class_tokens))
        return intermediates if intermediates_only else (self.norm(x), intermediates)

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | list[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> Intermediates:
        """DINO's name for forward_intermediates: the last n blocks or these, as [B, P, D], with reshape as maps."""
        return cast(Intermediates, self.forward_intermediates(
            x, n, return_prefix_tokens, norm, output_fmt="NCHW" if reshape else "NLC", intermediates_only=True))

    @torch.no_grad()
    def forward_stream(self, x: Tensor | Iterable[Tensor], img_size: int | tuple[int, int] | None = None) -> Tensor:
        """Images in strips -> the logits [B, num_classes] of `forward` in eval mode, with the memory of one strip.

        Retention is causal: a strip goes through all layers before the next is read. Between strips each layer keeps a
        state of [B, H, K, K], or one row of such states with 2-D decay; positions are resampled for a strip at a time.
        There are no gradients.

        Args:
            x: Images [B, in_chans, height, width], or strips of them from top to bottom, [B, in_chans, any height,
                width], as they come from files larger than memory. Strips are moved to the model's device.
            img_size: The size of the whole images; None for the size that the model was built for.

        Raises:
            SettingsError: The model has no pool, or is in training mode, where dropout and stochastic depth act.
            ValueError: The strips do not make up the image.
        """
        return self.forward_head(self.forward_stream_features(x, img_size))

    @torch.no_grad()
    def forward_stream_features(self, x: Tensor | Iterable[Tensor],
                                img_size: int | tuple[int, int] | None = None) -> Tensor:
        """As forward_stream, but the normalised tokens [B, T, D] that forward_head reads: class and distillation token,
        or one that is the pool of all patches.
        """
        if self.training:
            raise SettingsError("forward_stream needs model.eval()")
        if self.global_pool == "":
            raise SettingsError("forward_stream keeps no patches, so global_pool cannot be ''; choose token or avg")
        if isinstance(x, Tensor):
            img_size, x = (x.shape[-2], x.shape[-1]), [x]
        size: tuple[int, int] = self.patch_embed.img_size if img_size is None else to_2tuple(img_size)
        rows, columns = self._grid(size)
        strip_rows = max(STREAM_TOKENS // columns, 1)
        height = strip_rows * self.patch_embed.patch_size[0]
        strips = map(self._to_whole_patches, cut_strips(x, height, self.in_chans, size))
        states: list[Tensor | None] = [None] * len(self.blocks)

        def extend(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
            for i, block in enumerate(cast(Iterable[Block], self.blocks)):
                tokens, states[i] = block.extend(tokens, states[i], grid)
            return self.norm(tokens)

        sums, maxima = [], []
        for positions, strip in zip(self._position_strips((rows, columns), strip_rows), strips, strict=True):
            patches = extend(self.patch_embed.proj(strip).flatten(2).mT + positions,
                             (positions.shape[1] // columns, columns))
            if self.cls_token is None:
                sums.append(patches.sum(dim=1, dtype=torch.promote_types(patches.dtype, torch.float32)))
                maxima.append(patches.amax(dim=1))
        if self.cls_token is not None:
            return extend(self._last_tokens(patches), (0, columns))
        mean, largest = torch.stack(sums).sum(dim=0) / (rows * columns), torch.stack(maxima).amax(dim=0)
        pooled = {"avg": mean, "max": largest, "avgmax": 0.5 * (mean + largest)}[self.global_pool]
        return pooled.to(patches.dtype).unsqueeze(1)

    def _to_whole_patches(self, strip: Tensor) -> Tensor:
        """The strip on the model's device, padded to whole patches where the model pads."""
        strip = strip.to(self.pos_embed.device)
        if not self.patch_embed.dynamic_img_pad:
            return strip
        (height, width), (patch_height, patch_width) = strip.shape[2:], self.patch_embed.patch_size
        return F.pad(strip, (0, -width % patch_width, 0, -height % patch_height))

    def _embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int], Tensor | None]:
        """Images -> tokens [B, N, D] for the first block, the grid of patches, and which of them patch dropout kept."""
        grid = self._grid((x.shape[2], x.shape[3]))
        x = self.patch_embed(x) + self._position_embedding(grid)
        x, kept = (x, None) if self.patch_drop is None else self.patch_drop(x)
        if self.cls_token is not None:
            x = torch.cat([x, self._last_tokens(x)], dim=1)
        return self.pos_drop(x), grid, kept

    def _last_tokens(self, x: Tensor) -> Tensor:
        """Class token, and distillation token where there is one, [B, 1 or 2, D], for patches x."""
        tokens: Tensor | None = self.cls_token
        assert tokens is not None
        if self.dist_token is not None:
            tokens = torch.cat([tokens, self.dist_token], dim=1)
        return tokens.expand(x.shape[0], -1, -1).to(x.dtype)

    def _grid(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of patches of images of this size; SettingsError if the model does not take them."""
        if self.dynamic_img_size:
            if not self.patch_embed.dynamic_img_pad:
                check_patches(img_size, self.patch_embed.patch_size)
            return self.patch_embed.dynamic_feat_size(img_size)
        check_size(img_size, self.patch_embed.img_size)
        return self.patch_embed.grid_size

    def _position_embedding(self, grid: tuple[int, int]) -> Tensor:
        """[1, P, D] for this grid."""
        if not self.dynamic_img_size:
            return self.pos_embed
        return resample_abs_pos_embed(self.pos_embed, grid, self.patch_embed.grid_size, num_prefix_tokens=0)

    def _position_strips(self, grid: tuple[int, int], rows: int) -> Iterator[Tensor]:
        """The same in strips of so many rows, [1, rows * columns, D], each made when it is asked for."""
        old = self.patch_embed.grid_size
        if not self.dynamic_img_size or grid == old:
            yield from self.pos_embed.split(rows * grid[1], dim=1)
            return
        table = self.pos_embed[0].float().unflatten(0, old)
        of_rows, of_columns = (resampling_weights(new, side).to(table.device) for new, side in zip(grid, old))
        for weights in of_rows.split(rows):
            yield resample(table, weights, of_columns).to(self.pos_embed.dtype)

    def _patches(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, P, D]."""
        return x[:, :x.shape[1] - self.num_prefix_tokens]


@torch.jit.ignore
def _check_pool(global_pool: str) -> None:
    if global_pool not in GLOBAL_POOLS:
        raise SettingsError(f"unknown global_pool {global_pool!r}; choose one of {', '.join(map(repr, GLOBAL_POOLS))}")


# While torch.fx traces, sizes are proxies, which these checks cannot compare: they are called, not traced.
@register_notrace_function
@torch.jit.ignore
def check_size(img_size: tuple[int, int], expected: tuple[int, int]) -> None:
    if tuple(img_size) != tuple(expected):
        height, width = img_size
        raise SettingsError(
            f"images are {height}x{width} but this model takes {expected[0]}x{expected[1]}; resize them, create it "
            f"with img_size=({height}, {width}) or dynamic_img_size=True, or call model.set_input_size first")


@register_notrace_function
@torch.jit.ignore
def check_patches(img_size: tuple[int, int], patch_size: tuple[int, int]) -> None:
    if min(patch_size) < 1:
        raise SettingsError(f"patch_size is {patch_size[0]}x{patch_size[1]}; it must be at least 1x1")
    if any(side < patch or side % patch for side, patch in zip(img_size, patch_size)):
        nearest = tuple(max(round(side / patch), 1) * patch for side, patch in zip(img_size, patch_size))
        raise SettingsError(f"img_size {img_size[0]}x{img_size[1]} is not divisible by patch_size "
                            f"{patch_size[0]}x{patch_size[1]}; the nearest that is: img_size={nearest}; "
                            f"dynamic_img_size=True with dynamic_img_pad=True pads images")


def _classifier(embed_dim: int, num_classes: int) -> nn.Module:
    if num_classes < 0:
        raise SettingsError(f"num_classes is {num_classes}; it must be positive, or 0 for no head")
    return _init_linear(nn.Linear(embed_dim, num_classes)) if num_classes else nn.Identity()


def _init_linear(module: nn.Linear) -> nn.Linear:
    trunc_normal_(module.weight, std=INIT_STD)
    nn.init.zeros_(module.bias)
    return module


_CFG: dict[str, Any] = dict(
    num_classes=1000, input_size=(3, 224, 224), pool_size=None, fixed_input_size=True, crop_pct=0.875,
    interpolation="bicubic", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5),
    first_conv="patch_embed.proj", classifier="head",
)

default_cfgs = generate_default_cfgs({
    "vir_tiny_patch16_224": _CFG,
    "vir_small_patch16_224": _CFG,
    "vir_base_patch16_224": _CFG,
    "vir_large_patch16_224": _CFG,
    "vir_large_patch14_224": _CFG,
    "vir2d_tiny_patch16_224": _CFG,
    "vir2d_small_patch16_224": _CFG,
    "vir2d_base_patch16_224": _CFG,
    "vir2d_large_patch16_224": _CFG,
})


def checkpoint_filter_fn(state_dict: dict[str, Any], model: VisionRetention) -> dict[str, Tensor]:
    """The state dict, with patches and positions resampled to the model's sizes.

    It may also be the value of a key `model` or `state_dict`. The authors' release has the same names and shapes as a
    model with retention_norm="none".
    """
    state_dict = state_dict.get("model", state_dict)
    state_dict = dict(state_dict.get("state_dict", state_dict))
    weight, pos_embed = state_dict.get("patch_embed.proj.weight"), state_dict.get("pos_embed")
    patch_size, grid = model.patch_embed.patch_size, model.patch_embed.grid_size
    if weight is not None and tuple(weight.shape[2:]) != patch_size:
        state_dict["patch_embed.proj.weight"] = resample_patch_embed(weight, list(patch_size))
    if pos_embed is not None and pos_embed.shape[1] != model.patch_embed.num_patches:
        if math.isqrt(pos_embed.shape[1]) ** 2 != pos_embed.shape[1]:
            raise SettingsError(f"the position embedding has {pos_embed.shape[1]} places, which make no square to "
                                f"resample from; load it into a model of its own img_size and call set_input_size")
        state_dict["pos_embed"] = resample_abs_pos_embed(pos_embed, list(grid), num_prefix_tokens=0)
    return state_dict


def _create(variant: str, pretrained: bool, **kwargs: Any) -> VisionRetention:
    if pretrained:
        cfg = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
        if not (cfg.has_weights or cfg.state_dict):
            raise SettingsError(
                f"no pretrained weights of {variant} have been released; use pretrained=False, or load a file of your "
                f"own with vir.models.load(path) or timm.create_model({variant!r}, checkpoint_path=path)"
            )
    feature_cfg = dict(out_indices=kwargs.pop("out_indices", 3), feature_cls="getter")
    if kwargs.get("distilled"):
        kwargs["pretrained_cfg_overlay"] = (kwargs.get("pretrained_cfg_overlay") or {}) | {
            "classifier": ("head", "head_dist")}
    return build_model_with_cfg(VisionRetention, variant, pretrained, feature_cfg=feature_cfg,
                                pretrained_filter_fn=checkpoint_filter_fn, **kwargs)


_TINY: dict[str, Any] = dict(embed_dim=192, depth=12, num_heads=3)
_SMALL: dict[str, Any] = dict(embed_dim=384, depth=12, num_heads=6)
_BASE: dict[str, Any] = dict(embed_dim=768, depth=12, num_heads=12)
_LARGE: dict[str, Any] = dict(embed_dim=1024, depth=24, num_heads=16)


@register_model
def vir_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionRetention:
    """ViR-Ti/16, 5.7 M parameters."""
    return _create("vir_tiny_patch16_224", pretrained, **_TINY | kwargs)


@register_model
def vir_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionRetention:
    """ViR-S/16, 22.1 M parameters."""
    return _create("vir_small_patch16_224", pretrained, **_SMALL | kwargs)


@register_model
def vir_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionRetention:
    """ViR-B/16, 86.6 M parameters."""
    return _create("vir_base_patch16_224", pretrained, **_BASE | kwargs)


@register_model
def vir_large_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionRetention:
    """ViR-L/16, 304.4 M parameters."""
    return _create("vir_large_patch16_224", pretrained, **_LARGE | kwargs)


@register_model
def vir_large_patch14_224(pretrained: bool = False, **kwargs: Any) -> VisionRetention:
    """ViR-L/14, 304.3 M parameters."""
    return _create("vir_large_patch14_224", pretrained, **_LARGE | dict(patch_size=14) | kwargs)


@register_model
def vir2d_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionRetention:
    """ViR-2D-Ti/16, 5.7 M parameters; decay over rows and columns."""
    return _create("vir2d_tiny_patch16_224", pretrained, **_TINY | dict(retention_dims=2) | kwargs)


@register_model
def vir2d_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionRetention:
    """ViR-2D-S/16, 22.1 M parameters; decay over rows and columns."""
    return _create("vir2d_small_patch16_224", pretrained, **_SMALL | dict(retention_dims=2) | kwargs)


@register_model
def vir2d_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionRetention:
    """ViR-2D-B/16, 86.6 M parameters; decay over rows and columns."""
    return _create("vir2d_base_patch16_224", pretrained, **_BASE | dict(retention_dims=2) | kwargs)


@register_model
def vir2d_large_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionRetention:
    """ViR-2D-L/16, 304.4 M parameters; decay over rows and columns."""
    return _create("vir2d_large_patch16_224", pretrained, **_LARGE | dict(retention_dims=2) | kwargs)
