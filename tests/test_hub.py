"""Folders of Hugging Face: timm makes the same model of what is written, and what is read is what timm writes."""

import hashlib
import json
import re
import shutil

import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from timm.data import resolve_model_data_config
from timm.models._hub import save_for_hf

from support.small_disk import small_disk  # noqa: F401, a fixture
from vir import evaluate
from vir.errors import DataError, SettingsError
from vir.models import WeightsMetadata, load, read_metadata, save_weights
from vir.weights.hub import is_folder, read_config, read_evaluation, weights_of, write_folder
from vir.weights.portable import write_weights
from vir.weights.spec import InputSpec, ModelSpec
from vir.weights.tensor_files import of_tensor

torch.set_num_threads(1)

VIR = dict(img_size=[16, 24], patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=3)
OF_TIMM = dict(img_size=32, num_classes=3)
INPUT = InputSpec(size=(3, 16, 24), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), interpolation="bilinear", crop_pct=0.9,
                  crop_mode="squash")


def of_ours(path, name="vir_small_patch16_224", args=VIR, size=(3, 16, 24), seed=0, dtype="fp32", **changed):
    """A weights file with random numbers."""
    torch.manual_seed(seed)
    spec = ModelSpec(name=name, args=args, classes=("cat", "dög", "eel"),
                     input=InputSpec(**{**vars(INPUT), "size": size}))
    kept = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    state = {key: x.to(kept) if x.is_floating_point() else x
             for key, x in timm.create_model(name, **args).state_dict().items()}
    save_weights(path, state, WeightsMetadata(**{**dict(
        model=spec, step=1000, samples_seen=64000, ema=True, dtype=dtype, config_hash="c0ffee",
        data_fingerprint="da7a"), **changed}))
    return path


@pytest.fixture
def path(tmp_path):
    return of_ours(tmp_path / "w.safetensors")


@pytest.fixture
def folder(tmp_path, path):
    write_folder(tmp_path / "hub", path, load(path))
    return tmp_path / "hub"


# ---- What is written


def as_list(value):
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize("name, args, size, dtype", [
    ("vir_small_patch16_224", VIR, (3, 16, 24), "fp32"),
    ("vir2d_tiny_patch16_224", VIR, (3, 16, 24), "bf16"),
    ("test_vit.r160_in1k", OF_TIMM, (3, 32, 32), "fp32"),
    ("test_resnet", {"num_classes": 3}, (3, 64, 48), "fp32"),  # takes any size
])
def test_timm_makes_the_same_model_of_the_folder(tmp_path, name, args, size, dtype):
    path = of_ours(tmp_path / "w.safetensors", name, args, size, dtype=dtype)
    expected = load(path)
    write_folder(tmp_path / "new" / "hub", path, expected)
    found = timm.create_model(f"local-dir:{tmp_path}/new/hub", pretrained=True).eval()
    images = torch.randn(2, *size)
    assert found(images).equal(expected(images))
    assert found.pretrained_cfg["label_names"] == ["cat", "dög", "eel"]
    config, given = resolve_model_data_config(found), {**INPUT.timm_cfg(), "input_size": size}
    assert {key: as_list(config[key]) for key in given} == {key: as_list(value) for key, value in given.items()}
    fields = json.loads((tmp_path / "new" / "hub" / "config.json").read_text())
    assert fields["num_features"] == expected.num_features and fields["num_classes"] == 3
    assert sorted(one.name for one in tmp_path.rglob("*")) == [
        "README.md", "config.json", "hub", "model.safetensors", "new", "w.safetensors"]


def test_the_weights_in_it_are_the_same_file_which_vir_takes_too(folder, path):
    assert (folder / "model.safetensors").read_bytes() == path.read_bytes()
    assert read_metadata(weights_of(folder)) == read_metadata(path) and is_folder(folder)
    spec = read_config(folder)
    assert (spec.name, spec.classes, spec.input) == ("vir_small_patch16_224", ("cat", "dög", "eel"), INPUT)


def test_timm_takes_another_head_of_it(folder):
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=7)
    expected = load_file(folder / "model.safetensors")
    assert model.head.weight.shape == (7, 16) and model.norm.weight.equal(expected["norm.weight"])


def test_weights_in_several_files_become_one(tmp_path, path):
    state, metadata = load_file(path), read_metadata(path)
    several = tmp_path / "several.safetensors"
    written = write_weights(several, [of_tensor(*item) for item in state.items()], metadata, max_file_bytes=8000)
    assert len(written) > 2 and not several.exists()
    write_folder(tmp_path / "hub", several, load(several))
    found = load_file(tmp_path / "hub" / "model.safetensors")
    assert found.keys() == state.keys() and all(found[name].equal(state[name]) for name in state)


