"""The weights that training begins from: what is taken, what is said of it, and what is refused."""

import json
import logging
import os
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from timm.models._hub import save_for_hf

import vir.models  # noqa: F401  registers the models
from support.launchers import HANGS, call, torchrun
from support.tiny_runs import command, launch
from vir.config import ModelConfig
from vir.errors import DataError, SettingsError
from vir.models import WeightsMetadata, load, save_weights
from vir.models.build import build
from vir.models.initialize import check_pretrained, initialize_from, initialize_pretrained
from vir.models.network import mismatches, network_of, resampled, timm_cfg
from vir.weights.hub import write_folder
from vir.weights.spec import ModelSpec, input_of

torch.set_num_threads(1)
VIR = "vir_tiny_patch16_224"
TINY = dict(patch_size=14, embed_dim=16, depth=2, num_heads=2)


def config(**changed):
    return ModelConfig(**{"name": VIR, "img_size": 28, "args": TINY} | changed)


def of_ours(path: Path, classes: str, **changed) -> tuple[dict[str, torch.Tensor], str]:
    """A file of ours with those classes, and its tensors."""
    model, spec = build(config(**changed), classes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    save_weights(path, model.state_dict(), WeightsMetadata(model=spec, step=7, samples_seen=56, ema=True, dtype="fp32"))
    return model.state_dict(), str(path)


@pytest.fixture
def weights(tmp_path):
    """A file that names neither model nor classes, which are two."""
    model, _ = build(config(), ["a", "b"])
    torch.save(model.state_dict(), tmp_path / "w.pth")
    return model.state_dict(), str(tmp_path / "w.pth")


@pytest.fixture
def said(caplog):
    """The lines of the log so far."""
    caplog.set_level(logging.INFO, logger="vir")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "vir"]


def test_training_begins_from_the_weights_of_a_file(weights, said):
    expected, path = weights
    model, _ = build(config(init_from=path), ["x", "y"])
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert said() == [
        f"initial weights: {len(expected)} tensors from {path}",
        "initial weights: the head is taken, for it has as many classes, 2; whether they are the same is not known"]


def test_weights_of_a_checkpoint_to_come_make_those_of_a_file_needless(weights):
    torch.manual_seed(7)
    expected, _ = build(config(), "ab")
    torch.manual_seed(7)
    model, _ = build(config(init_from="/no/such/file"), "ab", fresh=False)
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in model.state_dict().items())
    build(ModelConfig(name="test_resnet", pretrained=True), "ab", fresh=False)


