"""What is done to repeated blocks: the graphs that compilation makes, counted, and its stochastic depth."""

import pytest
import timm
import torch
from timm.layers import DropPath
from torch import nn

import vir.models  # noqa: F401  registers the models
from vir.engine import blocks

torch.set_num_threads(1)
VIT = dict(img_size=16, patch_size=4, embed_dim=24, depth=12, num_heads=2)


def build(name="vir_tiny_patch16_224", **args):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5, **(VIT if name.startswith("vi") else {}) | args)


@pytest.fixture()
def graphs(monkeypatch):
    """The graphs that compilation has made so far, which run operator by operator, as Inductor needs a minute."""
    def keep(graph, _):
        made.append(graph)
        return graph.forward

    made, compile = [], torch.compile
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", lambda function: compile(function, backend=keep))
    yield made
    torch._dynamo.reset()


def names(model):
    """Where its repeated blocks are, without their numbers, and how many."""
    where = {id(module): name for name, module in model.named_modules()}
    found = [where[id(block)].rpartition(".")[0] for block in blocks.repeated_blocks(model)]
    return {name: found.count(name) for name in found}


@pytest.mark.parametrize("name, expected", {
    "vir_small_patch16_224": {"blocks": 12}, "vir2d_small_patch16_224": {"blocks": 12},
    "convnext_tiny": {"stages.0.blocks": 3, "stages.1.blocks": 3, "stages.2.blocks": 9, "stages.3.blocks": 3},
    "coatnet_0_224": {"stages.0.blocks": 2, "stages.1.blocks": 3, "stages.2.blocks": 5, "stages.3.blocks": 2},
    "resnet26d": {"layer1": 2, "layer2": 2, "layer3": 2, "layer4": 2},
    "vit_small_patch16_18x2_224": {"blocks": 18},  # each holds two lists of layers
    "cait_xxs24_224": {"blocks": 24, "blocks_token_only": 2},
}.items())
def test_the_repeated_blocks_of_a_model_are_neither_its_stages_nor_its_layers(name, expected):
    with torch.device("meta"):
        assert names(timm.create_model(name)) == expected


@pytest.mark.parametrize("name", ["vir_tiny_patch16_224", "vit_small_patch16_224"])
def test_twelve_blocks_of_other_drop_paths_share_their_graphs(name, graphs):
    """The first, without drop path, has its own; each has one for training, for evaluation, and for its last batch."""
    model, x = build(name, drop_path_rate=0.1), torch.randn(6, 3, 16, 16)
    keys, expected = list(model.state_dict()), model.eval()(x)
    blocks.compile_blocks(model, zero_stage=2)
    assert list(model.state_dict()) == keys
    counted = []
    for training, size in ((True, 6), (False, 6), (False, 4), (False, 3), (True, 6)):
        with torch.set_grad_enabled(training):
            found = model.train(training)(x[:size])
        assert training or (found - expected[:size]).abs().max() < 1e-5
        counted.append(len(graphs))
    assert counted == [2, 4, 6, 6, 6]
    assert torch._dynamo.utils.counters["frames"] == {"total": 6, "ok": 6}  # none was given up
    assert not torch._dynamo.utils.counters["graph_break"]


class Layer(nn.Linear):
    """A block."""


def test_blocks_of_many_widths_stay_below_the_limit_of_graphs(graphs):
    """Dynamo's own is 8 for a class."""
    model = nn.ModuleList(nn.ModuleList([Layer(width, width), Layer(width, width)]) for width in range(2, 12))
    blocks.compile_blocks(model, zero_stage=2)
    for stack in model:
        for block in stack:
            block(torch.ones(1, block.in_features))
    assert len(graphs) == 10 and torch._dynamo.utils.counters["frames"] == {"total": 10, "ok": 10}


class Paths(nn.Sequential):
    """A block of the rates in the list, and none of them in a layer of its own."""


def compiled_path(rate, scale_by_keep=True):
    """A DropPath as compile_blocks leaves it, run without a graph."""
    model = nn.ModuleList([Paths(DropPath(rate, scale_by_keep)), Paths(DropPath(rate))])
    blocks.compile_blocks(model, zero_stage=2)
    return model[0][0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(997, 3, 2), (997, 1, 2, 3), (997, 5)])
@pytest.mark.parametrize("scale_by_keep", [True, False])
def test_stochastic_depth_drops_samples_and_scales_the_kept_as_timms_does(scale_by_keep, shape, dtype):
    torch.manual_seed(5)
    ours, timms = compiled_path(0.3, scale_by_keep), DropPath(0.3, scale_by_keep)
    x = torch.randn(shape).to(dtype).abs() + 1
    found, expected = ours(x), timms(x)
    assert found.dtype == dtype and not torch.equal(ours(x), found)
    dropped = (found == 0).flatten(1)
    assert torch.equal(dropped.any(1), dropped.all(1))
    assert 0.25 < dropped.float().mean() < 0.35  # 3.4 standard deviations
    both = ~dropped[:, 0] & (expected != 0).flatten(1)[:, 0]
    assert both.sum() > 300 and torch.equal(found[both], expected[both])
    assert torch.equal(ours.eval()(x), x)


def test_the_gradient_is_of_the_kept_samples():
    path, x = compiled_path(0.5), torch.ones(64, 2, requires_grad=True)
    out = path(x)
    out.sum().backward()
    assert torch.equal(x.grad, out.detach()) and {*x.grad.flatten().tolist()} == {0.0, 2.0}


@pytest.mark.parametrize("rate, left", [(0.0, 1.0), (1.0, 0.0)])
def test_at_the_ends_timms_stays(rate, left):
    path = compiled_path(rate)
    assert type(path) is DropPath and torch.equal(path(torch.ones(3, 2)), torch.full((3, 2), left))
