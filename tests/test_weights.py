"""The weights file: what is written comes back, for vir and for timm, and what is wrong with a file is said."""

import dataclasses
import json
import os
import pickle
import resource
import shutil
import stat
import time

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed, resample_patch_embed

import vir.models
from vir.errors import DataError, SettingsError
from vir.models import WeightsMetadata, load, network, read_metadata, save_weights
from vir.weights.portable import is_there, outline, read, stated_metadata
from vir.weights.spec import InputSpec, ModelSpec, input_of
from vir.weights.tensor_files import CODES

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
    for value, said in ((object(), "is not JSON serializable"), ("\ud800", "model_args is "), (["\ud800"], "model_ar")):
        with pytest.raises(SettingsError, match=f"these weights cannot be saved: .*{said}"):
            save_weights(path, {}, dataclasses.replace(METADATA, model=dataclasses.replace(MODEL, args={"a": value})))
    with pytest.raises(SettingsError, match="a is torch.complex128, which safetensors cannot hold"):
        save_weights(path, {"a": torch.zeros(1, dtype=torch.complex128)}, METADATA)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_weights_in_several_files_of_that_name_are_not_replaced(tmp_path):
    """They may be of others: readers would take the one file for them."""
    names = ["m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors", "m.safetensors.index.json"]
    for name in names:
        (tmp_path / name).write_text("precious")
    with pytest.raises(SettingsError, match="m.safetensors is the name of weights in several files, m.safetensors.in"):
        save_weights(tmp_path / "m.safetensors", {}, METADATA)
    assert sorted(os.listdir(tmp_path)) == names


