"""The ViR network: one set of weights in every mode, and every option with its effect."""

import copy
from collections import Counter

import pytest
import timm
import torch
from torch.nn import functional

from support.tiny_models import IMAGES, by_definition, largest_difference, logits_and_gradients, tiny
from vir.errors import SettingsError
from vir.models import retention_decay

torch.set_num_threads(1)


# ---- one model in every mode

@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("mode, chunk_size", [("recurrent", None), ("auto", None), ("chunkwise", 64), ("chunkwise", 5),
                                              ("chunkwise", 1)])
def test_modes_agree_in_logits_and_parameter_gradients(mode, chunk_size, dims):
    model = tiny(retention_dims=dims)
    model.set_retention_mode("parallel")
    expected = logits_and_gradients(model)
    model.set_retention_mode(mode, chunk_size)
    # 3 blocks of float32 sums in another order; each form alone is held to 1e-5.
    assert largest_difference(logits_and_gradients(model), expected) < 3e-5


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("retention_norm", ["none", "layernorm", "layernorm_gelu"])
def test_modes_agree_in_float64(retention_norm, dims):
    model = tiny(retention_dims=dims, retention_norm=retention_norm).double()
    model.set_retention_mode("parallel")
    expected = logits_and_gradients(model, IMAGES.double())
    for mode in ("chunkwise", "recurrent"):
        model.set_retention_mode(mode, chunk_size=4)
        assert largest_difference(logits_and_gradients(model, IMAGES.double()), expected) < 1e-10


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


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("mode", ["parallel", "chunkwise"])
def test_torch_compile_traces_the_whole_model(mode, dims):
    model = tiny(depth=1, retention_dims=dims, retention_mode=mode, chunk_size=5).eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(IMAGES), model(IMAGES), atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(compiled(IMAGES), model(IMAGES), atol=1e-6)


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("mode", ["parallel", "chunkwise"])
def test_torch_export_gives_the_same_logits(mode, dims):
    model = tiny(depth=1, retention_dims=dims, retention_mode=mode, chunk_size=5).eval()
    exported = torch.export.export(model, (IMAGES,)).module()
    other = torch.randn_like(IMAGES)
    assert torch.allclose(exported(other), model(other), atol=1e-6)


# ---- the definition

@pytest.mark.parametrize("retention_norm", ["none", "layernorm", "layernorm_gelu"])
@pytest.mark.parametrize("dims", [1, 2])
def test_features_are_those_of_the_equations(dims, retention_norm):
    """1-D without a norm is the recurrent form of the authors' code, layer for layer."""
    model = tiny(retention_dims=dims, retention_norm=retention_norm).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)  # at the start biases are 0 and branches small
    expected = by_definition(model.state_dict(), IMAGES, 8, 2, dims, retention_norm)
    for mode in ("auto", "parallel", "chunkwise", "recurrent"):
        model.set_retention_mode(mode, 5)
        assert largest_difference([model.forward_features(IMAGES).double()], [expected]) < 1e-5


# ---- tokens

def test_a_patch_of_2d_retention_reaches_what_is_below_and_right_of_it():
    model, other = tiny(retention_dims=2, depth=1).eval(), IMAGES.clone()
    other[:, :, 16:24, 8:16] += 1  # row 2, column 1 of 4 x 3
    changed = (model.forward_features(other) != model.forward_features(IMAGES)).any(-1).any(0)
    assert changed.tolist() == [False] * 7 + [True, True] + [False, True, True] + [True]


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
    assert model.pool(before, "max").equal(before[:, :12].amax(1))
    assert torch.allclose(model.pool(before, "avgmax"), (before[:, :12].mean(1) + before[:, :12].amax(1)) / 2)
    assert model.pool(before, "") is before


# ---- the distillation token

def distilled(**kwargs):
    model = tiny(distilled=True, **kwargs).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model