def test_what_is_there_is_replaced_by_force_alone_and_other_files_stay(folder, tmp_path):
    (folder / "LICENSE").write_text("mine")
    other = of_ours(tmp_path / "other.safetensors", seed=1)
    with pytest.raises(SettingsError, match="hub has model.safetensors, README.md, config.json already; give another "
                                            "folder, or --force to replace$"):
        write_folder(folder, other, load(other))
    write_folder(folder, other, load(other), force=True)
    assert (folder / "model.safetensors").read_bytes() == other.read_bytes()
    assert sorted(one.name for one in folder.iterdir()) == ["LICENSE", "README.md", "config.json", "model.safetensors"]


def test_where_it_cannot_be_written_nothing_is_left(tmp_path, path):
    with pytest.raises(DataError, match="cannot write .*/hub: .*; free some space or choose another folder"):
        write_folder(path / "hub", path, load(path))
    network = load(path)
    network.num_classes = {1, 2}  # JSON has none
    with pytest.raises(TypeError):
        write_folder(tmp_path / "hub", path, network)
    assert [one.name for one in tmp_path.iterdir()] == ["w.safetensors"]


def test_a_full_disk_leaves_nothing(small_disk, path):  # noqa: F811
    (small_disk / "full").write_bytes(bytes((1 << 20) - 8192))
    with pytest.raises(DataError, match="cannot write .*/disk/hub: .*No space left on device: .*; free some space or"):
        write_folder(small_disk / "hub", path, load(path))
    assert [one.name for one in small_disk.iterdir()] == ["full"]


# ---- The model card


@pytest.fixture
def results(tmp_path, path):
    """Of the weights, as vir-evaluate writes them."""
    for name in ("cat", "dög", "eel"):
        (tmp_path / "val" / name).mkdir(parents=True)
        Image.new("RGB", (24, 16), (40 * len(name), 90, 10)).save(tmp_path / "val" / name / "1.png")
    words = ["--weights", path, "--data", tmp_path / "val", "--index-dir", tmp_path, "--workers", 1, "--device", "cpu",
             "--json", tmp_path / "results.json"]
    assert evaluate.main(list(map(str, words))) == 0
    return tmp_path / "results.json"


def test_the_card_has_the_accuracy_as_evaluated_and_the_command_to_repeat_it(tmp_path, path, results):
    other = of_ours(tmp_path / "other.safetensors", seed=1)
    with pytest.raises(SettingsError, match=r"--evaluation .*results.json is not of .*/other.safetensors, whose SHA-256"
                                            r" is \w{64}; make one by vir-evaluate --weights .*/other.safetensors"):
        write_folder(tmp_path / "hub", other, load(other), evaluation=results)
    found = json.loads(results.read_text())
    several = tmp_path / "several.json"
    several.write_text(json.dumps([{**found, "weights_sha256": {"x": "0"}}, found]))
    for file in (results, several):
        write_folder(tmp_path / "hub", path, load(path), evaluation=file, force=True)
        card = (tmp_path / "hub" / "README.md").read_text()
        numbers = f"{found['top1']:.2f} % | 100.00 % | {found['loss']:.4f} | {found['ece']:.2f} %"
        assert f"\n| {numbers} |\n" in card
        assert "On 3 images of 3 classes (0 left out)" in card and f"`{found['command']}`" in card
        assert found["data_fingerprint"] in card and f"torch {found['versions']['torch']}, " in card
        assert "Not evaluated" not in card


@pytest.mark.parametrize("changed, said", [
    ({"weights_sha256": None}, "it does not say of which weights it is; evaluate again"),
    ({"top1": "99"}, "top1 is not a number; evaluate again"),
    ({"command": None}, "command is not a text; evaluate again"),
    ("{", "Expecting property name .*; copy it again"),
    ("3", "it is a int; copy it again"),
], ids=str)
def test_results_of_another_kind_are_refused(tmp_path, path, changed, said):
    file = tmp_path / "results.json"
    checksum = hashlib.sha256(path.read_bytes()).hexdigest()
    good = {"weights_sha256": {"w": checksum}, "images": 1, "images_left_out": 0, "classes": 1, "top1": 1.0, "top5": 1,
            "loss": None, "ece": None, "data": "d", "data_fingerprint": "f", "command": "c", "versions": {}}
    file.write_text(changed if isinstance(changed, str) else json.dumps(good | changed))
    with pytest.raises(DataError, match=f"results.json is not what vir-evaluate --json writes: {said}"):
        read_evaluation(file, path)
    file.write_text(json.dumps(good))
    write_folder(tmp_path / "hub", path, load(path), evaluation=file)
    assert "| 1.00 % | 1.00 % | not finite | not finite |" in (tmp_path / "hub" / "README.md").read_text()


