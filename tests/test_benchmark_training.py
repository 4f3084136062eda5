"""tools/benchmark_training.py on a tiny network: every figure is there, and the tables follow from the raw numbers."""

import importlib
import json
import statistics
import sys

import pytest
import torch

import vir.models
from support.launchers import HANGS, ROOT, TINY, call
from vir.benchmarks import launching, training
from vir.benchmarks.checkpoint_size import ema_bytes
from vir.benchmarks.tables import training_tables


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    return importlib.import_module("benchmark_training")


def rows_of(markdown):
    """Of each table, in order: its one row or rows as lists of cells, without the head."""
    tables = [part.splitlines() for part in markdown.split("\n\n") if part.startswith("|")]
    return [[[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]] for table in tables]


@pytest.mark.launcher
@pytest.mark.timeout(2 * HANGS)
def test_figures_of_both_loops_checkpoints_and_ema(shards, tmp_path):
    config = ROOT / "ds_configs" / "zero2_fp32.json"
    done = call(sys.executable, "tools/benchmark_training.py", "--data", shards, "--steps", 6, "--log_every", 2,
                "--repeats", 1, "--adam", "torch", "--loading", "--deepspeed_config", config, "--ema", config,
                "--json", tmp_path / "x.json", "--", *TINY, "--train.global_batch_size", "16",
                "--train.micro_batch_size", "4", timeout=HANGS)
    assert done.returncode == 0, done.stdout
    result = json.loads((tmp_path / "x.json").read_text())
    run, = result["runs"]
    loops, saved, (average,) = run["loops"], run["checkpoints"], run["ema"]
    turn, = loops["turns"]
    of_turn = turn["loops"]
    assert (run["model"], run["ranks"], run["zero"]) == ("vir_tiny_patch16_224", 2, "zero2_fp32")
    assert {name: len(loop["seconds"]) for name, loop in of_turn.items()} == {
        "deepspeed": 2, "torch": 2, "torch_loading": 2, "ours": 1}  # a checkpoint is in the other
    for name, loop in of_turn.items():
        assert loop["ms"] == 1000 * statistics.median(loop["seconds"]) > 0.1
        assert 0 < loop["trainer_cpu"] < 2 * max(loop["seconds"])  # one thread, and a few that wait
        assert (loop["loader_cpu"] > 0) == (name in ("torch_loading", "ours"))
    assert 0 <= of_turn["ours"]["data_wait"] < 1
    assert loops["peer_optimizer"] == "torch.optim.adamw.AdamW"

    model = vir.models.vision_retention.VisionRetention(
        img_size=28, patch_size=14, embed_dim=128, depth=2, num_heads=2, num_classes=10)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert loops["parameters"] == parameters
    assert len(saved["seconds"]) == 1 and 0 < saved["median_seconds"] < 60
    # float32 weights, masters, two moments and the average; the rest is names and numbers of DeepSpeed's
    assert 20 * parameters < saved["bytes"] < 24 * parameters
    assert saved["images_per_second"] == pytest.approx(16e3 / of_turn["ours"]["ms"])
    assert saved["share"] == pytest.approx(
        saved["median_seconds"] / (saved["median_seconds"] + 1_281_167 / saved["images_per_second"]))

    assert average["stage"] == 2 and average["ideal_bytes"] == 4 * parameters / 2
    assert len(average["bytes_of_rank"]) == 2 and 4 * parameters <= sum(average["bytes_of_rank"]) < 4.1 * parameters

    (ours, *others), (checkpoint,), (ema,) = rows_of(done.stdout)
    assert ours[:4] == ["2", "zero2_fp32", "16 of 4", "ours"]
    assert [row[3] for row in others] == ["bare DeepSpeed", "bare PyTorch", "bare PyTorch, torch's DataLoader"]
    for row, name in zip(others, ("deepspeed", "torch", "torch_loading")):
        assert float(row[4]) == pytest.approx(of_turn[name]["ms"], rel=1e-3)
        assert float(row[6]) == pytest.approx(100 * (of_turn["ours"]["ms"] / of_turn[name]["ms"] - 1), rel=1e-3)
    assert float(checkpoint[1]) == pytest.approx(saved["bytes"] / 1e6, abs=0.01)
    assert [int(one.replace(",", "")) for one in ema[2].split(", ")] == average["bytes_of_rank"]