def test_what_is_there_is_told_by_the_files(tmp_path):
    assert not is_there(tmp_path / "x.safetensors.index.json") and not is_there(tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors.index.json").touch()
    assert is_there(tmp_path / "x.safetensors.index.json") and is_there(tmp_path / "x.safetensors")


@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_each_type_that_is_written_is_read_again(tmp_path, dtype):
    path = tmp_path / "x.safetensors"
    save_weights(path, {"a": torch.ones(3).to(dtype)}, METADATA)
    assert outline(path)[1]["a"].dtype == read(path)[1]["a"].dtype == dtype


def test_a_device_that_is_not_there_is_told_before_anything_is_built(path):
    with pytest.raises(SettingsError, match="^device is 'nope', which torch cannot use here: "):
        load(path, "nope")


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


def nested(depth, value=1):
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("changes, said", [
    ({"other": 1}, "it has unknown fields: other; known are model_name, model_args, classes, input_size, mean, "),
    ({"a": 1, "b": 1, "c": 1, "d": 1, "\x1b[2J": 1}, r"it has unknown fields: '\\x1b\[2J', a, b, …; known"),
    ({"model_name": ""}, "model_name is ''; it must be the name of a model"),
    ({"model_args": 3}, "model_args is 3; it must be an object of arguments by their names"),
    ({"model_args": ["depth"]}, r"model_args is \['depth'\]; it must be an object"),
    ({"model_args": {"a": nested(16)}}, "model_args is .*nested 16 deep at most"),
    ({"classes": 3}, "classes is 3; it must be a list of names"),
    ({"classes": "abc"}, "classes is 'abc'; it must be a list of names"),
    ({"classes": ["a", 1, "a"]}, r"classes is \['a', 1, 'a'\]; it must be a list of names"),
    ({"classes": ["a", "\ud800", "b"]}, "classes is .* it must be a list of names"),
    ({"classes": [1, 2, 3]}, r"classes is \[1, 2, 3\]; it must"),
    ({"input_size": [3, 16]}, r"input_size is \[3, 16\]; it must be \[channels, height, width\], three whole"),
    ({"input_size": [3, 0, 16]}, r"input_size is \[3, 0, 16\]"),
    ({"input_size": [3, 16.0, 16]}, r"input_size is \[3, 16.0, 16\]"),
    ({"input_size": "3x1"}, "input_size is '3x1'"),
    ({"mean": 0.5}, "mean is 0.5; it must be a list of numbers, one of each channel"),
    ({"mean": [True, 0, 0]}, r"mean is \[True, 0, 0\]"),
    ({"mean": [0.5]}, "mean has 1 and std has 3 numbers for 3 channels"),
    ({"std": [0, 1, 1]}, r"std is \[0, 1, 1\]; it must be a list of numbers above 0"),
    ({"std": [10**400, 1, 1]}, r"std is \[100.*, 1, 1\]; it must be a list of numbers"),
    ({"interpolation": "random"}, "interpolation is 'random'; it must be one of bicubic, bilinear, box, hamming, lanc"),
    ({"interpolation": ["box"]}, r"interpolation is \['box'\]; it must be one of"),
    ({"crop_pct": 0}, "crop_pct is 0; it must be a number from 0.01 to 10"),
    ({"crop_pct": "1"}, "crop_pct is '1'; it must be a number from 0.01 to 10"),
    ({"crop_mode": "stretch"}, "crop_mode is 'stretch'; it must be one of center, squash, border"),
    ({"crop_mode": None}, "crop_mode is None; it must be one of"),
    ({"step": -1}, "step is -1; it must be a whole number, 0 or more"),
    ({"step": True}, "step is True; it must be a whole number"),
    ({"samples_seen": 1.5}, "samples_seen is 1.5; it must be a whole number"),
    ({"ema": 1}, "ema is 1; it must be true or false"),
    ({"dtype": "int8"}, "dtype is 'int8'; it must be one of fp32, bf16, fp16"),
    ({"config_hash": None}, "config_hash is None; it must be a text"),
    ({"data_fingerprint": 7}, "data_fingerprint is 7; it must be a text"),
    ({"format_version": "x"}, "format_version is 'x'; it must be a whole number, 1 or more"),
    ({"format_version": 0}, "format_version is 0; it must be"),
    ({"format_version": True}, "format_version is True; it must be"),
    ({"step": float("nan")}, "NaN is no number of JSON"),
    ({"mean": [0, 0, float("inf")]}, "Infinity is no number of JSON"),
], ids=lambda value: str(value)[:40].encode("ascii", "replace").decode())
def test_damaged_metadata_is_refused_by_a_sentence_on_the_field(path, changes, said):
    for one in (read_metadata, stated_metadata, load):
        with pytest.raises(DataError, match=f"vir.safetensors has damaged metadata: {said}.*; make it anew with vir-c"):
            one(rewritten(path, **changes))


@pytest.mark.parametrize("text, said", [
    ("[" * 100_000 + "]" * 100_000, "it is nested too deeply"),
    ('{"a":' * 100_000 + "1" + "}" * 100_000, "it is nested too deeply"),
    ("[1, 2]", r"it is \[1, 2\], not an object of fields"),
    ("null", "it is None, not an object"),
    ("", "Expecting value"),
    ('{"step": 1, "step": 2}', "it has step twice"),
    ("{}", "it lacks fields: classes, config_hash, crop_mode, …; make"),
    ('{"step": ' + "9" * 5000 + "}", "Exceeds the limit"),
], ids=lambda text: text[:20])
def test_metadata_that_are_no_object_of_fields_are_refused(path, text, said):
    save_file({"a": torch.zeros(1)}, path, {"format": "pt", "vir": text})
    with pytest.raises(DataError, match=f"has damaged metadata: {said}"):
        read_metadata(path)


def test_a_file_of_version_1_is_read_and_crops_the_centre(path):
    with safe_open(path, "pt") as file:
        fields = json.loads(file.metadata()["vir"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    for name in ("crop_mode", "config_hash", "data_fingerprint"):
        del fields[name]
    for version in (1, 2):
        save_file(tensors, path, {"format": "pt", "vir": json.dumps(fields | {"format_version": version})})
        if version == 1:
            assert load(path).weights_metadata == dataclasses.replace(METADATA, format_version=1)
    with pytest.raises(DataError, match="damaged metadata: it lacks fields: config_hash, crop_mode, data_fingerprint;"):
        load(path)


def test_a_model_that_squashes_images_does_so_again(tmp_path):
    name = "vit_base_patch16_clip_384"
    args = dict(img_size=28, patch_size=14, embed_dim=16, depth=1, num_heads=2, num_classes=3)
    model = timm.create_model(name, **args)
    assert input_of(model).crop_mode == "squash"
    save_weights(tmp_path / "w", model.state_dict(), dataclasses.replace(METADATA, model=ModelSpec(
        name=name, args=args, input=input_of(model), classes=())))
    assert read_metadata(tmp_path / "w").model.input.crop_mode == "squash"
    for loaded in (load(tmp_path / "w"), load(tmp_path / "w", img_size=56)):
        assert loaded.pretrained_cfg["crop_mode"] == "squash" == input_of(loaded).crop_mode
    rewritten(tmp_path / "w", crop_mode="border")  # the file knows it better than timm
    assert input_of(load(tmp_path / "w")).crop_mode == "border"


@pytest.mark.parametrize("changed, said", [
    ({"model": dataclasses.replace(MODEL, classes=("crane", "eel", 7))}, "classes is .*a list of names"),
    ({"model": dataclasses.replace(MODEL, args={"init_values": float("nan")})}, "NaN is no number of JSON"),
    ({"dtype": "float32"}, "dtype is 'float32'; it must be one of fp32, bf16, fp16"), ({"step": -1}, "step is -1; it")])
def test_what_could_not_be_read_again_is_not_written(path, changed, said):
    before = path.read_bytes()
    with pytest.raises(SettingsError, match=f"these weights cannot be saved: {said}"):
        save_weights(path, tiny_model().state_dict(), dataclasses.replace(METADATA, **changed))
    assert path.read_bytes() == before


# ---- hostile files


def raw(fields, data=b"", length=None):
    """A safetensors file by hand: length of the header, header, data."""
    text = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def tensor(begin, end, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


TWICE = b'{"a": %s, "b": %s, "a": %s}' % tuple(
    json.dumps(tensor(*ends)).encode() for ends in ((0, 4), (4, 8), (0, 4)))


@pytest.mark.parametrize("content", [
    raw({}, length=10**6), raw({}, length=0), raw({}, length=2**63), raw({}, length=2**64 - 1),
    raw(b"[" * 100_000, length=100_000), raw(b"\xff\xfe"), raw(b"[]"),
    raw({"a": tensor(0, 4), "b": tensor(0, 4)}, b"0000"), raw({"a": tensor(0, 8, (2,)), "b": tensor(4, 8)}, b"0" * 8),
    raw({"a": tensor(0, 4), "b": tensor(8, 12)}, b"0" * 12), raw({"a": tensor(4, 8)}, b"0" * 8),
    raw({"a": tensor(0, 4)}, b""), raw({"a": tensor(0, 4)}, b"0" * 8), raw({"a": tensor(4, 0)}, b"0000"),
    raw({"a": tensor(0, 4, dtype="F33")}, b"0000"), raw({"a": tensor(0, 4, (2,))}, b"0000"),
    raw({"a": tensor(0, 4, (2**62, 2**62))}, b"0000"), raw({"a": tensor(0, 4, (-1,))}, b"0000"),
    raw({"a": tensor(0, 4), "__metadata__": {"vir": 3}}, b"0000"), raw(TWICE, b"0" * 8),
    b'{"__metadata__"', b"\x80\x04K\x01.", b"PK\x03\x04" + b"0" * 100,
], ids=[
    "header beyond the end", "header of 0", "header of 2^63", "header of 2^64-1", "deep header", "no text", "a list",
    "same place", "overlap", "hole", "hole at the start", "beyond the end", "bytes left over", "end before start",
    "unknown dtype", "bytes and shape differ", "shape beyond counting", "negative shape", "metadata of numbers",
    "one name twice", "text", "pickle", "zip"])
def test_hostile_safetensors_are_refused(tmp_path, content):
    (tmp_path / "w.safetensors").write_bytes(content)
    for one in (load, read_metadata, read):
        with pytest.raises(DataError, match=r"w.safetensors is not a safetensors file or is (cut short|damaged) \(."):
            one(tmp_path / "w.safetensors")


def test_a_file_of_torch_is_refused_and_nothing_in_it_runs(tmp_path):
    torch.save(tiny_model().state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(DataError, match="is not a safetensors file"):
        load(tmp_path / "w.safetensors")


def test_pipes_and_devices_are_no_weights(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    os.mkfifo(tmp_path / "w.safetensors.index.json")
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path / "w.safetensors.index.json", tmp_path / "w.safetensors"):
        for one in (load, read_metadata):
            with pytest.raises(DataError, match="no weights file at"):
                one(path)
    assert stated_metadata(tmp_path / "pipe") is None


def test_tensors_that_no_state_dict_has_are_refused(tmp_path):
    header = {"__metadata__": {"vir": METADATA.to_json()}}
    for entry, said in ((tensor(0, 1, (1,), "F8_E8M0"), r"a is F8_E8M0 of shape \[1\] \(which is not read here"),
                        (tensor(0, 0, (0, 2**62, 2**62)), r"a is F32 of shape \[0, .*overflow")):
        data = b"0" * entry["data_offsets"][1]
        (tmp_path / "w").write_bytes(raw(header | {"a": entry}, data))
        with pytest.raises(DataError, match=said):
            load(tmp_path / "w")


def test_tensors_of_another_type_are_refused(path):
    with safe_open(path, "pt") as file:
        header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    save_file(tensors | {"norm.weight": torch.ones(16, dtype=torch.int8)}, path, header)
    with pytest.raises(DataError, match=r"1 tensors of another type \(norm.weight is torch.int8, not torch.float32\)"):
        load(path)


@pytest.fixture(scope="module")
def megabyte(tmp_path_factory):
    """A file of 0.9 MB."""
    args = dict(img_size=32, patch_size=8, embed_dim=64, depth=4, num_heads=2, num_classes=3)
    stored(path := tmp_path_factory.mktemp("large") / "w.safetensors", MODEL.name, **args)
    assert 0.8e6 < path.stat().st_size < 1e6
    return path, args


@pytest.mark.parametrize("name, args, said", [
    ("vir_large_patch16_224", dict(img_size=32, embed_dim=8192), "that network has several times as many"),  # 77 GB
    (MODEL.name, dict(depth=10**9), r"its model_args ask for depths and sizes of 10000001\d\d in sum; it was not"),
    (MODEL.name, dict(depth=-10**9), r"its model_args ask for depths and sizes of 10000001\d\d in sum"),
    (MODEL.name, dict(img_size=[32, 10**6]), r"its model_args ask for depths and sizes of 10001\d\d in sum"),
    (MODEL.name, dict(depth=10**4000), r"depths and sizes of 1000\d+\.\.\.\d+ in sum"),
    ("swin_tiny_patch4_window7_224", dict(depths=[60_000] * 10_000), "depths and sizes of 600000000 in sum"),
    (MODEL.name, dict(depth=60_000, embed_dim=2), "that network has several times as many"),
    (MODEL.name, dict(img_size=65_536), "that network has several times as many"),
    (MODEL.name, dict(mlp_ratio=1e9), "that network has several times as many"),
    (MODEL.name, dict(mlp_ratio=1e300), "cannot create"),
    (MODEL.name, dict(depth=-1), "56 tensors unexpected"),
    (MODEL.name, dict(embed_dim=-64), "cannot create .*negative dimension -64"),
    (MODEL.name, dict(depth="4"), "cannot create .*'str' object cannot be interpreted as an integer"),
    (MODEL.name, dict(img_size=nested(14)), "cannot create"),
    (MODEL.name, dict(unknown="y" * 10**6), "cannot create .*y…"),
    (MODEL.name, dict(device="cuda"), r"has model_args \['device'\], which are for its reader to choose"),
    ("vit_small_patch16_224", dict(norm_layer="os.system"), "cannot create"),
    ("swin_tiny_patch4_window7_224", dict(img_size=60_000), "that network has several times as many"),  # by its masks
], ids=lambda value: str(value)[:30])
def test_a_small_file_that_claims_a_large_network_is_refused_at_once(megabyte, tmp_path, name, args, said):
    path, own = megabyte
    shutil.copy(path, tmp_path / path.name)
    rewritten(tmp_path / path.name, model_name=name, model_args=own | args if name == MODEL.name else args)
    before, start = peak(), time.monotonic()
    with pytest.raises(DataError, match=said) as error:
        load(tmp_path / path.name)
    assert time.monotonic() - start < 5  # of which most tell 0.01 s; other programs run beside
    assert peak() - before < 100 << 20 and len(str(error.value)) < 3000


def test_a_network_that_cannot_be_built_without_numbers_is_built_with_them(path, monkeypatch):
    real, devices = network.create, []

    def create(*args, **more):
        devices.append(torch.get_default_device().type)
        if devices[-1] == "meta":
            raise network.NotBuiltError("Tensor.item() cannot be called on meta tensors")
        return real(*args, **more)

    expected = load(path).state_dict()
    monkeypatch.setattr(network, "create", create)
    assert all(x.equal(expected[name]) for name, x in load(path).state_dict().items())
    assert devices == ["meta", "cpu", "cpu"]
    with pytest.raises(DataError, match="that network has several times as many"):
        load(rewritten(path, model_args=TINY | {"embed_dim": 8192}))


def test_masks_that_no_file_holds_are_counted_too(tmp_path):
    """Swin's weights are the same for images of any size, its masks of windows are not: 4 GB here."""
    args = dict(img_size=32, window_size=4, patch_size=4, embed_dim=8, depths=(2, 1), num_heads=(2, 2), num_classes=3)
    stored(tmp_path / "w", "swin_tiny_patch4_window7_224", **args)
    load(rewritten(tmp_path / "w", model_args=args | {"img_size": 64}))
    with pytest.raises(DataError, match="that network has several times as many"):
        load(rewritten(tmp_path / "w", model_args=args | {"img_size": 32768}))


def peak():
    """Bytes of memory that this process has ever had at once."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def test_networks_that_are_built_later_are_not_counted(path):
    with pytest.raises(DataError):
        load(rewritten(path, model_args=TINY | {"img_size": 4096}))
    assert timm.create_model("test_vit").num_classes == 1000 and timm.create_model("vir_tiny_patch16_224")


# ---- dtype


@pytest.mark.parametrize("dtype, expected", [
    ("fp32", torch.float32), ("bf16", torch.bfloat16), (torch.float16, torch.float16), (torch.float64, torch.float64)])
def test_a_model_is_loaded_in_the_type_that_is_asked_for(path, dtype, expected):
    model = load(path, "cpu", dtype)
    assert {x.dtype for x in model.parameters()} == {expected}
    assert {x.dtype for x in model.buffers()} == {torch.float32}  # ViR's decay, which is exact in no other
    found = load(path, dtype=dtype, img_size=(32, 48))(IMAGES.to(expected)).float()
    assert found.allclose(load(path, img_size=(32, 48))(IMAGES), atol=0.02)  # half a percent of logits of about 1


def test_integers_of_a_model_keep_their_type(tmp_path):
    stored(tmp_path / "w", "test_resnet")
    model = load(tmp_path / "w", dtype="bf16")
    assert {str(x.dtype) for x in model.buffers()} == {"torch.bfloat16", "torch.int64"}


@pytest.mark.parametrize("dtype", ["int8", torch.int8, None, 3], ids=str)
def test_a_type_that_is_none_is_told(path, dtype):
    with pytest.raises(SettingsError, match=f"dtype is {dtype!r}; it must be one of fp32, bf16, fp16, or such a"):
        load(path, dtype=dtype)


# ---- weights in several files


def split(path, changed=lambda number, header: header):
    """The same weights in three files beside it and their index, and the file itself gone."""
    with safe_open(path, "pt") as file:
        header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    path.unlink()
    parts = [f"{path.stem}-{number + 1:05d}-of-00003.safetensors" for number in range(3)]
    names = {name: parts[number % 3] for number, name in enumerate(sorted(tensors))}
    for number, part in enumerate(parts):
        save_file({name: tensors[name] for name in names if names[name] == part}, path.parent / part,
                  changed(number, header))
    index = path.parent / f"{path.name}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": names}))
    return index, names


def test_weights_in_several_files_are_read_by_either_name(path, tmp_path):
    expected = load(path).state_dict()
    index, names = split(path)
    assert not path.exists() and len(set(names.values())) == 3
    for name in (path, index, str(path), str(index)):
        model = load(name)
        assert model.weights_metadata == METADATA == read_metadata(name) == stated_metadata(name) == read(name)[0]
        assert all(x.equal(expected[key]) for key, x in model.state_dict().items())
    assert read(path)[1].keys() == expected.keys()
    save_file({"a": torch.zeros(1)}, path)  # a file of that name is that file
    with pytest.raises(DataError, match="does not say which model"):
        load(path)


@pytest.mark.parametrize("change, said", [
    (lambda names: names | {"norm.weight": "../w.safetensors"}, "it names the file ../w.safetensors; files are named"),
    (lambda names: names | {"norm.weight": "/etc/w.safetensors"}, "it names the file /etc/w.safetensors; files are"),
    (lambda names: names | {"norm.weight": ".."}, r"it names the file \.\.; "),
    (lambda names: names | {"norm.weight": ""}, "it names the file ; "),
    (lambda names: names | {"norm.weight": "w.pth"}, "it names the file w.pth; .* end in .safetensors"),
    (lambda names: names | {"norm.weight": 3}, "its weight_map must name the file of each tensor"),
    (lambda names: {}, "its weight_map must name the file of each tensor"),
    (lambda names: list(names), "its weight_map must name the file of each tensor"),
], ids=range(8))
def test_an_index_that_is_none_is_refused(path, change, said):
    index, names = split(path)
    index.write_text(json.dumps({"weight_map": change(names)}))
    for one in (load, read_metadata, stated_metadata):
        with pytest.raises(DataError, match=f"vir.safetensors.index.json is no index of weights: {said}"):
            one(path)


@pytest.mark.parametrize("text, said", [
    ("[" * 100_000, "it is nested too deeply"), ("", "Expecting value"), ("[]", "its weight_map must"),
    ("\xff", "Expecting value"), ('{"weight_map": {"a": "a.safetensors", "a": "b.safetensors"}}', "it has a twice"),
], ids=lambda text: text[:12])
def test_an_index_of_damaged_text_is_refused(path, text, said):
    index, _ = split(path)
    index.write_text(text)
    with pytest.raises(DataError, match=f"is no index of weights: {said}"):
        load(index)


def test_an_index_larger_than_any_is_not_read(path):
    index, _ = split(path)
    with index.open("wb") as file:
        file.truncate(10**12)
    with pytest.raises(DataError, match="index.json cannot be read: it has 1000000000000 bytes, more than the 1000000"):
        load(index)


def test_files_that_are_not_those_of_the_index_are_refused(path):
    index, names = split(path)
    one, two = sorted(set(names.values()))[:2]
    name = next(name for name in names if names[name] == one)
    less = {key: names[key] for key in names if key != name}
    for changed, first in ((names | {"more": one}, "more"), (names | {name: two}, name), (less, name)):
        index.write_text(json.dumps({"weight_map": changed}))
        with pytest.raises(DataError, match=r"vir-0000\d-of-00003.safetensors does not hold the tensors that vir.safet"
                                            rf"ensors.index.json says: {first}; copy all files"):
            load(index)
    index.write_text(json.dumps({"weight_map": names}))
    (path.parent / two).unlink()
    with pytest.raises(DataError, match=f"index.json names {two}, which is not beside it; copy all files of these"):
        load(index)
    (path.parent / two).write_bytes(b"")
    with pytest.raises(DataError, match=f"{two} is not a safetensors file or is cut short"):
        load(index)


@pytest.mark.parametrize("other", [
    {"vir": dataclasses.replace(METADATA, step=8).to_json()}, {"vir": "{"}, {}], ids=["step", "damaged", "none"])
@pytest.mark.parametrize("number", [1, 2])
def test_files_of_two_steps_make_no_weights(path, other, number):
    index, _ = split(path, lambda part, header: other if part == number else header)
    with pytest.raises(DataError, match=f"vir-0000{number + 1}-of-00003.safetensors says something else of itself than "
                                        "vir-00001-of-00003.safetensors: they are of different steps or runs; "):
        load(index)


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


@pytest.mark.parametrize("name, old, new, grids", [
    ("convit_tiny", (16, 64), 32, "pos_embed is of 2x8 patches, not of 4x4"),
    ("convit_tiny", 32, (16, 64), "pos_embed is of 4x4 patches, not of 2x8")])
def test_positions_of_another_grid_of_as_many_patches_are_not_taken_as_they_are(tmp_path, name, old, new, grids):
    stored(tmp_path / "w", name, img_size=old, patch_size=8, embed_dim=16, depth=1, local_up_to_layer=1, num_heads=2)
    with pytest.raises(SettingsError, match=f"in the place of .*: {grids}, and timm resamples no positions between the"
                                            "m for this family; take the img_size of the file$"):
        load(tmp_path / "w", img_size=new)


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