def begun(path, classes, **changed) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What is begun with, and what would be without the file."""
    torch.manual_seed(7)
    fresh, _ = build(config(**changed), classes)
    torch.manual_seed(7)
    model, _ = build(config(init_from=path, **changed), classes)
    return model.state_dict(), fresh.state_dict()


def check_body(model, expected):
    for name in expected:
        assert name.startswith("head.") or torch.equal(model[name], expected[name]), name


def test_a_head_of_another_class_count_begins_at_random_and_the_rest_does_not(weights, said):
    model, fresh = begun(weights[1], "abc")
    check_body(model, weights[0])
    assert all(torch.equal(model[name], fresh[name]) for name in ("head.weight", "head.bias"))
    assert said()[-1] == "initial weights: the head begins at random: 2 classes there, 3 here"


@pytest.mark.parametrize("classes, line", [
    ("abcd", "is taken: the same 4 classes"),
    ("dbca", "is taken row by row: all 4 classes are among the 4 there"),
    ("cb", "is taken row by row: all 2 classes are among the 4 there"),
    ("abce", "is taken row by row: 3 of 4 classes are among the 4 there, the others begin at random (e)"),
    ("wxyz", "begins at random: none of the 4 classes is among the 4 there (w, x, y, …)"),
    ("ecabd", "is taken row by row: 4 of 5 classes are among the 4 there, the others begin at random (e)"),
])
def test_the_head_of_a_file_that_names_its_classes_is_taken_by_their_names(tmp_path, said, classes, line):
    expected, path = of_ours(tmp_path / "w.safetensors", "abcd")
    model, fresh = begun(path, classes)
    check_body(model, expected)
    for name in ("head.weight", "head.bias"):
        rows = [expected[name]["abcd".index(one)] if one in "abcd" else fresh[name][place]
                for place, one in enumerate(classes)]
        assert torch.equal(model[name], torch.stack(rows))
    assert said() == [f"initial weights: {len(expected)} tensors from {path}, a {VIR} (EMA weights of step 7)",
                      f"initial weights: the head {line}"]


def test_a_file_without_a_head_leaves_it_at_random(weights, tmp_path, said):
    expected, _ = weights
    save_file({name: tensor.contiguous() for name, tensor in expected.items() if not name.startswith("head.")},
              tmp_path / "body.safetensors")
    model, fresh = begun(str(tmp_path / "body.safetensors"), "abc")
    check_body(model, expected)
    assert torch.equal(model["head.weight"], fresh["head.weight"])
    assert said()[-1] == "initial weights: the head begins at random: there is none in it"


def test_positions_are_resampled_and_the_log_says_from_which_size(tmp_path, said):
    expected, path = of_ours(tmp_path / "w.safetensors", "ab", img_size=56)
    model, _ = build(config(init_from=path, img_size=84), "ab")
    table = resample_abs_pos_embed(expected["pos_embed"], [6, 6], [4, 4], num_prefix_tokens=0)
    assert torch.equal(model.pos_embed, table) and torch.equal(model.norm.weight, expected["norm.weight"])
    assert ("initial weights: resampled for images of 56x56 -> 84x84 pixels: pos_embed [1, 16, 16] -> [1, 36, 16]"
            ) in said()


def of_size(path: Path, name: str, size: tuple[int, int], dtype: str = "fp32") -> dict[str, torch.Tensor]:
    """A file of ours for images of that size, with patches of 8x8, and its tensors."""
    args = dict(img_size=size, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=2)
    model = timm.create_model(name, **args)
    torch.nn.init.normal_(model.pos_embed)
    kept = {key: x.to({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]) for key, x in model.state_dict().items()}
    save_weights(path, kept, WeightsMetadata(
        model=ModelSpec(name=name, args=args, input=input_of(model), classes=("a", "b")), step=7, samples_seen=56,
        ema=False, dtype=dtype))
    return kept


@pytest.mark.parametrize("name, prefix", [(VIR, 0), ("vit_tiny_patch16_224", 1)])
@pytest.mark.parametrize("old, new, patch", [
    ((16, 64), (32, 32), 8), ((32, 32), (16, 64), 8),  # 2x8 and 4x4 places, and back
    ((16, 64), (64, 16), 8), ((16, 64), (32, 64), 8), ((16, 64), (64, 128), 16), ((32, 32), (64, 64), 16),
    ((56, 224), (56, 224), 8),  # 7x28, as many as the 14x14 of timm's pretrained weights
    ((56, 224), (112, 112), 8),
])
def test_positions_are_resampled_from_the_grid_of_the_file(tmp_path, said, name, prefix, old, new, patch):
    """With the class token's place first in timm's table and none for it in ours."""
    given = of_size(tmp_path / "w.safetensors", name, old)
    model = timm.create_model(name, img_size=new, patch_size=patch, embed_dim=16, depth=1, num_heads=2, num_classes=2)
    initialize_from(model, tmp_path / "w.safetensors", "ab")
    grids = [[side // step for side in size] for size, step in ((old, 8), (new, patch))]
    table = resample_abs_pos_embed(given["pos_embed"], grids[1], grids[0], num_prefix_tokens=prefix)
    weight = given["patch_embed.proj.weight"]
    assert torch.equal(model.pos_embed, table)
    assert torch.equal(model.patch_embed.proj.weight,
                       weight if patch == 8 else resample_patch_embed(weight, [patch, patch]))
    lines = [line for line in said() if "resampled for" in line]
    sizes = "{}x{} -> {}x{}".format(*old, *new)
    assert len(lines) == (old != new) and all(f"for images of {sizes} pixels: " in line for line in lines)
    assert all(("pos_embed [" in line) == (grids[0] != grids[1]) for line in lines)


def test_only_what_is_resampled_is_told_of_a_file_of_half_precision(tmp_path, said):
    given = of_size(tmp_path / "w.safetensors", VIR, (16, 64), "bf16")
    model = timm.create_model(VIR, img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=2)
    initialize_from(model, tmp_path / "w.safetensors", "ab")
    table = resample_abs_pos_embed(given["pos_embed"].float(), [4, 4], [2, 8], num_prefix_tokens=0)
    assert torch.equal(model.pos_embed, table)
    assert [line for line in said() if "resampled for" in line] == [
        "initial weights: resampled for images of 16x64 -> 32x32 pixels: pos_embed [1, 16, 16] -> [1, 16, 16]"]


def test_what_set_input_size_would_make_of_another_shape_is_left_to_timms_filter():
    """Swin would scale its windows with the images; the run's are those of its arguments, the file's too."""
    args = dict(window_size=4, patch_size=4, embed_dim=8, depths=(1, 1), num_heads=(2, 2), num_classes=2)
    source = timm.create_model("swin_tiny_patch4_window7_224", img_size=32, **args)
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=64, **args)
    given = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    fitted = resampled(given, model, source)
    assert fitted.keys() == given.keys() and all(torch.equal(fitted[name], given[name]) for name in given)


def test_a_family_without_a_grid_of_patches_is_left_to_timms_filter():
    """Such a model does not tell which size of images it was built for, by which MaxViT's windows grow."""
    source, model = (timm.create_model("maxvit_pico_rw_256", img_size=side, num_classes=2) for side in (64, 128))
    given = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    assert mismatches(given, model.state_dict()) and not mismatches(resampled(given, model, source), model.state_dict())


