"""tools/benchmark_end_to_end.py: real runs of tiny models, the same settings for both, figures that follow.

timm's train.py is in no package: VIR_TIMM_SCRIPT names it, or the run has our side alone, and what is read of the
script is held by lines that it has written.
"""

import importlib
import json
import os
import statistics
import subprocess
import sys
import time

import psutil
import pytest
from PIL import Image

from support.launchers import HANGS, ROOT, free_port
from vir.benchmarks import end_to_end, launching
from vir.benchmarks.end_to_end import Settings, Side, Step, held_bytes, our_steps, ours, sides_of, timms, timms_steps
from vir.benchmarks.plot import plot_bars
from vir.benchmarks.tables import end_to_end_bars, end_to_end_table, render
from vir.flags import parse

SCRIPT = os.environ.get("VIR_TIMM_SCRIPT")
# Of train.py of timm's repository at version 1.0.29.dev0, on two ranks, with the clock that timm_script.py adds.
LINES = """\
1796078106.676 Scheduled epochs: 1 (epochs + cooldown_epochs). Warmup within epochs when warmup_prefix=False.
1796078119.488 Train: 0 [   0/4 ( 25%)]  Loss: 4.11 (4.11)  Time: 12.763s,    1.25/s  (12.763s,    1.25/s)  \
LR: 1.000e-05  Data: 0.657 (0.657)
1796078128.353 Train: 0 [   1/4 ( 50%)]  Loss: 3.99 (4.05)  Time: 8.912s,    1.80/s  (10.837s,    1.48/s)  \
LR: 1.000e-05  Data: 0.004 (0.330)
1796078145.520 Distributing BatchNorm running means and vars
"""


