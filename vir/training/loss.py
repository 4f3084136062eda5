"""The training loss: what the targets ask for, and what a teacher does."""

# Dimension key: B batch, K classes.

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, kl_div

from vir.config import DistillConfig, TrainConfig


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


def distillation_loss(logits: Tensor | tuple[Tensor, Tensor], targets: Tensor, taught: Tensor, train: TrainConfig,
                      distill: DistillConfig) -> Tensor:
    """Mean loss of a micro-batch under a teacher, float32: (1 - alpha) * training_loss + alpha * the teacher's part.

    soft: T^2 * KL(softmax(taught / T) || softmax(logits / T)) of each image, as equation 2 of DeiT (arXiv:2012.12877)
    has it and Hinton et al. before. DeiT's code also divides it by the number of classes: with 1000 of them its weight
    would be a thousandth of what alpha says. hard and token: cross-entropy with the class that the teacher would choose
    (equation 3), without smoothing.

    Args:
        logits: [B, K]; of a model whose heads are taught apart a pair: the first by the targets, the second by the
            teacher.
        targets: [B, K].
        taught: [B, K], logits of the teacher.
    """
    own, by_teacher = logits if isinstance(logits, tuple) else (logits, logits)
    if distill.kind == "soft":
        ours, theirs = ((x.float() / distill.temperature).log_softmax(dim=-1) for x in (by_teacher, taught))
        part = distill.temperature**2 * kl_div(ours, theirs, reduction="batchmean", log_target=True)
    else:
        part = cross_entropy(by_teacher.float(), taught.argmax(dim=-1))
    return (1 - distill.alpha) * training_loss(own, targets, train) + distill.alpha * part
