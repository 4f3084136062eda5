"""Which form of retention computes a result: parallel, chunkwise, recurrent, or the fastest one (auto).

On CUDA, auto uses the kernels of vir.models.kernels for the tensors that they support.

Dimension key: B batch, H heads, N tokens, K key and value width.
"""

from typing import get_args

import torch
from torch import Tensor

from vir.config import RetentionMode
from vir.models.kernels import (
    FLA_WIDTHS,
    FUSED_WIDTHS,
    fla_retention,
    fla_supports,
    fused_retention,
    fused_supports,
)
from vir.models.retention import chunkwise_retention, parallel_retention, recurrent_retention
from vir.models.retention_2d import chunkwise_retention_2d, parallel_retention_2d, recurrent_retention_2d

RETENTION_MODES: tuple[str, ...] = get_args(RetentionMode)

# Where `auto` changes form, measured with tools/benchmark_model.py (docs/benchmarks.md has the tables).
AUTO_PARALLEL_TOKENS = 144
AUTO_CHUNK_SIZE, AUTO_LONG_CHUNK_SIZE, AUTO_LONG_TOKENS = 64, 128, 12_000
AUTO_PARALLEL_TOKENS_2D = 600  # more than in 1-D: a state for each column costs more than one state for all tokens
AUTO_CHUNK_SIZE_2D = 256
FLA_CHUNK_SIZE = 64  # its own choice for sequences of more than 64 tokens
AUTO_FUSED_TOKENS = 2048  # on CUDA, not measured yet; fla's tables have it behind fused attention up to about 1,000


def retain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    grid: tuple[int, int] | None = None,
    mode: str = "auto",
    chunk_size: int = 64,
) -> Tensor:
    """Retention of a whole sequence.

    Args:
        q, k, v: [B, H, N, K].
        decay: [H], see retention_decay.
        grid: (rows, columns) of patches for 2-D decay; None for decay along the sequence.
        mode: One of RETENTION_MODES.
        chunk_size: Tokens in a chunk of the chunkwise form; `auto` chooses its own.

    Returns:
        [B, H, N, K].
    """
    if mode == "auto":
        if fused_supports(q, v) and _prefers_fused(q.shape[2], grid is not None, q.dtype != torch.float32):
            return fused_retention(q, k, v, decay, grid=grid)
        if grid is None and fla_supports(q, v):
            return fla_retention(q, k, v, decay)[0]
        mode, chunk_size = choose(q.shape[2], grid is not None)
    if grid is not None:
        if mode == "parallel":
            return parallel_retention_2d(q, k, v, decay, grid)
        if mode == "chunkwise":
            return chunkwise_retention_2d(q, k, v, decay, grid, chunk_rows(chunk_size, grid))[0]
        return recurrent_retention_2d(q, k, v, decay, grid)[0]
    if mode == "parallel":
        return parallel_retention(q, k, v, decay)
    if mode == "chunkwise":
        return chunkwise_retention(q, k, v, decay, chunk_size)[0]
    return recurrent_retention(q, k, v, decay)[0]


def taken(num_tokens: int, head_width: int, two_dimensional: bool, half: bool, on_gpu: bool) -> tuple[str, int]:
    """The form that `auto` takes, "fused", "fla", "parallel" or "chunkwise", and the tokens of its chunks.

    Args:
        half: bfloat16 or float16; they differ in long sequences alone, where float16 is computed "chunkwise".
        on_gpu: on one of Ampere or later, with fla-core installed; without it "fla" is "chunkwise".
    """
    if on_gpu and head_width in FUSED_WIDTHS and _prefers_fused(num_tokens, two_dimensional, half):
        return "fused", num_tokens
    if on_gpu and half and head_width in FLA_WIDTHS and not two_dimensional:
        return "fla", FLA_CHUNK_SIZE
    return choose(num_tokens, two_dimensional)


def _prefers_fused(num_tokens: int, two_dimensional: bool, half: bool) -> bool:
    """Whether it is the fastest form; exact float32 products use no tensor cores: cuBLAS may be faster there."""
    return half and (two_dimensional or num_tokens <= AUTO_FUSED_TOKENS)


def choose(num_tokens: int, two_dimensional: bool) -> tuple[str, int]:
    """The mode and chunk size that `auto` uses where no kernel of vir.models.kernels is used."""
    if num_tokens <= (AUTO_PARALLEL_TOKENS_2D if two_dimensional else AUTO_PARALLEL_TOKENS):
        return "parallel", num_tokens
    if two_dimensional:
        return "chunkwise", AUTO_CHUNK_SIZE_2D
    return "chunkwise", AUTO_CHUNK_SIZE if num_tokens <= AUTO_LONG_TOKENS else AUTO_LONG_CHUNK_SIZE


def chunk_rows(chunk_size: int, grid: tuple[int, int]) -> int:
    """The number of whole rows of patches in chunk_size tokens, at least one."""
    return max(chunk_size // grid[1], 1)
