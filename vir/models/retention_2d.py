"""Retention over the rows and columns of an image in its three forms, as pure functions that give the same numbers.

Dimension key: B batch, H heads, N tokens, K key width, V value width, R rows and C columns of patches.

Patch (r, c) sees the patches (r', c') with r' <= r and c' <= c, with weight decay^((r - r') + (c - c')). The weight
depends on distances alone, so a shifted image gives shifted outputs. A class token stands at (R, C - 1) and sees every
patch and itself; no patch sees it. The sum over the rectangle is a scan along each row, then down each column
(ViR, arXiv:2310.19731): H[r, c] = decay H[r, c-1] + k^T v, S[r, c] = decay S[r-1, c] + H[r, c], out = q S.

Precision follows the same rules as in vir.models.retention, which has the helpers of both modules.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from vir.models.retention import (
    _check_shapes,
    _compute_dtype,
    _decay_matrix,
    _first_state,
    _masked_product,
    _own_precision,
    _powers,
    _rounded,
    _scale,
    _state_dtype,
    retention_step,
)


def parallel_retention_2d(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, grid: tuple[int, int], scale: float | None = None
) -> Tensor:
    """All tokens at once, in 2-D; memory grows with N^2.

    Args:
        q, k: [B, H, N, K], N = R * C patches in raster order, or R * C + 1 with the class token last.
        v: [B, H, N, V].
        decay: [H], see retention_decay.
        grid: (R, C).
        scale: Factor on q . k; K^-0.5 when None.

    Returns:
        [B, H, N, V] in v's dtype.
    """
    _check_shapes(q, k, v, decay)
    _check_grid(q, grid)
    with _own_precision(q):
        mask = _decay_matrix_2d(decay, grid, q.shape[2], _state_dtype(v)) * _scale(q, scale)
        return _rounded(_masked_product(q, k, v, mask), v.dtype)


def recurrent_retention_2d(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    grid: tuple[int, int],
    initial_state: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """One row of patches after the other, token by token; in inference it needs the memory of one row of states.

    Args:
        q, k: [B, H, N, K], N = R * C patches in raster order, or R * C + 1 with the class token last.
        v: [B, H, N, V].
        decay: [H], see retention_decay.
        grid: (R, C). An image can come in strips of rows; the class token then comes last, alone, with grid (0, C).
        initial_state: [B, H, C, K, V], the states of the row above; zero when None.
        scale: Factor on q . k; K^-0.5 when None.

    Returns:
        out [B, H, N, V] in v's dtype, and the states [B, H, C, K, V] of the last row of patches.
    """
    _check_shapes(q, k, v, decay)
    _check_grid(q, grid)
    states = list(_first_state(k, v, initial_state, columns=grid[1]).unbind(2))
    dtype = _state_dtype(v)
    outputs: list[Tensor] = []
    along_row: Tensor | int = 0
    with _own_precision(q):
        factor = decay.to(dtype)[:, None, None]
        for n in range(grid[0] * grid[1]):
            column = n % grid[1]
            update = k[:, :, n, :, None].to(dtype) * v[:, :, n, None, :].to(dtype)
            along_row = update + (factor * along_row if column else 0)
            states[column] = factor * states[column] + along_row
            outputs.append(_rounded((q[:, :, n, None].to(dtype) * _scale(q, scale)) @ states[column], v.dtype))
        return _with_class_token(q, k, v, decay, outputs, torch.stack(states, dim=2), scale)


def chunkwise_retention_2d(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    grid: tuple[int, int],
    chunk_rows: int = 4,
    initial_state: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Parallel inside blocks of chunk_rows rows, recurrent between them; any chunk_rows >= 1 gives the same result.

    Args:
        q, k: [B, H, N, K], N = R * C patches in raster order, or R * C + 1 with the class token last.
        v: [B, H, N, V].
        decay: [H], see retention_decay.
        grid: (R, C). An image can come in strips of rows; the class token then comes last, alone, with grid (0, C).
        chunk_rows: Rows of patches in a block; memory grows with (chunk_rows * C)^2.
        initial_state: [B, H, C, K, V], the states of the row above; zero when None.
        scale: Factor on q . k; K^-0.5 when None.

    Returns:
        out [B, H, N, V] in v's dtype, and the states [B, H, C, K, V] of the last row of patches.
    """
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows is {chunk_rows}; it must be at least 1 row of patches")
    _check_shapes(q, k, v, decay)
    _check_grid(q, grid)
    (rows, columns), dtype, state_dtype = grid, _compute_dtype(v), _state_dtype(v)
    num_blocks = math.ceil(rows / chunk_rows)
    chunk_rows = math.ceil(rows / num_blocks) if num_blocks else 1  # even blocks, as in chunkwise_retention
    states = _first_state(k, v, initial_state, columns)
    outputs: list[Tensor] = []
    with _own_precision(q):
        mask = _decay_matrix_2d(decay, (chunk_rows, columns), chunk_rows * columns, state_dtype) * _scale(q, scale)
        powers = _powers(decay, chunk_rows + 1, state_dtype)[:, None, :, None]  # [H, 1, chunk_rows + 1, 1]
        along_row = _decay_matrix(decay, columns, state_dtype)  # [H, C, C]
        for top in range(0, rows, chunk_rows):
            height = min(chunk_rows, rows - top)
            tokens = slice(top * columns, (top + height) * columns)
            q_block, k_block, v_block = (x[:, :, tokens].to(dtype) for x in (q, k, v))
            out = _masked_product(q_block, k_block, v_block, mask[:, :height * columns, :height * columns])
            q_block, k_block, v_block = (
                x.unflatten(2, (height, columns)).transpose(2, 3) for x in (q_block, k_block, v_block)
            )  # [B, H, C, height, K or V]
            if top or initial_state is not None:
                aged_q = q_block * (powers[:, :, 1:height + 1] * _scale(q, scale))  # [B, H, C, height, K]
                from_above = aged_q.to(dtype) @ states.to(dtype)
                out = out + from_above.transpose(2, 3).flatten(2, 3)
            outputs.append(_rounded(out, v.dtype))
            aged_k = k_block * powers[:, :, :height].flip(2)
            sums = (aged_k.to(dtype).mT @ v_block).to(state_dtype)  # [B, H, C, K, V], of each column
            sums = (along_row @ sums.flatten(3)).view_as(sums)
            states = torch.addcmul(sums, powers[:, :, height:height + 1], states)
        return _with_class_token(q, k, v, decay, outputs, states, scale)