def test_vir_takes_patches_of_another_size():
    torch.manual_seed(1)
    model = timm.create_model(VIR, **TINY, img_size=(28, 56))
    table, weight = model.pos_embed.detach(), model.patch_embed.proj.weight.detach()
    model.set_input_size((28, 84), patch_size=7)
    assert torch.equal(model.pos_embed, resample_abs_pos_embed(table, [4, 12], [2, 4], num_prefix_tokens=0))
    assert torch.equal(model.patch_embed.proj.weight, resample_patch_embed(weight, [7, 7]))
    assert {info["reduction"] for info in model.feature_info} == {7}
    assert model(torch.zeros(1, 3, 28, 84)).shape == (1, 1000)
    with pytest.raises(SettingsError, match="patch_size is 0x0; it must be at least 1x1"):
        model.set_input_size(28, patch_size=0)


@pytest.mark.parametrize("changed, said", [
    ({"name": "hf-hub:someone/model"}, "holds a 'hf-hub:someone/model', which timm .* does not know"),
    ({"args": {"checkpoint_path": "x.pth"}}, r"has model_args \['checkpoint_path'\], which would fetch other weight"),
    ({"args": {"num_hats": 2}}, "timm .* cannot create 'vir_tiny_patch16_224' with .*num_hats.*; install the versions"),
])
def test_a_file_opens_no_other_weights_and_says_what_it_holds(changed, said):
    image = input_of(timm.create_model("test_vit"))
    spec = ModelSpec(**{"name": VIR, "args": {}, "input": image, "classes": ()} | changed)
    with pytest.raises(DataError, match=f"w.safetensors:? {said}"):
        network_of("w.safetensors", spec)


def test_timm_is_told_the_images_of_a_file_and_its_class_count():
    image = input_of(timm.create_model("test_vit"))
    spec = ModelSpec(name=VIR, args={"depth": 1}, input=image, classes=())
    assert timm_cfg(spec) == image.timm_cfg()
    assert network_of("w", spec).pretrained_cfg["input_size"] == (3, 160, 160)
    spec = ModelSpec(name=VIR, args={"depth": 1, "num_classes": 7}, input=image, classes=())
    assert timm_cfg(spec) == image.timm_cfg() | {"num_classes": 7}


def test_weights_of_another_architecture_are_refused_by_name(weights, tmp_path):
    deeper = {"args": {**TINY, "depth": 3}}
    with pytest.raises(DataError, match=r"w.pth does not fit: this run builds a vir_tiny_\w+: \d+ tensors missing "
                                        r"\(blocks.2.*give weights of the same architecture$"):
        build(config(init_from=weights[1], **deeper), "ab")
    _, path = of_ours(tmp_path / "w.safetensors", "ab")
    with pytest.raises(DataError, match=rf"step 7\) does not fit: it holds a {VIR} with .*'depth': 2.*, this run "
                                        rf"builds a {VIR}: \d+ tensors missing \(blocks.2.*or the same --model.args$"):
        build(config(init_from=path, **deeper), "ab")
    with pytest.raises(DataError, match=f"it holds a {VIR} with .*, this run builds a test_vit: .*--model.name {VIR}$"):
        build(ModelConfig(name="test_vit", init_from=path), "ab")


RETENTION = "blocks.0.retention has {0} there, {1} here; blocks.1.retention has {0} there, {1} here; give weights of"


@pytest.mark.parametrize("changed, said", [
    ({"args": {**TINY, "num_heads": 4}}, RETENTION.format("num_heads 2", "4")),
    ({"args": {**TINY, "retention_dims": 2}}, RETENTION.format("dims 1", "2")),
    ({"name": VIR.replace("vir", "vir2d")}, f"builds a vir2d_.*{RETENTION.format('dims 1', '2')}.*--model.name {VIR}$"),
], ids=["heads", "dims", "name"])
def test_weights_of_another_network_of_equal_shapes_are_refused(tmp_path, changed, said):
    _, path = of_ours(tmp_path / "w.safetensors", "ab")
    with pytest.raises(DataError, match=f"does not fit: it holds a {VIR} with .*{said}"):
        build(config(init_from=path, **changed), "ab")


def test_another_activation_is_another_network(tmp_path):
    _, path = of_ours(tmp_path / "w.safetensors", "ab", args={**TINY, "retention_norm": "layernorm"})
    with pytest.raises(DataError, match="blocks.0.retention.act is a Identity there, a GELU here; blocks.1.ret"):
        build(config(init_from=path, args={**TINY, "retention_norm": "layernorm_gelu"}), "ab")


VIT = dict(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=2)


