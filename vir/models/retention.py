"""Retention of a token sequence in its three forms, as pure functions that give the same numbers.

Dimension key: B batch, H heads, N tokens, K key width, V value width, M chunks, C tokens of a chunk.

out[n] = sum over m <= n of decay^(n - m) * scale * (q[n] . k[m]) v[m], for each head with its own decay in (0, 1).
There is no softmax: with one, no state of fixed size could give the same result (RetNet, arXiv:2307.08621).
vir.models.retention_2d has the same forms for decay over rows and columns.

All forms compute the powers of decay in float32 (float64 for float64 inputs) and keep states in that precision. They
ignore an autocast around them: the dtypes of the tensors alone decide the precision of a result. float16 is computed in
float32, because sums over tokens exceed its largest number; an output that does becomes that number, 65504, so that a
training step does not meet an infinity that the sum is not (_rounded). bfloat16 is computed in float32 on CPUs that
have no instructions for it.
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

_CPU_MULTIPLIES_BFLOAT16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()

_LARGEST_CARRY, _CARRY_GROUP = 128, 32
"""Chunks that are carried by one matrix, and those of a group where there are more."""

_as_on_gpu = False


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """In the block, retention is computed as on a GPU of Ampere or later, with Triton: for fake tensors on the CPU.

    The fused kernel has fake results for them. flash-linear-attention has none: chunkwise_retention, which keeps much
    the same tensors for the backward pass, takes its place.
    """
    global _as_on_gpu
    before, _as_on_gpu = _as_on_gpu, True
    try:
        yield
    finally:
        _as_on_gpu = before


def counts_as_on_gpu() -> bool:
    """Whether this is in a block of as_on_gpu."""
    return _as_on_gpu


def retention_decay(num_heads: int) -> Tensor:
    """The fixed decay of each head, 31/32 for the first to 511/512 for the last, evenly spaced in log(1 - decay).

    Returns:
        [H], float32 on the CPU. These float32 values are the definition, also for models in other precisions.
    """
    # numpy's float64 gives the same bits on every machine. It does not depend on torch's default dtype or on the tensor
    # constructors that deepspeed.zero.Init patches.
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
        return _rounded(_masked_product(q, k, v, mask), v.dtype)


def recurrent_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    initial_state: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """One token after the other. In inference, the memory it needs besides inputs and outputs does not grow with N.

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
        out = ((q.to(dtype) * _scale(q, scale))[..., None, :] @ state).squeeze(-2)
        return _rounded(out, v.dtype), state


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
    inputs = q, k, v, decay, initial_state, chunk_size, _scale(q, scale)
    if torch._C._are_functorch_transforms_active():
        return _chunkwise_by_autograd(*inputs)
    return _Chunkwise.apply(*inputs)


class _ChunkwiseContext(FunctionCtx):
    """What the forward pass of _Chunkwise leaves for its backward pass."""

    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype, torch.dtype | None]
    """Of q, k, v and the initial state."""
    num_tokens: int
    saved_tensors: tuple[Tensor, ...]