def _with_class_token(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, outputs: list[Tensor], states: Tensor, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Join the outputs of patches [B, H, some, V]; where q has one token more, add that of the class token."""
    if sum(out.shape[2] for out in outputs) < q.shape[2]:
        out, _ = retention_step(q[:, :, -1], k[:, :, -1], v[:, :, -1], decay, states[:, :, -1], scale)
        outputs = [*outputs, out[:, :, None]]
    return torch.cat(outputs, dim=2), states


def _decay_matrix_2d(decay: Tensor, grid: tuple[int, int], num_tokens: int, dtype: torch.dtype) -> Tensor:
    """decay^(distance in rows + in columns) where a token sees another, else 0: [H, N, N].

    For the patches, this is the Kronecker product of the decay matrix of the rows and that of the columns.
    """
    (rows, columns), num_patches = grid, grid[0] * grid[1]
    down, right = _decay_matrix(decay, rows + 1, dtype), _decay_matrix(decay, columns, dtype)
    mask = (down[:, :rows, None, :rows, None] * right[:, None, :, None, :]).flatten(3).flatten(1, 2)
    if num_tokens == num_patches:
        return mask
    class_row = (down[:, -1, :-1, None] * right[:, -1, None, :]).flatten(1)  # [H, R * C]
    return torch.cat([F.pad(mask, (0, 1)), F.pad(class_row, (0, 1), value=1.0)[:, None]], dim=1)


def _check_grid(q: Tensor, grid: tuple[int, int]) -> None:
    rows, columns = grid
    num_patches = rows * columns
    if rows < 0 or columns < 1 or q.shape[2] not in (num_patches, num_patches + 1):
        raise ValueError(f"{q.shape[2]} tokens do not fit a grid of {rows} rows and {columns} columns; it takes "
                         f"{num_patches} patches, or {num_patches + 1} tokens with a class token")
