"""What is done to the repeated blocks of a model before training: gathered at once under ZeRO 3, or compiled."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.utils import set_z3_leaf_module
from timm.layers import DropPath
from torch import Tensor, nn

from vir.engine.stacks import repeated_blocks
from vir.errors import SettingsError

_GRAPHS = 64  # of one kind of block: first and others, training and evaluation, widths of stages, the last batch


def gather_by_block(model: nn.Module) -> None:
    """Have ZeRO 3 gather a repeated block's weights at once, and none of its layers by hooks of their own.

    The hooks of 12 blocks took 65 ms of a step's host time, and take 13 ms so; within a compiled block they would cut
    its graph to pieces. The price is memory for all weights of one block, and for their gradients until its backward
    pass has ended: 3.5 MB each in ViR-S, 25 MB in ViR-L (16-bit).
    """
    for block in repeated_blocks(model):
        set_z3_leaf_module(block, True)
        if any(parameter.requires_grad for parameter in block.parameters()):
            block.register_forward_pre_hook(_with_gradient)


def _with_gradient(block: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Of images, or of what frozen layers made, no gradient is asked: ask it, for it tells when the block's are ready.

    Without it torch tells DeepSpeed that the backward pass of the block has ended before it begins.

    Raises:
        SettingsError: an input in which torch does not look for gradients.
    """
    if not isinstance(inputs[0], Tensor):
        raise SettingsError(f"ZeRO 3: {type(block).__name__} takes a {type(inputs[0]).__name__}, in which no gradients "
                            "are found; take a --deepspeed_config of stage 2, or another --model.name")
    if torch.is_grad_enabled() and not any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
        return (inputs[0].detach().requires_grad_(), *inputs[1:])
    return inputs


def compile_blocks(model: nn.Module) -> None:
    """Compile the forward of each repeated block (regional compilation): one graph serves all blocks of a kind."""
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, _GRAPHS)  # beyond it torch warns and runs without a graph
    for block in repeated_blocks(model):
        for owner in list(block.modules()):
            for name, path in owner.named_children():
                if type(path) is DropPath and 0 < path.drop_prob < 1:
                    setattr(owner, name, _DropPath(path))
        setattr(block, "forward", torch.compile(block.forward))


class _DropPath(nn.Module):
    """timm's DropPath for x [B, ...] with its rate in a buffer: each Python number would make another graph."""

    keep: Tensor

    def __init__(self, path: DropPath) -> None:
        super().__init__()
        self.scale_by_keep = path.scale_by_keep
        self.register_buffer("keep", torch.tensor(1 - path.drop_prob), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        kept = torch.bernoulli(self.keep.expand(x.shape[0], *[1] * (x.ndim - 1)))
        return x * (kept / self.keep if self.scale_by_keep else kept).to(x.dtype)