def test_the_card_says_what_it_knows_and_leaves_the_licence_to_the_user(folder):
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front) == {"library_name": "timm", "pipeline_tag": "image-classification",
                                     "tags": ["image-classification", "timm"]}
    assert "# license: " in front
    count = sum(x.numel() for x in load(folder / "model.safetensors").parameters())
    for said in ("# vir_small_patch16_224\n", f"**Parameters:** {count:,}\n", "3 classes; their names", "`da7a`",
                 "averaged (EMA), fp32, of step 1,000 after 64,000 images", "`c0ffee`",
                 "Not evaluated. `vir-evaluate --weights model.safetensors", "`bilinear`,\n  crop 0.9 (`squash`)"):
        assert said in text, said


def test_text_of_a_file_stays_code_in_the_card(tmp_path):
    path = of_ours(tmp_path / "w.safetensors", config_hash="a`b``c\n# d", data_fingerprint="")
    write_folder(tmp_path / "hub", path, load(path))
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "\n``` a`b``c # d ```.\n" in card and "does not say on which images it was trained" in card


def test_the_program_in_the_card_runs(folder, tmp_path, monkeypatch, capsys):
    Image.new("RGB", (30, 20), (200, 90, 10)).save(tmp_path / "image.jpg")
    program = re.search("```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    assert "import vir.models" in program
    monkeypatch.chdir(tmp_path)
    exec(program.replace("hf-hub:OWNER/NAME", f"local-dir:{folder}"), {})
    assert capsys.readouterr().out.strip() in ("cat", "dög", "eel")


# ---- What is read


def rewritten(folder, **changed):
    fields = json.loads((folder / "config.json").read_text()) | changed
    (folder / "config.json").write_text(json.dumps({key: x for key, x in fields.items() if x != "left out"}))
    return folder


def test_what_timm_writes_is_read(tmp_path):
    model = timm.create_model("test_vit", img_size=32, num_classes=2)
    save_for_hf(model, tmp_path, model_config={"label_names": ["a", "b"]}, safe_serialization="both")
    spec = read_config(tmp_path)
    assert (spec.name, spec.classes, spec.args["num_classes"], spec.input.size) == (
        "test_vit", ("a", "b"), 2, (3, 32, 32))
    assert weights_of(tmp_path).name == "model.safetensors"
    weights_of(tmp_path).unlink()
    assert weights_of(tmp_path).name == "pytorch_model.bin"


def test_a_config_of_one_level_is_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({
        "architecture": "resnet18", "num_classes": 2, "labels": {"0": "a", "1": "b"}, "input_size": [3, 64, 64],
        "mean": [0.5, 0.5, 0.5], "url": "http://x"}))
    spec = read_config(tmp_path)
    assert (spec.name, spec.args, spec.classes) == ("resnet18", {"num_classes": 2}, ("a", "b"))
    assert (spec.input.size, spec.input.mean, spec.input.crop_pct) == ((3, 64, 64), (0.5,) * 3, 0.875)


def test_names_of_some_logits_alone_are_none(folder):
    assert read_config(rewritten(folder, label_names={"0": "a", "2": "c"})).classes == ()


@pytest.mark.parametrize("changed, said", [
    ({"architecture": "left out"}, "it names no architecture of timm; take the folder of a model of timm"),
    ({"architecture": ["ViTForImageClassification"]}, "it names no architecture"),
    ({"model_args": [1]}, "model_args is not an object of arguments"),
    ({"pretrained_cfg": 1}, "pretrained_cfg is not an object"),
    ({"pretrained_cfg": {"input_size": [3, 0, 0]}, "model_args": {}}, r"size is \[3, 0, 0\]; it must be"),
    ({"model_args": {"img_size": "x"}}, r"size is \[3, 'x', 'x'\]; it must be"),
    ({"label_names": "abc"}, "label_names is neither a list of names nor an object"),
    ({"label_names": ["a"]}, "it has 1 label_names and 3 classes"),
    ({"num_classes": "x", "model_args": {}}, "num_classes is x, not a whole number"),
])
def test_a_config_of_another_kind_is_refused(folder, changed, said):
    with pytest.raises(DataError, match=f"config.json is not one that timm writes: {said}"):
        read_config(rewritten(folder, **changed))


def test_a_folder_that_is_not_whole_is_told(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    with pytest.raises(DataError, match="hub has a config.json and neither model.safetensors nor pytorch_model.bin; c"):
        weights_of(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(DataError, match="config.json is not a config.json of timm: it is a list; copy it again"):
        read_config(folder)
    shutil.rmtree(folder)
    with pytest.raises(DataError, match="config.json cannot be read: No such file or directory; copy it again"):
        read_config(folder)
    assert not is_folder(folder) and not is_folder("a\0b")
