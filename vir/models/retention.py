"""Retention of a token sequence in its three forms, as pure functions that give the same numbers.

Dimension key: B batch, H heads, N tokens, K key width, V value width, M chunks, C tokens of a chunk; in 2-D, R rows and
C columns of patches.

out[n] = sum over m <= n of decay^(n - m) * scale * (q[n] . k[m]) v[m], for each head with its own decay in (0, 1).
There is no softmax: with one, no state of fixed size could give the same result (RetNet, arXiv:2307.08621).

In 2-D, patch (r, c) sees the patches (r', c') with r' <= r and c' <= c, with weight decay^((r - r') + (c - c')). That
depends on distances alone, so a shifted image gives shifted outputs. A class token stands at (R, C - 1) and sees every
patch and itself; no patch sees it. The sum over the rectangle is a scan along each row, then down each column
(ViR, arXiv:2310.19731): H[r, c] = decay H[r, c-1] + k^T v, S[r, c] = decay S[r-1, c] + H[r, c], out = q S.

All forms sum with powers of decay taken in float32 (float64 for float64 inputs), carry states in that precision, and
ignore an autocast around them: the precision of a result follows from the tensors alone. float16 is computed in
float32, because sums over tokens outgrow its largest number, and so is bfloat16 on CPUs without instructions for it.
"""

import math
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_CPU_MULTIPLIES_BFLOAT16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def retention_decay(num_heads: int) -> Tensor:
    """The fixed decay of each head, 31/32 for the first to 511/512 for the last, evenly spaced in log(1 - decay).

    Returns:
        [H], float32 on the CPU. These float32 values are the definition, also for models in other precisions.
    """
    # In numpy and float64: bit-equal on every machine, and out of reach of torch's default dtype and of the patched
    # tensor constructors under deepspeed.zero.Init.
    gap = np.exp(np.linspace(math.log(1 / 32), math.log(1 / 512), num_heads))
    return torch.from_numpy((1 - gap).astype(np.float32))


def parallel_retention(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, scale: float | None = None) -> Tensor:
    """All tokens at once; memory grows with N^2.

    Args:
        q, k: [B, H, N, K].
        v: [B, H, N, V].
        decay: [H], see retention_decay.
        scale: Factor on q . k; K^-0.5 when None.

    Returns:
        [B, H, N, V] in v's dtype.
    """
    _check_shapes(q, k, v, decay)
    with _own_precision(q):
        mask = _decay_matrix(decay, q.shape[2], _state_dtype(v)) * _scale(q, scale)
        return _masked_product(q, k, v, mask).to(v.dtype)


def recurrent_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    initial_state: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """One token after the other; in inference, memory beside inputs and outputs does not depend on N.

    Args:
        q, k: [B, H, N, K].
        v: [B, H, N, V].
        decay: [H], see retention_decay.
        initial_state: [B, H, K, V], the state after the tokens that came before; zero when None.
        scale: Factor on q . k; K^-0.5 when None.

    Returns:
        out [B, H, N, V] in v's dtype, and the state [B, H, K, V] after the last token.
    """
    _check_shapes(q, k, v, decay)
    state = _first_state(k, v, initial_state)
    outputs = []
    with _own_precision(q):
        for token in zip(q.unbind(2), k.unbind(2), v.unbind(2)):
            out, state = retention_step(*token, decay, state, scale)
            outputs.append(out)
        return torch.stack(outputs, dim=2), state


