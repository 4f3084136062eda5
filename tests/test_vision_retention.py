"""The ViR network: one set of weights in every mode, every option with its effect, and what timm expects of a model."""

import subprocess
import sys
from collections import Counter

import pytest
import timm
import torch
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay, param_groups_weight_decay

import vir.models.block
from vir.errors import SettingsError
from vir.models import VisionRetention, retention_decay

torch.set_num_threads(1)

IMAGES = torch.randn(3, 3, 32, 24, generator=torch.Generator().manual_seed(1))


def tiny(seed=0, **kwargs):
    """4 x 3 patches and a class token; 5 classes."""
    torch.manual_seed(seed)
    args = dict(img_size=(32, 24), patch_size=8, num_classes=5, embed_dim=32, depth=3, num_heads=2)
    return VisionRetention(**args | kwargs)


def logits_and_gradients(model, images=IMAGES):
    model.zero_grad()
    logits = model(images)
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    return [logits.detach(), *(p.grad for p in model.parameters())]


def largest_difference(found, expected):
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, expected, strict=True))


# ---- one model in every mode

@pytest.mark.parametrize("mode, chunk_size", [("recurrent", None), ("auto", None), ("chunkwise", 64), ("chunkwise", 5),
                                              ("chunkwise", 1)])
def test_modes_agree_in_logits_and_parameter_gradients(mode, chunk_size):
    model = tiny()
    model.set_retention_mode("parallel")
    expected = logits_and_gradients(model)
    model.set_retention_mode(mode, chunk_size)
    # 3 blocks of float32 sums in another order; each form alone is held to 1e-5.
    assert largest_difference(logits_and_gradients(model), expected) < 3e-5


def test_modes_agree_in_float64():
    model = tiny().double()
    model.set_retention_mode("parallel")
    expected = logits_and_gradients(model, IMAGES.double())
    for mode in ("chunkwise", "recurrent"):
        model.set_retention_mode(mode, chunk_size=4)
        assert largest_difference(logits_and_gradients(model, IMAGES.double()), expected) < 1e-10


@pytest.mark.parametrize("mode, tokens, form", [
    ("auto", 256, "parallel"), ("auto", 257, "chunkwise"), ("parallel", 300, "parallel"), ("chunkwise", 9, "chunkwise"),
    ("recurrent", 9, "recurrent"),
])
def test_mode_chooses_the_form_and_the_chunk_size(mode, tokens, form, monkeypatch):
    calls = []
    for name in ("parallel", "chunkwise", "recurrent"):
        function = getattr(vir.models.block, f"{name}_retention")

        def record(q, k, v, decay, *args, name=name, function=function):
            calls.append((name, *args))
            return function(q, k, v, decay, *args)

        monkeypatch.setattr(vir.models.block, f"{name}_retention", record)
    block = tiny(retention_mode=mode, chunk_size=17).blocks[0]
    block(torch.randn(1, tokens, 32))
    assert calls == [(form, 17) if form == "chunkwise" else (form,)]


def test_chunk_size_stays_unless_given():
    model = tiny(chunk_size=17)
    model.set_retention_mode("chunkwise")
    assert {block.retention.chunk_size for block in model.blocks} == {17}
    model.set_retention_mode("chunkwise", chunk_size=3)
    assert {block.retention.chunk_size for block in model.blocks} == {3}


def test_mode_and_chunk_size_errors_name_the_choices():
    with pytest.raises(ValueError, match="unknown retention mode 'softmax'; choose one of auto, parallel, chunkwise"):
        tiny().set_retention_mode("softmax")
    with pytest.raises(ValueError, match="chunk_size is 0; it must be at least 1"):
        tiny(chunk_size=0)


@pytest.mark.parametrize("mode", ["parallel", "chunkwise"])
def test_torch_compile_traces_the_whole_model(mode):
    model = tiny(depth=1, retention_mode=mode, chunk_size=5).eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(IMAGES), model(IMAGES), atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(compiled(IMAGES), model(IMAGES), atol=1e-6)


# ---- tokens

def test_a_later_patch_does_not_change_earlier_tokens():
    model, other = tiny().eval(), IMAGES.clone()
    other[:, :, 16:24, 8:16] += 1  # row 2, column 1 of 3: patch 7
    changed = (model.forward_features(other) != model.forward_features(IMAGES)).any(-1).any(0)
    assert changed.tolist() == [False] * 7 + [True] * 6


def test_the_class_token_is_last_and_carries_no_position():
    model = tiny().eval()
    before = model.forward_features(IMAGES)
    with torch.no_grad():
        model.cls_token += 1
    changed = (model.forward_features(IMAGES) != before).any(-1).any(0)
    assert changed.tolist() == [False] * 12 + [True]
    assert model.pos_embed.shape == (1, 12, 32)
    assert model.pool(before).equal(before[:, -1])
    assert model.pool(before, "avg").equal(before[:, :12].mean(1))
    assert model.pool(before, "") is before


