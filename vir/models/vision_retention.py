"""ViR: a vision backbone of retention blocks (arXiv:2310.19731), with timm's names and registered with timm.

Dimension key: B batch, P patches, N tokens (P patches in raster order, then the class token), D width.

The class token comes last: retention is causal, so only the last token sees every patch.
"""

import torch
from timm.layers import LayerScale, PatchEmbed, resample_abs_pos_embed, to_2tuple, trunc_normal_
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model, resolve_pretrained_cfg
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from vir.errors import SettingsError
from vir.models.block import NORM_EPS, Block

__all__ = ["VisionRetention"]

GLOBAL_POOLS = ("", "token", "avg")
INIT_STD = 0.02


class VisionRetention(nn.Module):
    """Images [B, in_chans, height, width] -> logits [B, num_classes].

    Args, where they say more than in timm:
        img_size: One side, or (height, width); each divisible by patch_size. Other sizes: set_input_size.
        global_pool: `token` reads the class token, `avg` the mean of the patches, and '' keeps all tokens. A model
            built with `avg` has no class token: nothing would read it.
        init_values: Where the layer scales start, None for none. The default .1 trained better than the authors'
            1e-5 with a class token near zero (Fashion-MNIST, 400 steps, one seed: 80.1 against 76.9 %): without
            a normaliser after retention, tiny queries leave the class token with almost no signal.
        drop_rate, pos_drop_rate, proj_drop_rate: Dropout before the head, after the position embedding, and after
            the linear layers of each block.
        drop_path_rate: Stochastic depth of the last block; the first has none, in between it grows linearly.
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
        init_values: float | None = 0.1,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        retention_mode: str = "auto",
        chunk_size: int = 64,
    ) -> None:
        super().__init__()
        _check_pool(global_pool)
        img_size, patch_size = to_2tuple(img_size), to_2tuple(patch_size)
        _check_divisible(img_size, patch_size)
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.global_pool = global_pool
        self.embed_dim = self.num_features = self.head_hidden_size = embed_dim
        self.grad_checkpointing = False

        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        self.pos_embed = nn.Parameter(torch.empty(1, self.patch_embed.num_patches, embed_dim))
        self.cls_token = None if global_pool == "avg" else nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_drop = nn.Dropout(pos_drop_rate)
        self.blocks = nn.Sequential(*[
            Block(embed_dim, num_heads, mlp_ratio, init_values, proj_drop_rate,
                  drop_path=drop_path_rate * i / max(depth - 1, 1))
            for i in range(depth)
        ])
        self.feature_info = [dict(module=f"blocks.{i}", num_chs=embed_dim, reduction=max(patch_size))
                             for i in range(depth)]
        self.norm = nn.LayerNorm(embed_dim, eps=NORM_EPS)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = _classifier(embed_dim, num_classes)

        self.set_retention_mode(retention_mode, chunk_size)
        self.init_weights()

    @property
    def num_prefix_tokens(self) -> int:
        """1 with a class token, else 0: timm's name for tokens that are no patch. Here it is the last token."""
        return 0 if self.cls_token is None else 1

    def init_weights(self) -> None:
        """Draw all weights anew."""
        trunc_normal_(self.pos_embed, std=INIT_STD)
        if self.cls_token is not None:
            trunc_normal_(self.cls_token, std=INIT_STD)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                _init_linear(module)
            elif isinstance(module, nn.Conv2d):
                module.reset_parameters()  # scaled by fan-in: patches may be 4x4x1 or 16x16x3
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
            chunk_size: Tokens in a chunk; unchanged when None.
        """
        for block in self.blocks:
            block.retention.set_mode(mode, chunk_size)

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Take images of this size from now on; the position embedding is resampled, bicubic."""
        img_size = to_2tuple(img_size)
        _check_divisible(img_size, self.patch_embed.patch_size)
        old_grid = self.patch_embed.grid_size
        self.patch_embed.set_input_size(img_size=img_size)
        if self.patch_embed.grid_size != old_grid:
            resampled = resample_abs_pos_embed(
                self.pos_embed.detach(), self.patch_embed.grid_size, old_grid, num_prefix_tokens=0)
            self.pos_embed = nn.Parameter(resampled, requires_grad=self.pos_embed.requires_grad)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the inputs of blocks for the backward pass and compute the rest again; same result, bit by bit."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "cls_token"}

    def group_matcher(self, coarse: bool = False) -> dict:
        """Patterns of parameter names from input to output, for timm's layer-wise lr decay; coarse: one of blocks."""
        blocks = r"^blocks" if coarse else [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]
        return dict(stem=r"^(?:cls_token|pos_embed|patch_embed)", blocks=blocks)

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new head in place (none for 0 classes). Changing to `avg` drops the class token."""
        if global_pool is not None:
            _check_pool(global_pool)
            if global_pool == "token" and self.cls_token is None:
                raise SettingsError("this model has no class token to pool; build it with global_pool='token'")
            self.global_pool = global_pool
        if self.global_pool == "avg":
            self.cls_token = None
        self.num_classes = num_classes
        self.head = _classifier(self.embed_dim, num_classes).to(self.pos_embed)
        self.head.train(self.training)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what forward_intermediates does not need for these blocks; returns their indices.

        Without a head nothing reads the class token, which no patch can see: prune_head removes both.
        """
        take_indices, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[:last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
            self.cls_token = None
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, height, width] -> normalised tokens [B, N, D], the class token last."""
        x = self._embed(x)
        for block in self.blocks:
            x = self._run(block, x)
        return self.norm(x)

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """Tokens [B, N, D] -> [B, D] by pool_type or else global_pool; '' returns the tokens."""
        pool_type = self.global_pool if pool_type is None else pool_type
        _check_pool(pool_type)
        if pool_type == "token":
            if self.cls_token is None:
                raise SettingsError("this model has no class token to pool; build it with global_pool='token'")
            return x[:, -1]
        if pool_type == "avg":
            return self._patches(x).mean(dim=1)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens [B, N, D] -> logits [B, num_classes], or with pre_logits what the head would read, [B, D]."""
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
    ):
        """The patches after chosen blocks, as timm's ViT returns them; same arguments and results.

        Args:
            indices: The last n blocks, these blocks, or all when None.
            return_prefix_tokens: Also the class tokens, [B, 1, D]: in pairs (patches, class token).
            norm: Apply the final norm to each.
            stop_early: Run no block beyond the last chosen.
            output_fmt: `NCHW` for maps [B, D, rows, columns], `NLC` for [B, P, D].
            intermediates_only: Leave out the final tokens.
            output_dict: A dict of image_features, image_intermediates and image_intermediates_prefix.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise SettingsError(f"unknown output_fmt {output_fmt!r}; choose NCHW or NLC")
        take_indices, last = feature_take_indices(len(self.blocks), indices)
        x = self._embed(x)
        taken = []
        for i, block in enumerate(self.blocks[:last + 1] if stop_early else self.blocks):
            x = self._run(block, x)
            if i in take_indices:
                taken.append(self.norm(x) if norm else x)

        patches = [self._patches(y) for y in taken]
        if output_fmt == "NCHW":
            patches = [y.mT.unflatten(2, self.patch_embed.grid_size).contiguous() for y in patches]
        class_tokens = [y[:, -1:] for y in taken] if return_prefix_tokens and self.num_prefix_tokens else None

        if output_dict:
            result = {"image_intermediates": patches}
            if class_tokens is not None:
                result["image_intermediates_prefix"] = class_tokens
            if not intermediates_only:
                result["image_features"] = self.norm(x)
            return result
        intermediates = patches if class_tokens is None else list(zip(patches, class_tokens))
        return intermediates if intermediates_only else (self.norm(x), intermediates)

    def _embed(self, x: Tensor) -> Tensor:
        """Images -> tokens [B, N, D] for the first block."""
        height, width = self.patch_embed.img_size
        if x.shape[-2:] != (height, width):
            raise SettingsError(
                f"images are {x.shape[-2]}x{x.shape[-1]} but this model takes {height}x{width}; resize them, create it "
                f"with img_size=({x.shape[-2]}, {x.shape[-1]}), or call model.set_input_size first"
            )
        x = self.patch_embed(x) + self.pos_embed
        if self.cls_token is not None:
            x = torch.cat([x, self.cls_token.expand(x.shape[0], -1, -1).to(x.dtype)], dim=1)
        return self.pos_drop(x)

    def _run(self, block: Block, x: Tensor) -> Tensor:
        return checkpoint(block, x, use_reentrant=False) if self.grad_checkpointing else block(x)

    def _patches(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, P, D]."""
        return x[:, :x.shape[1] - self.num_prefix_tokens]