def test_the_distillation_token_follows_the_class_token_and_has_a_head_of_its_own():
    model = distilled()
    tokens = by_definition(model.state_dict(), IMAGES, 8, 2, 1).float()
    own, other = tokens[:, -2], tokens[:, -1]
    wanted = (own @ model.head.weight.T + model.head.bias, other @ model.head_dist.weight.T + model.head_dist.bias)
    for mode in ("auto", "parallel", "chunkwise", "recurrent"):
        model.set_retention_mode(mode, 5)
        assert largest_difference([model.forward_features(IMAGES), model(IMAGES)], [tokens, sum(wanted) / 2]) < 1e-5
    assert largest_difference([model.forward_stream(IMAGES)], [sum(wanted) / 2]) < 1e-5
    assert torch.allclose(model.forward_head(tokens, pre_logits=True), (own + other) / 2)
    model.set_distilled_training()
    assert largest_difference([model(IMAGES)], [sum(wanted) / 2]) < 1e-5
    assert largest_difference(model.train()(IMAGES), wanted) < 1e-5
    assert model.pool(tokens).equal(own) and model.pool(tokens, "avg").equal(tokens[:, :12].mean(1))
    assert model.forward_intermediates(IMAGES, return_prefix_tokens=True)[1][0][1].shape == (3, 2, 32)


def test_a_distilled_model_has_timms_names_and_both_its_heads_are_its_classifier():
    model = timm.create_model("vir_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2,
                              num_classes=5, distilled=True)
    theirs = timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, embed_dim=32, depth=2, num_heads=2)
    names = {name for name, _ in theirs.named_parameters() if "dist" in name}
    assert {name for name, _ in model.named_parameters() if "dist" in name} == names
    assert model.default_cfg["classifier"] == theirs.default_cfg["classifier"] == ("head", "head_dist")
    assert "dist_token" in model.no_weight_decay() and model.num_prefix_tokens == theirs.num_prefix_tokens == 2
    model.reset_classifier(3)
    assert [head.out_features for head in model.get_classifier()] == [3, 3]
    images = torch.randn(2, 3, 32, 32)
    assert model(images).shape == (2, 3) and torch.jit.script(model.eval())(images).equal(model(images))
    model.prune_intermediate_layers(1)
    assert model.num_prefix_tokens == 0 and model.forward_features(images).shape == (2, 16, 32)


def test_a_distillation_token_without_a_place_is_refused():
    for kwargs in (dict(retention_dims=2), dict(global_pool="avg")):
        with pytest.raises(SettingsError, match="distilled=True with .* follows the class token in one sequence; it n"):
            tiny(distilled=True, **kwargs)
    with pytest.raises(SettingsError, match="a distilled model reads its .* global_pool='avg' needs a model built"):
        tiny(distilled=True).reset_classifier(3, "avg")
    with pytest.raises(SettingsError, match="this model has no distillation token; build it with distilled=True"):
        tiny().set_distilled_training()


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("global_pool", ["token", "avg", "max", "avgmax", ""])
def test_every_parameter_gets_a_gradient(global_pool, dims):
    model = tiny(global_pool=global_pool, retention_dims=dims, retention_norm="layernorm")
    model.set_grad_checkpointing()
    logits_and_gradients(model)
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("global_pool", ["avg", "max", "avgmax"])
def test_every_parameter_gets_a_gradient_after_changing_to_a_pool_of_patches(global_pool):
    model = tiny()
    model.reset_classifier(4, global_pool)
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


@pytest.mark.parametrize("dims", [1, 2])
def test_dynamic_size_is_set_input_size_for_one_call(dims):
    model, fixed = (tiny(retention_dims=dims, dynamic_img_size=dynamic).eval() for dynamic in (True, False))
    assert model(IMAGES).equal(fixed(IMAGES))
    images = torch.randn(2, 3, 40, 56)
    fixed.set_input_size((40, 56))
    assert torch.allclose(model(images), fixed(images), atol=1e-6)
    assert model.forward_intermediates(images, intermediates_only=True)[0].shape == (2, 32, 5, 7)
    assert model.pos_embed.shape == (1, 12, 32)
    with pytest.raises(SettingsError, match=r"size 40x52 .* img_size=\(40, 48\); .* dynamic_img_pad=True"):
        model(images[..., :52])