class _Chunkwise(torch.autograd.Function):
    """chunkwise_retention with its gradient written by hand: it reads memory half as often as autograd's would.

    For one chunk, let P = q k^T * mask and let S be the state before the chunk. Then out = P v + (q * q_age) S, and the
    chunk adds (k * k_age)^T v to the state. S is _carry(what each chunk adds) + start_age * initial_state.
    """

    @staticmethod
    def forward(
        ctx: _ChunkwiseContext,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Tensor,
        initial_state: Tensor | None,
        chunk_size: int,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        ctx.num_tokens = q.shape[2]
        ctx.dtypes = q.dtype, k.dtype, v.dtype, None if initial_state is None else initial_state.dtype
        with _own_precision(q):
            last_state, parts = _chunks(q, k, v, decay, initial_state, chunk_size, scale)
            q, k, v, scores, states, _, q_age, *_ = parts
            out = _add_product((q * q_age).to(q.dtype) @ states, scores, v)
        ctx.save_for_backward(*parts)
        return _rounded(_join(out, ctx.num_tokens), ctx.dtypes[2]), last_state

    @staticmethod
    @once_differentiable
    def backward(ctx: _ChunkwiseContext, d_out: Tensor, d_state: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, scores, states, mask, q_age, k_age, start_age, last_fade, *carries = ctx.saved_tensors
        dtype, num_chunks, chunk_size = q.dtype, q.shape[2], q.shape[3]
        with _own_precision(q):
            d_out = _split(d_out, num_chunks, chunk_size, dtype)
            d_scores = (d_out @ v.mT).mul_(mask)
            d_states = ((q * q_age).to(dtype).mT @ d_out).to(d_state.dtype)
            d_states[:, :, -1] += last_fade * d_state
            d_sums = _carry(d_states.flatten(3), carries, reverse=True).view_as(d_states)
            d_sums[:, :, -1] += d_state
            d_sums = d_sums.to(dtype)
            d_initial = (start_age * d_states).sum(2).to(ctx.dtypes[3]) if ctx.dtypes[3] else None
            d_q = _add_product(((d_out @ states.mT) * q_age).to(dtype), d_scores, k)
            d_k = _add_product(((v @ d_sums.mT) * k_age).to(dtype), d_scores.mT, q)
            d_v = _add_product((k * k_age).to(dtype) @ d_sums, scores.mT, d_out)
        d_q, d_k, d_v = (_join(x, ctx.num_tokens).to(dtype) for x, dtype in zip((d_q, d_k, d_v), ctx.dtypes[:3]))
        return d_q, d_k, d_v, None, d_initial, None, None


def _chunkwise_by_autograd(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, initial_state: Tensor | None, chunk_size: int, scale: float
) -> tuple[Tensor, Tensor]:
    """_Chunkwise without its gradient, for the transforms of torch.func: they differentiate and map each operator."""
    num_tokens, dtype = q.shape[2], v.dtype
    with _own_precision(q):
        last_state, parts = _chunks(q, k, v, decay, initial_state, chunk_size, scale)
        q, k, v, scores, states, _, q_age, *_ = parts
        out = (q * q_age).to(q.dtype) @ states + scores @ v
    return _rounded(_join(out, num_tokens), dtype), last_state


def _chunks(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, initial_state: Tensor | None, chunk_size: int, scale: float
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The last state; and q, k and v in chunks, scores [B, H, M, C, C], states [B, H, M, K, V] and _chunk_tables."""
    num_tokens, dtype, state_dtype = q.shape[2], _compute_dtype(v), _state_dtype(v)
    num_chunks = math.ceil(num_tokens / chunk_size)
    chunk_size = math.ceil(num_tokens / num_chunks)  # even chunks: 197 tokens are 4 x 50, not 4 x 64
    tables = _chunk_tables(decay, num_tokens, num_chunks, chunk_size, scale, state_dtype)
    mask, _, k_age, start_age, last_fade, *carries = tables
    q, k, v = (_split(x, num_chunks, chunk_size, dtype) for x in (q, k, v))  # [B, H, M, C, K or V]
    scores = (q @ k.mT).mul_(mask)
    sums = ((k * k_age).to(dtype).mT @ v).to(state_dtype)  # [B, H, M, K, V]
    states = _carry(sums.flatten(3), carries).view_as(sums)
    if initial_state is not None:
        states = torch.addcmul(states, start_age, initial_state.to(state_dtype)[:, :, None])
    last_state = torch.addcmul(sums[:, :, -1], last_fade, states[:, :, -1])
    return last_state, (q, k, v, scores, states.to(dtype), *tables)


def _chunk_tables(
    decay: Tensor, num_tokens: int, num_chunks: int, chunk_size: int, scale: float, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """The powers of decay that _Chunkwise needs; mask and q_age are multiplied by the scale.

    Returns:
        mask [H, 1, C, C], q_age [H, 1, C, 1], k_age [H, M, C, 1], start_age [H, M, 1, 1], last_fade [H, 1, 1] and what
        _carry needs. In a short last chunk only its tokens count, not its padding.
    """
    last_length = num_tokens - (num_chunks - 1) * chunk_size
    powers = _powers(decay, chunk_size + 1, dtype)
    mask = _decay_matrix(decay, chunk_size, dtype)[:, None] * scale
    k_age = powers[:, None, :chunk_size].flip(2).repeat(1, num_chunks, 1)
    k_age[:, -1, :last_length] = powers[:, :last_length].flip(1)
    start_age = _powers(decay, num_chunks, dtype, step=chunk_size)[..., None, None]
    q_age = powers[:, None, 1:, None] * scale
    carries = _carry_matrices(decay, num_chunks, chunk_size, dtype)
    return mask, q_age, k_age[..., None], start_age, powers[:, last_length, None, None], *carries


def _carry_matrices(decay: Tensor, num_chunks: int, chunk_size: int, dtype: torch.dtype) -> list[Tensor]:
    """decay^(chunk_size * (i - 1 - j)) for i > j, else 0: [H, G + 1, G] for each level of _carry."""
    num_groups = 1 if num_chunks <= _LARGEST_CARRY else math.ceil(num_chunks / _CARRY_GROUP)
    size = math.ceil(num_chunks / num_groups)
    matrix = F.pad(_decay_matrix(decay, size, dtype, step=chunk_size), (0, 0, 1, 0))
    return [matrix] if num_groups == 1 else [matrix, *_carry_matrices(decay, num_groups, size * chunk_size, dtype)]


def _carry(sums: Tensor, matrices: list[Tensor], reverse: bool = False) -> Tensor:
    """What earlier chunks (reverse: later ones) add to the state of each chunk, from what each adds: [B, H, M, K * V].

    This is a product with a triangular matrix of M x M. Where M is large, only groups of G chunks are multiplied with
    one, of G x G, and the groups are the chunks of the next level: the cost grows with M * G.
    """
    matrix, *outer = matrices
    carry, total = matrix[:, :-1], matrix[:, -1:]  # [H, G, G], [H, 1, G]
    if reverse:
        carry, total = carry.mT, total.flip(2)
    if not outer:
        return carry @ sums
    num_chunks, size = sums.shape[2], carry.shape[2]
    groups = F.pad(sums, (0, 0, 0, -num_chunks % size)).unflatten(2, (-1, size))  # [B, H, M / G, G, K * V]
    before = _carry((total[:, None] @ groups).squeeze(3), outer, reverse)
    states = (carry[:, None] @ groups).addcmul_(total.flip(2).mT[:, None], before[:, :, :, None])
    return states.flatten(2, 3)[:, :, :num_chunks]


def _split(x: Tensor, num_chunks: int, chunk_size: int, dtype: torch.dtype) -> Tensor:
    """[B, H, N, D] -> [B, H, M, C, D] in dtype, with zeros after the last token."""
    out = x.new_empty(*x.shape[:2], num_chunks * chunk_size, x.shape[3], dtype=dtype)
    out[:, :, :x.shape[2]] = x
    out[:, :, x.shape[2]:] = 0
    return out.unflatten(2, (num_chunks, chunk_size))


def _join(x: Tensor, num_tokens: int) -> Tensor:
    """[B, H, M, C, D] -> [B, H, N, D]."""
    return x.flatten(2, 3)[:, :, :num_tokens]


def _add_product(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """x + a @ b in one pass, for matrices in three batch dimensions; writes over x."""
    return x.flatten(0, 2).baddbmm_(a.flatten(0, 2), b.flatten(0, 2)).view_as(x)


def _powers(decay: Tensor, count: int, dtype: torch.dtype, step: int = 1) -> Tensor:
    """decay^0, decay^step, ..., decay^(step * (count - 1)): [H, count]."""
    # Exponents are integers, because bfloat16 would round 257 to 256.
    return decay.to(dtype)[:, None] ** (step * torch.arange(count, device=decay.device))


def _decay_matrix(decay: Tensor, size: int, dtype: torch.dtype, step: int = 1) -> Tensor:
    """decay^(step * (i - j)) for i >= j, else 0: [H, size, size]."""
    # Row i is a window on decay^(step * (size - 1)), ..., decay^step, 1, 0, ..., 0. Computing or looking up a power for
    # each pair of tokens would take about as long as multiplying the pairs.
    powers = F.pad(_powers(decay, size, dtype, step).flip(1), (0, size - 1))
    return powers.unfold(1, size, 1).flip(1)


def _masked_product(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """((q k^T) * mask) v, [B, H, N, V] in _compute_dtype; the mask [H, N, N] is 0 above its diagonal.

    Each of four blocks of queries is multiplied with the keys up to its own end, which saves 3/8 of the products.
    """
    dtype = _compute_dtype(v)
    q, k, v = (x.to(dtype, memory_format=torch.contiguous_format) for x in (q, k, v))
    outputs, end = [], 0
    for block in q.split(max(math.ceil(q.shape[2] / 4), 80), dim=2):  # below 80 tokens, smaller products cost more
        start, end = end, end + block.shape[2]
        scores = (block @ k[:, :, :end].mT).mul_(mask[:, start:end, :end])  # in place: saves a copy of them
        outputs.append((scores @ v[:, :, :end]).transpose(1, 2))
    return torch.cat(outputs, dim=1).transpose(1, 2)  # in memory [B, N, H, V]: the next layer merges the heads


def _rounded(out: Tensor, dtype: torch.dtype) -> Tensor:
    """An output in dtype. Finite numbers that float16 cannot hold become its largest, -65504 or 65504.

    Infinities and NaN stay: the guard of a run looks for them. The gradient is that of the sum, so that it can bring a
    number back; gradients themselves overflow to infinity in float16, by which the loss scale finds its place.
    """
    rounded = out.to(dtype)
    if dtype == torch.float16:
        largest, out = torch.finfo(dtype).max, out.detach()
        rounded.detach().copy_(torch.where(out.isinf(), out, out.clamp(-largest, largest)))
    return rounded


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def _state_dtype(v: Tensor) -> torch.dtype:
    return torch.promote_types(v.dtype, torch.float32)


def _compute_dtype(v: Tensor) -> torch.dtype:
    """The dtype in which tokens are multiplied."""
    fast = _CPU_MULTIPLIES_BFLOAT16 or v.device.type != "cpu" or counts_as_on_gpu()
    return torch.float32 if v.dtype == torch.float16 or v.dtype == torch.bfloat16 and not fast else v.dtype


def _first_state(k: Tensor, v: Tensor, initial_state: Tensor | None, columns: int | None = None) -> Tensor:
    """initial_state in the precision of states, or zeros: [B, H, K, V], or [B, H, columns, K, V]."""
    if initial_state is None:
        return v.new_zeros(_state_shape(k, v, columns), dtype=_state_dtype(v))
    _check_state(initial_state, k, v, columns)
    return initial_state.to(_state_dtype(v))


def _state_shape(k: Tensor, v: Tensor, columns: int | None) -> tuple[int, ...]:
    return (*k.shape[:2], *([] if columns is None else [columns]), k.shape[-1], v.shape[-1])


def _own_precision(x: Tensor) -> AbstractContextManager[object]:
    """A context that switches autocast off on x's device."""
    if x.device.type == "meta":  # it has none; torch 2.9 cannot compile a function that asks whether a device has
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> None:
    if q.ndim != 4 or q.shape != k.shape or v.ndim != 4 or v.shape[:3] != q.shape[:3] or q.shape[2] < 1:
        raise ValueError(
            f"q, k and v must be [B, H, N, K], [B, H, N, K] and [B, H, N, V] with N >= 1, "
            f"not {list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
        )
    if decay.shape != q.shape[1:2]:
        raise ValueError(f"decay has shape {list(decay.shape)} but q has {q.shape[1]} heads; one decay per head: "
                         f"retention_decay({q.shape[1]})")


def _check_state(state: Tensor, k: Tensor, v: Tensor, columns: int | None = None) -> None:
    expected = _state_shape(k, v, columns)
    if state.shape != expected:
        names = "[B, H, K, V]" if columns is None else "[B, H, columns, K, V]"
        raise ValueError(f"state has shape {list(state.shape)}; for these inputs {names} is {list(expected)}")
    if state.device != k.device:
        raise ValueError(f"state is on {state.device} but k is on {k.device}; move it: state.to({str(k.device)!r})")