def of_a_name(path: Path, name: str, **args) -> dict[str, torch.Tensor]:
    """A file of ours of that model of timm, and its tensors."""
    model = timm.create_model(name, **args)
    save_weights(path, model.state_dict(), WeightsMetadata(
        model=ModelSpec(name=name, args=args, input=input_of(model), classes=("a", "b")), step=7, samples_seen=56,
        ema=False, dtype="fp32"))
    return model.state_dict()


@pytest.mark.parametrize("name, args, changed, problem", [
    ("deit_small_patch16_224", VIT, {"num_heads": 4},
     "blocks.0.attn has num_heads 2 there, 4 here; blocks.1.attn has num_heads 2 there, 4 here; give weights"),
    ("deit_small_patch16_224", VIT, {"act_layer": "gelu_tanh"}, "blocks.0.mlp.act is a GELU there, a GELUTanh here; "),
    ("test_resnet", {"num_classes": 2}, {"output_stride": 8}, "layer3.0 has stride 2 there, 1 here; layer3.0"),
])
def test_networks_of_timm_that_compute_otherwise_are_refused(tmp_path, name, args, changed, problem):
    of_a_name(tmp_path / "w.safetensors", name, **args)
    model = timm.create_model(name.replace("deit", "vit"), **args | changed)
    with pytest.raises(DataError, match=f"it holds a {name} .*: {problem}"):
        initialize_from(model, tmp_path / "w.safetensors", "ab")


@pytest.mark.parametrize("changed", [
    {}, {"img_size": 64}, {"patch_size": 4}, {"num_classes": 5},
    {f"{place}_rate": 0.1 for place in ("drop", "pos_drop", "patch_drop", "proj_drop", "attn_drop", "drop_path")},
], ids=str)
def test_another_name_of_the_same_network_is_allowed_and_told(tmp_path, said, changed):
    """Regularisation, sizes of images and patches, and heads make no other network."""
    given = of_a_name(tmp_path / "w.safetensors", "deit_small_patch16_224", **VIT)
    model = timm.create_model("vit_small_patch16_224", **VIT | changed)
    initialize_from(model, tmp_path / "w.safetensors", "ab" if "num_classes" not in changed else "abcde")
    assert torch.equal(model.blocks[1].attn.qkv.weight, given["blocks.1.attn.qkv.weight"])
    assert said()[0] == (f"initial weights: {len(given)} tensors from {tmp_path}/w.safetensors, a deit_small_patch16_"
                         "224 (raw weights of step 7)")


def test_a_network_without_a_head_is_no_other_network(tmp_path, said):
    given = of_a_name(tmp_path / "w.safetensors", "vit_small_patch16_224", **VIT | {"num_classes": 0})
    model = timm.create_model("vit_small_patch16_224", **VIT)
    initialize_from(model, tmp_path / "w.safetensors", "ab")
    assert torch.equal(model.norm.weight, given["norm.weight"])
    assert said()[-1] == "initial weights: the head begins at random: there is none in it"


@pytest.mark.parametrize("name, old, new, more, grids", [
    ("cait_xxs24_224", (16, 64), 32, {**VIT, "depth": 1}, "pos_embed is of 2x8 patches, not of 4x4"),
    ("cait_xxs24_224", 32, (16, 64), {**VIT, "depth": 1}, "pos_embed is of 4x4 patches, not of 2x8"),
    ("tnt_s_patch16_224", (32, 128), 64, {"depth": 1}, "patch_pos is of 2x8 patches, not of 4x4"),
    ("tnt_s_patch16_224", (32, 128), 128, {"depth": 1}, "patch_pos is of 2x8 patches, not of 8x8"),
    ("crossvit_9_240", (120, 480), 240, {}, r"pos_embed_\d is of \d+x\d+ patches, not of "),
    ("hiera_tiny_224", (448, 112), 224, {}, "pos_embed is of 112x28 patches, not of 56x56"),
], ids=str)
def test_positions_that_a_family_cannot_resample_are_not_taken_as_they_are(tmp_path, name, old, new, more, grids):
    """2x8 places are as many as 4x4, and timm would take 2x8 for a square."""
    args = {**more, "num_classes": 2}
    of_a_name(tmp_path / "w.safetensors", name, **args | {"img_size": old})
    model = timm.create_model(name, **args | {"img_size": new})
    with pytest.raises(DataError, match=f": {grids}.* and timm resamples no positions between them for this fami"):
        initialize_from(model, tmp_path / "w.safetensors", "ab")


def test_training_begins_from_weights_in_several_files(tmp_path, said):
    expected, path = of_ours(tmp_path / "w.safetensors", "ab")
    with safe_open(path, "pt") as file:
        header = file.metadata()
    os.remove(path)
    names = {name: f"w-0000{number % 2 + 1}-of-00002.safetensors" for number, name in enumerate(expected)}
    for part in set(names.values()):
        save_file({name: expected[name].contiguous() for name in names if names[name] == part}, tmp_path / part, header)
    Path(f"{path}.index.json").write_text(json.dumps({"weight_map": names}))
    for name in (path, f"{path}.index.json"):
        model, _ = build(config(), "ab")
        initialize_from(model, name, "ab")
        assert all(torch.equal(tensor, expected[key]) for key, tensor in model.state_dict().items())
    assert said()[-1] == "initial weights: the head is taken: the same 2 classes"