def test_dynamic_padding_fills_patches_with_zeros_below_and_right():
    model = tiny(dynamic_img_size=True, dynamic_img_pad=True).eval()
    images = torch.randn(2, 3, 30, 41)
    padded = torch.zeros(2, 3, 32, 48)
    padded[:, :, :30, :41] = images
    assert model(images).equal(model(padded))
    with pytest.raises(SettingsError, match="dynamic_img_pad .* needs dynamic_img_size=True"):
        tiny(dynamic_img_pad=True)


# ---- options

@pytest.mark.parametrize("dims", [1, 2])
def test_patch_dropout_keeps_order_places_and_the_class_token(dims):
    model = tiny(retention_dims=dims, patch_drop_rate=0.5)
    torch.manual_seed(5)
    found = model.forward_features(IMAGES)
    assert found.shape == (3, 6 + 1, 32)

    torch.manual_seed(5)
    kept = model.patch_drop(torch.zeros(3, 12, 1))[1]  # drawn before anything else
    assert (kept.diff(dim=1) > 0).all() and len({tuple(row) for row in kept.tolist()}) == 3
    for i in range(3):
        expected = by_definition(model.state_dict(), IMAGES[i:i + 1], 8, 2, dims, kept=kept[i].tolist())
        assert largest_difference([found[i:i + 1].double()], [expected]) < 1e-5


@pytest.mark.parametrize("option", [
    "drop_rate", "pos_drop_rate", "proj_drop_rate", "drop_path_rate", "patch_drop_rate",
])
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


def test_class_token_std_sets_its_spread():
    assert tiny(embed_dim=512, class_token_std=1e-6).cls_token.std().item() == pytest.approx(1e-6, rel=0.15)


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
    with pytest.raises(SettingsError, match="retention_norm 'rms'; choose one of none, layernorm, layernorm_gelu"):
        tiny(retention_norm="rms")
    with pytest.raises(SettingsError, match="retention_dims is 3; it must be 1 .* or 2"):
        tiny(retention_dims=3)
    with pytest.raises(ValueError, match="needs the grid"):
        tiny(retention_dims=2).blocks[0](torch.randn(1, 13, 32))
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


def computes_as_in_float32(name, dtype, device):
    """Logits, and the direction of every gradient, against those of float32 on CPU."""
    torch.manual_seed(0)
    exact = timm.create_model(name, img_size=64, depth=4, num_classes=10)
    images, weight = torch.randn(4, 3, 64, 64), torch.randn(4, 10)
    rounded = copy.deepcopy(exact).to(device, dtype)
    expected, found = exact(images), rounded(images.to(device, dtype)).float().cpu()
    # Numbers keep 8 or 11 bits; each of some 20 sums of the network in a row rounds them again.
    assert (found - expected).abs().max() < {torch.bfloat16: 2**-4, torch.float16: 2**-7}[dtype] * expected.abs().max()
    (expected * weight).sum().backward()
    (rounded(images.to(device, dtype)).float() * weight.to(device)).sum().backward()
    for (parameter, one), other in zip(exact.named_parameters(), rounded.parameters(), strict=True):
        cosine = functional.cosine_similarity(one.grad.flatten(), other.grad.float().cpu().flatten(), dim=0)
        assert cosine > {torch.bfloat16: 0.999, torch.float16: 0.9999}[dtype], parameter


@pytest.mark.parametrize("name", ["vir_tiny_patch16_224", "vir2d_tiny_patch16_224"])
def test_bf16_computes_as_float32(name):
    computes_as_in_float32(name, torch.bfloat16, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["vir_tiny_patch16_224", "vir2d_tiny_patch16_224"])
def test_a_gpu_in_half_precision_computes_as_a_cpu_in_float32(name, dtype):
    computes_as_in_float32(name, dtype, "cuda")
