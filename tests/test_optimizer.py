"""Which parameter is decayed; that none is left out."""

from types import SimpleNamespace

import pytest
import timm
import torch
from torch import nn

import vir.models  # noqa: F401  registers the models
from vir.config import OptimConfig
from vir.engine import optimizer as optimizers
from vir.engine.optimizer import ELEMENTWISE, build, check_name, copied, set_rates, states_per_number
from vir.errors import SettingsError


def parameter_groups(model, weight_decay, **optim):
    return optimizers.parameter_groups(model, OptimConfig(weight_decay=weight_decay, **optim))


def vir_model():
    return timm.create_model("vir_tiny_patch16_224", img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=1,
                             num_classes=3, init_values=0.1)


def names(groups):
    return {group["name"]: set(group["names"]) for group in groups}


def test_every_trainable_parameter_is_in_one_group_once_under_its_name():
    model = vir_model()
    groups = parameter_groups(model, 0.05)
    grouped = [pair for group in groups for pair in zip(group["names"], group["params"], strict=True)]
    assert len(grouped) == len(list(model.parameters()))
    assert {name: id(parameter) for name, parameter in grouped} == {
        name: id(parameter) for name, parameter in model.named_parameters()}


def test_matrices_are_decayed_and_nothing_else_is():
    """By the kind of module that owns the parameter, not by its shape."""
    model = vir_model()
    expected = {f"{path}.weight" for path, module in model.named_modules()
                if isinstance(module, (nn.Linear, nn.Conv2d))}
    found = names(parameter_groups(model, 0.05))
    assert found["decay"] == expected and len(expected) > 6
    assert {"cls_token", "pos_embed", "norm.bias", "head.bias"} <= found["no_decay"]
    assert any(name.endswith("gamma") for name in found["no_decay"])  # layer scale


def test_the_groups_carry_their_decay():
    decays = {group["name"]: group["weight_decay"] for group in parameter_groups(vir_model(), 0.05)}
    assert decays == {"decay": 0.05, "no_decay": 0.0}


def test_frozen_parameters_and_empty_groups_are_left_out():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    assert names(parameter_groups(model, 0.1)) == {"decay": {"1.weight"}, "no_decay": {"1.bias"}}
    model[1].bias.requires_grad_(False)
    assert names(parameter_groups(model, 0.1)) == {"decay": {"1.weight"}}


def test_a_shared_parameter_is_in_one_group_once():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    (group,) = parameter_groups(model, 0.1)
    assert group["names"] == ["0.weight"] and len(group["params"]) == 1


def test_a_torch_optimizer_takes_the_groups_and_decays_by_them():
    model = nn.Linear(2, 2)
    nn.init.ones_(model.weight), nn.init.ones_(model.bias)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.5), lr=0.1)
    (model(torch.zeros(1, 2)).sum() * 0).backward()  # zero gradients: only the decay acts
    optimizer.step()
    assert torch.allclose(model.weight, torch.tensor(0.95)) and torch.equal(model.bias, torch.ones(2))


@pytest.mark.parametrize("make", [vir_model, lambda: timm.create_model("convnext_atto"),
                                  lambda: timm.create_model("resnet18")], ids=["vir", "convnext", "resnet"])
def test_layer_decay_gives_each_parameter_timms_rate_and_decay(make):
    from timm.optim import param_groups_layer_decay

    model = make()
    excluded = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    expected = {id(parameter): (group["lr_scale"], group["weight_decay"])
                for group in param_groups_layer_decay(model, 0.1, excluded, layer_decay=0.7)
                for parameter in group["params"]}
    found = {id(parameter): (group["lr_scale"], group["weight_decay"])
             for group in parameter_groups(model, 0.1, layer_decay=0.7) for parameter in group["params"]}
    assert found == expected and len({scale for scale, _ in found.values()}) > 2


def test_layer_decay_of_a_model_without_layers_is_refused():
    with pytest.raises(SettingsError, match="layer_decay 0.5: Linear does not say which parameters form a layer"):
        parameter_groups(nn.Linear(2, 2), 0.1, layer_decay=0.5)


def test_rates_of_a_step_keep_the_groups_scale_and_exemption():
    groups = parameter_groups(vir_model(), 0.1, layer_decay=0.5)
    set_rates(groups, lr=2.0, weight_decay=0.3)
    assert {group["lr"] / group["lr_scale"] for group in groups} == {2.0}
    assert {group["weight_decay"] for group in groups if group["decays"]} == {0.3}
    assert {group["weight_decay"] for group in groups if not group["decays"]} == {0.0}


