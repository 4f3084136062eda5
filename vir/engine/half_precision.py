"""How well this machine computes in bf16 or fp16: what a processor or a GPU lacks is emulated without a word."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.nn.functional import linear

from vir.engine import ds_config as ds

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

_CLEARLY = 1.5
"""Times slower from which on it is said. With instructions for it bf16 is faster, without them 10 to 20 times slower;
the share of a model that is no matrix product is the same in both."""
_SECONDS = 0.2
"""Of measuring, at least; rounds of a slow processor take longer."""
_ROUNDS = 3
_TOKENS, _WIDTH = 256, 192  # a layer of a tiny model: 3 ms in float32 on one slow core


@dataclass(frozen=True)
class Speed:
    """Of one linear layer, forward and backward, on one core of this processor."""

    fp32: float
    """Milliseconds."""
    half: float
    """Milliseconds."""

    @property
    def times_slower(self) -> float:
        return self.half / self.fp32

    @property
    def is_slow(self) -> bool:
        return self.times_slower >= _CLEARLY


@cache
def measure(precision: str) -> Speed:
    """The speed of bf16 or fp16 on this processor, once a process. It draws no random numbers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # those of other ranks may keep all cores busy, which tells nothing of the instructions
    try:
        best = {torch.float32: float("inf"), DTYPES[precision]: float("inf")}
        end, rounds = time.perf_counter() + _SECONDS, 0
        while rounds < _ROUNDS or time.perf_counter() < end:
            for dtype in best:  # by turns: other work slows both down
                best[dtype] = min(best[dtype], _milliseconds(dtype))
            rounds += 1
    finally:
        torch.set_num_threads(threads)
    return Speed(fp32=best[torch.float32], half=best[DTYPES[precision]])


def instead_of_emulation(ds_config: dict[str, Any], capability: tuple[int, int]) -> str | None:
    """Name of the shipped JSON for a GPU that emulates the bf16 of this one: in fp16, of its stage; None: it does not.

    Args:
        capability: as torch.cuda.get_device_capability gives it; bf16 came with Ampere, 8.0. DeepSpeed and PyTorch call
            it supported before that, too.
    """
    if ds.precision(ds_config) != "bf16" or capability >= (8, 0):
        return None
    return f"zero{max(1, ds.zero_stage(ds_config))}_fp16"


def _milliseconds(dtype: torch.dtype) -> float:
    tokens = torch.full((_TOKENS, _WIDTH), 0.5, dtype=dtype, requires_grad=True)
    weight = torch.full((4 * _WIDTH, _WIDTH), 0.01, dtype=dtype, requires_grad=True)
    begin = time.perf_counter()
    linear(tokens, weight).sum().backward()
    return 1e3 * (time.perf_counter() - begin)