def _check_pool(global_pool: str) -> None:
    if global_pool not in GLOBAL_POOLS:
        raise SettingsError(f"unknown global_pool {global_pool!r}; choose one of {', '.join(map(repr, GLOBAL_POOLS))}")


def _check_divisible(img_size: tuple[int, int], patch_size: tuple[int, int]) -> None:
    if min(patch_size) < 1:
        raise SettingsError(f"patch_size is {patch_size[0]}x{patch_size[1]}; it must be at least 1x1")
    if any(side < patch or side % patch for side, patch in zip(img_size, patch_size)):
        nearest = tuple(max(round(side / patch), 1) * patch for side, patch in zip(img_size, patch_size))
        raise SettingsError(f"img_size {img_size[0]}x{img_size[1]} is not divisible by patch_size "
                            f"{patch_size[0]}x{patch_size[1]}; the nearest that is: img_size={nearest}")


def _classifier(embed_dim: int, num_classes: int) -> nn.Module:
    if num_classes < 0:
        raise SettingsError(f"num_classes is {num_classes}; it must be positive, or 0 for no head")
    return _init_linear(nn.Linear(embed_dim, num_classes)) if num_classes else nn.Identity()


def _init_linear(module: nn.Linear) -> nn.Linear:
    trunc_normal_(module.weight, std=INIT_STD)
    nn.init.zeros_(module.bias)
    return module


