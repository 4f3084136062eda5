"""The block that a ViR repeats: multi-head retention and an MLP, each behind a layer norm.

Dimension key: B batch, N tokens, D width, H heads, K = D / H key and value width.
"""

from collections.abc import Callable

import torch
from timm.layers import DropPath, LayerScale, Mlp
from torch import Tensor, nn

from vir.errors import SettingsError
from vir.models.forms import RETENTION_MODES, choose, chunk_rows, retain
from vir.models.retention import chunkwise_retention, retention_decay
from vir.models.retention_2d import chunkwise_retention_2d

RETENTION_NORMS = ("none", "layernorm", "layernorm_gelu")

NORM_EPS = 1e-6


class Retention(nn.Module):
    """Multi-head retention [B, N, D] -> [B, N, D]. The mode chooses how the result is computed, not what it is.

    Args:
        dims: 1 for decay along the sequence, 2 for decay over the rows and columns of patches.
        norm: What comes between retention and its output layer: `none` as in the authors' code, `layernorm`, or
            `layernorm_gelu` as in the paper's first version.
    """

    decay: Tensor

    def __init__(self, dim: int, num_heads: int, dims: int = 1, norm: str = "none", proj_drop: float = 0.0) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise SettingsError(f"embed_dim {dim} is not divisible by num_heads {num_heads}; "
                                f"64 channels per head are usual: num_heads={max(dim // 64, 1)}")
        if dims not in (1, 2):
            raise SettingsError(f"retention_dims is {dims!r}; it must be 1 (the sequence) or 2 (rows and columns)")
        if norm not in RETENTION_NORMS:
            raise SettingsError(f"unknown retention_norm {norm!r}; choose one of {', '.join(RETENTION_NORMS)}")
        self.num_heads = num_heads
        self.dims = dims
        self.mode = "auto"
        self.chunk_size = 64
        self.qkv = nn.Linear(dim, 3 * dim)
        self.norm = nn.Identity() if norm == "none" else nn.LayerNorm(dim, eps=NORM_EPS)
        self.act = nn.GELU() if norm == "layernorm_gelu" else nn.Identity()
        self.out_proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.register_buffer("decay", retention_decay(num_heads), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Retention":
        # .bfloat16() and .half() would round 511/512 to 1, and to_empty() leaves random values: restore the exact ones.
        super()._apply(fn, recurse)
        self.decay = retention_decay(self.num_heads).to(self.decay.device)
        return self

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None, kept: Tensor | None = None) -> Tensor:
        """The whole sequence at once.

        Args:
            x: [B, N, D]: patches in raster order, then the class token where there is one.
            grid: Rows and columns of patches; not used where decay is along the sequence.
            kept: [B, patches in x], the positions in the grid, ascending, of the patches that patch dropout kept; None
                for all. With 2-D decay the patches keep their positions; along a sequence they move together.
        """
        q, k, v = self._heads(x)
        return self._merge(self._retain(q, k, v, grid, kept))

    def extend(self, x: Tensor, state: Tensor | None, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The next tokens of a sequence that comes in parts: grid rows of patches, or (0, columns) and the class token.

        Args:
            x: [B, N, D].
            state: The state that the previous call returned; None in the first call.

        Returns:
            [B, N, D], and the state: [B, H, K, K], or [B, H, columns, K, K] with 2-D decay.
        """
        q, k, v = self._heads(x)
        decay = self.decay.to(x.device)
        chunk_size = choose(x.shape[1], self.dims == 2)[1] if self.mode == "auto" else self.chunk_size
        if self.dims == 1:
            out, state = chunkwise_retention(q, k, v, decay, chunk_size, state)
        else:
            out, state = chunkwise_retention_2d(q, k, v, decay, grid, chunk_rows(chunk_size, grid), state)
        return self._merge(out), state

    def computed_by(self, retain: Callable[[Tensor, Tensor, Tensor], Tensor], x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D] with the output [B, H, N, K] that `retain` makes of q, k and v."""
        q, k, v = self._heads(x)
        return self._merge(retain(q, k, v))

    def _heads(self, x: Tensor) -> list[Tensor]:
        """q, k and v, each [B, H, N, K]."""
        return self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()

    def _merge(self, out: Tensor) -> Tensor:
        """[B, H, N, K] -> [B, N, D]."""
        return self.proj_drop(self.out_proj(self.act(self.norm(out.transpose(1, 2).flatten(2)))))

    @torch.jit.ignore  # TorchScript cannot compile the modes and autocast contexts: it calls Python here
    def _retain(
        self, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int] | None, kept: Tensor | None
    ) -> Tensor:
        decay = self.decay.to(q.device)  # a model made under torch.device("meta") or "cuda" keeps decay on the CPU
        if self.dims == 1:
            return retain(q, k, v, decay, None, self.mode, self.chunk_size)
        if grid is None:
            raise ValueError("2-D retention needs the grid, (rows, columns) of patches")
        if kept is None:
            return retain(q, k, v, decay, grid, self.mode, self.chunk_size)
        # A patch with zeros for key and value adds nothing: this is how dropped patches are left out.
        num_patches = grid[0] * grid[1]
        num_tokens = num_patches + q.shape[2] - kept.shape[1]
        class_token = torch.arange(num_patches, num_tokens, device=q.device).expand(q.shape[0], -1)
        places = torch.cat([kept, class_token], dim=1)[:, None, :, None].expand_as(q)
        q, k, v = (y.new_zeros(*y.shape[:2], num_tokens, y.shape[3]).scatter(2, places, y) for y in (q, k, v))
        return retain(q, k, v, decay, grid, self.mode, self.chunk_size).gather(2, places)

    def set_mode(self, mode: str, chunk_size: int | None = None) -> None:
        """Choose one of RETENTION_MODES and the chunk size of `chunkwise`, None: unchanged; `auto` chooses its own."""
        if mode not in RETENTION_MODES:
            raise SettingsError(f"unknown retention mode {mode!r}; choose one of {', '.join(RETENTION_MODES)}")
        if chunk_size is not None and chunk_size < 1:
            raise SettingsError(f"chunk_size is {chunk_size}; it must be at least 1 (64 is a good start)")
        self.mode = mode
        self.chunk_size = self.chunk_size if chunk_size is None else chunk_size

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, dims={self.dims}, mode={self.mode}, chunk_size={self.chunk_size}"


