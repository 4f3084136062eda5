"""Retention on GPUs: one fused Triton kernel for short and medium sequences, flash-linear-attention for long ones.

Dimension key: B batch, H heads, N tokens, K key width, V value width; R rows and C columns of patches.

Both give the same results as the functions in vir.models.retention and retention_2d. Those are the definition and are
used where a kernel does not compile. fused_supports and fla_supports say which tensors each kernel supports.

The fused kernel also computes its own gradient. With D the matrix of decays and w the scale, retention is
out = ((q k^T) * D w) v: linear in each of q, k and v, and

    d_q = ((d_out v^T) * D w) k,    d_k = ((v d_out^T) * D^T w) q,    d_v = ((k q^T) * D^T w) d_out

are retentions themselves, the last two backwards in time. So the same operator gives derivatives of any order. One
program computes each sum in a fixed order: no atomics and no scores in memory, in the forward and the backward pass.
"""

from __future__ import annotations  # the kernels' signatures name triton, which may be missing

import importlib.util
import math
import warnings
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from vir.models.retention import (
    _check_shapes,
    _check_state,
    _own_precision,
    _rounded,
    chunkwise_retention,
    counts_as_on_gpu,
)
from vir.models.retention_2d import _check_grid, parallel_retention_2d

try:
    import triton
    import triton.language as tl
except ImportError:  # PyTorch for CPUs or for macOS
    triton = None

FUSED_WIDTHS = range(16, 129, 8)
"""Key and value widths of the fused kernel: with larger ones, the tiles and sums of a program exceed its registers."""

FLA_WIDTHS = range(16, 257, 8)
"""Key and value widths of fla_retention. It refuses odd widths, but only when it computes the gradient."""

_HAS_FLA = triton is not None and importlib.util.find_spec("fla") is not None

_Function = TypeVar("_Function", bound=Callable[..., object])

_broken: set[str] = set()
"""The kernels that have failed in this process and are not tried again."""


def fused_supports(q: Tensor, v: Tensor) -> bool:
    """Whether fused_retention supports q (and a k like it) [B, H, N, K] and v [B, H, N, V].

    torch.func cannot differentiate a custom operator. GPUs before Ampere (8.0) have too little shared memory for it.
    """
    if torch._C._are_functorch_transforms_active():
        return False
    if counts_as_on_gpu():
        return _fits(q, q, v)
    return triton is not None and "fused" not in _broken and _fits(q, q, v) and _on_ampere_or_later(q)


