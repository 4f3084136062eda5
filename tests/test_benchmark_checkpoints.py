"""tools/benchmark_checkpoints.py on a tiny network: every figure is there, and the table follows from the numbers."""

import importlib
import json
import statistics

import pytest

from support.launchers import HANGS, ROOT
from vir.benchmarks import checkpoints, launching
from vir.benchmarks.tables import checkpointing_table, render


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    monkeypatch.setattr(checkpoints.launcher, "hide_gpus", lambda: None)  # it would for all tests that follow
    return importlib.import_module("benchmark_checkpoints")


@pytest.fixture
def main(tool):
    return tool.main


def rows_of(table):
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in table.splitlines()[2:]]


@pytest.mark.launcher
@pytest.mark.timeout(HANGS)
def test_every_figure_is_measured_and_shown(tmp_path, main, capsys):
    assert main(["--folder", str(tmp_path), "--quick", "--deepspeed_configs", "zero3_fp32", "--writing_ranks", "2",
                 "--turns", "2", "--written", "1", "--json", str(tmp_path / "x.json")]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
    result = json.loads((tmp_path / "x.json").read_text())
    assert str(tmp_path) not in json.dumps({**result, "command": ""})
    stall, writing, throughput = result["checkpointing"]
    assert [task["part"] for task in result["checkpointing"]] == ["stall", "writing", "throughput"]
    for task in result["checkpointing"]:
        assert (task["ranks"], task["stage"], task["precision"]) == (2, 3, "fp32")
        # float32 weights, two moments and the average, each once in all; the rest is names and numbers of DeepSpeed's
        assert 16 * task["parameters"] < task["files_bytes"] < 24 * task["parameters"]
    assert 16 * stall["parameters"] < sum(stall["bytes_of_rank"]) < stall["files_bytes"]
    assert len(stall["stalls"]) == len(stall["copies"]) == 3 and min(*stall["stalls"], *stall["copies"]) > 0
    write, = stall["writes"]
    assert write.keys() == {"asynchronous", "synchronous", "plain", "torch", "torch_stall"}
    assert min(write.values()) > 0 and write["torch"] > write["torch_stall"]
    assert len(writing["turns"]) == 2
    assert all(len(turn["writing"]) == len(turn["alone"]) == len(turn["busy"]) > 0 for turn in writing["turns"])
    assert throughput["steps"] == 3 and [[*turn] for turn in throughput["turns"]] == [
        ["none", "asynchronous", "synchronous"], ["asynchronous", "synchronous", "none"],
        ["synchronous", "none", "asynchronous"]]
    shown = capsys.readouterr().out.strip()
    assert shown == render(tmp_path / "x.json")
    first, later, published, beside, steps = rows_of(shown)
    assert float(first[4]) == pytest.approx(1e3 * stall["stalls"][0], rel=1e-3)
    assert float(later[4].split()[0]) == pytest.approx(1e3 * statistics.median(stall["stalls"][1:]), rel=1e-3)
    assert float(published[5]) == pytest.approx(write["synchronous"], rel=1e-3)


def test_a_ratio_is_the_median_of_those_of_the_turns():
    model = {"name": "vir_tiny_patch16_224", "args": {}, "img_size": 224, "micro_batch_size": 4}
    of_all = {"model": model, "parameters": 5_500_000, "stage": 2, "precision": "bf16", "files_bytes": 9e7}
    writes = [{"asynchronous": 3.0, "synchronous": 2.0, "plain": 1.0, "torch": 4.0, "torch_stall": 0.5},
              {"asynchronous": 5.0, "synchronous": 3.0, "plain": 2.0, "torch": 5.0, "torch_stall": 0.7}]
    first, later, published, beside, steps = rows_of(checkpointing_table([
        {**of_all, "part": "stall", "ranks": 2, "bytes_of_rank": [60e6, 30e6], "stalls": [0.4, 0.11, 0.3],
         "copies": [0.2, 0.1, 0.2], "writes": writes},
        {**of_all, "part": "writing", "ranks": 1, "turns": [
            {"writing": [1.0, 3.0], "alone": [1.0, 1.0], "busy": [1.2, 1.4]},
            {"writing": [1.5], "alone": [1.0], "busy": [1.5]}]},
        {**of_all, "part": "throughput", "ranks": 2, "steps": 20, "turns": [
            {"none": 10.0, "asynchronous": 10.1, "synchronous": 11.0}]}]))
    assert first[1:] == ["ZeRO 2, bf16, 2 ranks", "5.5 M, 4 of 224 px", "90", "400", "", "", "copy of 60 MB: 200",
                         "2.000", ""]
    assert later[4:] == ["205 (110–300)", "2500 (2000–3000)", "600 (500–700)", "copy of 60 MB: 150 (100–200)", "1.300",
                         "1.2"]
    assert published[4:] == ["4 (3–5)", "2.5 (2–3)", "4.5 (4–5)", "write and fsync: 1.5 (1–2), 60 MB/s", "2.750", ""]
    assert beside[4:] == ["1750 (1500–2000)", "", "", "not writing: 1000 (1000–1000); beside another process that "
                          "hashes: 1400 (1300–1500), × 1.400", "1.750", "1.03"]
    assert steps[4:] == ["10.1", "11, × 1.100", "", "without one: 10", "1.010", "1.02"]


def test_what_has_the_same_ranks_and_json_is_measured_in_one_launch(tool):
    def parts(*words):
        settings = checkpoints.Settings(**vars(tool._parser().parse_args(words)))
        found = checkpoints._launches(settings, ["zero0_fp32", "zero2_fp32"])
        return {launch: [task["part"] for task in tasks] for launch, tasks in found.items()}

    assert parts() == {(2, "zero0_fp32"): ["stall"], (2, "zero2_fp32"): ["stall", "throughput"],
                       (1, "zero2_fp32"): ["writing"]}
    assert parts("--parts", "writing", "--writing_ranks", "4") == {(4, "zero2_fp32"): ["writing"]}


@pytest.mark.parametrize("words, code, said", [
    (["--ranks", "0"], 2, "--ranks is 0; it must be at least 1"),
    (["--turns", "1"], 2, "--turns is 1; it must be at least --written, which is 2"),
    (["--folder", "nowhere"], 3, "--folder nowhere is no folder; make it"),
    (["--deepspeed_configs", "no.json"], 2, "no.json: no such file"),
    (["--json", "nowhere/x.json"], 2, "--json nowhere/x.json cannot be written")])
def test_what_cannot_be_measured_is_told_before_anything_runs(words, code, said, main, capsys, monkeypatch):
    monkeypatch.setattr(launching.subprocess, "Popen", None)
    assert main(words) == code
    assert said in capsys.readouterr().err
