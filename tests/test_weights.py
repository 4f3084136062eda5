"""The weights file: what is written comes back, for vir and for timm, and what is wrong with a file is said."""

import dataclasses
import json
import os
import pickle
import stat

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed, resample_patch_embed

import vir.models
from vir.errors import DataError, SettingsError
from vir.models import WeightsMetadata, load, read_metadata, save_weights
from vir.models.spec import InputSpec, ModelSpec
from vir.models.weights import read, stated_metadata

torch.set_num_threads(1)

TINY = dict(img_size=[16, 24], patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=3)

INPUT = InputSpec(size=(3, 16, 24), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), interpolation="bilinear", crop_pct=0.9)
MODEL = ModelSpec(name="vir_small_patch16_224", args=TINY, classes=("cat", "dög", "eel"), input=INPUT)
METADATA = WeightsMetadata(model=MODEL, step=7, samples_seen=56, ema=True, dtype="fp32")


def tiny_model():
    return timm.create_model(MODEL.name, **TINY).eval()


@pytest.fixture
def path(tmp_path):
    save_weights(tmp_path / "vir.safetensors", tiny_model().state_dict(), METADATA)
    return tmp_path / "vir.safetensors"


def rewritten(path, **changes):
    """The same file with other fields in our metadata."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        fields = json.loads(file.metadata()["vir"]) | changes
    save_file(tensors, path, {"format": "pt", "vir": json.dumps(fields)})
    return path


def test_a_model_comes_back_with_equal_weights_logits_and_metadata(tmp_path):
    model = tiny_model()
    save_weights(tmp_path / "new" / "a.safetensors", model.state_dict(), METADATA)
    loaded = load(tmp_path / "new" / "a.safetensors")
    assert loaded.weights_metadata == METADATA == read_metadata(tmp_path / "new" / "a.safetensors")
    assert not loaded.training
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(x.equal(model.state_dict()[name]) for name, x in loaded.state_dict().items())
    images = torch.randn(2, 3, 16, 24)
    assert loaded(images).equal(model(images))


def test_timm_finds_the_preprocessing_of_the_file(path):
    config = timm.data.resolve_model_data_config(load(path))
    expected = {"input_size": INPUT.size, **dataclasses.asdict(INPUT)}
    for name in ("input_size", "mean", "std", "interpolation", "crop_pct"):
        assert config[name] == expected[name]


def test_timm_loads_the_same_file(path):
    model = timm.create_model("vir_small_patch16_224", checkpoint_path=path, **TINY).eval()
    images = torch.randn(2, 3, 16, 24)
    assert model(images).equal(load(path)(images))


def test_timm_loads_it_as_pretrained_weights(path):
    overlay = dict(file=str(path), input_size=(3, 16, 24), num_classes=3)
    model = timm.create_model("vir_small_patch16_224", pretrained=True, pretrained_cfg_overlay=overlay, **TINY).eval()
    images = torch.randn(2, 3, 16, 24)
    assert model(images).equal(load(path)(images))


def test_hugging_face_tools_see_a_torch_file(path):
    with safe_open(path, "pt") as file:
        assert file.metadata()["format"] == "pt"


def test_any_timm_model_can_be_stored(tmp_path):
    model = timm.create_model("test_vit", num_classes=0).eval()
    metadata = dataclasses.replace(METADATA, model=ModelSpec(
        name="test_vit", args={"num_classes": 0}, classes=(), input=dataclasses.replace(INPUT, size=(3, 160, 160))))
    save_weights(tmp_path / "a.safetensors", model.state_dict(), metadata)
    images = torch.randn(1, 3, 160, 160)
    assert load(tmp_path / "a.safetensors")(images).equal(model(images))


def test_bfloat16_weights_load_into_a_float32_model(tmp_path):
    state_dict = {name: x.bfloat16() for name, x in tiny_model().state_dict().items()}
    save_weights(tmp_path / "a.safetensors", state_dict, dataclasses.replace(METADATA, dtype="bf16"))
    for name, x in load(tmp_path / "a.safetensors").state_dict().items():
        assert x.dtype == torch.float32 and x.equal(state_dict[name].float())


def test_tied_and_non_contiguous_tensors_are_stored_in_full(tmp_path):
    buffer = torch.arange(12.0)
    state_dict = {"a": buffer.view(3, 4).T, "b": buffer, "c": buffer[:4]}
    save_weights(tmp_path / "a.safetensors", state_dict, METADATA)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert all(file.get_tensor(name).equal(x) for name, x in state_dict.items())


def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(path):
    before = path.read_bytes()
    with pytest.raises(AttributeError):
        save_weights(path, {"a": "no tensor"}, METADATA)
    with pytest.raises(TypeError):
        save_weights(path, {}, dataclasses.replace(METADATA, model=dataclasses.replace(MODEL, args={"a": object()})))
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_the_final_name_appears_only_when_the_file_is_whole(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(os, "replace", lambda source, target: seen.append((read_metadata(source), target.exists())))
    save_weights(tmp_path / "a.safetensors", tiny_model().state_dict(), METADATA)
    assert seen == [(METADATA, False)]


def test_others_may_read_the_file_as_the_umask_says(tmp_path):
    before = os.umask(0o022)
    try:
        save_weights(tmp_path / "a.safetensors", {"a": torch.zeros(1)}, METADATA)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == 0o644


@pytest.mark.parametrize("read", [read_metadata, load])
def test_a_missing_file_is_named(read, tmp_path):
    with pytest.raises(DataError, match="no weights file at .*gone.safetensors; vir-consolidate"):
        read(tmp_path / "gone.safetensors")
    with pytest.raises(DataError, match="no weights file at"):
        read(tmp_path)
    with pytest.raises(DataError, match="no weights file at"):
        read(tmp_path / ("x" * 300))


@pytest.mark.parametrize("read", [read_metadata, load])
def test_a_pickle_a_cut_and_an_empty_file_are_refused(read, path):
    whole = path.read_bytes()
    for content in (pickle.dumps({"a": 1}), whole[:-1], whole[:100], b""):
        path.write_bytes(content)
        with pytest.raises(DataError, match="not a safetensors file or is cut short"):
            read(path)


def test_a_file_without_our_metadata_is_refused(path):
    for header in (None, {"format": "pt"}):
        save_file({"a": torch.zeros(1)}, path, header)
        with pytest.raises(DataError, match="does not say which model it holds.*checkpoint_path"):
            load(path)


def test_a_future_format_asks_for_an_update(path):
    with pytest.raises(DataError, match="format_version 3, this vir reads up to 2; update vir"):
        read_metadata(rewritten(path, format_version=3, new_field="x"))


@pytest.mark.parametrize("changes", [{"other": 1}, {"classes": 3}, {"model_args": 3}, {"format_version": "x"}], ids=str)
def test_damaged_metadata_is_refused(path, changes):
    with pytest.raises(DataError, match="has damaged metadata"):
        read_metadata(rewritten(path, **changes))


@pytest.mark.parametrize("name", ["no_such_model", "hf-hub:someone/model", "local-dir:/tmp"])
def test_an_unknown_model_is_named(path, name):
    with pytest.raises(DataError, match=f"holds a '{name}', which timm {timm.__version__} does not know"):
        load(rewritten(path, model_name=name))


@pytest.mark.parametrize("key", ["pretrained", "checkpoint_path", "pretrained_cfg"])
def test_a_file_cannot_make_its_reader_open_other_weights(path, key):
    with pytest.raises(DataError, match=f"model_args .*{key}.* fetch other weights"):
        load(rewritten(path, model_args=TINY | {key: "elsewhere.pth"}))


def test_timm_sees_the_class_count_of_the_file(path):
    model = load(path)
    assert model.pretrained_cfg["num_classes"] == model.default_cfg["num_classes"] == 3


# ---- other arguments than the file's


IMAGES = torch.randn(2, 3, 32, 48)


def test_a_model_is_loaded_for_images_of_another_size(path):
    """As set_input_size makes it of the same model."""
    expected = load(path)
    expected.set_input_size((32, 48))
    model = load(path, img_size=(32, 48))
    assert model(IMAGES).equal(expected(IMAGES))
    assert model.pretrained_cfg["input_size"] == (3, 32, 48) == model.weights_metadata.model.input.size
    assert timm.data.resolve_model_data_config(model)["input_size"] == (3, 32, 48)
    assert model.weights_metadata.model.args["img_size"] == (32, 48) and model.weights_metadata.step == METADATA.step
    again = timm.create_model(MODEL.name, **model.weights_metadata.model.args)
    assert again.state_dict().keys() == model.state_dict().keys()


def stored(path, name, **args):
    """A file of a small model with these arguments, and its tensors."""
    args = dict(num_classes=3) | args
    model = timm.create_model(name, **args)
    size = (3, *timm.layers.to_2tuple(args.get("img_size", model.default_cfg["input_size"][1:])))
    save_weights(path, model.state_dict(), dataclasses.replace(METADATA, model=dataclasses.replace(
        MODEL, name=name, args=args, input=dataclasses.replace(INPUT, size=size))))
    return model.state_dict()


@pytest.mark.parametrize("name, prefix", [(MODEL.name, 0), ("vit_tiny_patch16_224", 1)])
@pytest.mark.parametrize("old, args, grids", [
    ((16, 24), dict(img_size=(48, 8)), ([2, 3], [6, 1])),
    ((32, 32), dict(img_size=(16, 64)), ([4, 4], [2, 8])),
    ((16, 64), dict(img_size=32), ([2, 8], [4, 4])),
    ((16, 64), dict(img_size=[32, 64]), ([2, 8], [4, 8])),
    ((16, 64), dict(patch_size=4), ([2, 8], [4, 16])),
    ((16, 64), dict(patch_size=4, img_size=32), ([2, 8], [8, 8])),
    ((16, 64), dict(patch_size=(4, 16)), ([2, 8], [4, 4])),
    ((32, 32), dict(patch_size=4, img_size=16), ([4, 4], [4, 4])),
    ((56, 224), dict(dynamic_img_size=True), ([7, 28], [7, 28])),  # as many as timm's pretrained 14x14
], ids=str)
def test_positions_and_patches_are_resampled_once_from_the_grid_of_the_file(tmp_path, name, prefix, old, args, grids):
    """As timm resamples them, with the class token's place first in its table and none for it in ours."""
    given = stored(tmp_path / "w", name, img_size=old, patch_size=8, embed_dim=16, depth=1, num_heads=2)
    model = load(tmp_path / "w", **args)
    assert model.pos_embed.equal(
        resample_abs_pos_embed(given["pos_embed"], grids[1], grids[0], num_prefix_tokens=prefix))
    weight, patch = given["patch_embed.proj.weight"], list(timm.layers.to_2tuple(args.get("patch_size", 8)))
    assert model.patch_embed.proj.weight.equal(weight if patch == [8, 8] else resample_patch_embed(weight, patch))
    assert model.norm.weight.equal(given["norm.weight"])
    assert model.patch_embed.grid_size == tuple(grids[1])
    images = torch.randn(1, *model.pretrained_cfg["input_size"])
    assert model(images).shape == (1, 3)