@pytest.fixture
def main(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    return importlib.import_module("benchmark_end_to_end").main


def settings(tmp_path, **changed):
    return Settings(**{**dict(
        timm_script=tmp_path / "train.py", folder=tmp_path, models=("test_vit",), ranks=2, workers=1, batch=4, steps=8,
        warmup=3, images=64, image_bytes=9000, deepspeed_config="zero0_fp32", repeats=1, json=None, plot=None),
        **changed})


@pytest.mark.launcher
@pytest.mark.timeout(2 * HANGS)
def test_figures_of_real_runs(main, tmp_path, capsys):
    script = tmp_path / "train.py" if SCRIPT is None else SCRIPT
    (tmp_path / "train.py").touch()
    models = "vir_tiny_patch16_224" if SCRIPT is None else "vir_tiny_patch16_224,test_vit"
    words = ["--timm_script", script, "--folder", tmp_path, "--models", models, "--ranks", "1", "--batch", "2",
             "--steps", "6", "--warmup", "3", "--images", "12", "--image_bytes", "9000", "--repeats", "1",
             "--json", tmp_path / "x.json", "--plot", tmp_path / "x.png"]
    began = time.time()
    code = main([str(word) for word in words])
    said = capsys.readouterr()
    assert code == 0, said.err
    lasted = time.time() - began
    assert sorted(os.listdir(tmp_path)) == ["train.py", "x.json", "x.png"]
    content = json.loads((tmp_path / "x.json").read_text())
    assert content["title"] and content["machine"] and "--ranks 1" in content["command"]
    assert (content["precision"], content["global_batch_size"], content["ranks"]) == ("fp32", 2, 1)
    assert [(side["engine"], side["model"]) for side in content["end_to_end"]] == (
        [("ours", "vir_tiny_patch16_224")] + ([] if SCRIPT is None else [("ours", "test_vit"), ("timm", "test_vit")]))
    for side in content["end_to_end"]:
        turn, = side["turns"]
        assert len(turn["step_seconds"]) == 3 and 0 <= turn["data_wait"] < 1
        assert turn["images_per_second"] == 2 / statistics.median(turn["step_seconds"])
        assert 1 < turn["first_step_seconds"] < lasted  # torch alone is longer in coming
        assert 200e6 < turn["peak_bytes"] < 10e9
    table = end_to_end_table(content["end_to_end"])
    assert table in said.out and render(tmp_path / "x.json") == table
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.width > 1000 and len(picture.convert("RGB").getcolors(1 << 20)) > 100


def test_both_get_the_same_settings(tmp_path, shards):
    asked = settings(tmp_path, steps=8, batch=4)
    config = parse(ours("test_vit", asked, shards / "train", tmp_path)[2:])
    words = timms("test_vit", asked, shards / "train", tmp_path)
    given = {}
    for word in words:
        if word.startswith("--"):
            given[name := word] = []
        else:
            given[name].append(word)
    values = {name: value if len(value) > 1 else (value or ["yes"])[0] for name, value in given.items()}
    augment, optim, train = config.augment, config.optim, config.train
    for name, ours_value in {
            "--batch-size": train.micro_batch_size, "--seed": train.seed, "--smoothing": train.smoothing,
            "--workers": config.data.workers, "--lr": optim.peak_lr(8), "--weight-decay": optim.weight_decay,
            "--clip-grad": optim.clip_grad, "--hflip": augment.hflip, "--color-jitter": augment.color_jitter,
            "--reprob": augment.reprob, "--mixup": augment.mixup, "--cutmix": augment.cutmix,
            "--train-num-samples": train.steps * train.global_batch_size}.items():
        assert float(values[name]) == ours_value, name
    assert [values[name] for name in ("--aa", "--remode", "--train-interpolation", "--opt", "--sched")] == [
        augment.auto_augment, augment.remode, augment.interpolation, optim.name, config.schedule.name]
    assert tuple(map(float, values["--scale"])) == augment.scale
    assert tuple(map(float, values["--ratio"])) == augment.ratio
    assert values["--num-classes"] == "10" and values["--warmup-epochs"] == "0" == str(config.schedule.warmup_epochs)[0]
    assert config.ema.decay == 0 and "--model-ema" not in values and "--amp" not in values
    half = timms("test_vit", settings(tmp_path, deepspeed_config="zero1_bf16"), shards / "train", tmp_path)
    assert half[half.index("--amp"):][:3] == ["--amp", "--amp-dtype", "bfloat16"]


def test_a_vir_has_one_side_and_stands_beside_the_vit_of_its_size(tmp_path):
    sides = sides_of(["vir_small_patch16_224", "vir2d_small_patch16_224", "vit_small_patch16_224"])
    assert sides == [Side("ours", "vir_small_patch16_224"), Side("ours", "vir2d_small_patch16_224"),
                     Side("ours", "vit_small_patch16_224"), Side("timm", "vit_small_patch16_224")]

    def turn(rate):
        return {"images_per_second": rate, "data_wait": 0.125, "first_step_seconds": 10 / rate, "peak_bytes": 3 << 20}

    rates = ([10, 20, 40], [1, 2, 3], [5, 5, 5], [4, 10, 10])
    measured = [{**side._asdict(), "turns": [turn(rate) for rate in of_side]} for side, of_side in zip(sides, rates)]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in end_to_end_table(measured).splitlines()]
    assert rows[2] == ["vir_small_patch16_224", "ours", "20 (10–40)", "2.500", "12.5 (12.5–12.5)", "0.5 (0.25–1)",
                       "3 (3–3)", "3"]
    assert [row[3] for row in rows[2:]] == ["2.500", "0.250", "0.500", ""]
    bars = end_to_end_bars(measured)
    assert bars["images/s"]["vit_small_patch16_224\ntimm's script"] == [4, 10, 10] and len(bars) == 4
    plot_bars(bars, tmp_path / "bars.png", "a title")
    assert (tmp_path / "bars.png").stat().st_size > 10_000
    assert end_to_end_table(measured[:1]).splitlines()[2].split("|")[4].strip() == ""  # no peer was measured


def test_the_order_of_the_sides_turns(tmp_path, monkeypatch):
    order = []
    one = {"images_per_second": 1.0, "data_wait": 0.0, "first_step_seconds": 1.0, "peak_bytes": 1}
    monkeypatch.setattr(end_to_end, "_measured", lambda side, *_: order.append(side.engine) or one)
    (tmp_path / "train.py").touch()
    said = end_to_end.benchmark(settings(tmp_path, repeats=3), "command")
    assert order == ["ours", "timm", "timm", "ours", "ours", "timm"] and said.count("| 1 (1–1) |") == 4


def test_steps_are_read_of_what_each_side_writes(tmp_path):
    assert timms_steps(tmp_path / "steps.log") == [] == our_steps(tmp_path)
    (tmp_path / "steps.log").write_text(LINES)
    assert timms_steps(tmp_path / "steps.log") == [Step(1796078119.488, 0.657), Step(1796078128.353, 0.004)]
    event = {"kind": "train", "step": 1, "epoch": 0.1, "time": 5.5, "data_wait_seconds": 0.25}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(event) + "\n" + json.dumps({**event, "kind": "eval"}) + "\n")
    assert our_steps(tmp_path) == [Step(5.5, 0.25)]


