"""Evaluation of a weights file: what is refused at the door, and a result that cannot be written.

Its numbers are compared with those of training in test_train.py.
"""

import json
import os
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch

from support.http_server import HttpServer
from support.launchers import HANGS, call, torchrun
from vir import evaluate
from vir.data.shards import read_manifest
from vir.models.spec import InputSpec, ModelSpec
from vir.models.weights import WeightsMetadata, save_weights

ARGS = dict(img_size=28, patch_size=14, embed_dim=16, depth=1, num_heads=1, num_classes=10)


@pytest.fixture(scope="module")
def given(shards, tmp_path_factory):
    """--weights and --data."""
    torch.manual_seed(0)
    spec = ModelSpec(name="vir_tiny_patch16_224", args=ARGS, classes=read_manifest(shards / "val").classes,
                     input=InputSpec(size=(3, 28, 28), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic",
                                     crop_pct=1.0))
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    save_weights(path, timm.create_model(spec.name, **ARGS).state_dict(),
                 WeightsMetadata(model=spec, step=3, samples_seen=30, ema=False, dtype="fp32"))
    return ["--weights", str(path), "--data", str(shards / "val"), "--workers", "1"]


def test_the_result_is_in_the_file_and_on_the_last_line(given, tmp_path, capsys):
    (tmp_path / "r.json").write_text("old")
    assert evaluate.main([*given, "--json", str(tmp_path / "r.json")]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out.splitlines()[-1]) == json.loads((tmp_path / "r.json").read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]
    assert "130/130" in said.err


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


@pytest.mark.parametrize("name, said", [
    ("gone/r.json", "No such file or directory"), ("file/r.json", "Not a directory"), ("folder", "it is a folder"),
    ("null", "it is no regular file")])
def test_a_file_that_cannot_be_written_is_refused_before_the_evaluation(given, tmp_path, capsys, name, said):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "null").symlink_to("/dev/null")
    assert evaluate.main([*given, "--json", str(tmp_path / name)]) == 2
    error = capsys.readouterr()
    assert (error.out, error.err) == ("", f"vir-evaluate: --json {tmp_path / name} cannot be written: {said}; give a "
                                          "file in a folder that is there\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "null"]


def test_a_result_that_cannot_be_written_any_more_is_printed_all_the_same(given, tmp_path, capsys, monkeypatch):
    write, folder = evaluate.replace_text, tmp_path / "folder"
    folder.mkdir()

    def too_late(path, text):
        shutil.rmtree(folder)
        write(path, text)

    monkeypatch.setattr(evaluate, "replace_text", too_late)
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
        done = call(sys.executable, "-m", "vir.evaluate", *given, "--device", device, "--compare-modes", "--json",
                    tmp_path / "r.json", timeout=HANGS)
        assert done.returncode == 0, done.stdout
        results.append(json.loads((tmp_path / "r.json").read_text()))
    on_gpu, on_cpu = results
    assert on_gpu["images"] == on_cpu["images"] == 130 and abs(on_gpu["top1"] - on_cpu["top1"]) < 1.6  # two images
    assert on_gpu["loss"] == pytest.approx(on_cpu["loss"], rel=1e-4)
    assert all(difference < 1e-4 for difference in on_gpu["mode_differences"].values())
