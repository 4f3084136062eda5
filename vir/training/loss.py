"""The training loss."""

from __future__ import annotations

from torch import Tensor


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over the batch of -sum(target * log softmax(logit)), in float32. logits, targets: [B, K]."""
    return -(targets * logits.float().log_softmax(dim=-1)).sum(dim=-1).mean()