@pytest.mark.parametrize("name", sorted(ELEMENTWISE))
def test_an_elementwise_optimizer_does_not_see_how_its_numbers_are_cut(name):
    """Whole tensors against two flat pieces that cut through them, as ZeRO hands them out."""
    torch.manual_seed(0)
    whole = [nn.Parameter(torch.randn(shape)) for shape in ((4, 6), (5,), (3, 2, 2, 2))]
    flat = torch.cat([parameter.detach().flatten() for parameter in whole])
    pieces = [nn.Parameter(piece.clone()) for piece in flat.split(27)]
    makers = [build([{"params": parameters, "weight_decay": 0.1, "lr_scale": 1.0, "decays": True}],
                    OptimConfig(name=name)) for parameters in (whole, pieces)]
    for step in range(5):
        gradients = [torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + i))
                     for i, p in enumerate(whole)]
        for parameter, gradient in zip(whole, gradients):
            parameter.grad = gradient
        for piece, gradient in zip(pieces, torch.cat([gradient.flatten() for gradient in gradients]).split(27)):
            piece.grad = gradient.clone()
        for optimizer in makers:
            set_rates(optimizer.param_groups, 0.01, 0.1)
            optimizer.step()
    found, expected = (torch.cat([p.detach().flatten() for p in parameters]) for parameters in (pieces, whole))
    assert not torch.equal(expected, flat) and torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("name, stage, said", [
    ("adamww", 0, "timm has no such optimizer; did you mean adamw"), ("qqq", 2, "known are .*adamw"),
    ("lamb", 1, "needs whole tensors, and ZeRO stage 1 hands the optimizer flat pieces.*adamw"),
    ("cadamw", 3, "needs whole tensors"), ("adahessian", 0, "needs gradients of gradients"),
    ("adan", 2, "counts its steps per group"),
])
def test_an_optimizer_that_would_compute_something_else_is_refused(name, stage, said):
    with pytest.raises(SettingsError, match=f"--optim.name {name}:? .*{said}"):
        check_name(name, stage)


def test_what_an_optimizer_refuses_is_told():
    parameter = nn.Parameter(torch.ones(2))
    with pytest.raises(SettingsError, match="--optim.name sgd does not take .*Nesterov momentum requires a momentum"):
        build([{"params": [parameter]}], OptimConfig(name="sgd", momentum=0))


def test_other_optimizers_of_timm_are_taken_without_zero():
    for name in ("lamb", "cadamw", "adamw", "sgd"):
        check_name(name, 0)


@pytest.mark.parametrize("name, numbers", [("adamw", 2), ("sgd", 1), ("lion", 1), ("madgrad", 3)])
def test_the_optimizers_memory_is_counted(name, numbers):
    assert states_per_number(OptimConfig(name=name)) == numbers


@pytest.mark.parametrize("name", ["adafactor", "novograd", "kron", "lamb", "adamw", "nadam"])
def test_restored_state_lies_where_the_weights_are(name):
    """A master on no device at all stands for one on a GPU. The step stays on the CPU, where torch's optimizers want it
    unless they are fused."""
    from vir.engine.engine import Engine

    parameter = nn.Parameter(torch.ones(64, 64))
    before = build([{"params": [parameter]}], OptimConfig(name=name))
    parameter.grad = torch.ones(64, 64)
    before.step()
    kept = before.state[parameter]
    whole = [key for key, value in kept.items() if isinstance(value, torch.Tensor) and value.shape == parameter.shape]
    beside = {key: value for key, value in kept.items() if key not in whole}
    saved = SimpleNamespace(keys=lambda _: whole, scalars=lambda _: beside)
    master = nn.Parameter(torch.ones(64, 64, device="meta"))
    engine = Engine.__new__(Engine)
    engine.has_ema, engine._optimizer = True, build([{"params": [master]}], OptimConfig(name=name))
    engine._begin_state(master, "weight", saved)
    state = engine._optimizer.state[master]
    assert state.keys() == kept.keys() | {"ema"}
    places = {key: {item.device.type for item in (value if isinstance(value, list) else [value])
                    if isinstance(item, torch.Tensor)} for key, value in state.items()}
    for key, found in places.items():
        assert found <= {"cpu" if key == "step" and name != "adamw" else "meta"}, key
    assert {"adafactor": "exp_avg_sq_row", "novograd": "exp_avg_sq", "kron": "Q"}.get(name, "ema") in {
        key for key, found in places.items() if found == {"meta"}}


def test_a_copied_state_is_of_its_own():
    matrices = [torch.ones(2), torch.ones(2)]
    found = copied(matrices, torch.device("cpu"))
    found[0].zero_()
    assert matrices[0].sum() == 2 and copied(3, torch.device("cpu")) == 3
