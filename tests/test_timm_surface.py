"""What timm, its optimizers and torch's exporters expect of a model, asked of ViR."""

import subprocess
import sys
import warnings

import pytest
import timm
import torch
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay, param_groups_weight_decay

from support.tiny_models import IMAGES, tiny
from vir.errors import SettingsError
from vir.models.vision_retention import checkpoint_filter_fn

torch.set_num_threads(1)


@pytest.mark.parametrize("name, millions", [
    ("vir_tiny_patch16_224", 5.722), ("vir_small_patch16_224", 22.059), ("vir_base_patch16_224", 86.585),
    ("vir_large_patch16_224", 304.375), ("vir_large_patch14_224", 304.252),
    ("vir2d_tiny_patch16_224", 5.722), ("vir2d_small_patch16_224", 22.059), ("vir2d_base_patch16_224", 86.585),
    ("vir2d_large_patch16_224", 304.375),
])
def test_named_models_have_the_published_number_of_parameters(name, millions):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 3) == millions
    assert model.patch_embed.img_size == (224, 224)
    assert {block.retention.dims for block in model.blocks} == {2 if name.startswith("vir2d") else 1}
    config = timm.data.resolve_model_data_config(model)
    assert config["mean"] == config["std"] == (0.5, 0.5, 0.5)
    assert (config["crop_pct"], config["interpolation"], config["input_size"]) == (0.875, "bicubic", (3, 224, 224))
    names = model.state_dict().keys()
    assert {model.default_cfg["classifier"] + ".weight", model.default_cfg["first_conv"] + ".weight"} <= names


def test_parameters_have_the_names_of_the_official_code():
    layers = ("norm1", "retention.qkv", "retention.out_proj", "norm2", "mlp.fc1", "mlp.fc2")
    block = [f"{name}.{kind}" for name in layers for kind in ("weight", "bias")] + ["ls1.gamma", "ls2.gamma"]
    around = [f"{name}.{kind}" for name in ("patch_embed.proj", "norm", "head") for kind in ("weight", "bias")]
    expected = {f"blocks.{i}.{name}" for i in range(3) for name in block} | {"cls_token", "pos_embed", *around}
    assert tiny().state_dict().keys() == expected
    shapes = {name: tuple(x.shape) for name, x in tiny().state_dict().items()}
    assert shapes["cls_token"] == (1, 1, 32) and shapes["pos_embed"] == (1, 12, 32)
    assert shapes["blocks.0.retention.qkv.weight"] == (96, 32)


def test_pretrained_weights_are_refused_with_the_way_out():
    with pytest.raises(SettingsError, match="no pretrained weights of vir_tiny_patch16_224 .* vir.models.load"):
        timm.create_model("vir_tiny_patch16_224", pretrained=True)
    assert timm.list_models("vir_*", pretrained=True) == []


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"model": x}, lambda x: {"state_dict": x}])
def test_a_checkpoint_of_other_sizes_is_resampled(wrap):
    source = tiny(img_size=32, patch_size=8).eval()
    with torch.no_grad():  # a ramp along the rows
        source.pos_embed.copy_(torch.arange(4.0).repeat_interleave(4)[None, :, None].expand(1, 16, 32))
    model = tiny(img_size=(96, 64), patch_size=16)
    found = checkpoint_filter_fn(wrap(source.state_dict()), model)
    model.load_state_dict(found)
    rows = model.pos_embed.view(6, 4, 32)
    assert (rows.diff(dim=0) > 0).all() and rows.diff(dim=1).abs().max() < 1e-5
    assert model.patch_embed.proj.weight.shape == (32, 3, 16, 16)
    assert model.blocks[0].mlp.fc1.weight.equal(source.blocks[0].mlp.fc1.weight)
    same = checkpoint_filter_fn(wrap(source.state_dict()), source)
    assert all(same[name].equal(x) for name, x in source.state_dict().items())