def test_a_file_that_is_not_of_the_model_it_names_is_refused(tmp_path):
    _, path = of_ours(tmp_path / "w.safetensors", "ab")
    with safe_open(path, "pt") as file:
        fields, tensors = json.loads(file.metadata()["vir"]), {name: file.get_tensor(name) for name in file.keys()}
    for args, problem in (({"depth": 1}, "14 tensors unexpected"), ({"embed_dim": 8192}, "several times as many")):
        changed = json.dumps(fields | {"model_args": fields["model_args"] | args})
        save_file(tensors, path, {"format": "pt", "vir": changed})
        with pytest.raises(DataError, match=f"w.safetensors does not fit {VIR} with model_args .*{problem}.* correct"):
            build(config(init_from=path), "ab")


def test_a_table_of_positions_that_cannot_be_resampled_is_told(tmp_path):
    model = timm.create_model(VIR, **TINY, img_size=(28, 42), num_classes=2)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    with pytest.raises(DataError, match=f"w.pth does not fit: this run builds a {VIR}: .* 6 places, which make no"):
        build(config(init_from=str(tmp_path / "w.pth")), "ab")


@pytest.mark.parametrize("name, content, reason", [
    ("w.safetensors", b"", "SafetensorError: .*header"),
    ("w.safetensors", b"no weights", "SafetensorError: .*header"),
    ("w.pth", b"", "EOFError"),
    ("w.pth", b"hello", "KeyError: 101"),
    ("w.pth", [1, 2], "AttributeError: 'list' object"),
    ("w.pth", torch.zeros(3), "AttributeError: 'Tensor' object"),
    ("w.pth", {"state_dict": "x"}, "AttributeError: 'str' object"),
], ids=str)
def test_a_file_that_holds_no_weights_is_told(tmp_path, name, content, reason):
    path = tmp_path / name
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(DataError, match=f"{name} cannot be read as weights: {reason}.*; give a .safetensors file, or "
                                        r"one that torch.save wrote of a model's state_dict\(\)$"):
        build(config(init_from=str(path)), "ab")


@pytest.mark.parametrize("name", ["missing.pth", ".", "x" * 300])
def test_where_there_is_no_file_it_is_told(tmp_path, name):
    with pytest.raises(DataError, match="no weights file at .*; vir-consolidate makes one from a run folder"):
        initialize_from(torch.nn.Linear(1, 1), tmp_path / name)


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_a_file_that_would_run_code_is_refused_and_does_not_run(tmp_path):
    torch.save({"state_dict": Payload(tmp_path / "it-ran")}, tmp_path / "w.pth")
    with pytest.raises(DataError, match="w.pth cannot be read as weights: "):
        build(config(init_from=str(tmp_path / "w.pth")), "ab")
    assert not (tmp_path / "it-ran").exists()


# ---- folders of Hugging Face


def as_folder(tmp_path, model, **more) -> tuple[dict[str, torch.Tensor], str]:
    """What timm writes of a model, and its tensors."""
    save_for_hf(model, tmp_path / "hub", **{"safe_serialization": True, **more})
    return model.state_dict(), str(tmp_path / "hub")


@pytest.mark.parametrize("is_safe", [True, False])
def test_training_begins_from_a_folder_that_timm_wrote(tmp_path, said, is_safe):
    expected, path = as_folder(tmp_path, timm.create_model("deit_small_patch16_224", **VIT), safe_serialization=is_safe,
                               model_config={"label_names": ["b", "a"]})
    model = timm.create_model("vit_small_patch16_224", **VIT | {"img_size": 64})
    initialize_from(model, path, "ab")
    table = resample_abs_pos_embed(expected["pos_embed"], [8, 8], [4, 4], num_prefix_tokens=1)
    assert torch.equal(model.pos_embed, table) and torch.equal(model.norm.weight, expected["norm.weight"])
    assert torch.equal(model.head.weight, expected["head.weight"][[1, 0]])
    assert said() == [
        f"initial weights: {len(expected)} tensors from {path}, a deit_small_patch16_224",
        "initial weights: resampled for images of 32x32 -> 64x64 pixels: pos_embed [1, 17, 16] -> [1, 65, 16]",
        "initial weights: the head is taken row by row: all 2 classes are among the 2 there"]