def retention_step(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """One token: state <- decay * state + k^T v, out = scale * q state.

    Args:
        q, k: [B, H, K].
        v: [B, H, V].
        decay: [H], see retention_decay.
        state: [B, H, K, V], the sum over the tokens before; zeros to start.
        scale: Factor on q . k; K^-0.5 when None.

    Returns:
        out [B, H, V] in v's dtype, and the new state [B, H, K, V], float32 (float64 for float64 inputs).
    """
    _check_state(state, k, v)
    with _own_precision(q):
        dtype = _state_dtype(v)
        update = k.to(dtype)[..., :, None] * v.to(dtype)[..., None, :]
        state = decay.to(dtype)[:, None, None] * state.to(dtype) + update
        return ((q.to(dtype) * _scale(q, scale))[..., None, :] @ state).squeeze(-2).to(v.dtype), state


def chunkwise_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    chunk_size: int = 64,
    initial_state: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Parallel inside chunks of chunk_size tokens, recurrent between them; memory grows with N * chunk_size.

    Any chunk_size >= 1 gives the same result, also one that does not divide N or exceeds it.

    Args:
        q, k: [B, H, N, K].
        v: [B, H, N, V].
        decay: [H], see retention_decay.
        chunk_size: The most tokens in a chunk; N is divided evenly. About K keeps the states no larger than the inputs.
        initial_state: [B, H, K, V], the state after the tokens that came before; zero when None.
        scale: Factor on q . k; K^-0.5 when None.

    Returns:
        out [B, H, N, V] in v's dtype, and the state [B, H, K, V] after the last token.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; it must be at least 1 (64 is a good start)")
    _check_shapes(q, k, v, decay)
    if initial_state is not None:
        _check_state(initial_state, k, v)
    return _Chunkwise.apply(q, k, v, decay, initial_state, chunk_size, _scale(q, scale))


class _Chunkwise(torch.autograd.Function):
    """chunkwise_retention with its gradient written out, which passes over memory half as often as a recorded one.

    In a chunk, with P = q k^T * mask and S the state before it, out = P v + (q * q_age) S. Its own tokens add up to
    (k * k_age)^T v. S is what carry makes of the sums of all chunks before, and start_age * initial_state.
    """

    @staticmethod
    def forward(ctx, q, k, v, decay, initial_state, chunk_size, scale):
        num_tokens, dtype, state_dtype = q.shape[2], _compute_dtype(v), _state_dtype(v)
        num_chunks = math.ceil(num_tokens / chunk_size)
        chunk_size = math.ceil(num_tokens / num_chunks)  # even chunks: 197 tokens are 4 x 50, not 4 x 64
        ctx.dtypes = q.dtype, k.dtype, v.dtype, None if initial_state is None else initial_state.dtype
        with _own_precision(q):
            tables = _chunk_tables(decay, num_tokens, num_chunks, chunk_size, scale, state_dtype)
            mask, q_age, k_age, carry, start_age, last_fade = tables
            q, k, v = (_split(x, num_chunks, chunk_size, dtype) for x in (q, k, v))  # [B, H, M, C, K or V]
            scores = (q @ k.mT).mul_(mask)
            sums = ((k * k_age).to(dtype).mT @ v).to(state_dtype)  # [B, H, M, K, V]
            states = (carry @ sums.flatten(3)).view_as(sums)
            if initial_state is not None:
                states.addcmul_(start_age, initial_state.to(state_dtype)[:, :, None])
            last_state = torch.addcmul(sums[:, :, -1], last_fade, states[:, :, -1])
            states = states.to(dtype)
            out = _add_product((q * q_age).to(dtype) @ states, scores, v)
        ctx.num_tokens = num_tokens
        ctx.save_for_backward(q, k, v, scores, states, *tables)
        return _join(out, num_tokens, ctx.dtypes[2]), last_state

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out, d_state):
        q, k, v, scores, states, mask, q_age, k_age, carry, start_age, last_fade = ctx.saved_tensors
        dtype, num_chunks, chunk_size = q.dtype, q.shape[2], q.shape[3]
        with _own_precision(q):
            d_out = _split(d_out, num_chunks, chunk_size, dtype)
            d_scores = (d_out @ v.mT).mul_(mask)
            d_states = ((q * q_age).to(dtype).mT @ d_out).to(d_state.dtype)
            d_states[:, :, -1] += last_fade * d_state
            d_sums = (carry.mT @ d_states.flatten(3)).view_as(d_states)
            d_sums[:, :, -1] += d_state
            d_sums = d_sums.to(dtype)
            d_initial = (start_age * d_states).sum(2).to(ctx.dtypes[3]) if ctx.dtypes[3] else None
            d_q = _add_product(((d_out @ states.mT) * q_age).to(dtype), d_scores, k)
            d_k = _add_product(((v @ d_sums.mT) * k_age).to(dtype), d_scores.mT, q)
            d_v = _add_product((k * k_age).to(dtype) @ d_sums, scores.mT, d_out)
        d_q, d_k, d_v = (_join(x, ctx.num_tokens, dtype) for x, dtype in zip((d_q, d_k, d_v), ctx.dtypes))
        return d_q, d_k, d_v, None, d_initial, None, None


