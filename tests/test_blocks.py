"""What is done to repeated blocks: the graphs that compilation makes, counted, and its stochastic depth; the same bits
where ZeRO 3 gathers them at once."""

import deepspeed
import pytest
import timm
import torch
from timm.layers import DropPath
from torch import nn

import vir.models  # noqa: F401  registers the models
from vir.engine import blocks, stacks
from vir.errors import SettingsError
from vir.models.build import freeze

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
    found = [where[id(block)].rpartition(".")[0] for block in stacks.repeated_blocks(model)]
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
    blocks.compile_blocks(model)
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
    blocks.compile_blocks(model)
    for stack in model:
        for block in stack:
            block(torch.ones(1, block.in_features))
    assert len(graphs) == 10 and torch._dynamo.utils.counters["frames"] == {"total": 10, "ok": 10}


class Paths(nn.Sequential):
    """A block of the rates in the list, and none of them in a layer of its own."""


def compiled_path(rate, scale_by_keep=True):
    """A DropPath as compile_blocks leaves it, run without a graph."""
    model = nn.ModuleList([Paths(DropPath(rate, scale_by_keep)), Paths(DropPath(rate))])
    blocks.compile_blocks(model)
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


# ---- ZeRO 3 by block


class Depthwise(nn.Module):
    """A block that takes the images, which have no gradient."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 5, groups=3, padding=2)

    def forward(self, x):
        return x + self.conv(x)


def train(model, device, by_block, offload, size):
    """Losses and gradient norms of two steps under ZeRO 3, then a sum of logits; how many of its modules DeepSpeed
    has hooked within the blocks."""
    if by_block:
        blocks.gather_by_block(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    offloaded = {key: {"device": "cpu"} for key in ("offload_param", "offload_optimizer") if offload}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, dist_init_required=False, config={
        "train_batch_size": 4, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, **offloaded}})
    told = []
    for number in range(2):
        torch.manual_seed(number)  # of DropPath too
        loss = engine(torch.randn(4, 3, size, size).to(device)).square().mean()
        engine.backward(loss)
        engine.step()
        told += [float(loss.detach()), float(engine.get_global_grad_norm())]
    engine.eval()
    with torch.no_grad():
        told.append(float(engine(torch.ones(1, 3, size, size, device=device)).sum()))
    hooked = sum(bool(module._forward_pre_hooks) for block in stacks.repeated_blocks(model) for module in
                 list(block.modules())[1:])
    engine.destroy()
    return told, hooked


FROZEN = r"patch_embed|cls_token|pos_embed|blocks\.0\.mlp"  # what comes into the first block then has no gradient


@pytest.mark.parametrize("name, frozen, recomputed, offload", [
    ("vir2d_tiny_patch16_224", "", True, True), ("vir_tiny_patch16_224", FROZEN, True, False),
    ("test_convnext", "", False, False), ("of images", "", False, False),
])
def test_weights_gathered_by_block_train_to_the_same_bits(name, frozen, recomputed, offload, alone):
    def made():
        torch.manual_seed(0)
        if name == "of images":
            return nn.Sequential(nn.Sequential(Depthwise(), Depthwise()), nn.Flatten(), nn.Linear(3 * 16**2, 5))
        model = build(name, **dict(depth=2, drop_path_rate=0.2) if name.startswith("vir") else {})
        if frozen:
            freeze(model, frozen)
        if recomputed:
            stacks.recompute(model)
        return model

    size = 32 if name == "test_convnext" else 16
    (expected, many), (found, none) = (train(made(), alone, by_block, offload, size) for by_block in (False, True))
    assert found == expected and many > 0 == none
    assert all(norm > 0 for norm in found[1:4:2])


def test_a_block_that_takes_a_list_is_refused():
    """torch looks for gradients in no list, and would call its backward pass ended before it begins."""
    model = nn.ModuleList([Layer(2, 2), Layer(2, 2)])
    blocks.gather_by_block(model)
    with pytest.raises(SettingsError, match="ZeRO 3: Layer takes a list, .*; take a --deepspeed_config of stage 2"):
        model[0]([torch.ones(1, 2)])
