"""The block that a ViR repeats: multi-head retention and an MLP, each behind a layer norm.

Dimension key: B batch, N tokens, D width, H heads, K = D / H key and value width.
"""

from typing import get_args

from timm.layers import DropPath, LayerScale, Mlp
from torch import Tensor, nn

from vir.config import RetentionMode
from vir.errors import SettingsError
from vir.models.retention import chunkwise_retention, parallel_retention, recurrent_retention, retention_decay

RETENTION_MODES: tuple[str, ...] = get_args(RetentionMode)

NORM_EPS = 1e-6


class Retention(nn.Module):
    """Multi-head retention [B, N, D] -> [B, N, D]. The mode chooses how the result is computed, not which.

    `auto` is parallel for up to AUTO_PARALLEL_TOKENS tokens and chunkwise beyond.
    """

    # Forward and backward on one CPU core, batch 8, 6 heads of 64, parallel against chunks of 64: 37 and 43 ms at
    # 197 tokens, 70 and 50 ms at 257; batch 4 at 577 tokens: 163 and 47 ms.
    AUTO_PARALLEL_TOKENS = 256

    decay: Tensor

    def __init__(self, dim: int, num_heads: int, proj_drop: float = 0.0) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise SettingsError(f"embed_dim {dim} is not divisible by num_heads {num_heads}; "
                                f"64 channels per head are usual: num_heads={max(dim // 64, 1)}")
        self.num_heads = num_heads
        self.mode = "auto"
        self.chunk_size = 64
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out_proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.register_buffer("decay", retention_decay(num_heads), persistent=False)

    def _apply(self, fn, recurse=True):
        # .bfloat16() and .half() would round 511/512 to 1, and to_empty() leaves noise: put the exact values back.
        super()._apply(fn, recurse)
        self.decay = retention_decay(self.num_heads).to(self.decay.device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, H, N, K]
        out = self._retain(q, k, v).transpose(1, 2).flatten(2)
        return self.proj_drop(self.out_proj(out))

    def _retain(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        decay = self.decay.to(q.device)  # a model made under torch.device("meta") or "cuda" keeps its table on CPU
        mode = self.mode
        if mode == "auto":
            mode = "parallel" if q.shape[2] <= self.AUTO_PARALLEL_TOKENS else "chunkwise"
        if mode == "parallel":
            return parallel_retention(q, k, v, decay)
        if mode == "chunkwise":
            return chunkwise_retention(q, k, v, decay, self.chunk_size)[0]
        return recurrent_retention(q, k, v, decay)[0]

    def set_mode(self, mode: str, chunk_size: int | None = None) -> None:
        """Choose one of RETENTION_MODES, and the chunk size of `chunkwise` and `auto` (unchanged when None)."""
        if mode not in RETENTION_MODES:
            raise SettingsError(f"unknown retention mode {mode!r}; choose one of {', '.join(RETENTION_MODES)}")
        if chunk_size is not None and chunk_size < 1:
            raise SettingsError(f"chunk_size is {chunk_size}; it must be at least 1 (64 is a good start)")
        self.mode = mode
        self.chunk_size = self.chunk_size if chunk_size is None else chunk_size

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, mode={self.mode}, chunk_size={self.chunk_size}"


class Block(nn.Module):
    """x + retention(norm(x)), then x + mlp(norm(x)), [B, N, D]; each branch with layer scale and stochastic depth.

    init_values is where the layer scale starts; None leaves it out.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        init_values: float | None = None,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.retention = Retention(dim, num_heads, proj_drop)
        self.ls1 = nn.Identity() if init_values is None else LayerScale(dim, init_values)
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop)
        self.ls2 = nn.Identity() if init_values is None else LayerScale(dim, init_values)
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.retention(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