def _chunk_tables(
    decay: Tensor, num_tokens: int, num_chunks: int, chunk_size: int, scale: float, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """mask [H, 1, C, C], q_age [H, 1, C, 1], k_age [H, M, C, 1], carry [H, M, M], start_age [H, M, 1, 1] and last_fade
    [H, 1, 1] of _Chunkwise; mask and q_age have the scale in them. The padding of a short last chunk ages no state.
    """
    last_length = num_tokens - (num_chunks - 1) * chunk_size
    powers = _powers(decay, chunk_size + 1, dtype)
    mask = _decay_matrix(decay, chunk_size, dtype)[:, None] * scale
    k_age = powers[:, None, :chunk_size].flip(2).repeat(1, num_chunks, 1)
    k_age[:, -1, :last_length] = powers[:, :last_length].flip(1)
    carry = F.pad(_decay_matrix(decay, num_chunks, dtype, step=chunk_size)[:, :-1], (0, 0, 1, 0))
    start_age = _powers(decay, num_chunks, dtype, step=chunk_size)[..., None, None]
    q_age = powers[:, None, 1:, None] * scale
    return mask, q_age, k_age[..., None], carry, start_age, powers[:, last_length, None, None]


def _split(x: Tensor, num_chunks: int, chunk_size: int, dtype: torch.dtype) -> Tensor:
    """[B, H, N, D] -> [B, H, M, C, D] in dtype, with zeros after the last token."""
    out = x.new_empty(*x.shape[:2], num_chunks * chunk_size, x.shape[3], dtype=dtype)
    out[:, :, :x.shape[2]] = x
    out[:, :, x.shape[2]:] = 0
    return out.unflatten(2, (num_chunks, chunk_size))


def _join(x: Tensor, num_tokens: int, dtype: torch.dtype) -> Tensor:
    """[B, H, M, C, D] -> [B, H, N, D] in dtype."""
    return x.flatten(2, 3)[:, :, :num_tokens].to(dtype)


def _add_product(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """x + a @ b in one pass, for matrices in three batch dimensions; writes over x."""
    return x.flatten(0, 2).baddbmm_(a.flatten(0, 2), b.flatten(0, 2)).view_as(x)


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
        return _masked_product(q, k, v, mask).to(v.dtype)


def recurrent_retention_2d(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    grid: tuple[int, int],
    initial_state: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """One row of patches after the other, token by token; in inference its memory is a row of states.

    Args:
        q, k: [B, H, N, K], N = R * C patches in raster order, or R * C + 1 with the class token last.
        v: [B, H, N, V].
        decay: [H], see retention_decay.
        grid: (R, C). An image can come in strips of rows; after the last, (0, C) and the class token alone.
        initial_state: [B, H, C, K, V], the states of the row above; zero when None.
        scale: Factor on q . k; K^-0.5 when None.

    Returns:
        out [B, H, N, V] in v's dtype, and the states [B, H, C, K, V] of the last row of patches.
    """
    _check_shapes(q, k, v, decay)
    _check_grid(q, grid)
    states = list(_first_state(k, v, initial_state, columns=grid[1]).unbind(2))
    dtype, outputs, along_row = _state_dtype(v), [], 0
    with _own_precision(q):
        factor = decay.to(dtype)[:, None, None]
        for n in range(grid[0] * grid[1]):
            column = n % grid[1]
            update = k[:, :, n, :, None].to(dtype) * v[:, :, n, None, :].to(dtype)
            along_row = update + (factor * along_row if column else 0)
            states[column] = factor * states[column] + along_row
            outputs.append(((q[:, :, n, None].to(dtype) * _scale(q, scale)) @ states[column]).to(v.dtype))
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
        grid: (R, C). An image can come in strips of rows; after the last, (0, C) and the class token alone.
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
    states, outputs = _first_state(k, v, initial_state, columns), []
    with _own_precision(q):
        mask = _decay_matrix_2d(decay, (chunk_rows, columns), chunk_rows * columns, state_dtype) * _scale(q, scale)
        powers = _powers(decay, chunk_rows + 1, state_dtype)[:, None, :, None]  # [H, 1, chunk_rows + 1, 1]
        along_row = _decay_matrix(decay, columns, state_dtype)  # [H, C, C]
        for top in range(0, rows, chunk_rows):
            height = min(chunk_rows, rows - top)
            block = [x[:, :, top * columns:(top + height) * columns].to(dtype) for x in (q, k, v)]
            out = _masked_product(*block, mask[:, :height * columns, :height * columns])
            q_block, k_block, v_block = (x.unflatten(2, (height, columns)).transpose(2, 3) for x in block)
            if top or initial_state is not None:
                aged_q = q_block * (powers[:, :, 1:height + 1] * _scale(q, scale))  # [B, H, C, height, K]
                from_above = aged_q.to(dtype) @ states.to(dtype)
                out = out + from_above.transpose(2, 3).flatten(2, 3)
            outputs.append(out.to(v.dtype))
            aged_k = k_block * powers[:, :, :height].flip(2)
            sums = (aged_k.to(dtype).mT @ v_block).to(state_dtype)  # [B, H, C, K, V], of each column
            sums = (along_row @ sums.flatten(3)).view_as(sums)
            states = torch.addcmul(sums, powers[:, :, height:height + 1], states)
        return _with_class_token(q, k, v, decay, outputs, states, scale)


def _with_class_token(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, outputs: list[Tensor], states: Tensor, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Join the outputs of patches [B, H, some, V] with that of the class token, where q has one token more."""
    if sum(out.shape[2] for out in outputs) < q.shape[2]:
        out, _ = retention_step(q[:, :, -1], k[:, :, -1], v[:, :, -1], decay, states[:, :, -1], scale)
        outputs = [*outputs, out[:, :, None]]
    return torch.cat(outputs, dim=2), states


def _powers(decay: Tensor, count: int, dtype: torch.dtype, step: int = 1) -> Tensor:
    """decay^0, decay^step, ..., decay^(step * (count - 1)): [H, count]."""
    # Exponents are integers: in bfloat16, 257 would already be 256.
    return decay.to(dtype)[:, None] ** (step * torch.arange(count, device=decay.device))


def _decay_matrix(decay: Tensor, size: int, dtype: torch.dtype, step: int = 1) -> Tensor:
    """decay^(step * (i - j)) for i >= j, else 0: [H, size, size]."""
    # Row i is a window on decay^(step * (size - 1)), ..., decay^step, 1, 0, ..., 0. One pow or one look-up for each
    # pair of tokens would take about as long as their products.
    powers = F.pad(_powers(decay, size, dtype, step).flip(1), (0, size - 1))
    return powers.unfold(1, size, 1).flip(1)


def _decay_matrix_2d(decay: Tensor, grid: tuple[int, int], num_tokens: int, dtype: torch.dtype) -> Tensor:
    """decay^(distance in rows + in columns) where a token sees another, else 0: [H, N, N].

    Of the patches this is the Kronecker product of the matrices of rows and of columns.
    """
    (rows, columns), num_patches = grid, grid[0] * grid[1]
    down, right = _decay_matrix(decay, rows + 1, dtype), _decay_matrix(decay, columns, dtype)
    mask = (down[:, :rows, None, :rows, None] * right[:, None, :, None, :]).flatten(3).flatten(1, 2)
    if num_tokens == num_patches:
        return mask
    class_row = (down[:, -1, :-1, None] * right[:, -1, None, :]).flatten(1)  # [H, R * C]
    return torch.cat([F.pad(mask, (0, 1)), F.pad(class_row, (0, 1), value=1.0)[:, None]], dim=1)


def _masked_product(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """((q k^T) * mask) v, [B, H, N, V] in the precision of products; the mask [H, N, N] is 0 above its diagonal.

    Four blocks of queries, each with the keys up to its own end, leave out three eighths of the products.
    """
    dtype = _compute_dtype(v)
    q, k, v = (x.to(dtype, memory_format=torch.contiguous_format) for x in (q, k, v))
    outputs, end = [], 0
    for block in q.split(max(math.ceil(q.shape[2] / 4), 80), dim=2):  # below 80 tokens, smaller products cost more
        start, end = end, end + block.shape[2]
        scores = (block @ k[:, :, :end].mT).mul_(mask[:, start:end, :end])  # in place: they are written once
        outputs.append((scores @ v[:, :, :end]).transpose(1, 2))
    return torch.cat(outputs, dim=1).transpose(1, 2)  # in memory [B, N, H, V]: what follows merges the heads


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def _state_dtype(v: Tensor) -> torch.dtype:
    return torch.promote_types(v.dtype, torch.float32)


def _compute_dtype(v: Tensor) -> torch.dtype:
    """In which tokens are multiplied."""
    slow = v.dtype == torch.bfloat16 and v.device.type == "cpu" and not _CPU_MULTIPLIES_BFLOAT16
    return torch.float32 if slow or v.dtype == torch.float16 else v.dtype


def _first_state(k: Tensor, v: Tensor, initial_state: Tensor | None, columns: int | None = None) -> Tensor:
    """initial_state in the precision of states, or zeros: [B, H, K, V], or [B, H, columns, K, V]."""
    if initial_state is None:
        return v.new_zeros(_state_shape(k, v, columns), dtype=_state_dtype(v))
    _check_state(initial_state, k, v, columns)
    return initial_state.to(_state_dtype(v))


def _state_shape(k: Tensor, v: Tensor, columns: int | None) -> tuple[int, ...]:
    return (*k.shape[:2], *([] if columns is None else [columns]), k.shape[-1], v.shape[-1])


def _own_precision(x: Tensor):
    """A context without autocast on x's device."""
    if torch.amp.is_autocast_available(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> None:
    if q.ndim != 4 or q.shape != k.shape or v.ndim != 4 or v.shape[:3] != q.shape[:3] or q.shape[2] < 1:
        raise ValueError(
            f"q, k and v must be [B, H, N, K], [B, H, N, K] and [B, H, N, V] with N >= 1, "
            f"not {list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
        )
    if decay.shape != q.shape[1:2]:
        raise ValueError(f"decay has shape {list(decay.shape)} but q has {q.shape[1]} heads; one decay per head: "
                         f"retention_decay({q.shape[1]})")


def _check_grid(q: Tensor, grid: tuple[int, int]) -> None:
    rows, columns = grid
    num_patches = rows * columns
    if rows < 0 or columns < 1 or q.shape[2] not in (num_patches, num_patches + 1):
        raise ValueError(f"{q.shape[2]} tokens do not fit a grid of {rows} rows and {columns} columns; it takes "
                         f"{num_patches} patches, or {num_patches + 1} tokens with a class token")


def _check_state(state: Tensor, k: Tensor, v: Tensor, columns: int | None = None) -> None:
    expected = _state_shape(k, v, columns)
    if state.shape != expected:
        names = "[B, H, K, V]" if columns is None else "[B, H, columns, K, V]"
        raise ValueError(f"state has shape {list(state.shape)}; for these inputs {names} is {list(expected)}")
    if state.device != k.device:
        raise ValueError(f"state is on {state.device} but k is on {k.device}; move it: state.to({str(k.device)!r})")