def test_a_folder_of_ours_is_taken_as_the_file_in_it(tmp_path, said):
    expected, path = of_ours(tmp_path / "w.safetensors", "abc", img_size=56)
    write_folder(tmp_path / "hub", Path(path), load(path))
    model, _ = build(config(init_from=str(tmp_path / "hub"), img_size=84, args={**TINY, "patch_size": 7}), "db")
    weight, table = expected["patch_embed.proj.weight"], expected["pos_embed"]
    assert torch.equal(model.patch_embed.proj.weight, resample_patch_embed(weight, [7, 7]))
    assert torch.equal(model.pos_embed, resample_abs_pos_embed(table, [12, 12], [4, 4], num_prefix_tokens=0))
    assert torch.equal(model.blocks[1].mlp.fc1.weight, expected["blocks.1.mlp.fc1.weight"])
    lines = said()
    assert lines[0].endswith(f"tensors from {tmp_path}/hub/model.safetensors, a {VIR} (EMA weights of step 7)")
    assert lines[-1].endswith("the head is taken row by row: 1 of 2 classes are among the 3 there, the others begin at "
                              "random (d)")


def test_names_of_old_in_a_folder_are_those_of_timms_filter(tmp_path):
    """Files of Swin from before 2023 have the indexes of their windows."""
    args = dict(img_size=32, window_size=4, patch_size=4, embed_dim=8, depths=(1, 1), num_heads=(2, 2), num_classes=2)
    expected, path = as_folder(tmp_path, timm.create_model("swin_tiny_patch4_window7_224", **args))
    save_file(expected | {"layers.0.blocks.0.attn.relative_position_index": torch.zeros(16, 16, dtype=torch.int64)},
              f"{path}/model.safetensors")
    model = timm.create_model("swin_tiny_patch4_window7_224", **args)
    initialize_from(model, path, "ab")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("changed, said", [
    ({"model_args": {"checkpoint_path": "x.pth"}}, r"hub has model_args \['checkpoint_path'\], which would fetch oth"),
    ({"architecture": "hf-hub:someone/model"}, "hub holds a 'hf-hub:someone/model', which timm .* does not know"),
    ({"model_args": VIT | {"depth": 1 << 30}}, "hub holds .* numbers in all, and its model_args ask for depths and"),
    ({"model_args": VIT | {"depth": 1}}, "hub does not fit vit_small_patch16_224 with .* tensors unexpected"),
    ({"model_args": VIT | {"num_heads": 4}}, "hub, a vit_small_patch16_224 does not fit: it holds a .* has num_heads 4 "
                                             "there, 2 here"),
])
def test_a_folder_opens_no_other_weights_and_says_what_it_holds(tmp_path, changed, said):
    model = timm.create_model("vit_small_patch16_224", **VIT)
    _, path = as_folder(tmp_path, model)
    fields = json.loads(Path(path, "config.json").read_text())
    Path(path, "config.json").write_text(json.dumps(fields | changed))
    with pytest.raises(DataError, match=said):
        initialize_from(model, path, "ab")


def test_a_folder_with_code_or_damage_is_refused_and_nothing_runs(tmp_path):
    model = timm.create_model("vit_small_patch16_224", **VIT)
    _, path = as_folder(tmp_path, model)
    os.remove(f"{path}/model.safetensors")
    torch.save({"state_dict": Payload(tmp_path / "it-ran")}, f"{path}/pytorch_model.bin")
    with pytest.raises(DataError, match="hub/pytorch_model.bin cannot be read as weights: "):
        initialize_from(model, path)
    assert not (tmp_path / "it-ran").exists()
    save_file({"pos_embed": torch.zeros(3)}, f"{path}/model.safetensors")
    with pytest.raises(DataError, match="hub holds no weights of the vit_small_patch16_224 that its config.json "
                                        "describes: .*; copy both files again"):
        initialize_from(model, path)


# ---- the head


@pytest.mark.parametrize("classes", ["ab", "abc"])
def test_a_head_that_is_reset_begins_at_random_though_that_of_the_file_fits(tmp_path, said, classes):
    expected, path = of_ours(tmp_path / "w.safetensors", "ab")
    torch.manual_seed(7)
    fresh, _ = build(config(), classes)
    torch.manual_seed(7)
    model, _ = build(config(init_from=path, reset_head=True), classes)
    check_body(model.state_dict(), expected)
    assert torch.equal(model.head.weight, fresh.head.weight) and torch.equal(model.head.bias, fresh.head.bias)
    assert said()[-1] == "initial weights: the head begins at random, as --model.reset_head says"


def test_the_head_of_pretrained_weights_is_reset_too(monkeypatch, said):
    source, model = timm.create_model("test_resnet"), timm.create_model("test_resnet")
    own = model.fc.weight.clone()
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: source)
    initialize_pretrained(model, "test_resnet", reset_head=True)
    assert torch.equal(model.fc.weight, own) and torch.equal(model.conv1[0].weight, source.conv1[0].weight)
    assert said()[-1] == "initial weights: the head begins at random, as --model.reset_head says"


