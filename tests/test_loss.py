"""The training loss against timm's and PyTorch's, values and gradients."""

import pytest
import torch
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy

from vir.config import TrainConfig
from vir.training.loss import training_loss


@pytest.mark.parametrize("config, expected", [
    (TrainConfig(), SoftTargetCrossEntropy()),
    (TrainConfig(loss="bce"), BinaryCrossEntropy(smoothing=0.0)),
    (TrainConfig(loss="bce", bce_target_thresh=0.3), BinaryCrossEntropy(smoothing=0.0, target_threshold=0.3)),
], ids=["cross_entropy", "bce", "bce_thresh"])
@pytest.mark.parametrize("batch", [1, 7])
def test_the_loss_is_timms(config, expected, batch):
    torch.manual_seed(0)
    targets = torch.randn(batch, 5).mul(2).softmax(1)
    ours, theirs = (torch.linspace(-3, 3, batch * 5).view(batch, 5).requires_grad_() for _ in range(2))
    found, wanted = training_loss(ours, targets, config), expected(theirs, targets)
    assert torch.allclose(found, wanted, rtol=1e-6)
    found.backward(), wanted.backward()
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-7)


def test_low_precision_logits_are_summed_in_float32():
    logits = torch.randn(4, 1000).bfloat16()
    targets = torch.full((4, 1000), 1e-3)
    assert training_loss(logits, targets, TrainConfig()).dtype == torch.float32