def test_windows_that_would_grow_with_the_images_stay_as_they_are(tmp_path):
    args = dict(img_size=32, window_size=4, patch_size=4, embed_dim=8, depths=(1, 1), num_heads=(2, 2))
    given = stored(tmp_path / "w", "swin_tiny_patch4_window7_224", **args)
    loaded = load(tmp_path / "w", img_size=64)
    assert all(tensor.equal(given[name]) for name, tensor in loaded.state_dict().items())
    assert loaded(torch.randn(1, 3, 64, 64)).shape == (1, 3)


def test_a_model_is_loaded_for_images_of_any_size(path):
    model = load(path, dynamic_img_size=True)
    assert model(IMAGES).allclose(load(path, img_size=(32, 48))(IMAGES), atol=1e-5)
    assert model.pretrained_cfg["input_size"] == (3, 16, 24)


def test_a_timm_model_is_loaded_for_another_size_too(tmp_path):
    for name, size in (("test_vit", 160), ("test_resnet", 160)):
        model = timm.create_model(name, num_classes=3).eval()
        save_weights(tmp_path / name, model.state_dict(), dataclasses.replace(METADATA, model=dataclasses.replace(
            MODEL, name=name, args={"num_classes": 3}, input=dataclasses.replace(INPUT, size=(3, size, size)))))
        if name == "test_vit":
            model.set_input_size(img_size=(80, 96))
        loaded, images = load(tmp_path / name, img_size=(80, 96)), torch.randn(1, 3, 80, 96)
        assert loaded(images).equal(model(images)) and loaded.pretrained_cfg["input_size"] == (3, 80, 96)