def test_a_reset_of_no_head_or_of_no_weights_is_refused(tmp_path):
    with pytest.raises(SettingsError, match="--model.reset_head is given and no weights to begin from are; give "
                                            "--model.init_from or --model.pretrained, or leave it out"):
        ModelConfig(reset_head=True)
    model = torch.nn.Linear(2, 2)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(SettingsError, match="--model.reset_head: a Linear does not say which of its layers is the he"):
        initialize_from(model, tmp_path / "w.safetensors", reset_head=True)


def test_without_classes_the_head_is_judged_by_their_count(tmp_path):
    expected, path = of_ours(tmp_path / "w.safetensors", "ab")
    model, _ = build(config(), "xy")
    initialize_from(model, path)
    assert torch.equal(model.head.weight, expected["head.weight"])


def test_only_families_that_know_how_resample():
    tensors = {"a": torch.zeros(1)}
    assert resampled(tensors, torch.nn.Linear(1, 1)) == tensors


def test_mismatches_are_counted_by_kind_and_the_first_are_named():
    def tensors(**shapes):
        return {name: torch.zeros(shape) for name, shape in shapes.items()}

    assert mismatches(tensors(a=1, b=2), tensors(a=1, b=2)) == ""
    said = mismatches(tensors(a=1, b=2, x=1), tensors(a=(3, 1), b=2, c=1, d=1, e=1, f=1))
    assert said == ("4 tensors missing (c, d, e, …); 1 tensors unexpected (x); "
                    "1 tensors of another shape (a is [1], not [3, 1])")
    whole, half = {"a": torch.zeros(1, dtype=torch.int64)}, {"a": torch.zeros(1, dtype=torch.bfloat16)}
    assert mismatches(whole, half) == "1 tensors of another type (a is torch.int64, not torch.bfloat16)"
    assert mismatches(half, whole) == mismatches(half, tensors(a=1)) == ""  # counts of batches that were averaged


def test_both_heads_of_a_distilled_model_are_taken_by_class_names(tmp_path, said):
    args = TINY | {"distilled": True}
    there, path = of_ours(tmp_path / "w.safetensors", "abc", args=args)
    found = build(config(args=args, init_from=path), "ca")[0].state_dict()
    for head in ("head", "head_dist"):
        assert torch.equal(found[f"{head}.weight"], there[f"{head}.weight"][[2, 0]])
        assert torch.equal(found[f"{head}.bias"], there[f"{head}.bias"][[2, 0]])
    assert torch.equal(found["dist_token"], there["dist_token"])
    with pytest.raises(DataError, match=r"3 tensors missing \(dist_token, head_dist.bias, head_dist.weight\)"):
        build(config(args=args, init_from=of_ours(tmp_path / "plain.safetensors", "ca")[1]), "ca")


# ---- pretrained


@pytest.mark.parametrize("name, line", [
    (VIR, "no pretrained weights of vir_tiny_patch16_224; timm.list_pretrained.* --model.init_from"),
    ("vit_tiny_patch16_384", None),
    ("vit_small_patch16_36x1_224", r"no pretrained weights of vit_small_\w+; there are some of vit_\w+\.\w+, .*, …$"),
])
def test_a_model_without_pretrained_weights_is_refused_and_others_are_named(name, line):
    if line is None:
        assert check_pretrained(name).hf_hub_id.startswith(f"timm/{name}.")
        return
    with pytest.raises(SettingsError, match=f"--model.pretrained: timm has {line}"):
        check_pretrained(name)


def test_one_of_the_two_beginnings_is_given():
    with pytest.raises(SettingsError, match="--model.pretrained true and --model.init_from w.pth are both given"):
        ModelConfig(pretrained=True, init_from="w.pth")


def hub_cache(home: Path, name: str) -> dict[str, torch.Tensor]:
    """A cache of Hugging Face as a download leaves it, with random weights in the place of the published ones."""
    torch.manual_seed(1)
    tensors = timm.create_model(name).state_dict()
    repository = home / "hub" / f"models--{timm.get_pretrained_cfg(name).hf_hub_id.replace('/', '--')}"
    (repository / "snapshots" / "0123abcd").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abcd")
    save_file(tensors, repository / "snapshots" / "0123abcd" / "model.safetensors")
    return tensors


