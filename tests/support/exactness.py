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


def assert_saturates(form, device="cpu"):
    """form(q, k, v) of two heads in float16: outputs of finite sums are finite and have the gradient of the sum.

    Infinity and NaN in the inputs, and gradients too large for float16, still show.
    """
    signs = torch.tensor([1, -1] * 8, device=device, dtype=torch.float16)
    tensors = [torch.full((1, 2, 100, 16), 8.0, device=device, dtype=torch.float16) * x for x in (1, 1, signs)]
    tensors = [x.requires_grad_() for x in tensors]
    out, exact = form(*tensors), form(*(x.float() for x in tensors))
    assert exact.abs().max() > 70_000 and exact.abs().min() < 60_000
    assert_close([out], [exact.clamp(-65504, 65504)], 2**-9)
    d_out = torch.arange(1, 17, device=device) * torch.full_like(exact, 2**-10)
    expected = torch.autograd.grad(exact, tensors, d_out)
    assert_close(torch.autograd.grad(out, tensors, d_out.half(), retain_graph=True), expected, 2**-8)
    assert all(x.isinf().any() for x in torch.autograd.grad(out, tensors, torch.full_like(out, 1000) * signs))
    for bad in (float("nan"), float("inf")):
        for n in range(3):
            changed = [x.detach().clone() for x in tensors]
            changed[n][0, 0, 50, 3] = bad
            assert not form(*changed)[0, 0, 50].isfinite().all()
