"""A run that streams from S3, is killed at random and started again ends as one from local shards that is not killed;
and the comparison sees differences."""

import contextlib
import io
import json
import re
import shutil

import kill_and_resume
import pytest
import torch

from support.launchers import HANGS
from support.s3_server import S3Server
from vir.checkpoints.names import LATEST
from vir.reports.metrics import read_metrics
from vir.run_folder import CHECKPOINTS, METRICS

KILLS = 2
pytestmark = [pytest.mark.launcher, pytest.mark.timeout(2 * HANGS)]


@pytest.fixture(scope="module")
def experiment(shards, tmp_path_factory):
    """Exit code, printed lines and kept folder of an experiment; the cache has room for three of seven shards."""
    tmp = tmp_path_factory.mktemp("killed")
    folder, cache = tmp / "experiment", tmp / "cache"
    room = 3 * max(path.stat().st_size for path in (shards / "train").glob("*.tar"))
    with S3Server() as server:
        server.upload_folder(shards)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            code = kill_and_resume.main([
                "--shards", str(shards), "--kills", str(KILLS), "--output", str(folder), "--killed-shards",
                server.url("").rstrip("/"), "--cache", str(cache), "--cache-bytes", str(room)])
        asked = {path.split("?")[0] for method, path, status in server.requests() if method == "GET" and status < 300}
    assert sum(path.stat().st_size for path in cache.glob("*.tar")) <= room
    assert len(asked) > 7, asked  # the shards, and what lies beside them
    return code, printed.getvalue().splitlines(), folder


@pytest.fixture
def killed(experiment, tmp_path):
    """A copy of the killed run, to be spoilt."""
    return shutil.copytree(experiment[2] / "killed", tmp_path / "killed")


def test_a_killed_run_ends_bit_for_bit_as_the_uninterrupted_one(experiment):
    code, lines, folder = experiment
    assert code == 0, "\n".join(lines)
    assert lines[-1].startswith(f"EQUAL: {kill_and_resume.STEPS_PER_KILL * KILLS} steps and "), lines[-1]
    met = re.search(rf"after {KILLS} kills \((.*)\), seed 0$", lines[-1])[1]  # where a save is fast, none within one
    assert sum(int(count) for count in re.findall(r"\d+", met)) == 2 * KILLS  # each counts by its moment and its kind
    assert [line.split(":")[0] for line in lines[1:-1]] == [f"kill {k} of {KILLS}" for k in range(1, KILLS + 1)]
    continued = [int(line.split("continued after step ")[1]) for line in lines[1:-1]]
    assert all(step % kill_and_resume.CHECKPOINT_EVERY == 0 for step in continued)
    starts = sorted(path.name for path in folder.glob("killed-start-*.txt"))
    assert starts == [f"killed-start-{k:02d}.txt" for k in range(1, KILLS + 2)]


def test_one_changed_event_is_found(experiment, killed):
    events = read_metrics(killed)
    fifth = next(event for event in events if event["kind"] == "train" and event["step"] == 5)
    fifth["loss"] *= 1 + 2 ** -52
    (killed / METRICS).write_text("".join(json.dumps(event) + "\n" for event in events))
    (said,) = kill_and_resume.differences(experiment[2] / "uninterrupted", killed)
    assert said.startswith("metrics.jsonl, step 5: loss ")


@pytest.mark.parametrize("key", kill_and_resume.COMPARED)
def test_every_compared_key_is_compared(key):
    events = [{name: float(step) for name in kill_and_resume.COMPARED} for step in (1, 2, 3)]
    changed = [*events[:2], {**events[2], key: 3.5}]
    assert kill_and_resume.event_differences(events, events, 3) == []
    assert kill_and_resume.event_differences(events, changed, 3)[-1] == (
        f"metrics.jsonl, step 3.0: {key} 3.0 in the uninterrupted run, 3.5 in the killed one")


@pytest.mark.parametrize("steps", [[1, 2, 4], [1, 2, 2, 3, 4], [1, 2, 3], [1, 3, 2, 4], [1, 2, 3, 4, 5]])
def test_each_step_must_stand_once(steps):
    whole, spoilt = ([dict.fromkeys(kill_and_resume.COMPARED, 0) | {"step": step} for step in of]
                     for of in ([1, 2, 3, 4], steps))
    said = kill_and_resume.event_differences(whole, spoilt, 4)
    assert said[0] == "killed run: the steps in metrics.jsonl are not each of 1 to 4 once"


def test_the_checkpoint_of_another_step_is_found(experiment, killed):
    names = sorted(path.name for path in (killed / CHECKPOINTS).glob("step-*"))
    (killed / CHECKPOINTS / LATEST).write_text(names[-2])
    said = "\n".join(kill_and_resume.differences(experiment[2] / "uninterrupted", killed))
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