def test_the_median_is_over_turns_and_each_turn_begins_with_another_loop(monkeypatch):
    class Sides:
        parameters, adam, ranks, order = 7, "A", 2, []

        def measure(self, name, *turns):
            self.order.append(name)
            seconds = turns[self.order.count(name) - 1]
            return training.Steps(seconds=seconds, trainer_cpu=0.02, loader_cpu=0.5 * (name == "ours"),
                                  data_wait=0.25 if name == "ours" else None,
                                  checkpoint_seconds=[10 * seconds[0]] if name == "ours" else [])

        @property
        def loops(self):
            return {"deepspeed": lambda: self.measure("deepspeed", *[[0.1, 0.5, 0.1]] * 3),
                    "torch": lambda: self.measure("torch", *[[0.05]] * 3),
                    "ours": lambda: self.measure("ours", [0.12, 0.2, 0.1], [0.2] * 3, [0.11] * 3)}

    monkeypatch.setattr(training, "_busy_cores", lambda: 0.0)
    loops = training.compare(Sides(), 3)
    assert Sides.order == ["deepspeed", "torch", "ours", "torch", "ours", "deepspeed", "ours", "deepspeed", "torch"]
    saved = training.checkpoint_cost(loops, global_batch_size=12, size=5)
    assert saved["seconds"] == [1.2, 2.0, 1.1] and saved["median_seconds"] == 1.2
    assert saved["images_per_second"] == pytest.approx(100) and saved["share"] == pytest.approx(1.2 / (1.2 + 12811.67))

    (ours, deepspeed, torch), _ = rows_of(training_tables({"runs": [{
        "ranks": 2, "zero": "zero2_fp32", "global_batch_size": 12, "micro_batch_size": 6, "loops": loops,
        "checkpoints": saved}]}))
    assert ours == ["2", "zero2_fp32", "12 of 6", "ours", "120 (110–200)", "8.333", "", "20 (20–20)", "500 (500–500)",
                    "25 (25–25)"]
    assert deepspeed[3:7] == ["bare DeepSpeed", "100 (100–100)", "10", "20 (10–100)"]
    assert torch[1:7] == ["", "12 of 6", "bare PyTorch", "50 (50–50)", "20", "140 (120–300)"]
    assert torch[8:] == ["0 (0–0)", ""]


def test_a_rank_has_the_same_batch_on_every_number_of_ranks(tool, shards, tmp_path):
    args = tool._parser().parse_args(["--data", str(shards), "--ranks", "2", "1", "4"])
    settings = training.Settings(**vars(args))
    assert [training.Sides(settings, ranks, tmp_path).batch for ranks in settings.ranks] == [128, 64, 256]


def test_intervals_with_a_checkpoint_are_not_timed_and_tell_its_cost(tool, shards, tmp_path, monkeypatch):
    """Steps of 0.1 s, 0.02 s for a line of metrics, checkpoints of 3 s after steps 20 and 40."""
    args = tool._parser().parse_args(["--data", str(shards), "--steps", "50"])
    sides = training.Sides(training.Settings(**vars(args)), 2, tmp_path)
    monkeypatch.setattr(sides, "_launch", lambda launcher, words: None)
    events = [{"kind": "train", "step": step, "time": 100 + step * 0.102 + 3 * (step > 20) + 3 * (step > 40),
               "images_per_second": 1280.0, "data_wait": 0.25, "trainer_cpu_seconds": 0.8,
               "loader_cpu_seconds": 0.4} for step in range(10, 51, 10)]
    (tmp_path / "01").mkdir()
    (tmp_path / "01" / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    monkeypatch.setattr(sides, "_folder", lambda: tmp_path / "01")
    ours = sides.ours()
    assert ours.seconds == pytest.approx([0.102, 0.102])
    assert ours.checkpoint_seconds == pytest.approx([3, 3]) and ours.logging_seconds == pytest.approx(0.02)
    assert ours.data_wait == pytest.approx(0.25)
    assert (ours.trainer_cpu, ours.loader_cpu) == pytest.approx((0.08, 0.04))


@pytest.mark.parametrize("stage, name, state", [
    (0, "mp_rank_00_model_states.pt", lambda s: {"optimizer": {"state": {0: s, 1: s}}}),
    (2, "zero_pp_rank_0_mp_rank_00_optim_states.pt",
     lambda s: {"optimizer_state_dict": {"base_optimizer_state": {"state": [s, s]}}})])
def test_ema_bytes_are_those_of_the_ema_alone(stage, name, state, tmp_path):
    folder = tmp_path / "checkpoints" / "step-00000002"
    folder.mkdir(parents=True)
    (folder.parent / "latest").write_text(folder.name)
    of_parameter = {"ema": torch.zeros(5), "exp_avg": torch.zeros(5), "step": torch.tensor(1.0)}
    torch.save(state(of_parameter), folder / name)
    config = tmp_path / "stage.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    assert ema_bytes(tmp_path, str(config), 1, 10) == {
        "config": "stage", "stage": stage, "bytes_of_rank": [40], "ideal_bytes": 40.0, "ratio": 1.0}


@pytest.mark.parametrize("flags, said", [
    (["--steps", "10"], "--steps is 10; it must be at least 30"),
    (["--ranks", "2", "1", "2"], "--ranks 2 1 2 names a number twice"),
    (["--ranks", "0"], "--ranks is 0; it must be at"),
    (["--", "--no.such", "1"], "no.such"), (["--", "--train.global_batch_size", "100"], "nearest: 128"),
    (["--model", "vir_tiny_patch16_223"], "vir_tiny_patch16_223"), (["--ema", "no.json"], "no.json: no such file"),
    (["--data", "nowhere"], "nowhere")])
def test_what_cannot_be_measured_is_told_before_anything_runs(flags, said, tool, shards, capsys, monkeypatch):
    monkeypatch.setattr(launching.subprocess, "Popen", None)
    assert tool.main(["--data", str(shards), *flags]) in (2, 3)
    assert said in capsys.readouterr().err
