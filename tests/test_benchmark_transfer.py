"""tools/benchmark_transfer.py on a few images: its rows are real trainings, and compare seed by seed."""

import importlib
import json

import numpy as np
import pytest
from PIL import Image

from support.forked import forked
from support.launchers import HANGS, ROOT
from vir.benchmarks import transfer


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    return importlib.import_module("benchmark_transfer")


def write_images(folder, classes):
    """Stripes, in one direction for each class; 24 to train on, more than are to be taken."""
    draw = np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 4)):
        for number, name in enumerate(classes):
            (folder / split / name).mkdir(parents=True)
            for image in range(count):
                pixels = np.where(np.arange(28) // 4 % 2, 200, 30) + draw.integers(0, 30, (28, 28))
                Image.fromarray((pixels if number else pixels.T).astype(np.uint8)).save(
                    folder / split / name / f"{image}.png")
    return folder


@pytest.mark.launcher
@pytest.mark.timeout(4 * HANGS)
def test_few_images_with_and_without_what_was_learned_before(tool, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(transfer.subprocess, "run", lambda command, **how: forked(*command[1:], ranks=1))
    digits, fashion = (write_images(tmp_path / name, classes) for name, classes in (
        ("digits", ("one", "two")), ("fashion", ("coat", "shirt"))))
    assert tool.main(["--digits", str(digits), "--fashion", str(fashion), "--folder", str(tmp_path), "--parts", "few",
                      "--seeds", "1", "--scale", "0.02", "--json", str(tmp_path / "x.json")]) == 0
    result = json.loads((tmp_path / "x.json").read_text())
    assert [row[:2] for row in result["rows"]] == [
        ["20 a class, 3 steps", kind] for kind in
        ("from scratch", "fine-tuned from digits", "linear probe on random weights", "linear probe on digits")]
    assert all(float(accuracy) * 8 / 100 == pytest.approx(round(float(accuracy) * 8 / 100), abs=0.01)
               for _, _, accuracy, _, _ in result["rows"])  # whole numbers of the 8 images
    assert f"| {result['rows'][1][1]} | {result['rows'][1][2]} |" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["digits", "fashion", "x.json"]


def test_a_row_is_compared_seed_by_seed_with_the_first():
    assert transfer.compared("20 a class", {"plain": [50.0, 60.0], "taught": [53.0, 61.0]}) == [
        ("20 a class", "plain", "50.0, 60.0", "55.0", ""),
        ("20 a class", "taught", "53.0, 61.0", "57.0", "+2.0 (+1.0 to +3.0)")]


def test_the_few_images_are_drawn_by_the_seed(tmp_path):
    source = write_images(tmp_path / "source", ("coat", "shirt")) / "train"
    drawn = [{path.relative_to(tmp_path / name) for path in transfer.some_of(source, 5, seed, tmp_path / name).rglob(
        "*.png")} for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    assert [len(images) for images in drawn] == [10] * 3 and drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("flags, said", [
    (["--seeds", "0"], "--seeds 0 must be at least 1"), (["--scale", "2"], "--scale 2 more than 0 and at most 1"),
    (["--digits", "nowhere"], "--digits nowhere has no folder train"),
    (["--folder", "nowhere"], "--folder nowhere is no folder"),
    (["--json", "nowhere/x.json"], "--json nowhere/x.json cannot be written")])
def test_what_cannot_be_measured_is_told_before_anything_runs(flags, said, tool, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(transfer.subprocess, "run", None)
    source = write_images(tmp_path, ("coat", "shirt"))
    assert tool.main(["--digits", str(source), "--fashion", str(source), "--folder", str(tmp_path), *flags]) in (2, 3)
    assert said in capsys.readouterr().err