def fla_supports(q: Tensor, v: Tensor) -> bool:
    """Whether fla_retention supports q (and a k like it) [B, H, N, K] and v [B, H, N, V].

    torch.compile and torch.func cannot trace it. It multiplies float32 as TF32. It keeps states in the inputs'
    precision, so those of float16 could exceed the largest number. It counts elements in 32 bits.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    if counts_as_on_gpu() or not _HAS_FLA or "fla" in _broken:
        return False
    precise = q.dtype == torch.bfloat16 or (q.dtype == torch.float32 and _precision(q.dtype) == "tf32")
    fits = q.shape[-1] in FLA_WIDTHS and v.shape[-1] in FLA_WIDTHS and 0 < max(q.numel(), v.numel()) < 2**31
    return precise and q.dtype == v.dtype and fits and _on_ampere_or_later(q)


def fused_retention(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, scale: float | None = None, grid: tuple[int, int] | None = None
) -> Tensor:
    """parallel_retention or parallel_retention_2d computed in tiles, without an N x N matrix in memory.

    Args:
        q, k: [B, H, N, K], with any strides; with a grid, R * C patches in raster order and perhaps the class token.
        v: [B, H, N, V], in the dtype of q and k: bfloat16, float16 or float32; K and V of FUSED_WIDTHS.
        decay: [H], float32, see retention_decay; it gets no gradient.
        scale: Factor on q . k; K^-0.5 when None.
        grid: (R, C) for 2-D decay; None for decay along the sequence.

    Returns:
        [B, H, N, V] in v's dtype, summed in float32. In memory the heads of a token lie together, [B, N, H, V].

    torch.backends.cuda.matmul.fp32_precision sets how float32 is multiplied (allow_tf32 sets it).
    """
    _check_shapes(q, k, v, decay)
    if not _fits(q, k, v):
        raise ValueError(
            f"q, k and v must share one of bfloat16, float16 and float32, with K and V multiples of 8 from 16 to 128; "
            f"not {q.dtype}, {k.dtype} and {v.dtype} with K = {q.shape[-1]} and V = {v.shape[-1]}. "
            f"parallel_retention and chunkwise_retention take any"
        )
    if grid is None:
        grid = 1, q.shape[2]  # a sequence is a picture of one row
    _check_grid(q, grid)
    return _retention(q, k, v, decay, q.shape[-1] ** -0.5 if scale is None else scale, *grid, False, True)


def fla_retention(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, initial_state: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """chunkwise_retention through flash-linear-attention's chunk_simple_gla, for thousands of tokens.

    Args:
        q, k: [B, H, N, K].
        v: [B, H, N, V].
        decay: [H], float32, see retention_decay; it gets no gradient.
        initial_state: [B, H, K, V], the state after the tokens that came before; zero when None.
        scale: Factor on q . k; K^-0.5 when None.

    Returns:
        out [B, H, N, V] in v's dtype, and the state [B, H, K, V], float32, after the last token.
    """
    _check_shapes(q, k, v, decay)
    if initial_state is not None:
        _check_state(initial_state, k, v)
        initial_state = initial_state.float()
    if "fla" not in _broken:
        try:
            from fla.ops.simple_gla import chunk_simple_gla  # takes seconds

            tokens_first = [x.transpose(1, 2) for x in (q, k, v)]  # [B, N, H, K or V]
            out, state = chunk_simple_gla(*tokens_first, g_gamma=decay.log(), scale=scale,
                                          initial_state=initial_state, output_final_state=True)
            return out.transpose(1, 2), state
        except Exception as error:
            _give_up("fla", error)
    return chunkwise_retention(q, k, v, decay, initial_state=initial_state, scale=scale)


def _fits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    known = q.dtype in (torch.bfloat16, torch.float16, torch.float32) and q.dtype == k.dtype == v.dtype
    return known and q.shape[-1] in FUSED_WIDTHS and v.shape[-1] in FUSED_WIDTHS


def _on_ampere_or_later(q: Tensor) -> bool:
    return q.is_cuda and torch.cuda.get_device_properties(q.device).major >= 8  # torch has them: no call to the device


def _precision(dtype: torch.dtype) -> str:
    """How tl.dot multiplies float32 numbers. TF32 holds float16 exactly, and products too large for float16."""
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed or dtype == torch.float16 else "ieee"


def is_out_of_memory(error: Exception) -> bool:
    """Whether a GPU or this machine has no memory left.

    Of GPUs beside PyTorch's allocator its libraries, Triton and CUDA itself say so. The allocator of the CPU raises a
    plain RuntimeError, with one of the last two.
    """
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(words in str(error) for words in (
        "out of memory", "ALLOC_FAILED", "can't allocate memory", "not enough memory"))


def _give_up(name: str, error: Exception) -> None:
    """Warn once. A GPU in an error state stays in it, so PyTorch fails there too and returns no false result."""
    if is_out_of_memory(error):
        raise error
    _broken.add(name)
    warnings.warn(f"the {name} kernel of retention failed and PyTorch's operators take its place in this process, "
                  f"with the same results but slower: {type(error).__name__}: {error}")


@torch.library.custom_op("vir::retention", mutates_args=())
def _retention(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, scale: float, rows: int, columns: int, reverse: bool, saturate: bool
) -> Tensor:
    """Retention on a grid of patches. With reverse, a token sees exactly those tokens that see it without reverse.

    With saturate, outputs are rounded to float16 as in vir.models.retention._rounded; gradients are not.
    """
    out = _empty_output(q, k, v, decay, scale, rows, columns, reverse, saturate)
    if out.numel() and "fused" not in _broken:
        try:
            _launch(q, k, v, out, decay, scale, rows, columns, reverse, saturate)
            return out
        except Exception as error:
            _give_up("fused", error)
    result = _retention_by_pytorch(q, k, v, decay, scale, rows, columns, reverse)
    return out.copy_(_rounded(result, out.dtype) if saturate else result)


@_retention.register_fake
def _empty_output(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, scale: float, rows: int, columns: int, reverse: bool, saturate: bool
) -> Tensor:
    batch, num_heads, num_tokens, width = v.shape
    return v.new_empty(batch, num_tokens, num_heads, width).transpose(1, 2)  # so that merging the heads copies nothing


class _Context(FunctionCtx):
    """What the forward pass leaves for the gradient."""

    options: tuple[float, int, int]
    """scale, rows and columns."""
    reverse: bool
    saved_tensors: tuple[Tensor, ...]


def _save_inputs(
    ctx: _Context, inputs: tuple[Tensor, Tensor, Tensor, Tensor, float, int, int, bool, bool], output: Tensor
) -> None:
    q, k, v, decay, scale, rows, columns, ctx.reverse, _ = inputs
    ctx.options = scale, rows, columns
    ctx.save_for_backward(q, k, v, decay)


def _gradient(ctx: _Context, d_out: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, decay = ctx.saved_tensors
    d_q = _retention(d_out, v, k, decay, *ctx.options, ctx.reverse, False)
    d_k = _retention(v, d_out, q, decay, *ctx.options, not ctx.reverse, False)
    d_v = _retention(k, q, d_out, decay, *ctx.options, not ctx.reverse, False)
    return d_q, d_k, d_v, None, None, None, None, None, None


_retention.register_autograd(_gradient, setup_context=_save_inputs)


def _retention_by_pytorch(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, scale: float, rows: int, columns: int, reverse: bool
) -> Tensor:
    """The same result as the kernel, by PyTorch's operators and in float32."""
    one = q.new_ones(1, q.shape[1], q.shape[2], 1, dtype=torch.float32)
    every_token = torch.eye(q.shape[2], dtype=torch.float32, device=q.device).expand(1, q.shape[1], -1, -1)
    weights = parallel_retention_2d(one, one, every_token, decay, (rows, columns), scale)  # [1, H, N, N]
    with _own_precision(q):
        return ((q.float() @ k.float().mT) * (weights.mT if reverse else weights)) @ v.float()