BUILD = """
import sys
import torch
from vir import cli, log
from vir.config import ModelConfig
from vir.errors import VirError
from vir.models.build import build

log.start(0)
for word in sys.argv[2:]:
    name, size, count = word.split("/")
    print("##", word, flush=True)
    try:
        model, _ = build(ModelConfig(name=name, img_size=int(size), pretrained=True), list(map(str, range(int(count)))))
        torch.save(model.state_dict(), f"{sys.argv[1]}/{name}-{count}.pt")
    except VirError as error:
        print(cli.tell(error, "build"))
"""


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """Networks with timm's own weights, one after another in a process that has a cache and no network: their tensors,
    those of the cache, and what was said of each."""
    tmp = tmp_path_factory.mktemp("pretrained")
    published = {name: hub_cache(tmp / "home", name) for name in ("test_resnet", "test_vit", "test_efficientnet")}
    damaged = next(tmp.glob("home/hub/*test_efficientnet*/snapshots/*/model.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:100])
    words = ["test_resnet/64/10", "test_resnet/64/1000", "test_vit/80/10", "test_efficientnet/64/10",
             "test_convnext/64/10", "gcvit_xxtiny/224/10"]
    # The last one has a web address alone, and the proxy is a port where nobody listens.
    done = call(sys.executable, "-c", BUILD, tmp, *words, HF_HOME=str(tmp / "home"), HF_HUB_OFFLINE="1",
                TORCH_HOME=str(tmp / "torch"), https_proxy="http://127.0.0.1:9")
    assert done.returncode == 0, done.stdout
    said = {part.split("\n")[0]: part for part in done.stdout.split("## ")[1:]}
    assert list(said) == words
    return tmp, published, said


@pytest.mark.parametrize("word, own, lines", [
    ("test_resnet/64/10", {"fc.weight", "fc.bias"}, ["the head begins at random: 1000 classes there, 10 here"]),
    ("test_resnet/64/1000", set(), ["the head is taken, for it has as many classes, 1000; "]),
    ("test_vit/80/10", {"head.weight", "head.bias", "pos_embed"}, [
        "the head begins at random: 1000 classes there, 10 here",
        "resampled for images of 160x160 -> 80x80 pixels: pos_embed [1, 101, 64] -> [1, 26, 64]"]),
])
def test_timms_own_weights_come_from_its_cache(pretrained, word, own, lines):
    tmp, published, said = pretrained
    name, _, count = word.split("/")
    found, expected = torch.load(tmp / f"{name}-{count}.pt"), published[name]
    assert {key for key in found if not torch.equal(found[key], expected[key])} == own
    for line in (f"{len(expected)} tensors from timm's pretrained {name}.r160_in1k", *lines):
        assert f" initial weights: {line}" in said[word]


@pytest.mark.parametrize("word, place", [
    ("test_convnext/64/10", "test_convnext.r160_in1k (huggingface.co/timm/test_convnext.r160_in1k) come neither from "
                            "the network nor from the cache {tmp}/home/hub (HF_HOME moves it): "),
    ("test_efficientnet/64/10", "from the cache {tmp}/home/hub (HF_HOME moves it): "),
    ("gcvit_xxtiny/224/10", "come neither from the network nor from the cache {tmp}/torch/hub/checkpoints (TORCH_HOME "
                            "moves it): "),
], ids=["absent", "damaged", "absent on the web"])
def test_weights_that_cannot_be_had_are_told_in_one_line(pretrained, word, place):
    tmp, _, said = pretrained
    *_, line, code = said[word].splitlines()
    assert code == "3" and "Traceback" not in said[word]
    assert "--model.pretrained: the weights of " in line and place.format(tmp=tmp) in line
    assert f"timm.create_model('{word.split('/')[0]}', pretrained=True)" in line
    assert line.endswith("or give a file by --model.init_from FILE")


@pytest.mark.launcher
@pytest.mark.timeout(2 * HANGS)
def test_a_run_with_a_checkpoint_goes_on_without_the_weights_it_began_from(shards, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub_cache(tmp_path / "home", "test_resnet")
    _, path = of_ours(tmp_path / "w.safetensors", "ab", args=dict(
        patch_size=14, embed_dim=128, depth=2, num_heads=2))
    ways = {"pretrained": ["--model.name", "test_resnet", "--model.img_size", "64", "--model.args", "{}",
                           "--model.pretrained", "true"],
            "file": ["--model.init_from", path]}
    more = ["--train.epochs", "0.12", "--schedule.warmup_epochs", "null", "--eval.every_epochs", "100"]
    commands = [command(shards, tmp_path / way, "zero0_fp32", *words, *more) for way, words in ways.items()]
    codes, said = launch(tmp_path / "first", commands, ranks=1, launcher=torchrun)  # HF_HOME is read at import
    assert codes == [0, 0], said[-6000:]
    assert "initial weights: " in said and "from timm's pretrained test_resnet.r160_in1k" in said
    monkeypatch.setenv("HF_HOME", str(tmp_path / "empty"))
    Path(path).unlink()
    new = command(shards, tmp_path / "new", "zero0_fp32", *ways["file"], *more)
    nowhere = command(shards, tmp_path / "new", "zero0_fp32", "--model.pretrained", "true", *more)
    codes, said = launch(tmp_path / "second", [*commands, new, nowhere], ranks=1, launcher=torchrun)
    assert codes == [0, 0, 2, 2], said[-6000:]
    assert f"--model.pretrained: timm has no pretrained weights of {VIR}; " in said
    assert "initial weights: " not in said and f"--model.init_from {path}: no such file" in said
