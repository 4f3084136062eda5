"""Batch norm in low precision against one in float32, and the running statistics over steps, skips and averages."""

import copy

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from support.dispatches import Dispatches
from vir.engine.batch_norm import RunningStatistics, batch_norms, compute_in_float32

torch.set_num_threads(1)
KINDS = {
    "1d": (lambda: nn.BatchNorm1d(5), (7, 5)),
    "2d": (lambda: nn.BatchNorm2d(5), (3, 5, 4, 6)),
    "without weights": (lambda: nn.BatchNorm2d(5, affine=False), (3, 5, 4, 6)),
    "without statistics": (lambda: nn.BatchNorm2d(5, track_running_stats=False), (3, 5, 4, 6)),
    "cumulative": (lambda: nn.BatchNorm2d(5, momentum=None), (3, 5, 4, 6)),
    "with activation": (lambda: BatchNormAct2d(5), (3, 5, 4, 6)),
}


def pair(kind):
    """A norm as DeepSpeed leaves it, parameters in bfloat16 and buffers not, and one in float32 of the same numbers."""
    torch.manual_seed(3)
    norm = KINDS[kind][0]()
    for parameter in norm.parameters():
        parameter.data = torch.randn(5).bfloat16()
    exact = copy.deepcopy(norm).float()
    compute_in_float32(nn.Sequential(norm))
    return norm, exact


def images(kind, seed):
    return torch.randn(KINDS[kind][1], generator=torch.Generator().manual_seed(seed)).bfloat16() * 30 + 100


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_goes_through_the_arithmetic_of_float32(kind, training):
    norm, exact = pair(kind)
    norm.train(training), exact.train(training)
    for seed in range(3):
        low = images(kind, seed).requires_grad_()
        high = low.detach().float().requires_grad_()
        found, expected = norm(low), exact(high)
        assert found.dtype == torch.bfloat16 and torch.equal(found, expected.bfloat16())
        weight = torch.randn_like(expected).bfloat16()
        found.backward(weight)
        expected.backward(weight.float())
        assert torch.equal(low.grad, high.grad.bfloat16())
        for (name, parameter), reference in zip(norm.named_parameters(), exact.parameters(), strict=True):
            assert torch.equal(parameter.grad, reference.grad.bfloat16()), name
            parameter.grad = reference.grad = None
    for (name, buffer), reference in zip(norm.named_buffers(), exact.buffers(), strict=True):
        assert buffer.dtype == reference.dtype and torch.equal(buffer, reference), name


def test_the_numbers_of_this_test_do_differ_in_bfloat16():
    """Else the one above would see nothing."""
    norm, _ = pair("2d")
    plain = nn.BatchNorm2d(5).bfloat16()
    plain.load_state_dict(norm.state_dict())
    x = images("2d", 0)
    norm(x), plain(x)
    assert not torch.equal(norm.running_var, plain.running_var.float())


def test_every_batch_norm_of_a_model_is_found_and_no_other_layer():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Sequential(BatchNormAct2d(4), nn.LayerNorm(4)))
    assert batch_norms(model) == [model[1], model[2][0]]


# ---- running statistics


