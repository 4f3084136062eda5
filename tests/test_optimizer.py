"""Which parameter is decayed; that none is left out."""

import timm
import torch
from torch import nn

import vir.models  # noqa: F401  registers the models
from vir.training.optimizer import parameter_groups


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
