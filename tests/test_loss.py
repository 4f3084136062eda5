"""The training loss against timm's and PyTorch's, and a teacher's against its formula, values and gradients."""

import pytest
import torch
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy

from vir.config import DistillConfig, TrainConfig
from vir.training.loss import distillation_loss, training_loss


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


def by_definition(logits, targets, taught, kind, alpha, temperature):
    """Equations 2 and 3 of DeiT (arXiv:2012.12877) in float64, image by image and class by class."""
    own, by_teacher = (logits, logits) if isinstance(logits, torch.Tensor) else logits
    total = 0
    for z, z_teacher, y, t in zip(own.double(), by_teacher.double(), targets.double(), taught.double()):
        total = total - (1 - alpha) * sum(y[k] * torch.log(z[k].exp() / z.exp().sum()) for k in range(len(y)))
        if kind == "soft":
            p, q = ((x / temperature).exp() / (x / temperature).exp().sum() for x in (t, z_teacher))
            total = total + alpha * temperature**2 * sum(p[k] * torch.log(p[k] / q[k]) for k in range(len(y)))
        else:
            chosen = max(range(len(y)), key=lambda k: float(t[k]))
            total = total - alpha * torch.log(z_teacher[chosen].exp() / z_teacher.exp().sum())
    return total / len(own)


@pytest.mark.parametrize("kind, alpha, temperature, pair", [
    ("soft", 0.5, 1.0, False), ("soft", 0.1, 3.0, False), ("soft", 1.0, 2.0, True), ("hard", 0.5, 1.0, False),
    ("hard", 0.0, 1.0, False), ("token", 0.3, 1.0, True)])
def test_a_teachers_loss_is_that_of_the_paper_also_in_its_gradients(kind, alpha, temperature, pair):
    torch.manual_seed(0)
    targets, taught = torch.randn(7, 5).mul(2).softmax(1), torch.randn(7, 5).mul(3)
    ours, theirs = ([torch.linspace(-3, 3, 35).view(7, 5).roll(n, 0).requires_grad_() for n in range(2)]
                    for _ in range(2))
    settings = DistillConfig(teacher="t", kind=kind, alpha=alpha, temperature=temperature)
    found = distillation_loss(tuple(ours) if pair else ours[0], targets, taught, TrainConfig(), settings)
    wanted = by_definition(theirs if pair else theirs[0], targets, taught, kind, alpha, temperature)
    assert found.dtype == torch.float32 and torch.allclose(found.double(), wanted, rtol=1e-6)
    found.backward(), wanted.backward()
    for one, other in list(zip(ours, theirs))[:1 + pair]:
        assert torch.allclose(one.grad, other.grad, atol=1e-7)


def test_a_teacher_takes_its_share_of_the_loss_that_is_asked_for():
    torch.manual_seed(0)
    logits, targets, taught = torch.randn(3, 5), torch.randn(3, 5).softmax(1), torch.randn(3, 5)
    train = TrainConfig(loss="bce")
    half, none = (distillation_loss(logits, targets, taught, train, DistillConfig(teacher="t", alpha=alpha))
                  for alpha in (0.5, 0.0))
    assert none == training_loss(logits, targets, train)
    assert half == pytest.approx((none + torch.nn.functional.cross_entropy(logits, taught.argmax(1))).item() / 2)