def test_warm_up_is_not_timed(tmp_path, monkeypatch):
    """Steps end after 1, 2, 4, 7, … s: those from the fourth on are timed, from the end of the one before."""
    monkeypatch.setattr(end_to_end, "launch", lambda *_: time.sleep(0.5))
    steps = [Step(time.time() + 1 + number * (number + 1) / 2, 0.1 * number) for number in range(8)]
    monkeypatch.setattr(end_to_end, "our_steps", lambda run: steps)
    monkeypatch.setattr(end_to_end, "held_bytes", lambda process: 77)
    folder = tmp_path / "shards" / "train"
    folder.mkdir(parents=True)
    found = end_to_end._measured(Side("ours", "test_vit"), settings(tmp_path), folder)
    assert found["step_seconds"] == pytest.approx([3, 4, 5, 6, 7])
    assert found["images_per_second"] == pytest.approx(8 / 5) and found["data_wait"] == pytest.approx(0.1)
    assert 0.5 < found["first_step_seconds"] <= 1 and found["peak_bytes"] == 77
    with pytest.raises(end_to_end.SettingsError, match="ours with test_vit tells of 8 steps instead of 9.*--timm_scr"):
        end_to_end._measured(Side("ours", "test_vit"), settings(tmp_path, steps=9, images=72), folder)


def test_pages_of_several_processes_count_once():
    size = 200 << 20
    before = held_bytes(psutil.Process())
    code = f"import os, time; held = b'x' * {size}; os.fork(); os.write(1, b'.'); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert process.stdout.read(2) == b".."
        assert size <= held_bytes(psutil.Process()) - before < 1.2 * size
    finally:
        os.killpg(process.pid, 9)
        process.communicate()


STAND_IN = """
import logging, sys, torch
from timm.task import ClassificationTask

logging.root.setLevel(logging.INFO)
torch.distributed.init_process_group("gloo")
task = ClassificationTask(torch.nn.Linear(2, 2), device=torch.device("cpu"))
task.prepare_distributed(device_ids=[torch.device("cpu")], broadcast_buffers=True)
logging.getLogger("train").info("%s %s", type(task.trainable_module).__name__, sys.argv[1:])
torch.distributed.destroy_process_group()
"""


def test_the_script_is_started_as_a_rank_that_may_be_a_cpu(tmp_path):
    """The stand-in does what train.py does at the place where DistributedDataParallel refuses a device."""
    script, lines = tmp_path / "train.py", tmp_path / "steps.log"
    script.write_text(STAND_IN)
    done = subprocess.run(
        [sys.executable, "-m", "vir.benchmarks.timm_script", lines, script, "--device", "cpu"], cwd=ROOT, text=True,
        capture_output=True, timeout=HANGS, env={**os.environ, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0",
                                                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()})
    assert done.returncode == 0, done.stderr
    clock, text = lines.read_text().split(" ", 1)
    assert abs(float(clock) - time.time()) < 60 and text == "DistributedDataParallel ['--device', 'cpu']\n"


@pytest.mark.parametrize("flags, said", [
    (["--steps", "3"], "--steps is 3; it must be at least 4"), (["--warmup", "1"], "--warmup is 1; it must be"),
    (["--images", "100"], "--images is 100; it must be at least 192: an epoch of timm's script"),
    (["--models", "vit_smal"], "--models: timm knows no vit_smal"),
    (["--folder", "gone"], "--folder gone is no folder; make it"),
    (["--timm_script", "gone.py"], "--timm_script gone.py: no such file; it is train.py of timm's repository"),
    (["--deepspeed_config", "no.json"], "no.json: no such file"), (["--json", "gone/x.json"], "gone/x.json")])
def test_what_cannot_be_measured_is_told_before_anything_runs(flags, said, main, capsys, monkeypatch):
    monkeypatch.setattr(launching.subprocess, "Popen", None)
    monkeypatch.setattr(end_to_end, "make_images", None)
    assert main(["--timm_script", __file__, *flags]) in (2, 3)
    assert said in capsys.readouterr().err