def _launch(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, decay: Tensor, scale: float, rows: int, columns: int, reverse: bool,
    saturate: bool,
) -> None:
    """Run the kernel; it writes to out."""
    batch, num_heads, num_tokens, width = v.shape
    if triton is None:
        raise ImportError("triton is not installed")

    def programs(meta: dict[str, int]) -> tuple[int]:
        return (triton.cdiv(num_tokens, meta["TILE"]) * num_heads * batch,)

    rates = decay.float().log2()  # not in the kernel: its log2 is too inexact so close to 1
    with torch.cuda.device_of(q):
        _retention_kernel[programs](
            q, k, v, out, rates, q.stride(), k.stride(), v.stride(), out.stride(), num_heads, num_tokens,
            rows * columns, columns, scale, REVERSE=reverse, SATURATE=saturate and out.dtype == torch.float16,
            **_constants(q.shape[-1], width, q.dtype, _precision(q.dtype)))


def _constants(key: int, value: int, dtype: torch.dtype, precision: str) -> dict[str, int | str]:
    """The constants that are compiled into the kernel.

    Exact products of float32 need more registers, wide tiles of float32 more shared memory than the 99 KiB of sm_89;
    with small ones Hopper multiplies TF32 without wgmma. `auto` takes this kernel in half precision only.
    """
    tile = 32 if dtype == torch.float32 and (precision == "ieee" or max(key, value) > 64) else 64
    padded = {"KEY_BLOCK": triton.next_power_of_2(key), "VALUE_BLOCK": triton.next_power_of_2(value)}
    return {"KEY": key, "VALUE": value, "PRECISION": precision, "TILE": tile, **padded}


def _jit(function: _Function) -> _Function:
    return function if triton is None else triton.jit(function)


def _tuned(kernel: Callable[..., None]) -> triton.runtime.KernelInterface:
    """Time a few schedules for each number of tokens, whatever the batch.

    All use the same tiles, so the order of a sum does not depend on the choice.
    """
    if triton is None:
        return kernel
    schedules = [triton.Config({}, num_warps=warps, num_stages=stages) for warps, stages in ((8, 2), (4, 2), (4, 3))]
    key = ["num_tokens", "KEY", "VALUE", "REVERSE", "PRECISION"]
    return triton.autotune(schedules, key, do_bench=_time)(kernel)