def test_timm_loads_a_local_file_into_another_size_and_number_of_classes(tmp_path):
    args = dict(patch_size=8, embed_dim=32, depth=1, num_heads=2)
    source = timm.create_model("vir_tiny_patch16_224", img_size=32, num_classes=5, **args)
    torch.save({"state_dict": source.state_dict()}, tmp_path / "weights.pth")
    model = timm.create_model("vir_tiny_patch16_224", pretrained=True, img_size=64, num_classes=7, in_chans=1, **args,
                              pretrained_cfg_overlay=dict(file=str(tmp_path / "weights.pth"), num_classes=5))
    assert model(torch.randn(1, 1, 64, 64)).shape == (1, 7)
    assert model.blocks[0].mlp.fc1.weight.equal(source.blocks[0].mlp.fc1.weight)


def test_timm_passes_arguments_on():
    model = timm.create_model("vir_tiny_patch16_224", img_size=32, num_classes=7, in_chans=1, depth=1)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 7)


def test_attributes_and_heads():
    model = tiny().eval()
    assert model.num_classes == 5 and model.num_prefix_tokens == 1 and tiny(global_pool="avg").num_prefix_tokens == 0
    assert model.num_features == model.head_hidden_size == model.embed_dim == 32
    features = model.forward_features(IMAGES)
    assert model.forward_head(features).equal(model(IMAGES))
    assert model.forward_head(features, pre_logits=True).equal(features[:, -1])
    assert tiny(num_classes=0).eval()(IMAGES).shape == (3, 32)
    assert tiny(global_pool="").eval()(IMAGES).shape == (3, 13, 5)


def test_reset_classifier_puts_a_new_head_in_place():
    model = tiny().bfloat16()
    model.reset_classifier(9)
    assert model.get_classifier() is model.head
    assert model(IMAGES.bfloat16()).shape == (3, 9) and model.num_classes == 9
    model.reset_classifier(0)
    assert model(IMAGES.bfloat16()).shape == (3, 32) and model.num_classes == 0


def test_intermediates_are_the_patches_after_each_block():
    model = tiny().eval()
    features, maps = model.forward_intermediates(IMAGES)
    assert features.equal(model.forward_features(IMAGES))
    assert [x.shape for x in maps] == [(3, 32, 4, 3)] * 3
    assert [info["num_chs"] for info in model.feature_info] == [32] * 3
    assert {info["reduction"] for info in model.feature_info} == {8}
    pairs = model.forward_intermediates(IMAGES, [-1], True, norm=True, output_fmt="NLC", intermediates_only=True)
    assert torch.cat(pairs[0], dim=1).equal(features)
    assert model.norm(maps[2].flatten(2).mT).equal(pairs[0][0])
    result = model.forward_intermediates(IMAGES, 1, True, output_dict=True)
    assert result.keys() == {"image_features", "image_intermediates", "image_intermediates_prefix"}
    early, _ = model.forward_intermediates(IMAGES, [0], stop_early=True)
    assert not early.equal(features)


def test_get_intermediate_layers_are_dinos():
    model = tiny().eval()
    _, maps = model.forward_intermediates(IMAGES)
    last, = model.get_intermediate_layers(IMAGES, reshape=True)
    assert last.equal(maps[2])
    patches, token = model.get_intermediate_layers(IMAGES, [0, 2], return_prefix_tokens=True, norm=True)[1]
    assert torch.cat([patches, token], dim=1).equal(model.forward_features(IMAGES))


def test_patch_dropout_leaves_no_maps():
    model = tiny(patch_drop_rate=0.5)
    with pytest.raises(SettingsError, match="no map of all patches; call model.eval.. or use output_fmt='NLC'"):
        model.forward_intermediates(IMAGES)
    assert model.forward_intermediates(IMAGES, output_fmt="NLC", intermediates_only=True)[0].shape == (3, 6, 32)
    assert model.eval().forward_intermediates(IMAGES, intermediates_only=True)[0].shape == (3, 32, 4, 3)


