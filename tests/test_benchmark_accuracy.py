"""tools/benchmark_accuracy.py on a few images: its runs are real trainings, and those that are done stay done."""

import importlib
import json
from threading import Lock

import numpy as np
import pytest
from PIL import Image

from support.forked import forked
from support.launchers import HANGS, ROOT
from vir.benchmarks import accuracy, paired, tables


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    return importlib.import_module("benchmark_accuracy")


@pytest.fixture
def images(tmp_path):
    """Stripes, in one direction for each class."""
    draw = np.random.default_rng(0)
    for split, count in (("train", 40), ("val", 5)):
        for number, name in enumerate(("coat", "shirt")):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for image in range(count):
                pixels = np.where(np.arange(28) // 4 % 2, 200, 30) + draw.integers(0, 30, (28, 28))
                Image.fromarray((pixels if number else pixels.T).astype(np.uint8)).save(
                    tmp_path / "images" / split / name / f"{image}.png")
    return tmp_path / "images"


@pytest.mark.launcher
@pytest.mark.timeout(8 * HANGS)
def test_two_models_are_trained_judged_kept_and_compared(tool, images, tmp_path, capsys, monkeypatch):
    one_at_a_time = Lock()

    def call(command, ended):
        with one_at_a_time:
            done = forked(*command[1:], ranks=1)
        return done.returncode, done.stdout

    monkeypatch.setattr(accuracy, "call", call)
    monkeypatch.setattr(accuracy, "MODELS", {"ours": "vir_tiny_patch16_224", "theirs": "official_tiny_patch16_224"})
    monkeypatch.setattr(accuracy, "_EVALUATIONS", 2)
    words = ["--fashion", str(images), "--folder", str(tmp_path / "runs"), "--seeds", "1", "--epochs", "2",
             "--json", str(tmp_path / "x.json"), "--plot", str(tmp_path / "x.png")]
    assert tool.main(words) == 0, capsys.readouterr().err
    printed, result = capsys.readouterr().out, json.loads((tmp_path / "x.json").read_text())
    ours, theirs = result["accuracy"]
    assert (ours["model"], theirs["model"]) == ("ours", "theirs") and "right" not in ours["ema"]
    assert [epoch for epoch, _ in ours["top1"]] == pytest.approx([1.2, 2.4], abs=0.5)
    assert ours["raw"]["images"] == 10 and ours["top1"][-1][1] == pytest.approx(ours["ema"]["top1"])
    pair, = result["pairs"]
    assert 10 * (pair["only_first"] - pair["only_second"]) == pytest.approx(
        ours["ema"]["top1"] - theirs["ema"]["top1"])
    assert Image.open(tmp_path / "x.png").width > 500
    assert tables.render(tmp_path / "x.json") in printed and f"| theirs | {theirs['ema']['top1']:.2f} |" in printed

    monkeypatch.setattr(accuracy, "call", None)  # nothing is run again
    assert tool.main(words) == 0 and capsys.readouterr().out == printed
    assert tool.main([*words, "--epochs", "3"]) == 2
    assert "was made with other settings" in capsys.readouterr().err
    kept = tmp_path / "runs" / "fashion-mnist-vir_tiny_patch16_224-0.json"
    kept.write_text(kept.read_text()[:100])
    assert tool.main(words) == 3
    assert f"{kept} cannot be read" in capsys.readouterr().err


def test_a_run_that_fails_is_told_with_what_it_said(tool, images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(accuracy, "call", lambda command, ended: (75, "stopped by SIGINT after saving"))
    assert tool.main(["--fashion", str(images), "--folder", str(tmp_path)]) == 3
    told = capsys.readouterr().err
    assert "fashion-mnist-vir_tiny_patch16_224-0 ended with code 75; the same command goes on" in told
    assert "stopped by SIGINT after saving" in told


@pytest.mark.parametrize("flags, said", [
    ([], "nothing to train on"), (["--cifar", "nowhere"], "--cifar nowhere has no folder train"),
    (["--seeds", "0"], "--seeds 0 must be at least 1"), (["--epochs", "0"], "--epochs 0 above 0"),
    (["--folder", "train/coat/0.png/x", "--cifar", "."], "cannot write train/coat/0.png/x: "),
    (["--json", "nowhere/x.json", "--cifar", "."], "--json nowhere/x.json cannot be written")])
def test_what_cannot_be_measured_is_told_before_anything_runs(flags, said, tool, images, capsys, monkeypatch):
    monkeypatch.setattr(accuracy, "call", None)
    monkeypatch.chdir(images)
    assert tool.main(["--folder", str(images), *flags]) in (2, 3)
    assert said in capsys.readouterr().err


def of(model, seed, top1, right, raw=50.0):
    return {"data": "clothes", "model": model, "seed": seed, "raw": {"top1": raw},
            "ema": {"top1": top1, "right": right}}


def test_the_table_compares_each_model_with_the_first_seed_by_seed():
    found = [of("a", 0, 60.0, "f0"), of("b", 0, 62.0, "cf"), of("a", 1, 61.0, "00"), of("b", 1, 62.0, "01", 52.0)]
    pairs = accuracy._pairs(found)
    assert [(pair["seed"], pair["only_first"], pair["only_second"]) for pair in pairs] == [(0, 2, 4), (1, 0, 1)]
    low, high = paired.interval([2.0, 1.0])
    assert tables.accuracy_table({"accuracy": found, "pairs": pairs}).splitlines()[2:] == [
        "| clothes | a | 60.00, 61.00 | 60.50 ± 0.71 | 50.00 ± 0.00 |  |  |",
        f"| clothes | b | 62.00, 62.00 | 62.00 ± 0.00 | 51.00 ± 1.41 | +1.50 ({low:+.2f} to {high:+.2f}) "
        "| 4, 2 (p = 0.688); 1, 0 (p = 1.000) |"]
