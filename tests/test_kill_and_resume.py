"""A run that is killed at random and started again ends as the one that is not; and the comparison sees differences."""

import contextlib
import io
import json
import shutil

import kill_and_resume
import pytest
import torch

from vir.training.checkpoint_info import FOLDER, LATEST
from vir.training.metrics import FILE as METRICS
from vir.training.metrics import read_metrics

KILLS = 2


@pytest.fixture(scope="module")
def experiment(shards, tmp_path_factory):
    """Exit code, printed lines and kept folder of an experiment."""
    folder = tmp_path_factory.mktemp("killed") / "experiment"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = kill_and_resume.main(["--shards", str(shards), "--kills", str(KILLS), "--output", str(folder)])
    return code, printed.getvalue().splitlines(), folder


@pytest.fixture
def copies(experiment, tmp_path):
    """Folders of an uninterrupted and a killed run, to be spoilt."""
    for run in ("uninterrupted", "killed"):
        shutil.copytree(experiment[2] / run, tmp_path / run)
    return tmp_path / "uninterrupted", tmp_path / "killed"


def test_a_killed_run_ends_bit_for_bit_as_the_uninterrupted_one(experiment):
    code, lines, folder = experiment
    assert code == 0, "\n".join(lines)
    assert lines[-1].startswith(f"EQUAL: {kill_and_resume.STEPS_PER_KILL * KILLS} steps and "), lines[-1]
    assert f"after {KILLS} kills (1 between saves, 1 in a save), seed 0" in lines[-1]
    assert [line.split(":")[0] for line in lines[1:-1]] == [f"kill {k} of {KILLS}" for k in range(1, KILLS + 1)]
    continued = [int(line.split("continued after step ")[1]) for line in lines[1:-1]]
    assert all(step % kill_and_resume.CHECKPOINT_EVERY == 0 for step in continued)
    starts = sorted(path.name for path in folder.glob("killed-start-*.txt"))
    assert starts == [f"killed-start-{k:02d}.txt" for k in range(1, KILLS + 2)]


@pytest.mark.parametrize("key", kill_and_resume.COMPARED)
def test_one_changed_event_is_found(key, copies):
    events = read_metrics(copies[1])
    events[4][key] += 1 if isinstance(events[4][key], int) else events[4][key] * 2 ** -52
    (copies[1] / METRICS).write_text("".join(json.dumps(event) + "\n" for event in events))
    said = kill_and_resume.differences(*copies)
    assert any(f": {key} " in line for line in said) or key == "step" and "not each of 1 to" in said[0], said


@pytest.mark.parametrize("spoil", [lambda lines: lines[:9] + lines[10:], lambda lines: lines[:9] + lines[8:],
                                   lambda lines: lines[:-3]], ids=["a step missing", "a step twice", "the end missing"])
def test_each_step_must_stand_once(spoil, copies):
    path = copies[1] / METRICS
    path.write_text("".join(spoil(path.read_text().splitlines(keepends=True))))
    said = kill_and_resume.differences(*copies)
    assert said and said[0].startswith("killed run: the steps in metrics.jsonl are not each of 1 to "), said


def test_the_checkpoint_of_another_step_is_found(copies):
    latest = copies[1] / FOLDER / LATEST
    before = sorted(path.name for path in (copies[1] / FOLDER).glob("step-*"))[-2]
    latest.write_text(before)
    said = "\n".join(kill_and_resume.differences(*copies))
    for what in ("last checkpoint: step", "weights: ", "EMA: "):
        assert what in said, said


def test_one_changed_bit_of_one_tensor_is_found():
    weights = {"head.weight": torch.randn(10, 4), "scale": torch.tensor(0.0)}
    assert kill_and_resume.tensor_differences(weights, {n: w.clone() for n, w in weights.items()}, "EMA") == []
    changed = {**weights, "head.weight": weights["head.weight"].clone()}
    changed["head.weight"].view(torch.int32)[3, 2] ^= 1
    (said,) = kill_and_resume.tensor_differences(weights, changed, "EMA")
    assert said.startswith("EMA: 1 of 40 numbers of head.weight differ, by up to ")
    (said,) = kill_and_resume.tensor_differences(weights, {**weights, "scale": torch.tensor(-0.0)}, "EMA")
    assert "scale" in said
    assert kill_and_resume.tensor_differences(weights, {"scale": weights["scale"]}, "EMA") == [
        "EMA: head.weight is in one run alone"]
