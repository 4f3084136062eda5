"""The average of the weights against a plain loop beside torch's AdamW."""

import pytest
import torch

from vir.checkpoints.partitions import EMA
from vir.engine import ema
from vir.engine.ema import decay_at

torch.set_num_threads(1)


def optimizer_of_two_groups():
    torch.manual_seed(0)
    first, second = torch.nn.Parameter(torch.randn(3, 2)), torch.nn.Parameter(torch.randn(4))
    return torch.optim.AdamW([{"params": [first], "weight_decay": 0.1}, {"params": [second], "weight_decay": 0.0}],
                             lr=0.1), (first, second)


def attach(optimizer, decay, warmup):
    """With the decay of the updates that this optimizer has applied, as the engine counts them."""
    def of_update():
        return decay_at(max(int(state["step"]) for state in optimizer.state.values()), decay, warmup)

    ema.attach(optimizer, of_update)


def give_gradients(parameters, step):
    numbers = torch.Generator().manual_seed(step)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=numbers)


def expected_decay(update, decay, warmup):
    return min(decay, (1 + update) / (10 + update)) if warmup else decay


@pytest.mark.parametrize("decay, warmup", [(0.9, False), (0.9, True), (0.3, True), (0.0, False)])
def test_the_average_equals_a_plain_loop(decay, warmup):
    optimizer, parameters = optimizer_of_two_groups()
    expected = [parameter.detach().double() for parameter in parameters]  # from the initial weights
    attach(optimizer, decay, warmup)
    for update in range(1, 21):
        give_gradients(parameters, update)
        optimizer.step()
        d = expected_decay(update, decay, warmup)
        expected = [d * average + (1 - d) * p.detach().double() for average, p in zip(expected, parameters)]
        for parameter, average in zip(parameters, expected):
            found = optimizer.state[parameter][EMA]
            assert found.dtype == torch.float32
            assert (found - average).abs().max() < 1e-6  # float32 against float64, numbers up to 3


def test_the_average_does_not_change_the_training():
    plain, averaged = optimizer_of_two_groups(), optimizer_of_two_groups()
    attach(averaged[0], 0.9, True)
    for optimizer, parameters in (plain, averaged):
        for update in range(5):
            give_gradients(parameters, update)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(plain[1], averaged[1]))
    assert int(averaged[0].state[averaged[1][0]]["step"]) == 5


def test_stepping_one_group_at_a_time_gives_the_same_average():
    """As DeepSpeed does under ZeRO: the groups not in hand are emptied for the call."""
    together, apart = optimizer_of_two_groups(), optimizer_of_two_groups()
    for optimizer, _ in (together, apart):
        attach(optimizer, 0.9, True)
    for update in range(4):
        give_gradients(together[1], update)
        together[0].step()
        optimizer, parameters = apart
        give_gradients(parameters, update)
        groups = optimizer.param_groups
        for group in groups:
            optimizer.param_groups = [group]
            optimizer.step()
        optimizer.param_groups = groups
    for a, b in zip(together[1], apart[1]):
        assert torch.equal(together[0].state[a][EMA], apart[0].state[b][EMA])


def test_a_step_that_is_skipped_leaves_average_and_count_alone():
    optimizer, parameters = optimizer_of_two_groups()
    attach(optimizer, 0.9, True)
    give_gradients(parameters, 0)
    optimizer.step()
    before = optimizer.state[parameters[0]][EMA].clone()
    optimizer.zero_grad()  # a step without gradients
    optimizer.step()
    assert torch.equal(optimizer.state[parameters[0]][EMA], before)
    assert int(optimizer.state[parameters[0]]["step"]) == 1


def test_a_parameter_whose_gradient_comes_later_starts_from_its_initial_weight():
    optimizer, (first, second) = optimizer_of_two_groups()
    initial = second.detach().clone()
    attach(optimizer, 0.5, False)
    give_gradients([first], 0)
    optimizer.step()
    assert EMA in optimizer.state[first] and EMA not in optimizer.state[second]
    give_gradients([first, second], 1)
    optimizer.step()
    assert torch.allclose(optimizer.state[second][EMA], (initial + second.detach()) / 2)


def test_the_average_is_saved_and_restored_with_the_optimizer():
    """3 updates, save, load, 2 updates equal 5 updates."""
    whole, first, second = optimizer_of_two_groups(), optimizer_of_two_groups(), optimizer_of_two_groups()
    for optimizer, _ in (whole, first, second):
        attach(optimizer, 0.9, True)
    for update in range(5):
        give_gradients(whole[1], update)
        whole[0].step()
        if update < 3:
            give_gradients(first[1], update)
            first[0].step()
    second[0].load_state_dict(first[0].state_dict())
    with torch.no_grad():
        for old, new in zip(first[1], second[1]):
            new.copy_(old)
    for update in range(3, 5):
        give_gradients(second[1], update)
        second[0].step()
    for a, b in zip(whole[1], second[1]):
        assert torch.equal(whole[0].state[a][EMA], second[0].state[b][EMA])


def test_low_precision_weights_are_averaged_in_float32():
    parameter = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, weight_decay=0.0)
    attach(optimizer, 0.999, False)
    for _ in range(3):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    found = optimizer.state[parameter][EMA]
    assert found.dtype == torch.float32 and 0.9985 < float(found[0]) < 1  # bfloat16 would still say 1


def test_warm_up_starts_at_two_elevenths_and_ends_at_the_decay():
    assert decay_at(1, 0.9998, True) == 2 / 11 and decay_at(10**6, 0.9998, True) == 0.9998
    assert decay_at(1, 0.9998, False) == 0.9998
