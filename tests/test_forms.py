"""Which form a mode runs, and with which chunks."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import vir.models.forms
from vir.models import retain, retention_decay
from vir.models.forms import chunk_rows, taken
from vir.models.retention import as_on_gpu

torch.set_num_threads(1)


@pytest.fixture
def called(monkeypatch):
    """The names of forms in the order of their calls, with the size of chunks."""
    calls = []
    for name in ("parallel", "chunkwise", "recurrent", "parallel_2d", "chunkwise_2d", "recurrent_2d"):
        attribute = name.replace("_2d", "") + "_retention" + name[len(name.replace("_2d", "")):]
        function = getattr(vir.models.forms, attribute)

        def record(*args, name=name, function=function):
            calls.append((name, *(x for x in args if isinstance(x, int))))
            return function(*args)

        monkeypatch.setattr(vir.models.forms, attribute, record)
    return calls


@pytest.mark.parametrize("mode, tokens, grid, expected", [
    ("parallel", 300, None, ("parallel",)),
    ("chunkwise", 9, None, ("chunkwise", 17)),
    ("recurrent", 9, None, ("recurrent",)),
    ("auto", 144, None, ("parallel",)),
    ("auto", 145, None, ("chunkwise", 64)),
    ("auto", 12_001, None, ("chunkwise", 128)),
    ("parallel", 145, (12, 12), ("parallel_2d",)),
    ("chunkwise", 145, (18, 8), ("chunkwise_2d", 2)),
    ("chunkwise", 145, (6, 24), ("chunkwise_2d", 1)),
    ("recurrent", 13, (3, 4), ("recurrent_2d",)),
    ("auto", 600, (20, 30), ("parallel_2d",)),
    ("auto", 626, (25, 25), ("chunkwise_2d", 10)),
])
def test_a_mode_runs_its_form(mode, tokens, grid, expected, called):
    x = torch.randn(1, 1, tokens, 4)
    retain(x, x, x, retention_decay(1), grid, mode, chunk_size=17)
    assert called == [expected]


@pytest.mark.parametrize("tokens, grid", [(144, None), (145, None), (577, (24, 24)), (677, (26, 26))])
def test_auto_gives_the_result_of_the_other_modes(tokens, grid):
    q, k, v = torch.randn(3, 2, 3, tokens, 8, dtype=torch.float64)
    auto, parallel = (retain(q, k, v, retention_decay(3), grid, mode) for mode in ("auto", "parallel"))
    assert (auto - parallel).abs().max() < 1e-10 * parallel.abs().max()


def test_chunks_of_rows_hold_at_least_one_row():
    assert [chunk_rows(64, (5, columns)) for columns in (1, 8, 33, 64, 65, 500)] == [64, 8, 1, 1, 1, 1]


@pytest.mark.parametrize("tokens, width, two_dimensional, half, on_gpu, expected", [
    (197, 64, False, True, True, ("fused", 197)), (2048, 64, False, True, True, ("fused", 2048)),
    (2049, 64, False, True, True, ("fla", 64)), (9217, 64, True, True, True, ("fused", 9217)),
    (197, 256, False, True, True, ("fla", 64)), (197, 264, False, True, True, ("chunkwise", 64)),
    (197, 64, False, False, True, ("chunkwise", 64)), (197, 64, False, True, False, ("chunkwise", 64)),
    (145, 256, True, True, True, ("parallel", 145)), (601, 256, True, True, True, ("chunkwise", 256)),
])
def test_the_form_that_auto_takes(tokens, width, two_dimensional, half, on_gpu, expected):
    assert taken(tokens, width, two_dimensional, half, on_gpu) == expected


@pytest.mark.parametrize("tokens, width, grid, dtype", [
    (17, 16, None, torch.bfloat16), (17, 16, (4, 4), torch.float16), (2049, 16, None, torch.float16),
    (150, 16, None, torch.float32), (145, 136, (12, 12), torch.bfloat16)])
def test_fake_tensors_take_the_forms_of_a_gpu(tokens, width, grid, dtype, called, monkeypatch):
    fused = vir.models.forms.fused_retention
    monkeypatch.setattr(vir.models.forms, "fused_retention", lambda *args, **more: (
        called.append(("fused",)), fused(*args, **more))[1])
    with FakeTensorMode(), as_on_gpu():
        x = torch.empty(1, 1, tokens, width, dtype=dtype, requires_grad=True)
        retain(x, x, x, torch.ones(1), grid).float().sum().backward()
        assert x.grad.shape == x.shape
    with FakeTensorMode():  # and on the CPU again
        x = torch.empty(1, 1, tokens, width, dtype=dtype)
        retain(x, x, x, torch.ones(1), grid)
    forms = [name.replace("_2d", "") for name, *_ in called]
    assert forms == [taken(tokens, width, grid is not None, dtype != torch.float32, on_gpu)[0] for on_gpu in (
        tokens != 2049, False)]  # float16 is not for fla