@pytest.mark.parametrize("args, said", [
    ({"img_size": (32, 50)}, r"cannot be created with {'img_size': \(32, 50\)} in their place: .*32x50 is not divis"
                             r"ible by patch_size 8x8; the nearest that is: img_size=\(32, 48\)"),
    ({"no_such": 1}, "with model_args .* cannot be created with {'no_such': 1} in their place: .*no_such"),
    ({"num_classes": 10}, r"has a head of 3 classes, not of num_classes=10; .*model.reset_classifier\(…\) after load"),
    ({"depth": 1}, r"does not fit \w+ with {'depth': 1} in the place of its model_args .*: 14 tensors unexpected"),
    ({"depth": 3, "img_size": 32}, r"does not fit \w+ with .*: 14 tensors missing .* leave out what changes other"),
    ({"img_size": None}, "img_size=None is no size of images; give the pixels of one side or of .height, width.,"),
    ({"img_size": 0}, "img_size=0 is no size of images"),
    ({"img_size": (16,)}, r"img_size=\(16,\) is no size of images"),
    ({"img_size": (16, 16, 16)}, r"img_size=\(16, 16, 16\) is no size of images"),
    ({"img_size": 16.0}, "img_size=16.0 is no size of images"),
    ({"img_size": "x"}, "img_size='x' is no size of images; .* leave it out for the size in the file"),
    ({"checkpoint_path": "x.pth"}, "checkpoint_path would fetch other weights than the file's; leave it out"),
], ids=str)
def test_arguments_that_do_not_go_with_the_file_are_told(path, args, said):
    with pytest.raises(SettingsError, match=f"{path.name}.*{said}"):
        load(path, **args)


