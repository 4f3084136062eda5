"""What is done to the repeated blocks of a model before training: compiled, or recomputed in the backward pass."""

from __future__ import annotations

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


def compile_blocks(model: nn.Module, zero_stage: int) -> None:
    """Compile the forward of each repeated block (regional compilation): one graph serves all blocks of a kind.

    Under ZeRO 3 a block's weights are then gathered at once, before its graph: hooks within would cut it to pieces.
    """
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, _GRAPHS)  # beyond it torch warns and runs without a graph
    for block in repeated_blocks(model):
        if zero_stage == 3:
            set_z3_leaf_module(block, True)
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
