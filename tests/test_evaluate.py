"""The evaluation of weights files: what each flag changes, what is refused at the door, what is written at the end.

Its numbers are compared with those of training in test_train.py.
"""

import csv
import hashlib
import json
import os
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.data import ImageNetInfo, RealLabelsImagenet

from support.forked import forked
from support.http_server import HttpServer
from support.imagenet import jpeg, write_folders
from support.launchers import HANGS, call, torchrun
from support.small_disk import small_disk  # noqa: F401  a fixture
from vir import evaluate
from vir.data.shards import read_manifest
from vir.evaluation import outputs, run
from vir.evaluation.classes import shared_classes
from vir.models import RETENTION_MODES, read_metadata
from vir.weights.metadata import WeightsMetadata
from vir.weights.portable import save_weights
from vir.weights.spec import InputSpec, ModelSpec

ARGS = dict(img_size=28, patch_size=14, embed_dim=16, depth=1, num_heads=1, num_classes=10)


SPEC = ModelSpec(name="vir_tiny_patch16_224", args=ARGS, classes=(), input=InputSpec(
    size=(3, 28, 28), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", crop_pct=1.0))


def write_weights(path, seed=0, **changed):
    """A network with random weights that has something to say: its head is large."""
    torch.manual_seed(seed)
    spec = replace(SPEC, **changed)
    state = timm.create_model(spec.name, **spec.args).state_dict()
    state["head.weight"] *= 30
    save_weights(path, state, WeightsMetadata(model=spec, step=3, samples_seen=30, ema=False, dtype="fp32",
                                              config_hash="c", data_fingerprint="d"))
    return path


@pytest.fixture(scope="module")
def classes(shards):
    return read_manifest(shards / "val").classes


@pytest.fixture(scope="module")
def given(shards, classes, tmp_path_factory):
    """--weights and --data."""
    path = write_weights(tmp_path_factory.mktemp("weights") / "w.safetensors", classes=classes)
    return ["--weights", str(path), "--data", str(shards / "val"), "--workers", "1"]


@pytest.fixture
def result(given, capsys):
    """Evaluate with more flags, which come later; the JSON on the last line."""
    def evaluated(*more):
        assert evaluate.main([*given, *map(str, more)]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return evaluated


@pytest.fixture
def refusal(given, capsys):
    """What is told instead of an evaluation."""
    def refused(code, *more):
        assert evaluate.main([*given, *map(str, more)]) == code
        said = capsys.readouterr()
        assert said.out == ""
        return said.err

    return refused


def test_the_result_is_in_the_file_and_on_the_last_line(given, tmp_path, capsys):
    (tmp_path / "r.json").write_text("old")
    assert evaluate.main([*given, "--json", str(tmp_path / "r.json"), "--force"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out.splitlines()[-1]) == json.loads((tmp_path / "r.json").read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]
    assert "130/130" in said.err


def test_the_result_tells_all_that_is_needed_to_repeat_it(result, given, shards, classes):
    found = result("--crop-pct", "0.8")
    path = Path(given[1])
    assert found["weights_sha256"] == {path.name: hashlib.sha256(path.read_bytes()).hexdigest()}
    assert found["data_fingerprint"] == read_manifest(shards / "val").fingerprint
    assert found["command"] == f"vir-evaluate {' '.join(given)} --crop-pct 0.8"
    expected = {"weights": str(path), "data": given[3], "model": SPEC.name, "model_args": ARGS, "step": 3,
                "samples_seen": 30, "ema": False, "weights_dtype": "fp32", "config_hash": "c",
                "training_data_fingerprint": "d", "input_size": [3, 28, 28], "mean": [0.5] * 3, "std": [0.5] * 3,
                "interpolation": "bicubic", "crop_pct": 0.8, "crop_mode": "center", "dtype": "fp32", "mode": "auto",
                "hflip_tta": False, "batch_size": 128, "processes": 1, "images": 130, "images_left_out": 0,
                "classes": 10, "classes_of_model": 10, "classes_of_data": 10}
    assert {name: found[name] for name in expected} == expected
    assert found["versions"].keys() == {"vir", "torch", "torchvision", "timm", "pillow", "python"}
    assert found["images_per_second"] > 0


def test_each_file_says_what_the_result_says(result, classes, tmp_path):
    found = result("--per-class", tmp_path / "c.csv", "--save-predictions", tmp_path / "p.npz", "--confusion",
                   tmp_path / "c.png")
    with np.load(tmp_path / "p.npz") as saved:
        assert tuple(saved["classes"]) == classes and saved["samples"].tolist() == list(range(130))
        right = saved["predictions"][:, 0] == saved["labels"]
        assert found["top1"] == pytest.approx(100 * right.mean()) and 0 < right.sum() < 130
        assert found["loss"] == pytest.approx(saved["losses"].mean(dtype=np.float64))
        assert saved["keys"].shape == (130,) and len(set(saved["keys"].tolist())) == 130
        labels = saved["labels"]
    rows = list(csv.DictReader((tmp_path / "c.csv").open()))
    assert [row["class"] for row in rows] == list(classes)
    assert [int(row["images"]) for row in rows] == np.bincount(labels).tolist()
    assert sum(float(row["top1"]) * int(row["images"]) for row in rows) / 130 == pytest.approx(found["top1"], rel=1e-5)
    assert Image.open(tmp_path / "c.png").size > (300, 300)


def test_several_files_make_one_table_and_a_list(given, classes, tmp_path, capsys):
    other = write_weights(tmp_path / "another one.safetensors", seed=1, classes=classes)
    assert evaluate.main([*given, "--weights", given[1], str(other), "--json", str(tmp_path / "r.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    first, second = json.loads((tmp_path / "r.json").read_text())
    assert [first["weights"], second["weights"]] == [given[1], str(other)] and first["loss"] != second["loss"]
    assert first == json.loads(lines[-1])[0] and [line.split()[0] for line in lines[-4:-1]] == [
        "weights", given[1], str(other).split()[0]]
    assert f"{second['top1']:.2f}" in lines[-2] and f"{second['loss']:.4f}" in lines[-2]


# ---- classes


def test_weights_without_names_of_classes_are_evaluated_with_a_warning(result, refusal, digits, tmp_path, caplog):
    known, nameless = result(), write_weights(tmp_path / "n.safetensors")
    found = result("--weights", nameless)
    assert (found["top1"], found["loss"]) == (known["top1"], known["loss"])
    assert "the weights name no classes: their 10 logits are taken for those of the data" in caplog.text
    for name in ("one", "two"):
        (tmp_path / "few" / name).mkdir(parents=True)
        shutil.copy(next((digits / "val" / name).iterdir()), tmp_path / "few" / name)
    said = refusal(2, "--weights", nameless, "--data", tmp_path / "few")
    assert said == (f"vir-evaluate: --weights {nameless} and --data {tmp_path / 'few'} do not fit: the weights name no "
                    "classes and have 10 logits, the data has 2 classes; give data of the classes that they were "
                    "trained on\n")


def test_classes_that_both_know_are_evaluated(result, refusal, classes, digits, tmp_path, caplog):
    """Data of fewer classes, by name and by number; a model of fewer classes; nothing in common."""
    whole = result("--save-predictions", tmp_path / "p.npz")
    for name in ("one", "two", "six"):
        shutil.copytree(digits / "val" / name, tmp_path / "named" / name)
        shutil.copytree(digits / "val" / name, tmp_path / "numbered" / str(classes.index(name)))
    named, numbered = result("--data", tmp_path / "named"), result("--data", tmp_path / "numbered")
    assert (named["images"], named["classes"], named["classes_of_data"], named["top5"]) == (39, 3, 3, 100)
    assert all(named[key] == numbered[key] for key in ("images", "top1", "loss", "ece"))
    assert "the model chooses among 3 of its 10" in caplog.text and "names its 3 classes by number" in caplog.text
    few = classes[2:5]
    fewer = write_weights(tmp_path / "f.safetensors", classes=few, args=ARGS | {"num_classes": 3})
    found = result("--weights", fewer, "--save-predictions", tmp_path / "few.npz")
    assert (found["images"], found["images_left_out"], found["classes"], found["classes_of_model"]) == (39, 91, 3, 3)
    with np.load(tmp_path / "few.npz") as of_few, np.load(tmp_path / "p.npz") as of_all:
        assert of_few["keys"].tolist() == [key for key, label in zip(of_all["keys"], of_all["labels"])
                                           if 2 <= label < 5]
    assert whole["images"] == 130
    stranger = write_weights(tmp_path / "s.safetensors", classes=tuple("abcdefghij"))
    said = refusal(2, "--weights", stranger)
    assert "know 10 classes ('a', 'b', 'c', 'd', 'e' and 5 more)" in said and "none is in both" in said


# ---- how it is computed


def test_forms_of_retention_and_both_halves_of_a_mirror_agree(result):
    plain = result()
    compared = result("--compare-modes", "--mode", "chunkwise")
    assert list(compared["modes"]) == ["chunkwise", "parallel", "recurrent"] and compared["mode"] == "chunkwise"
    for of_mode in compared["modes"].values():
        assert of_mode["top1"] == plain["top1"] and of_mode["largest_logit_difference"] < 1e-4
        assert of_mode["forward_images_per_second"] > 0
    assert result("--mode", "recurrent")["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    mirrored = result("--hflip-tta")
    assert mirrored["hflip_tta"] and mirrored["loss"] != plain["loss"]


@pytest.mark.parametrize("flags, changed", [
    (["--img-size", "56"], {"input_size": [3, 56, 56]}), (["--crop-pct", "0.5"], {"crop_pct": 0.5}),
    (["--crop-mode", "squash", "--crop-pct", "0.5"], {"crop_mode": "squash"}),
    (["--dtype", "bf16"], {"dtype": "bf16"}), (["--dtype", "fp16"], {"dtype": "fp16"})])
def test_a_flag_changes_the_result_and_is_told_in_it(result, flags, changed):
    plain, found = result(), result(*flags)
    assert {name: found[name] for name in changed} == changed and found["loss"] != plain["loss"]
    if "--dtype" in flags:
        assert found["loss"] == pytest.approx(plain["loss"], rel=0.02)


class Recorder(torch.nn.Module):
    """Its logits say in which form it was asked."""

    def set_retention_mode(self, mode):
        self.mode = mode

    def forward(self, images):
        return torch.full((len(images), 2), float(RETENTION_MODES.index(self.mode)))


@pytest.mark.parametrize("mode, compares, forms", [
    ("auto", False, ["auto"]), ("recurrent", False, ["recurrent"]),
    ("auto", True, ["parallel", "chunkwise", "recurrent"]),
    ("recurrent", True, ["recurrent", "parallel", "chunkwise"])])
def test_each_form_is_chosen_before_it_computes(mode, compares, forms):
    how = run.How(mode=mode, compare_modes=compares, dtype="fp32", hflip_tta=False, img_size=None, crop_pct=None,
                  crop_mode=None, batch_size=1, workers=1)
    shared = shared_classes("ab", 2, "ab")
    forwards = run._forwards(Recorder(), how, shared, torch.device("cpu"))
    assert list(forwards) == forms
    for form in [*forms, *reversed(forms)]:
        assert forwards[form](torch.zeros(1, 3, 4, 4))[0, 0] == RETENTION_MODES.index(form)


def test_logits_that_are_not_finite_are_told_and_leave_a_json(given, classes, tmp_path, capsys, caplog):
    state = load_file(given[1])
    state["head.weight"] *= 1e6  # more than fp16 holds
    path = tmp_path / "w.safetensors"
    save_weights(path, state, read_metadata(given[1]))
    assert evaluate.main([*given, "--weights", str(path), "--dtype", "fp16", "--compare-modes", "--json",
                          str(tmp_path / "r.json")]) == 0
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["not_finite"] > 0 and found["loss"] is found["ece"] is None
    assert found["modes"]["recurrent"]["largest_logit_difference"] is None
    assert "loss not finite, ECE not finite %" in capsys.readouterr().out
    assert f"{found['not_finite']} images have logits that are not finite" in caplog.text


def test_validation_images_of_imagenet_get_their_accuracy_by_real_labels(tmp_path, result, capsys):
    """Two of each of three classes, and one that has no such label."""
    wnids, labels = ImageNetInfo().label_names(), RealLabelsImagenet([""] * 50000).real_labels
    few = {wnid: {} for wnid in wnids[:3]}
    for label, wnid in enumerate(few):
        names = [name for name, others in labels.items() if label in others][:2]
        few[wnid] = {name: jpeg(name) for name in names}
    few[wnids[0]] |= {name: jpeg(name) for name in [name for name, others in labels.items() if not others][:1]}
    write_folders(tmp_path / "val", few)
    path = write_weights(tmp_path / "w.safetensors", classes=tuple(wnids), args=ARGS | {"num_classes": 1000})
    found = result("--weights", path, "--data", tmp_path / "val", "--confusion", tmp_path / "c.svg")
    assert (found["images"], found["real_images"], found["classes"]) == (7, 6, 3)
    assert found["real_top5"] == 100 and "tench (3)" in (tmp_path / "c.svg").read_text()


@pytest.mark.launcher
@pytest.mark.timeout(2 * HANGS)
@pytest.mark.parametrize("more", [["--batch-size", "16"], ["--batch-size", "100", "--hflip-tta"]], ids=str)
def test_any_number_of_processes_finds_the_same_bits(given, more, tmp_path):
    """130 images: of 16 rank 0 has the last 2 alone; of 100 the third rank has none, and one that does not count."""
    results, saved = [], []
    for ranks in (1, 2, 3):
        done = forked("-m", "vir.evaluate", *given, *more, "--json", tmp_path / f"{ranks}.json", "--per-class",
                      tmp_path / f"{ranks}.csv", "--save-predictions", tmp_path / f"{ranks}.npz", ranks=ranks)
        assert done.returncode == 0, done.stdout
        results.append(json.loads((tmp_path / f"{ranks}.json").read_text()))
        with np.load(tmp_path / f"{ranks}.npz") as file:
            saved.append({name: file[name] for name in file})
    assert [result["processes"] for result in results] == [1, 2, 3] and results[0]["images"] == 130
    for other in (1, 2):
        assert all(results[other][name] == results[0][name] for name in ("images", "top1", "top5", "loss", "ece"))
        assert all(np.array_equal(saved[other][name], saved[0][name]) for name in saved[0])
        assert (tmp_path / f"{other + 1}.csv").read_text() == (tmp_path / "1.csv").read_text()


# ---- data


def test_images_of_a_server_and_of_a_folder_give_the_same_result(given, digits, shards, tmp_path, capsys):
    """And secrets of its URL are in none of it."""
    def results(data, *more):
        assert evaluate.main([*given, "--data", str(data), *more]) == 0
        said = capsys.readouterr()
        assert "geheim" not in said.out + said.err
        found = json.loads(said.out.splitlines()[-1])
        return {key: found[key] for key in ("images", "top1", "top5", "loss")}

    expected = results(shards / "val")
    with HttpServer({f"/val/{path.name}": path.read_bytes() for path in (shards / "val").iterdir()}) as server:
        url = server.url("/val", user="me:geheim")
        assert results(url, "--cache", str(tmp_path / "c"), "--index-dir", str(tmp_path / "i")) == expected
    found = results(digits / "val")
    assert found.pop("loss") == pytest.approx(expected.pop("loss"), rel=1e-6)  # summed in another order
    assert found == expected


def test_it_computes_on_cpu_where_told_to(given, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    assert evaluate.main([*given, "--device", "cpu"]) == 0
    assert (os.environ["CUDA_VISIBLE_DEVICES"], os.environ["DS_ACCELERATOR"]) == ("-1", "cpu")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["images"] == 130


# ---- what is refused, and what cannot be written


@pytest.mark.parametrize("flag, name", [("--json", "r.json"), ("--per-class", "c.csv"), ("--confusion", "c.png"),
                                        ("--save-predictions", "p.npz")])
def test_a_file_that_exists_is_replaced_only_by_force(result, refusal, tmp_path, flag, name):
    path = tmp_path / name
    path.write_text("precious")
    said = refusal(2, flag, path)
    assert said == f"vir-evaluate: {flag} {path} exists; give another file, or --force to replace it\n"
    assert path.read_text() == "precious"
    result(flag, path, "--force")
    assert path.read_bytes() != b"precious" and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_what_was_there(given, small_disk, capsys):  # noqa: F811
    """And what fits is written."""
    path, picture = small_disk / "p.npz", small_disk / "c.png"
    path.write_text("precious")
    (small_disk / "full").write_bytes(b"0" * (2**20 - 2 * 4096))
    assert evaluate.main([*given, "--save-predictions", str(path), "--per-class", str(small_disk / "c.csv"),
                          "--confusion", str(picture), "--force"]) == 3
    said = capsys.readouterr()
    assert json.loads(said.out.splitlines()[-1])["images"] == 130
    full = "could not be written: No space left on device"
    assert said.err.splitlines()[-1] == (f"vir-evaluate: --save-predictions {path} {full}; --confusion {picture} "
                                         f"{full}; the last line on stdout is the result")
    assert path.read_text() == "precious"
    assert sorted(each.name for each in small_disk.iterdir()) == ["c.csv", "full", "p.npz"]


def test_what_is_no_weights_file_is_told(refusal, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "w.safetensors").write_text("no")
    assert refusal(2, "--weights", tmp_path / "run").startswith(
        f"vir-evaluate: --weights {tmp_path / 'run'} is a folder; make a weights file of a run first: vir-consolidate ")
    assert "no weights file at" in refusal(3, "--weights", tmp_path / "none.safetensors")
    assert "is not a safetensors file" in refusal(3, "--weights", tmp_path / "w.safetensors")


def test_a_decoder_that_is_none_is_refused_before_the_weights_are_looked_at(refusal, monkeypatch, tmp_path):
    monkeypatch.setenv("VIR_DECODER", "libjpeg")
    said = refusal(2, "--weights", tmp_path / "none.safetensors")
    assert said == "vir-evaluate: VIR_DECODER must be one of pillow, simplejpeg, nvimgcodec, got 'libjpeg'\n"


def test_the_second_of_several_files_is_looked_at_before_the_first_is_evaluated(refusal, given, tmp_path):
    stranger = write_weights(tmp_path / "s.safetensors", classes=tuple("abcdefghij"))
    said = refusal(2, "--weights", given[1], stranger)
    assert f"--weights {stranger} and --data {given[3]} do not fit" in said and "none is in both" in said


def test_what_is_done_is_not_lost_where_a_later_file_is_refused(given, classes, tmp_path, capsys):
    """Here for its images, which only its own turn shows."""
    args = {"num_classes": 10, "img_size": 28, "patch_size": 14}
    path = write_weights(tmp_path / "v.safetensors", classes=classes, args=ARGS | {"patch_size": 7, "img_size": 28})
    whole = write_weights(tmp_path / "x.safetensors", name="test_vit", classes=classes, args=args)
    assert evaluate.main([*given, "--weights", str(path), str(whole), "--img-size", "21", "--json",
                          str(tmp_path / "r.json")]) == 2
    said = capsys.readouterr()
    assert said.err.splitlines()[-1] == (f"vir-evaluate: {whole} takes no images of --img-size 21: Input height (21) "
                                         "should be divisible by patch size (14).")
    assert json.loads((tmp_path / "r.json").read_text())["weights"] == str(path)


def test_files_that_would_replace_each_other_or_the_weights_are_refused(refusal, given, tmp_path):
    one = tmp_path / "one.csv"
    assert f"--per-class {one} is --json too; give another" in refusal(2, "--json", one, "--per-class", one)
    assert f"--json {given[1]} is one of --weights too" in refusal(2, "--json", given[1], "--force")


def test_retention_is_not_asked_of_a_network_without_it(refusal, classes, tmp_path):
    path = write_weights(tmp_path / "v.safetensors", name="test_vit", classes=classes,
                         args={"num_classes": 10, "img_size": 28, "patch_size": 14})
    for flags in (["--mode", "parallel"], ["--compare-modes"]):
        assert "holds a test_vit, which has no retention; leave out --mode" in refusal(2, "--weights", path, *flags)


@pytest.mark.parametrize("flags, said", [
    (["--batch-size", "0"], "--batch-size is 0; it must be at least 1"), (["--img-size", "-1"], "--img-size is -1"),
    (["--crop-pct", "1.5"], "--crop-pct is 1.5; it must be in (0, 1]"), (["--crop-pct", "nan"], "--crop-pct is nan"),
    (["--weights", "a", "b", "--per-class", "c.csv"], "--per-class is of one weights file, and 2 are given"),
    (["--crop-mode", "round"], "invalid choice: 'round'"), (["--dtype", "int8"], "invalid choice: 'int8'")])
def test_a_flag_that_cannot_be_is_told(given, capsys, flags, said):
    with pytest.raises(SystemExit) as end:
        evaluate.main([*given, *flags])
    assert end.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize("flag, name, better", [
    ("--per-class", "c.txt", "c.csv"), ("--per-class", "c", "c.csv"), ("--confusion", "c.doc", "c.png"),
    ("--save-predictions", "p.npy", "p.npz")])
def test_an_ending_of_another_kind_is_told_with_a_better_one(refusal, tmp_path, flag, name, better):
    assert f"; give {flag} {tmp_path / better}\n" in refusal(2, flag, tmp_path / name)


@pytest.mark.parametrize("name, said", [
    ("gone/r.json", "No such file or directory"), ("file/r.json", "Not a directory"), ("folder", "it is a folder"),
    ("null", "it is no regular file")])
def test_a_file_that_cannot_be_written_is_refused_before_the_evaluation(given, tmp_path, capsys, name, said):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "null").symlink_to("/dev/null")
    assert evaluate.main([*given, "--json", str(tmp_path / name)]) == 2
    error = capsys.readouterr()
    assert (error.out, error.err) == ("", f"vir-evaluate: --json {tmp_path / name} cannot be written: {said}; give "
                                          "another file, in a folder that is there\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "null"]


def test_a_result_that_cannot_be_written_any_more_is_printed_all_the_same(given, tmp_path, capsys, monkeypatch):
    write, folder = outputs.replace_text, tmp_path / "folder"
    folder.mkdir()

    def too_late(path, text):
        shutil.rmtree(folder)
        write(path, text)

    monkeypatch.setattr(outputs, "replace_text", too_late)
    assert evaluate.main([*given, "--json", str(folder / "r.json")]) == 3
    said = capsys.readouterr()
    assert json.loads(said.out.splitlines()[-1])["images"] == 130 and "top-1" in said.out
    assert said.err.splitlines()[-1] == (f"vir-evaluate: --json {folder / 'r.json'} could not be written: No such file "
                                         "or directory; the last line on stdout is the result")


@pytest.mark.parametrize("data, said", [
    ("none", "--data: no such folder: {}/none; convert first: vir-convert --source SRC --split none --output SHARDS"),
    ("", "--data: {} holds 'val', in which the images or shards lie; give one of them, as {}/val"),
    ("val/manifest.json", "--data: {}/val/manifest.json is a file; give the folder of a converted split; convert "
                          "first: vir-convert --source SRC --split SPLIT --output SHARDS")])
def test_a_folder_without_shards_is_told_with_its_flag(given, tmp_path, capsys, data, said):
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "manifest.json").touch()
    assert evaluate.main([*given, "--data", str(tmp_path / data)]) == 3
    assert capsys.readouterr().err == f"vir-evaluate: {said.format(tmp_path, tmp_path)}\n"


@pytest.mark.launcher
@pytest.mark.timeout(2 * HANGS)
def test_two_ranks_have_one_bar_of_all_images_and_one_refusal(given, tmp_path):
    """130 images are four times 2 x 16 and 2 that rank 0 has alone."""
    with ThreadPoolExecutor() as pool:
        done, refused = pool.map(lambda more: torchrun("-m", "vir.evaluate", *given, "--batch-size", "16", *more),
                                 ([], ["--json", tmp_path / "none" / "r.json"]))
    assert done.returncode == 0, done.stdout
    counts = [int(count) for count in re.findall(r"(\d+)/130 \[", done.stdout)]
    assert counts == sorted(counts) and counts[0] == 0 and counts[-1] == 130
    said = refused.stdout[:refused.stdout.index("Traceback")]  # of torchrun, whose report has the line again
    assert said.count("none/r.json cannot be written: No such file or directory") == 1, refused.stdout
    assert re.search(r"exitcode +: 2 ", refused.stdout)


@pytest.mark.gpu
@pytest.mark.launcher
@pytest.mark.timeout(2 * HANGS)
def test_the_command_finds_on_a_gpu_what_it_finds_on_cpu(given, tmp_path):
    results = []
    for device in ("auto", "cpu"):
        done = call(sys.executable, "-m", "vir.evaluate", *given, "--device", device, "--compare-modes", "--hflip-tta",
                    "--json", tmp_path / "r.json", "--force", timeout=HANGS)
        assert done.returncode == 0, done.stdout
        results.append(json.loads((tmp_path / "r.json").read_text()))
    on_gpu, on_cpu = results
    assert on_gpu["images"] == on_cpu["images"] == 130 and abs(on_gpu["top1"] - on_cpu["top1"]) < 1.6  # two images
    assert on_gpu["loss"] == pytest.approx(on_cpu["loss"], rel=1e-4)
    assert all(of_mode["largest_logit_difference"] < 1e-4 for of_mode in on_gpu["modes"].values())