class Block(nn.Module):
    """x + retention(norm(x)), then x + mlp(norm(x)), [B, N, D]; each branch with layer scale and stochastic depth.

    init_values is the initial value of the layer scale; None leaves the layer scale out.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        retention_dims: int = 1,
        retention_norm: str = "none",
        init_values: float | None = None,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.retention = Retention(dim, num_heads, retention_dims, retention_norm, proj_drop)
        self.ls1 = nn.Identity() if init_values is None else LayerScale(dim, init_values)
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop)
        self.ls2 = nn.Identity() if init_values is None else LayerScale(dim, init_values)
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None, kept: Tensor | None = None) -> Tensor:
        """x: [B, N, D]; grid and kept: see Retention.forward."""
        return self._after_retention(x, self.retention(self.norm1(x), grid, kept))

    def extend(self, x: Tensor, state: Tensor | None, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The next tokens of a sequence that comes in parts; see Retention.extend."""
        out, state = self.retention.extend(self.norm1(x), state, grid)
        return self._after_retention(x, out), state

    def with_retention(self, x: Tensor, retain: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """The block [B, N, D] -> [B, N, D] with another way of computing retention.

        Args:
            retain: From q, k and v, each [B, H, N, K], to the output [B, H, N, K].
        """
        return self._after_retention(x, self.retention.computed_by(retain, self.norm1(x)))

    def _after_retention(self, x: Tensor, out: Tensor) -> Tensor:
        """The block's input and what retention made of it, both [B, N, D], to the block's output."""
        x = x + self.drop_path1(self.ls1(out))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
