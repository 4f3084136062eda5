"""The arithmetic of a process: what torch is told, and that a whole step of ours runs in it."""

import os

import pytest
import torch

from support.tiny_runs import alone, command, train_events
from vir import arithmetic


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """Give torch its own arithmetic back."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    yield
    arithmetic.set_up()


@pytest.mark.parametrize("tf32", [True, False])
def test_matrix_products_and_convolutions_have_one_precision_in_all_words_that_torch_has_for_it(tf32):
    arithmetic.set_up(tf32=not tf32)
    arithmetic.set_up(tf32=tf32)
    backends = torch.backends
    assert (backends.cuda.matmul.fp32_precision == "tf32") is tf32  # which the kernels of retention read
    assert [op.fp32_precision == "tf32" for op in (backends.cudnn.conv, backends.cudnn.rnn)] == [tf32] * 2
    assert (backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32) == (tf32, tf32)  # each raises for a mix
    assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
    assert torch.backends.mkldnn.matmul.fp32_precision != "tf32"  # on CPU products stay exact


def test_deterministic_is_set_before_cublas_looks_and_taken_back():
    arithmetic.set_up(deterministic=True)
    assert torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.benchmark and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    arithmetic.set_up()
    assert not torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.deterministic


def test_a_workspace_that_the_user_has_chosen_stays(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    arithmetic.set_up(deterministic=True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


@pytest.mark.launcher
def test_a_run_uses_nothing_that_has_no_deterministic_form(shards, tmp_path):
    """Dropped patches are scattered and gathered; erasing, mixing and the average are on."""
    done = alone(*command(shards, tmp_path / "run", "zero2_fp32", "--train.deterministic", "--augment.reprob", "0.5",
                          "--model.args", "{patch_size: 7, embed_dim: 64, depth: 2, num_heads: 2, "
                          "patch_drop_rate: 0.3}", steps=3, every=3))
    assert done.returncode == 0 and len(train_events(tmp_path / "run")) == 3, done.stdout[-4000:]


@pytest.mark.gpu
def test_on_a_gpu_tf32_rounds_products_and_convolutions_and_its_absence_rounds_neither():
    generator = torch.Generator("cuda").manual_seed(0)
    a, b = (torch.randn(256, 256, generator=generator, device="cuda") for _ in range(2))
    exact = a.double() @ b.double()
    errors = {}
    for tf32 in (False, True):
        arithmetic.set_up(tf32=tf32)
        product, convolution = a @ b, torch.conv2d(a[None, :, None], b[:, :, None, None])  # the same numbers
        errors[tf32] = [(found.double() - expected).abs().max().item() / exact.abs().max().item()
                        for found, expected in ((product, exact), (convolution[0, :, 0], (b.double() @ a.double())))]
    assert max(errors[False]) < 2e-6, errors
    if torch.cuda.get_device_capability() >= (8, 0):
        assert min(errors[True]) > 2e-5, errors
