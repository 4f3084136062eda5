"""The reference of the authors' operator: what it computes, and that it is ViR in all else."""

import subprocess
import sys

import pytest
import timm
import torch

from support.launchers import ROOT
from vir.benchmarks.official import masked_softmax
from vir.models import retention_decay

ARGS = dict(img_size=28, patch_size=4, embed_dim=96, depth=2, num_heads=3, num_classes=10)


def create(name, **args):
    torch.manual_seed(0)
    return timm.create_model(name, **ARGS | args)


@pytest.mark.parametrize("num_tokens", [1, 2, 50])
def test_the_operator_is_the_formula_written_out(num_tokens):
    draw = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, num_tokens, 8, generator=draw, dtype=torch.float64)
    decay = retention_decay(3).double()
    for head in range(3):
        for n in range(num_tokens):
            weights = [torch.exp(q[1, head, n] @ k[1, head, m] / 8 ** 0.5 * (decay[head] ** (n - m) if m <= n else 0))
                       for m in range(num_tokens)]
            expected = sum(weight * v[1, head, m] for m, weight in enumerate(weights)) / sum(weights)
            torch.testing.assert_close(masked_softmax(q, k, v, decay)[1, head, n], expected)


def test_it_has_the_parameters_and_the_first_weights_of_vir_and_another_output():
    official, ours = create("official_tiny_patch16_224"), create("vir_tiny_patch16_224")
    first, second = official.state_dict(), ours.state_dict()
    assert list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)
    images = torch.randn(2, 3, 28, 28)
    assert (official.eval()(images) - ours.eval()(images)).abs().max() > 1e-4


def test_it_is_not_causal_and_all_its_parameters_learn():
    model = create("official_tiny_patch16_224").eval()
    images = torch.randn(2, 3, 28, 28)
    changed = images.clone()
    changed[:, :, -4:, -4:] += 1  # the last patch
    before, after = (model.forward_features(x)[:, 0] for x in (images, changed))
    assert (before - after).abs().max() > 1e-6  # the first token has seen it
    model(images).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_package_alone_does_not_register_it():
    done = subprocess.run([sys.executable, "-c", "import timm, vir.models; print(timm.list_models('official*'))"],
                          cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout == "[]\n", done.stderr
