"""The repeated blocks of a model, and their recomputation in the backward pass."""

from __future__ import annotations

from torch import nn

from vir.engine.batch_norm import batch_norms
from vir.errors import SettingsError


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of a transformer, or of the stages of a convnet: neither these stages nor the layers in a block."""
    return [block for owner in model.modules() if _is_stack(owner) and not any(
        _is_stack(module) for block in owner.children() for module in block.modules()) for block in owner.children()]


def _is_stack(owner: nn.Module) -> bool:
    """Whether these are modules of one class that is a model's own, so neither layers nor lists of them."""
    kinds = {type(child) for child in owner.children()}
    return (isinstance(owner, (nn.Sequential, nn.ModuleList)) and len(owner) > 1 and len(kinds) == 1
            and not kinds.pop().__module__.startswith(("torch.", "timm.layers.")))


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
