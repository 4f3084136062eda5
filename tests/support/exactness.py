"""How tests of retention compare: values and gradients, as the largest error over the largest number."""

import torch

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
"""The project's promise (DESIGN): rounding of a few hundred sums, far below what bfloat16 training could see."""


def value_and_gradients(function, tensors):
    """function(*tensors), and the gradients of one weighted sum of it."""
    out = function(*tensors)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).bfloat16()  # exact in all precisions
    return [out, *torch.autograd.grad((out.double() * weight.double().to(out.device)).sum(), tensors)]


def assert_close(found, expected, tolerance):
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        error = (a.double() - b.double()).abs().max() / b.double().abs().max()
        assert error <= tolerance, f"relative error {error:.1e}"
