"""What is done to the repeated blocks of a model before training: compiled, or recomputed in the backward pass."""

from __future__ import annotations

import torch
from deepspeed.utils import set_z3_leaf_modules
from torch import nn

from vir.engine.batch_norm import batch_norms
from vir.errors import SettingsError


def compile_blocks(model: nn.Module, zero_stage: int) -> None:
    """Compile the forward of each repeated block (regional compilation): one graph serves all blocks of a kind.

    Under ZeRO 3 a block's weights are then gathered at once, before its graph: hooks within would cut it to pieces.
    """
    for owner in model.modules():
        blocks = list(owner.children())
        kinds = {type(block) for block in blocks}
        if isinstance(owner, (nn.Sequential, nn.ModuleList)) and len(kinds) == 1:
            if zero_stage == 3:
                set_z3_leaf_modules(model, list(kinds))
            for block in blocks:
                setattr(block, "forward", torch.compile(block.forward))


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