@pytest.mark.parametrize("global_pool", ["token", "avg", ""])
def test_every_parameter_gets_a_gradient(global_pool):
    model = tiny(global_pool=global_pool)
    model.set_grad_checkpointing()
    logits_and_gradients(model)
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_every_parameter_gets_a_gradient_after_changing_to_avg():
    model = tiny()
    model.reset_classifier(4, "avg")
    assert model(IMAGES).shape == (3, 4) and model.forward_features(IMAGES).shape == (3, 12, 32)
    logits_and_gradients(model)
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


# ---- gradient checkpointing

def test_checkpointing_is_bit_equal_with_drop_path_and_dropout():
    model = tiny(drop_path_rate=0.5, proj_drop_rate=0.2)
    runs = Counter()
    for block in model.blocks:
        block.mlp.fc1.register_forward_hook(lambda *_: runs.update(["fc1"]))
    torch.manual_seed(3)
    expected = logits_and_gradients(model)
    assert runs["fc1"] == 3
    model.set_grad_checkpointing()
    torch.manual_seed(3)
    found = logits_and_gradients(model)
    assert runs["fc1"] == 3 + 6, "each block runs again in the backward pass"
    assert all(a.equal(b) for a, b in zip(found, expected, strict=True))
    model.set_grad_checkpointing(False)
    logits_and_gradients(model)
    assert runs["fc1"] == 3 + 6 + 3


# ---- precision

@pytest.mark.parametrize("cast", [
    lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.double(), lambda m: m.to(torch.bfloat16).float(),
    lambda m: m.to("meta").to_empty(device="cpu"),
], ids=["bfloat16", "half", "double", "and back", "meta and back"])
def test_decay_keeps_its_float32_values_when_the_model_is_cast(cast):
    model = cast(tiny())
    for block in model.blocks:
        assert block.retention.decay.dtype == torch.float32
        assert block.retention.decay.equal(retention_decay(2))


def test_decay_is_not_in_the_state_dict():
    assert not [name for name in tiny().state_dict() if "decay" in name]


def params_to_bfloat16(model):
    """What DeepSpeed's bf16 engine does: parameters are cast, buffers are not."""
    for p in model.parameters():
        p.data = p.data.bfloat16()
    return model