def test_a_family_whose_positions_timm_does_not_resample_is_told(tmp_path):
    stored(tmp_path / "w", "convit_tiny", img_size=32, embed_dim=16, depth=1, local_up_to_layer=1, num_heads=2)
    with pytest.raises(SettingsError, match=r"another shape \(pos_embed is .*; timm resamples no positions for this "
                                            "family; leave img_size out$"):
        load(tmp_path / "w", img_size=64)


def test_the_class_count_of_the_file_may_be_given(tmp_path, path):
    assert load(path, num_classes=3).num_classes == 3
    args = {key: value for key, value in TINY.items() if key != "num_classes"}  # then it is the model's own
    model = timm.create_model(MODEL.name, **args)
    save_weights(tmp_path / "w", model.state_dict(), dataclasses.replace(
        METADATA, model=dataclasses.replace(MODEL, args=args, classes=())))
    assert load(tmp_path / "w", num_classes=1000).num_classes == 1000
    with pytest.raises(SettingsError, match="has a head of 1000 classes, not of num_classes=3; leave it out"):
        load(tmp_path / "w", num_classes=3)


@pytest.mark.parametrize("extra", [{"no_such_argument": 1}, {"num_heads": 5}, {"img_size": 17}], ids=str)
def test_arguments_that_the_model_refuses_are_told(path, extra):
    with pytest.raises(DataError, match="cannot create 'vir_small_patch16_224' with model_args"):
        load(rewritten(path, model_args=TINY | extra))


def test_tensors_that_do_not_fit_are_told(path):
    with pytest.raises(DataError, match=r"14 tensors unexpected \(blocks.1.* correct the model_args"):
        load(rewritten(path, model_args=TINY | {"depth": 1}))
    with pytest.raises(DataError, match=r"14 tensors missing \(blocks.2"):
        load(rewritten(path, model_args=TINY | {"depth": 3}))
    with pytest.raises(DataError, match=r"of another shape \(pos_embed is \[1, 6, 16\], not \[1, 4, 16\]\)"):
        load(rewritten(path, model_args=TINY | {"img_size": 16}))


def test_classes_that_are_not_the_logits_are_told(path):
    with pytest.raises(DataError, match="names 2 classes but its model has 3 logits"):
        load(rewritten(path, classes=["a", "b"]))


def test_a_file_is_asked_whether_it_is_ours(path, tmp_path):
    assert stated_metadata(path) == METADATA == read(path)[0]
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "text").write_text("no weights")
    for other in ("other.safetensors", "text", "missing"):
        assert stated_metadata(tmp_path / other) is None
    with pytest.raises(DataError, match="damaged metadata"):
        stated_metadata(rewritten(path, classes=3))


def test_the_loader_is_exported():
    assert vir.models.load is load
