"""tools/benchmark_start.py on one rank: the phases of each side, from its command to its first step."""

import importlib
import json
import sys

import pytest

from support.launchers import HANGS, ROOT, call
from vir.benchmarks.tables import start_table

RANK = ["model", "engine", "first step"]


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    return importlib.import_module("benchmark_start")


@pytest.mark.launcher
@pytest.mark.timeout(2 * HANGS)
def test_phases_of_the_bare_script_of_a_new_run_and_of_a_resumed_one(shards, tmp_path):
    done = call(sys.executable, "tools/benchmark_start.py", "--data", shards, "--model", "test_vit", "--ranks", 1,
                "--repeats", 1, "--json", tmp_path / "start.json", timeout=HANGS)
    assert done.returncode == 0, done.stdout
    turn, = json.loads((tmp_path / "start.json").read_text())["start"]["turns"]
    assert list(turn) == ["bare", "new", "resumed"]
    assert list(turn["bare"]) == ["launcher", "imports", *RANK]
    for side in ("new", "resumed"):
        assert list(turn[side]) == ["launcher", "imports", "data", "process group", "model", "engine", "checkpoint",
                                    "first batch", "first step"]
    for seconds in turn.values():  # the launcher, and each rank, import torch: seconds on any machine
        assert all(value >= 0 for value in seconds.values()) and 0.5 < seconds["launcher"] < HANGS
        assert 0.5 < seconds["imports"] < HANGS


def test_the_table_compares_sides_of_the_same_turn():
    turns = [{"bare": {"launcher": 1.0, "first step": 1.0}, "new": {"launcher": 1.0, "first step": 3.0}},
             {"bare": {"launcher": 2.0, "first step": 2.0}, "new": {"launcher": 2.0, "first step": 3.0}},
             {"bare": {"launcher": 2.0, "first step": 3.0}, "new": {"launcher": 2.0, "data": 1.0, "first step": 3.0}}]
    turns[0]["new"]["data"] = turns[1]["new"]["data"] = 0.0
    table = start_table({"model": "resnet18", "ranks": 2, "zero": "zero2_fp32", "turns": turns})
    assert table.splitlines() == [
        "| resnet18, 2 ranks, zero2_fp32 | bare | new |", "|---|---|---|", "| **all, s** | 4 (2–5) | 5 (4–6) |",
        "| **× bare** | 1.000 | 1.250 |", "| launcher | 2.00 | 2.00 |", "| first step | 2.00 | 3.00 |",
        "| data |  | 0.00 |"]


@pytest.mark.parametrize("flags, says", [
    (["--ranks", "0"], "--ranks is 0; it must be at least 1"),
    (["--repeats", "-1"], "--repeats is -1; it must be at least 1"),
    (["--model", "vir_tiny"], "--model is 'vir_tiny'; timm.list_models() tells all names"),
])
def test_a_wrong_flag_is_told(flags, says, tool, capsys):
    assert tool.main(["--data", "nowhere", *flags]) == 2
    assert says in capsys.readouterr().err
