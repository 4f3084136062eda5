"""Batch norm under DeepSpeed: float32 arithmetic, running statistics of all ranks, their average beside the EMA.

DeepSpeed casts a model's parameters but not its buffers, reduces gradients but not buffers, and saves rank 0's.
"""

# Dimension key: B batch, C channels.

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import batch_norm
from torch.nn.modules.batchnorm import _BatchNorm


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def compute_in_float32(model: nn.Module) -> None:
    """Let batch norms take and give low precision [B, C, ...] but work in float32, like their running statistics."""
    for norm in batch_norms(model):
        setattr(norm, "forward", partial(_forward, norm))


def _forward(norm: _BatchNorm, x: Tensor) -> Tensor:
    if norm.training and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    momentum = norm.momentum if norm.momentum is not None else 1.0 / max(1.0, float(norm.num_batches_tracked or 0))
    weight, bias = (None if p is None else p.float() for p in (norm.weight, norm.bias))
    out = batch_norm(x.float(), norm.running_mean, norm.running_var, weight, bias,
                     norm.training or norm.running_mean is None, momentum, norm.eps).to(x.dtype)
    for then in ("drop", "act"):  # timm's norms that contain their activation
        if hasattr(norm, then):
            out = getattr(norm, then)(out)
    return out


class RunningStatistics:
    """Keeps a model's persistent buffers equal on all ranks and right over skipped steps; averages them for the EMA.

    Each rank normalises by its own micro-batch (no synchronised batch norm); the running statistics are averaged over
    the ranks after each step, so that a checkpoint and an evaluation hold those of the whole global batch.
    """

    def __init__(self, module: nn.Module, averages: bool) -> None:
        self._live = _persistent_buffers(module)
        self._floats = [name for name, buffer in self._live.items() if buffer.is_floating_point()]
        self._owner = {name: module.get_submodule(name.rpartition(".")[0]) for name in self._floats}
        self._kept = {name: buffer.clone() for name, buffer in self._live.items()} if self._floats else {}
        self.average = {name: self._live[name].clone() for name in self._floats} if averages else {}
        self._exchanged = False  # whether statistics and average have changed places

    @torch.no_grad()
    def after_step(self, applied: bool, decay: float) -> None:
        """Collective. A step that was not applied may have seen numbers that are not finite: its statistics go too."""
        if not self._floats:
            return
        if not applied:
            _copy(self._live, self._kept)
            return
        moving = [name for name in self._floats if self._owner[name].training]
        if not moving:  # a linear probe: a mean over the ranks would round
            return
        floats = [self._live[name] for name in moving]
        if dist.is_initialized() and dist.get_world_size() > 1:
            flat = torch.cat([buffer.reshape(-1).float() for buffer in floats])
            dist.all_reduce(flat)
            flat /= dist.get_world_size()
            means = flat.split([buffer.numel() for buffer in floats])
            torch._foreach_copy_(floats, [mean.view_as(buffer) for mean, buffer in zip(means, floats)])
        _copy(self._kept, self._live)
        if self.average:
            torch._foreach_lerp_([self.average[name] for name in moving], floats, 1 - decay)

    @torch.no_grad()
    def restore(self, live: dict[str, Tensor], average: dict[str, Tensor]) -> None:
        for into, saved in ((self._live, live), (self._kept, live), (self.average, average)):
            for name in into.keys() & saved.keys():
                into[name].copy_(saved[name])

    @torch.no_grad()
    def show(self, averaged: bool) -> None:
        """Let the module compute with the average of the running statistics, or with themselves.

        Calling it again with the same argument changes nothing.
        """
        if averaged == self._exchanged:
            return
        self._exchanged = averaged
        for name, average in self.average.items():
            live = self._live[name].clone()
            self._live[name].copy_(average)
            average.copy_(live)


def _copy(into: dict[str, Tensor], source: dict[str, Tensor]) -> None:
    """In a launch for each type: a list of several would be copied tensor by tensor on a GPU."""
    for dtype in {tensor.dtype for tensor in into.values()}:
        names = [name for name, tensor in into.items() if tensor.dtype == dtype]
        torch._foreach_copy_([into[name] for name in names], [source[name] for name in names])


def _persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Those that belong to a model's state_dict, by name."""
    return {f"{path}.{name}" if path else name: buffer for path, owner in module.named_modules()
            for name, buffer in owner.named_buffers(recurse=False) if name not in owner._non_persistent_buffers_set}
