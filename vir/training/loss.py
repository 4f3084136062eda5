"""The training loss."""

# Dimension key: B batch, K classes.

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from vir.config import TrainConfig


def training_loss(logits: Tensor, targets: Tensor, train: TrainConfig) -> Tensor:
    """Mean loss of a micro-batch in float32. logits, targets: [B, K].

    cross_entropy: -sum over classes of target * log softmax(logit). bce: binary cross-entropy of each class, mean over
    classes and batch (arXiv:2110.00476), after bce_target_thresh.
    """
    if train.loss == "bce":
        if train.bce_target_thresh is not None:
            targets = (targets > train.bce_target_thresh).float()
        return binary_cross_entropy_with_logits(logits.float(), targets)
    return -(targets * logits.float().log_softmax(dim=-1)).sum(dim=-1).mean()