@pytest.mark.parametrize("mode", ["parallel", "chunkwise", "recurrent"])
@pytest.mark.parametrize("cast, dtype", [
    (params_to_bfloat16, torch.bfloat16), (lambda m: m.bfloat16(), torch.bfloat16), (lambda m: m.half(), torch.float16),
], ids=["parameters only", "bfloat16", "half"])
def test_a_cast_model_gives_nearly_the_same_logits(cast, dtype, mode):
    model = tiny(retention_mode=mode, chunk_size=5).eval()
    expected = model(IMAGES)
    logits = cast(model)(IMAGES.to(dtype))
    assert logits.dtype == dtype
    # bfloat16 has 8 bits; errors of three blocks and a head add up to a few per cent of the largest logit.
    assert largest_difference([logits.float()], [expected]) < (0.05 if dtype == torch.bfloat16 else 0.005)
    logits.sum().backward()
    assert all(p.grad.dtype == dtype and torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("mode", ["parallel", "chunkwise", "recurrent"])
def test_autocast_trains_float32_parameters(mode):
    model = tiny(retention_mode=mode, chunk_size=5)
    expected = model(IMAGES)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(IMAGES)
    assert largest_difference([logits.float()], [expected]) < 0.05
    logits.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


# ---- image sizes

@pytest.mark.parametrize("img_size, patch_size, in_chans", [
    (28, 4, 1), ((16, 40), 8, 3), (28, 14, 3), ((12, 10), (4, 5), 2),
])
def test_any_image_and_patch_size(img_size, patch_size, in_chans):
    model = tiny(img_size=img_size, patch_size=patch_size, in_chans=in_chans)
    height, width = model.patch_embed.img_size
    assert model(torch.randn(2, in_chans, height, width)).shape == (2, 5)


def test_an_image_of_another_size_is_refused_with_the_way_out():
    with pytest.raises(SettingsError, match=r"are 24x32 but this model takes 32x24; .*=\(24, 32\).*set_input_size"):
        tiny()(IMAGES.mT)


def test_a_size_that_patches_do_not_fill_is_refused_at_construction():
    with pytest.raises(SettingsError, match=r"img_size 32x30 .* patch_size 8x8; the nearest .*: img_size=\(32, 32\)"):
        tiny(img_size=(32, 30))
    with pytest.raises(SettingsError, match=r"img_size 3x3 .* img_size=\(8, 8\)"):
        tiny(img_size=3)
    with pytest.raises(SettingsError, match="img_size 33x24"):
        tiny().set_input_size((33, 24))


def test_set_input_size_resamples_the_positions():
    model = tiny().eval()
    before = model(IMAGES)
    model.set_input_size((32, 24))
    assert model(IMAGES).equal(before)
    with torch.no_grad():  # a ramp along the rows stays one
        model.pos_embed.copy_(torch.arange(4.0).repeat_interleave(3)[None, :, None].expand(1, 12, 32))
    model.set_input_size((64, 48))
    assert isinstance(model.pos_embed, torch.nn.Parameter)
    rows = model.pos_embed.view(8, 6, 32)
    assert (rows.diff(dim=0) > 0).all() and rows.diff(dim=1).abs().max() < 1e-5
    assert model(torch.randn(1, 3, 64, 48)).shape == (1, 5)


# ---- options

@pytest.mark.parametrize("option", ["drop_rate", "pos_drop_rate", "proj_drop_rate", "drop_path_rate"])
def test_each_drop_option_acts_in_training_only(option):
    model = tiny(**{option: 0.5})
    assert not model(IMAGES).equal(model(IMAGES))
    model.eval()
    assert model(IMAGES).equal(tiny().eval()(IMAGES))


def test_drop_path_grows_from_none_to_its_rate():
    model = tiny(drop_path_rate=1.0)
    x = torch.randn(4, 13, 32)
    assert model.blocks[2](x).equal(x)
    assert model.blocks[0](x).equal(model.blocks[0].eval()(x))
    assert model.blocks[1].drop_path1.drop_prob == model.blocks[1].drop_path2.drop_prob == 0.5


def test_full_proj_dropout_leaves_only_the_residual_path():
    x = torch.randn(4, 13, 32)
    assert tiny(proj_drop_rate=1.0).blocks[0](x).equal(x)


def test_full_dropout_leaves_the_bias_of_the_head():
    model = tiny(drop_rate=1.0)
    with torch.no_grad():
        model.head.bias.copy_(torch.arange(5.0))
    assert model(IMAGES).equal(torch.arange(5.0).expand(3, 5))


def test_init_values_start_or_remove_the_layer_scale():
    assert tiny().blocks[0].ls1.gamma.unique().tolist() == [pytest.approx(0.1)]
    x = torch.randn(1, 13, 32)
    assert tiny(init_values=0.0).blocks[0](x).equal(x)
    assert not [name for name in tiny(init_values=None).state_dict() if "ls1" in name or "ls2" in name]


def test_mlp_ratio_sets_the_hidden_width():
    assert tiny(mlp_ratio=2.5).blocks[0].mlp.fc1.out_features == 80


def test_initial_weights_follow_the_named_distribution():
    model = tiny(embed_dim=128)
    drawn = [p for name, p in model.named_parameters() if p.ndim > 1 and "patch_embed" not in name]
    assert len(drawn) == 2 + 4 * 3 + 1
    assert all(0.015 < p.std() < 0.025 for p in drawn)
    assert all(not p.any() for name, p in model.named_parameters() if name.endswith("bias"))
    before = {name: p.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(3)
    torch.manual_seed(0)
    model.init_weights()
    assert all(not p.equal(torch.full_like(p, 3)) for p in model.parameters())
    assert all(p.equal(before[name]) for name, p in model.named_parameters() if p.ndim == 1)


def test_errors_in_options_name_the_choices():
    with pytest.raises(SettingsError, match="unknown global_pool 'map'; choose one of '', 'token', 'avg'"):
        tiny(global_pool="map")
    with pytest.raises(SettingsError, match="embed_dim 32 is not divisible by num_heads 3"):
        tiny(num_heads=3)
    with pytest.raises(SettingsError, match="num_classes is -1"):
        tiny(num_classes=-1)
    with pytest.raises(SettingsError, match="no class token to pool; build it with global_pool='token'"):
        tiny(global_pool="avg").reset_classifier(2, "token")
    with pytest.raises(SettingsError, match="unknown output_fmt 'NHWC'"):
        tiny().forward_intermediates(IMAGES, output_fmt="NHWC")


# ---- timm

@pytest.mark.parametrize("name, millions", [
    ("vir_tiny_patch16_224", 5.722), ("vir_small_patch16_224", 22.059), ("vir_base_patch16_224", 86.585),
    ("vir_large_patch16_224", 304.375), ("vir_large_patch14_224", 304.252),
])
def test_named_models_have_the_published_number_of_parameters(name, millions):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 3) == millions
    assert model.patch_embed.img_size == (224, 224)
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


def test_pretrained_weights_are_refused_with_the_way_out():
    with pytest.raises(SettingsError, match="no pretrained weights of vir_tiny_patch16_224 .* vir.models.load"):
        timm.create_model("vir_tiny_patch16_224", pretrained=True)
    assert timm.list_models("vir_*", pretrained=True) == []


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
    assert model.no_weight_decay() == {"pos_embed", "cls_token"}
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


def test_importing_vir_alone_imports_no_torch():
    code = "import sys, vir; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("mode", ["parallel", "chunkwise", "recurrent"])
def test_a_model_made_under_a_device_context_runs_there(mode):
    with torch.device("meta"):
        model = tiny()
        model.set_retention_mode(mode)
        assert model(torch.randn(2, 3, *model.patch_embed.img_size)).device.type == "meta"
