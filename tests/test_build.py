"""The builder of models: what reaches timm, what images the network takes, and what is said when it cannot be."""

from dataclasses import astuple
from inspect import signature

import pytest
import timm
import torch

import vir.models  # noqa: F401  registers the models
from vir.config import ModelConfig
from vir.errors import SettingsError
from vir.models.build import FORBIDDEN_ARGS, NotBuiltError, architecture, build, create
from vir.weights.spec import InputSpec, input_of

torch.set_num_threads(1)
VIR = "vir_tiny_patch16_224"
TINY = dict(patch_size=14, embed_dim=16, depth=2, num_heads=2)
OWN = InputSpec(size=(3, 28, 28), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", crop_pct=0.875)


def config(**changed):
    return ModelConfig(**{"name": VIR, "img_size": 28, "args": TINY} | changed)


def test_the_spec_says_how_to_build_the_same_network_again():
    model, spec = build(config(drop_path_rate=0.1), ["cat", "dog"])
    assert spec.name == VIR and spec.classes == ("cat", "dog") and spec.input == OWN
    assert spec.args == {**TINY, "num_classes": 2, "img_size": 28}  # drop path acts in training alone
    again = create(spec.name, spec.args)
    again.load_state_dict(model.state_dict())
    images = torch.randn(1, 3, 28, 28)
    assert torch.equal(again.eval()(images), model.eval()(images))


def test_drop_path_reaches_the_network():
    rates = [[module.drop_prob for module in build(config(drop_path_rate=rate), "ab")[0].modules()
              if type(module).__name__ == "DropPath"] for rate in (0.0, 0.2)]
    assert not any(rates[0]) and max(rates[1]) == pytest.approx(0.2)


@pytest.mark.parametrize("mode", ["parallel", "chunkwise", "recurrent"])
def test_the_form_of_retention_reaches_every_block_and_changes_no_logit(mode):
    images = torch.randn(2, 3, 28, 28)
    model, _ = build(config(), "ab")
    other, _ = build(config(retention_mode=mode, chunk_size=2), "ab")
    other.load_state_dict(model.state_dict())
    found = {module.mode for module in other.modules() if hasattr(module, "mode")}
    assert found == {mode}
    assert torch.allclose(other.eval()(images), model.eval()(images), atol=1e-5)  # float32 sums in another order


@pytest.mark.parametrize("name, fixed", [(VIR, True), ("test_vit", True), ("test_resnet", False),
                                         ("test_convnext", False)])
def test_only_networks_of_a_fixed_size_are_told_the_size_of_images(name, fixed):
    args = architecture(ModelConfig(name=name, img_size=64), 7)
    assert args == {"num_classes": 7} | ({"img_size": 64} if fixed else {})
    assert architecture(ModelConfig(name=name), 7) == {"num_classes": 7}  # the model's own


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_the_size_of_images_is_the_one_asked_for_with_either_kind(name):
    model, spec = build(ModelConfig(name=name, img_size=64), "ab")
    assert spec.input.size == (3, 64, 64)
    assert model.eval()(torch.zeros(1, *spec.input.size)).shape == (1, 2)


@pytest.mark.parametrize("name", ["mean", "std", "interpolation", "crop_pct", "crop_mode"])
def test_each_setting_of_images_overrides_the_networks_own_and_no_other(name):
    given = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "interpolation": "bilinear", "crop_pct": 1.0,
             "crop_mode": "border"}[name]
    _, spec = build(config(**{name: given}), "ab")
    assert getattr(spec.input, name) == given
    assert astuple(spec.input) == tuple(given if field == name else value for field, value in vars(OWN).items())


def test_images_of_a_network_are_as_its_default_cfg_says():
    _, spec = build(ModelConfig(name="test_vit"), "ab")
    assert spec.input == input_of(timm.create_model("test_vit")) and spec.input.size == (3, 160, 160)


@pytest.mark.parametrize("changed, said", [
    ({"name": "no_such_model"}, "--model.name no_such_model cannot be built with .*: .*no_such_model"),
    ({"args": {**TINY, "patch_sise": 4}}, f"--model.name {VIR} cannot be built with .*patch_sise.*: .*patch_sise"),
    ({"args": {**TINY, "num_heads": 3}}, f"--model.name {VIR} cannot be built with .*num_heads.*: ."),
    ({"args": {**TINY, "patch_size": 0}}, f"--model.name {VIR} cannot be built with "),
])
def test_arguments_that_do_not_fit_are_told_as_settings(changed, said):
    with pytest.raises(SettingsError, match=said) as error:
        build(config(**changed), "ab")
    assert not isinstance(error.value, NotBuiltError)  # that one is for those who build without settings


def test_the_creation_alone_says_what_timm_said():
    with pytest.raises(NotBuiltError, match="num_hats"):
        create(VIR, {"num_hats": 2})


def test_forbidden_arguments_are_arguments_of_timm():
    """So that a name that timm changes is not forbidden in vain."""
    assert FORBIDDEN_ARGS <= signature(timm.create_model).parameters.keys()


# ---- freeze


def frozen(model):
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


def test_parameters_whose_name_matches_from_its_start_are_frozen():
    model, _ = build(config(freeze=r"patch_embed|blocks\.0\."), "ab")
    names = {name for name, _ in model.named_parameters()}
    assert frozen(model) == {name for name in names if name.startswith(("patch_embed.", "blocks.0."))}
    assert len(frozen(model)) > 5 and not frozen(build(config(), "ab")[0])
    assert frozen(build(config(freeze="proj|norm"), "ab")[0]) == {"norm.weight", "norm.bias"}  # not patch_embed.proj


def test_weights_that_training_begins_from_reach_frozen_parameters(tmp_path):
    expected, path = build(config(), "ab")[0].state_dict(), str(tmp_path / "w.pth")
    torch.save(expected, path)
    model, _ = build(config(init_from=path, freeze="patch_embed"), "ab")
    assert torch.equal(model.patch_embed.proj.weight, expected["patch_embed.proj.weight"])
    assert not model.patch_embed.proj.weight.requires_grad and model.head.weight.requires_grad


@pytest.mark.parametrize("pattern, said", [
    ("stem", r"--model.freeze 'stem' matches no parameter of \w+ from the start of its name; it has blocks.0.*, …"),
    ("proj.weight", "--model.freeze 'proj.weight' matches no parameter"),
    (".*", r"--model.freeze '\.\*' leaves no parameter of \w+ to train; it matches blocks.0"),
    ("", "--model.freeze '' leaves no parameter"),
])
def test_a_freeze_that_fits_nothing_or_everything_is_refused(pattern, said):
    with pytest.raises(SettingsError, match=said):
        build(config(freeze=pattern), "ab")


def test_batch_norms_of_frozen_parameters_go_on_with_their_statistics():
    model, _ = build(ModelConfig(name="test_resnet", freeze="bn1"), "ab")
    model.train()(torch.randn(2, 3, 64, 64) + 1)
    assert frozen(model) == {"bn1.weight", "bn1.bias"} and model.bn1.running_mean.abs().max() > 0