def test_features_only_keeps_what_it_needs_and_trains_all_of_it():
    args = dict(img_size=(32, 24), patch_size=8, embed_dim=32, depth=3, num_heads=2)
    model = timm.create_model("vir_tiny_patch16_224", features_only=True, out_indices=(0, 1), **args)
    maps = model(IMAGES)
    assert [x.shape for x in maps] == [(3, 32, 4, 3)] * 2
    assert model.feature_info.channels() == [32, 32] and model.feature_info.reduction() == [8, 8]
    sum(x.square().sum() for x in maps).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert len(model.model.blocks) == 2


def test_timm_groups_parameters_for_decay():
    model = tiny()
    assert model.no_weight_decay() == {"pos_embed", "cls_token", "dist_token"}
    without, with_decay = param_groups_weight_decay(model, 0.1, no_weight_decay_list=model.no_weight_decay())
    assert any(p is model.cls_token for p in without["params"]) and any(p is model.pos_embed for p in without["params"])
    groups = param_groups_layer_decay(model, layer_decay=0.5, no_weight_decay_list=model.no_weight_decay())
    scale = {name: group["lr_scale"] for group in groups for name, p in model.named_parameters()
             if any(p is q for q in group["params"])}
    assert scale["head.weight"] == 1 and scale["norm.weight"] == 0.5
    assert scale["blocks.2.norm1.weight"] == 0.5 and scale["blocks.0.retention.qkv.weight"] == 0.125
    assert scale["cls_token"] == scale["pos_embed"] == scale["patch_embed.proj.weight"] == 0.0625
    coarse = group_parameters(model, model.group_matcher(coarse=True))
    assert len(coarse) == 3
    assert coarse[0] == ["pos_embed", "cls_token", "patch_embed.proj.weight", "patch_embed.proj.bias"]


@pytest.mark.parametrize("name", ["vir_tiny_patch16_224", "vir2d_tiny_patch16_224"])
def test_torch_fx_and_torchscript_give_the_same_logits(name):
    model = timm.create_model(name, img_size=(32, 24), patch_size=8, embed_dim=32, depth=2, num_heads=2).eval()
    expected = model(IMAGES)
    extractor = timm.models.create_feature_extractor(model, {"head": "logits", "blocks.0": "middle"})
    found = extractor(IMAGES)
    assert found["logits"].equal(expected) and found["middle"].shape == (3, 13, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and tracing tells of every size it fixes
        assert torch.jit.script(model)(IMAGES).equal(expected)
        assert torch.jit.trace(model, IMAGES)(IMAGES + 1).equal(model(IMAGES + 1))


def test_importing_vir_alone_imports_no_torch():
    code = "import sys, vir; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("mode", ["parallel", "chunkwise", "recurrent"])
def test_a_model_made_under_a_device_context_runs_there(mode):
    with torch.device("meta"):
        model = tiny()
        model.set_retention_mode(mode)
        assert model(torch.randn(2, 3, *model.patch_embed.img_size)).device.type == "meta"


def test_torch_func_gives_the_gradient_of_each_sample():
    model = timm.create_model("vir_tiny_patch16_224", img_size=208, depth=1, num_classes=5)  # 170 tokens: chunkwise
    parameters = {name: x.detach() for name, x in model.named_parameters()}
    images, labels = torch.randn(2, 3, 208, 208), torch.tensor([1, 4])

    def loss(parameters, image, label):
        logits = torch.func.functional_call(model, parameters, (image[None],))
        return torch.nn.functional.cross_entropy(logits, label[None])

    found = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, images, labels)
    for n in range(2):
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(images[n:n + 1]), labels[n:n + 1]).backward()
        for name, x in model.named_parameters():
            assert (found[name][n] - x.grad).abs().max() <= 1e-5 * x.grad.abs().max(), name
