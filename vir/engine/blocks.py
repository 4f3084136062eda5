"""What is done to the repeated blocks of a model before training: gathered at once under ZeRO 3, compiled, or
recomputed in the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.utils import set_z3_leaf_module
from timm.layers import DropPath
from torch import Tensor, nn

from vir.engine.batch_norm import batch_norms
from vir.errors import SettingsError

_GRAPHS = 64  # of one kind of block: first and others, training and evaluation, widths of stages, the last batch


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of a transformer, or of the stages of a convnet: neither these stages nor the layers in a block."""
    return [block for owner in model.modules() if _is_stack(owner) and not any(
        _is_stack(module) for block in owner.children() for module in block.modules()) for block in owner.children()]


def _is_stack(owner: nn.Module) -> bool:
    """Whether these are modules of one class that is a model's own, so neither layers nor lists of them."""
    kinds = {type(child) for child in owner.children()}
    return (isinstance(owner, (nn.Sequential, nn.ModuleList)) and len(owner) > 1 and len(kinds) == 1
            and not kinds.pop().__module__.startswith(("torch.", "timm.layers.")))


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


def recompute(model: nn.Module) -> None:
    """Have every block compute its activations again in the backward pass instead of keeping them.

    Raises:
        SettingsError: a model that cannot, or whose batch norms would count each batch twice.
    """
    kind = type(model).__name__
    if batch_norms(model):
        raise SettingsError(f"activation_checkpointing: {kind} has batch norms, whose running statistics recomputation "
                            "would update twice; take a --deepspeed_config without it")
    try:
        getattr(model, "set_grad_checkpointing")(True)
    except (AttributeError, AssertionError) as error:
        raise SettingsError(f"activation_checkpointing: {kind} does not support it; take a --deepspeed_config without "
                            "it") from error