_CFG = dict(
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
})


def _create(variant: str, pretrained: bool, **kwargs) -> VisionRetention:
    if pretrained:
        cfg = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
        if not (cfg.has_weights or cfg.state_dict):
            raise SettingsError(
                f"no pretrained weights of {variant} have been released; use pretrained=False, or load a file of your "
                f"own with vir.models.load(path) or timm.create_model({variant!r}, checkpoint_path=path)"
            )
    feature_cfg = dict(out_indices=kwargs.pop("out_indices", 3), feature_cls="getter")
    return build_model_with_cfg(VisionRetention, variant, pretrained, feature_cfg=feature_cfg, **kwargs)


@register_model
def vir_tiny_patch16_224(pretrained: bool = False, **kwargs) -> VisionRetention:
    """ViR-Ti/16, 5.7 M parameters."""
    return _create("vir_tiny_patch16_224", pretrained, **dict(embed_dim=192, depth=12, num_heads=3) | kwargs)


@register_model
def vir_small_patch16_224(pretrained: bool = False, **kwargs) -> VisionRetention:
    """ViR-S/16, 22.1 M parameters."""
    return _create("vir_small_patch16_224", pretrained, **dict(embed_dim=384, depth=12, num_heads=6) | kwargs)


@register_model
def vir_base_patch16_224(pretrained: bool = False, **kwargs) -> VisionRetention:
    """ViR-B/16, 86.6 M parameters."""
    return _create("vir_base_patch16_224", pretrained, **dict(embed_dim=768, depth=12, num_heads=12) | kwargs)


@register_model
def vir_large_patch16_224(pretrained: bool = False, **kwargs) -> VisionRetention:
    """ViR-L/16, 304.4 M parameters."""
    return _create("vir_large_patch16_224", pretrained, **dict(embed_dim=1024, depth=24, num_heads=16) | kwargs)


@register_model
def vir_large_patch14_224(pretrained: bool = False, **kwargs) -> VisionRetention:
    """ViR-L/14, 304.3 M parameters."""
    large = dict(patch_size=14, embed_dim=1024, depth=24, num_heads=16)
    return _create("vir_large_patch14_224", pretrained, **large | kwargs)