class Table(nn.Identity):
    """A module with a buffer that a state_dict does not hold."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.ones(2), persistent=False)


@pytest.fixture
def model():
    return nn.Sequential(nn.BatchNorm1d(2, momentum=0.5), Table())


def step(model, statistics, number, applied=True, decay=0.75):
    model(torch.randn(8, 2, generator=torch.Generator().manual_seed(number)) * (number + 1) + number)
    statistics.after_step(applied, decay)


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "running" in name or "num_" in name}


def equal(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_the_average_follows_by_its_decay(model):
    statistics = RunningStatistics(model, averages=True)
    expected = {name: x.clone() for name, x in state(model).items() if x.is_floating_point()}
    assert sorted(statistics.average) == ["0.running_mean", "0.running_var"]  # neither a counter nor a table
    for number in range(3):
        step(model, statistics, number)
        expected = {name: 0.75 * average + 0.25 * state(model)[name] for name, average in expected.items()}
    for name, average in statistics.average.items():
        assert torch.allclose(average, expected[name], rtol=1e-6)  # lerp rounds otherwise
        assert not torch.allclose(average, state(model)[name], rtol=1e-2)


def test_statistics_that_no_batch_has_moved_are_exchanged_with_nobody(model, monkeypatch):
    """As of a linear probe. A mean over three ranks would round."""
    statistics = RunningStatistics(model, averages=True)
    step(model, statistics, 0)
    before, average = state(model), copy.deepcopy(statistics.average)
    for name, answer in {"is_initialized": True, "get_world_size": 3, "all_reduce": None}.items():
        monkeypatch.setattr(torch.distributed, name, lambda *tensors, answer=answer: (
            [tensor.mul_(2) for tensor in tensors], answer)[1])
    model.eval()
    statistics.after_step(True, 0.75)
    assert equal(state(model), before) and equal(statistics.average, average)
    model.train()
    statistics.after_step(True, 0.75)
    assert not equal(state(model), before)


def test_a_skipped_step_takes_its_statistics_back(model):
    statistics = RunningStatistics(model, averages=True)
    step(model, statistics, 0)
    before, average = state(model), copy.deepcopy(statistics.average)
    model(torch.full((8, 2), float("nan")))
    assert not equal(state(model), before)
    statistics.after_step(False, 0.75)
    assert equal(state(model), before) and equal(statistics.average, average)
    step(model, statistics, 1)
    assert int(model[0].num_batches_tracked) == 2


def test_a_first_step_that_is_skipped_leaves_the_beginning(model):
    before = state(model)
    step(model, RunningStatistics(model, averages=True), 0, applied=False)
    assert equal(state(model), before)


def test_showing_the_average_and_back_gives_the_statistics_bit_for_bit(model):
    statistics = RunningStatistics(model, averages=True)
    for number in range(2):
        step(model, statistics, number)
    live, average = state(model), copy.deepcopy(statistics.average)
    for _ in range(2):  # a second call changes nothing
        statistics.show(True)
        assert equal({name: state(model)[name] for name in average}, average)
    for _ in range(2):
        statistics.show(False)
        assert equal(state(model), live) and equal(statistics.average, average)


def test_without_an_average_showing_it_changes_nothing(model):
    statistics = RunningStatistics(model, averages=False)
    step(model, statistics, 0)
    live = state(model)
    statistics.show(True)
    assert equal(state(model), live) and statistics.average == {}


def test_restored_statistics_go_on_as_if_there_had_been_no_stop(model):
    other = copy.deepcopy(model)
    statistics = RunningStatistics(model, averages=True)
    step(model, statistics, 0)
    restored = RunningStatistics(other, averages=True)
    restored.restore(state(model) | {"unknown": torch.ones(1)}, copy.deepcopy(statistics.average))
    assert equal(state(other), state(model)) and equal(restored.average, statistics.average)
    step(other, restored, 5, applied=False)  # back to what was restored, not to the beginning
    assert equal(state(other), state(model))
    step(model, statistics, 1)
    step(other, restored, 1)
    assert equal(state(other), state(model)) and equal(restored.average, statistics.average)


def loop(live, kept, average, applied, decay, world):
    """A step of the bookkeeping buffer by buffer; a rank's statistics are `rank` greater than those of rank 0."""
    for name, buffer in live.items():
        if not applied:
            buffer.copy_(kept[name])
            continue
        if buffer.is_floating_point():
            buffer.copy_((buffer * world + sum(range(world))) / world)
        kept[name].copy_(buffer)
        if name in average:
            average[name].lerp_(buffer, 1 - decay)


@pytest.mark.parametrize("world", [1, 4])
def test_the_bookkeeping_is_that_of_a_loop_over_the_buffers_in_a_few_launches(world, monkeypatch):
    """Other ranks are played by a sum, which is exact for numbers of few bits."""
    model = nn.Sequential(*(nn.Sequential(nn.BatchNorm1d(width), Table()) for width in (1, 3, 64, 2)))
    statistics = RunningStatistics(model, averages=True)
    live, kept = state(model), state(model)
    average = copy.deepcopy(statistics.average)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: world)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda flat: flat.mul_(world).add_(sum(range(world))))
    numbers = torch.Generator().manual_seed(1)
    for applied in (True, False, True, True):
        for name, buffer in model.state_dict().items():
            if name in live:
                buffer.copy_(torch.randint(-64, 64, buffer.shape, generator=numbers))
                live[name].copy_(buffer)
        with Dispatches() as asked:
            statistics.after_step(applied, 0.75)
        assert asked.launches <= (3 if world == 1 else 9) and asked.waits == 0
        loop(live, kept, average, applied, 0.75, world)
        assert equal(state(model), live) and equal(statistics.average, average)


def test_a_model_without_statistics_costs_nothing():
    statistics = RunningStatistics(nn.Sequential(nn.LayerNorm(2), Table()), averages=True)
    statistics.after_step(True, 0.5)
    statistics.after_step(False, 0.5)
    statistics.show(True)
    assert statistics.average == {}