def _time(run: Callable[[], object], quantiles: tuple[float, ...]) -> list[float]:
    """Milliseconds of a schedule; infinity for all, so that the first is used, where the GPU has no room to time them.

    The first spills no registers on the GPUs that tests/test_kernels.py compiles for. The timer's buffer, which empties
    the cache between runs, takes 256 MB.
    """
    try:
        return triton.testing.do_bench(run, quantiles=quantiles)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return [math.inf] * len(quantiles)


@_tuned
@_jit
def _retention_kernel(
    q: tl.tensor, k: tl.tensor, v: tl.tensor, out: tl.tensor, rates: tl.tensor,
    q_strides: tl.tuple, k_strides: tl.tuple, v_strides: tl.tuple, out_strides: tl.tuple,
    num_heads: tl.tensor, num_tokens: tl.tensor, num_patches: tl.tensor, columns: tl.tensor, scale: tl.tensor,
    KEY: tl.constexpr, VALUE: tl.constexpr, REVERSE: tl.constexpr, SATURATE: tl.constexpr, PRECISION: tl.constexpr,
    TILE: tl.constexpr, KEY_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,
) -> None:
    """A tile of out [TILE, V] of one head of one sample, from all tiles of k and v that it sees.

    rates [H]: log2 of the decays. In raster order a token sees only itself and tokens before it, in 2-D too: tiles
    after the diagonal are skipped.
    """
    num_tiles = tl.cdiv(num_tokens, TILE)
    program = tl.program_id(0).to(tl.int64)
    tile = (program % num_tiles).to(tl.int32)
    head, sample = program // num_tiles % num_heads, program // num_tiles // num_heads
    q += sample * q_strides[0] + head * q_strides[1]
    k += sample * k_strides[0] + head * k_strides[1]
    v += sample * v_strides[0] + head * v_strides[1]
    out += sample * out_strides[0] + head * out_strides[1]
    rate = tl.load(rates + head)

    here = tile * TILE + tl.arange(0, TILE)
    row, column = _place(here, num_patches, columns)
    q_tile = _load(q, q_strides, here, num_tokens, KEY, KEY_BLOCK)
    sums = tl.zeros([TILE, VALUE_BLOCK], tl.float32)
    first, end = (tile, num_tiles) if REVERSE else (0, tile + 1)
    for other in range(first, end):
        there = other * TILE + tl.arange(0, TILE)
        k_tile = _load(k, k_strides, there, num_tokens, KEY, KEY_BLOCK)
        v_tile = _load(v, v_strides, there, num_tokens, VALUE, VALUE_BLOCK)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)  # [TILE, TILE], float32

        other_row, other_column = _place(there, num_patches, columns)
        down, right = row[:, None] - other_row[None, :], column[:, None] - other_column[None, :]
        if REVERSE:
            down, right = -down, -right
        decayed = scores * tl.exp2((down + right).to(tl.float32) * rate)
        scores = tl.where((down >= 0) & (right >= 0), decayed, 0.0)

        if v_tile.dtype == tl.bfloat16:
            scores = scores.to(tl.bfloat16)
        else:
            v_tile = v_tile.to(tl.float32)
        sums = tl.dot(scores, v_tile, sums, input_precision=PRECISION)

    channel = tl.arange(0, VALUE_BLOCK)
    places = out + here[:, None].to(tl.int64) * out_strides[2] + channel[None, :] * out_strides[3]
    inside = (here < num_tokens)[:, None] & (channel < VALUE)[None, :]
    sums *= scale
    if SATURATE:  # as _rounded does for float16: a comparison with NaN is false
        sums = tl.where(tl.abs(sums) < float("inf"), tl.minimum(tl.maximum(sums, -65504.0), 65504.0), sums)
    tl.store(places, sums.to(out.dtype.element_ty), mask=inside)


@_jit
def _place(token: tl.tensor, num_patches: tl.tensor, columns: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Row and column of tokens in raster order; the class token stands below the last column."""
    return token // columns, tl.where(token < num_patches, token % columns, columns - 1)


@_jit
def _load(
    x: tl.tensor,
    strides: tl.tuple,
    token: tl.tensor,
    num_tokens: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """[tokens, BLOCK] of x, zero outside of it."""
    channel = tl.arange(0, BLOCK)
    places = x + token[:, None].to(tl.int64) * strides[2] + channel[None, :] * strides[3]
    return tl.load(places, mask=(token < num_tokens)[:, None] & (channel < WIDTH)[None, :], other=0.0)
