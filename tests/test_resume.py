"""Runs that were stopped, moved to other ranks and stages, damaged, or refused: the real commands, on real shards."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from support.launchers import DEEPSPEED, HANGS, ROOT, TORCHRUN, free_port, remove_shared_memory
from support.terminal import Terminal
from support.tiny_runs import BATCH, alone, command, epochs, launch, train_events, weights
from vir.checkpoints.info import read_info, verify
from vir.checkpoints.names import newest
from vir.reports.metrics import read_metrics

pytestmark = [pytest.mark.launcher, pytest.mark.timeout(2 * HANGS)]

STEPS, FIRST = 24, 4
FIXED = ["--model.drop_path_rate", "0", "--checkpoint.every_epochs", epochs(FIRST)]


def stage(tmp: Path, number: int, **more) -> Path:
    path = tmp / f"zero{number}.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": number}, **more}))
    return path


def step(run: Path, number: int) -> Path:
    return run / "checkpoints" / f"step-{number:08d}"


def took_back(run: Path, to: Path, number: int) -> Path:
    """A copy of a run as it was after step `number`."""
    shutil.copytree(run, to)
    for later in (to / "checkpoints").glob("step-*"):
        if later.name > step(to, number).name:
            shutil.rmtree(later)
    (to / "checkpoints" / "best").unlink(missing_ok=True)
    (to / "checkpoints" / "latest").write_text(step(to, number).name)
    return to


@pytest.fixture(scope="module")
def base(shards, tmp_path_factory) -> Path:
    """Two ranks, ZeRO 2, float32, without DropPath: 24 steps, a checkpoint each fourth."""
    tmp = tmp_path_factory.mktemp("base")
    codes, said = launch(tmp, [command(shards, tmp / "run", "zero2_fp32", *FIXED, steps=STEPS)])
    assert codes == [0], said
    return tmp / "run"


@pytest.fixture(scope="module")
def single(base, shards, tmp_path_factory) -> tuple[Path, dict[str, int], str]:
    """What one rank makes of it, in one launch: the runs' folder, their exit codes, what they said."""
    tmp = tmp_path_factory.mktemp("single")
    took_back(base, tmp / "damaged", 12)
    path = next(path for path in step(tmp / "damaged", 12).glob("*optim_states.pt"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    took_back(base, tmp / "missing", 12)
    shutil.rmtree(step(tmp / "missing", 12))
    took_back(base, tmp / "hopeless", 4)
    next(path for path in step(tmp / "hopeless", 4).glob("*optim_states.pt")).unlink()
    took_back(base, tmp / "dry again", 12)
    (tmp / "a file").touch()

    def of(name, config, *more, steps=STEPS):
        return command(shards, tmp / name, config, *FIXED, *more, steps=steps)

    def with_settings(name, *more):
        return of(
            name, "zero1_bf16", "--optim.name", "lion", "--optim.lr", "null", "--optim.lr_base", "1e-3",
            "--optim.layer_decay", "0.7", "--optim.weight_decay_end", "0.2", "--schedule.name", "linear",
            "--schedule.cooldown_epochs", "0.24", "--train.loss", "bce", "--train.bce_target_thresh", "0.2",
            "--model.mean", "[0.1, 0.2, 0.3]", "--model.crop_pct", "0.9", "--train.profile", "6",
            "--train.peak_tflops", "0.1", "--checkpoint.keep", "1", "--checkpoint.keep_every_epochs", epochs(6),
            "--eval.every_epochs", epochs(4), "--ema.decay", "0", *more, steps=14)

    fp16 = stage(tmp, 1, fp16={"enabled": True, "initial_scale_power": 2, "hysteresis": 1, "min_loss_scale": 1})
    jobs = {
        "elsewhere": of("elsewhere", stage(tmp, 3), "--resume", str(step(base, FIRST))),
        "damaged": of("damaged", "zero2_fp32"), "missing": of("missing", "zero2_fp32"),
        "hopeless": of("hopeless", "zero2_fp32"),
        "dry": of("dry", "zero3_bf16", "--dry-run"),
        "dry again": of("dry again", "zero2_fp32", "--dry_run"),
        "dry changed": of("dry changed", "zero2_fp32", "--dry_run", "--resume", str(base), "--train.seed", "7"),
        "dry hopeless": of("hopeless", "zero2_fp32", "--dry_run"),
        "dry in a file": of("a file/run", "zero2_fp32", "--dry_run"),
        "validate": of("validate", "zero2_fp32", "--validate_only", "--resume", str(base)),
        "validate another": of("missing", "zero2_fp32", "--validate_only", "--resume", str(step(base, FIRST))),
        "validate own": of("missing", "zero2_fp32", "--validate_only"),
        "nothing": of("nothing", "zero2_fp32", "--validate_only"),
        "floor": of("floor", fp16, "--optim.lr", "1e30", "--schedule.warmup_epochs", "0"),
        "changed": of("changed", "zero2_fp32", "--resume", str(base), "--train.seed", "7"),
        "no checkpoint": of("no checkpoint", "zero2_fp32", "--resume", str(shards)),
        "bf16": of("bf16", "zero2_bf16", "--resume", str(base)),
        "other optimizer": of("other", "zero2_fp32", "--resume", str(base), "--optim.name", "lion",
                              "--accept_config_change", "true"),
        "other freeze": of("freeze", "zero2_fp32", "--resume", str(base), "--model.freeze", "patch_embed",
                           "--accept_config_change", "true"),
        "settings": with_settings("settings"),
        "which best": with_settings("settings", "--validate_only", "--which", "best"),
        "which 8": with_settings("other", "--validate_only", "--resume", str(tmp / "settings"), "--which", "8"),
        "which 9": with_settings("settings", "--validate_only", "--which", "9"),
        "from best": of("from best", "zero2_fp32", "--dry_run", "--resume",
                        str(tmp / "missing" / "checkpoints" / "best")),
        "steps": of("steps", "zero0_fp32", "--train.steps", "3", "--checkpoint.every_steps", "2", "--eval.every_steps",
                    "2"),
        "no validation": of("no validation", "zero0_fp32", "--data.val", "", "--train.steps", "2",
                            "--schedule.warmup_epochs", "null"),
        "no recipe": ["--model.name", "resnet18", "--model.img_size", "32", "--data.train", str(shards / "train"),
                      "--train.epochs", "1", "--train.global_batch_size", "16", "--train.micro_batch_size", "16",
                      "--train.log_every", "1", "--output", str(tmp / "no recipe")],
        "dev": of("dev", "zero2_fp32", "--train.fast_dev_run", "--eval.batch_size", "4"),
    }
    before = listing(tmp / "dry again")
    codes, said = launch(tmp, list(jobs.values()), ranks=1)
    assert listing(tmp / "dry again") == before
    return tmp, dict(zip(jobs, codes)), said


def listing(folder: Path) -> dict[Path, int]:
    """When each file of a folder was changed last."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def same_losses(run: Path, base: Path, first: int, tolerance: float) -> None:
    expected, found = ([(event["step"], event["lr"], event["samples_seen"], event["loss"]) for event in
                        train_events(folder) if event["step"] > first] for folder in (base, run))
    assert len(found) == STEPS - first
    for old, new in zip(expected, found, strict=True):
        assert old[:3] == new[:3] and new[3] == pytest.approx(old[3], rel=tolerance), (old, new)


def test_another_stage_on_one_rank_goes_on_with_the_same_losses_for_twenty_steps(base, single):
    tmp, codes, said = single
    assert codes["elsewhere"] == 0, said
    assert "is of 2 ranks and ZeRO 2: sharding it anew for 1 ranks and ZeRO 3" in said
    same_losses(tmp / "elsewhere", base, FIRST, 1e-5)


def test_three_ranks_without_zero_go_on_with_the_same_losses_for_twenty_steps(base, shards, tmp_path):
    codes, said = launch(tmp_path, [command(
        shards, tmp_path / "run", "zero0_fp32", *FIXED, "--train.micro_batch_size", "8", "--resume",
        str(step(base, FIRST)), "--accept_config_change", "true", steps=STEPS)], ranks=3)
    assert codes == [0], said
    same_losses(tmp_path / "run", base, FIRST, 1e-5)
    own, other = (weights(run, STEPS, tmp_path, ema=True) for run in (tmp_path / "run", base))
    for name in own:  # differences of 1e-7 in a gradient grow through Adam, where it is small
        assert (own[name] - other[name]).abs().max() < 1e-3, name


@pytest.mark.parametrize("run, why", [("damaged", "has changed since it was written (sha256 differs)"),
                                      ("missing", "holds no checkpoint.json")])
def test_a_checkpoint_that_is_not_whole_is_passed_over_loudly(run, why, base, single):
    tmp, codes, said = single
    assert codes[run] == 0, said
    lines = [line for line in said.splitlines() if f"/{run}/" in line]
    assert any("DAMAGED CHECKPOINT PASSED OVER" in line and why in line for line in lines)
    assert any(f"continuing from the one before: {step(tmp / run, 8)}" in line for line in lines)
    same_losses(tmp / run, base, 0, 1e-5)  # each step stands once, those before the damage as they were


def test_a_run_without_any_whole_checkpoint_is_refused_and_left_as_it_is(single):
    tmp, codes, said = single
    assert codes["hopeless"] == 3 and "no checkpoint of" in said and "is missing; restore one" in said
    assert len(train_events(tmp / "hopeless")) == STEPS


def test_a_dry_run_tells_the_plan_and_leaves_nothing(single):
    tmp, codes, said = single
    plan = said[:said.index("a dry run: nothing was trained")]
    assert codes["dry"] == 0 and not (tmp / "dry").exists()
    for part in ("24 steps of 48 = 4 x 12 x 1 ranks; 1 evaluations, 6 checkpoints", "ZeRO 3, bf16, 1 ranks on cpu",
                 "400 training images in 7 shards, 130 validation images, 10 classes", "tensors per group: decay 10"):
        assert part in plan
    # 475,402 parameters: bf16 weights and gradients, float32 masters, two moments and the average
    assert ("memory per rank: 59.5 MB = 1.9 weights and gradients + 7.6 optimizer and EMA + 50.0 buckets of gradients"
            in plan)


def test_a_dry_run_goes_through_the_door_of_the_run_and_tells_where_that_would_go_on(base, single):
    tmp, codes, said = single
    assert codes["dry again"] == 0 and f"taking up {step(tmp / 'dry again', 12)}" in said
    assert "a dry run: nothing was trained and nothing is left; the run would go on after step 12 of 24" in said
    assert re.search(r"disk: 10 checkpoints of 9.5 MB \(6 newest, 2 by the clock, the best, one being written\) take "
                     r"0.0949 GB; 0.0\d+ GB are there, \S+ GB are free", said)
    measured = sum(file["bytes"] for file in read_info(step(base, 12)).files.values())
    assert measured == pytest.approx(9.5e6, rel=0.05)
    assert codes["dry changed"] == 2 and not (tmp / "dry changed").exists()
    assert codes["dry hopeless"] == 3 and codes["dry in a file"] == 2
    assert f"--output {tmp / 'a file' / 'run'} cannot be made: Not a directory; give another folder" in said


def test_the_best_and_any_other_checkpoint_can_be_named(single):
    tmp, codes, said = single
    evals = {event["step"]: event["top1"] for event in read_metrics(tmp / "settings") if event["kind"] == "eval"}
    best = int((tmp / "settings" / "checkpoints" / "best").read_text().removeprefix("step-"))
    assert codes["which best"] == codes["which 8"] == 0
    for number in (best, 8):  # in the run, and again
        assert said.count(f"step {number}: top1 {evals[number]:.3f}, top5") == (3 if best == 8 else 2)
    assert codes["which 9"] == 3 and f"the checkpoint of step 9 of {tmp / 'settings'} is not there: " in said
    assert codes["from best"] == 0 and f"taking up {step(tmp / 'missing', STEPS)}, as --output has no checkp" in said


def test_length_and_intervals_in_steps(single):
    tmp, codes, said = single
    assert codes["steps"] == 0, said
    assert [event["step"] for event in read_metrics(tmp / "steps") if event["kind"] == "eval"] == [2, 3]
    assert {path.name for path in (tmp / "steps" / "checkpoints").glob("step-*")} == {
        step(tmp, 2).name, step(tmp, 3).name}


def test_a_short_run_without_a_recipe_reaches_its_learning_rate_and_comes_down_again(single):
    tmp, codes, said = single
    assert codes["no recipe"] == 0, said
    events = train_events(tmp / "no recipe")
    rates = [event["lr"] for event in events]
    assert len(rates) == 25 and rates[0] == 1e-6 and rates[1] == 1e-3  # 25 // 15 steps of warm-up
    assert rates[1:] == sorted(rates[1:], reverse=True) and rates[-1] < 2e-5
    assert "ZeRO 2, fp32" in said and "learning rate: from 1e-06 to 0.001 over 1 steps of warm-up, cosine from" in said


def test_a_run_without_validation_data_trains_and_says_so(single):
    tmp, codes, said = single
    assert codes["no validation"] == 0, said
    assert [(event["kind"], event["step"]) for event in read_metrics(tmp / "no validation")] == [
        ("start", 1), ("train", 1), ("train", 2)]
    lines = [line.split(" ", 2)[2] for line in (tmp / "no validation" / "log.txt").read_text().splitlines()]
    assert "400 training images in 7 shards, no validation images (--data.val): no evaluation, 10 classes" in lines
    assert lines[0].startswith("command: ") and lines[1].startswith("vir-at-scale ") and lines[2].startswith("ranks: 1")
    assert (tmp / "no validation" / "curves.png").is_file()


def test_a_fast_dev_run_trains_evaluates_saves_resumes_and_leaves_nothing(single):
    tmp, codes, said = single
    folder = tmp / "dev.fast_dev_run"
    assert codes["dev"] == 0 and not folder.exists() and not (tmp / "dev").exists(), said[-3000:]
    assert f"taking up {step(folder, 5)}" in said
    assert [int(number) for number in re.findall(r"step (\d+): top1 .*, on 40 images", said)] == [5, 10]
    assert f"fast_dev_run: 10 steps were trained, evaluated, saved and resumed; {folder} is removed" in said


def test_validate_only_evaluates_and_leaves_nothing(base, single):
    tmp, codes, said = single
    assert codes["validate"] == 0 and not (tmp / "validate").exists()
    seen = read_metrics(base)[-1]
    assert f"step {STEPS}: top1 {seen['top1']:.3f}, top5 {seen['top5']:.3f}, loss {seen['loss']:.3f}, ema_top1 " in said
    assert codes["nothing"] == 2 and "has no checkpoint to evaluate; name a run folder" in said


def test_validate_only_takes_the_checkpoint_that_resume_names_before_the_outputs_own(single):
    """The run `missing` has gone on to its end by then."""
    tmp, codes, said = single
    assert codes["validate another"] == codes["validate own"] == 0, said
    evaluated = re.findall(r"step (\d+): top1", said[said.index("a dry run: nothing was trained"):])
    assert evaluated[:3] == [str(STEPS), str(FIRST), str(STEPS)]  # first those of the test before


def test_validate_only_without_a_resume_takes_no_checkpoint(base):
    from vir.config import DataConfig, RunConfig
    from vir.distributed import World
    from vir.training.resume import resume

    config = RunConfig(deepspeed_config="zero2_fp32", output=str(base), resume="none", validate_only=True,
                       data=DataConfig(train="t", val="v"))
    assert resume(config, None, None, "", World(rank=0, size=1, device=torch.device("cpu"))) is None


def test_a_loss_scale_at_its_floor_ends_the_run_with_a_code_of_its_own(single):
    tmp, codes, said = single
    assert codes["floor"] == 6
    assert "the gradient is not finite at loss scale 1, the floor (fp16.min_loss_scale): lower --optim.lr" in said
    events = train_events(tmp / "floor")  # the steps before it were skipped and counted
    assert events[-1]["skipped"] == 1 and events[-1]["updates"] < events[-1]["step"]


@pytest.mark.parametrize("job, code, why", [
    ("changed", 2, "was trained with other settings: train.seed: 42 -> 7; --accept_config_change true goes on"),
    ("no checkpoint", 3, "is neither a run folder with a checkpoint nor a checkpoint; give auto, none, or a path such"),
    ("bf16", 2, "was trained in fp32, --deepspeed_config"),
    ("other optimizer", 2, "holds the state of adamw, which --optim.name lion cannot continue"),
    ("other freeze", 2, "trained with other parameters frozen (2 differ: patch_embed.proj.bias, patch_embed.proj.weig"),
])
def test_a_checkpoint_that_does_not_fit_is_refused_with_the_difference(job, code, why, single):
    _, codes, said = single
    assert codes[job] == code and why in said


def test_settings_act(single):
    tmp, codes, said = single
    run = tmp / "settings"
    assert codes["settings"] == 0, said
    events = train_events(run)
    peak = 1e-3 * BATCH / 256
    assert max(event["lr"] for event in events) == pytest.approx(peak)
    assert [event["lr"] for event in events[-2:]] == [1e-5, 1e-5]  # the cool-down
    assert events[0]["weight_decay"] == pytest.approx(0.05) and events[-1]["weight_decay"] > 0.19
    assert 0.2 < events[0]["loss"] < 1  # binary cross-entropy of ten classes, not log 10
    assert all(event["mfu"] == pytest.approx(
        events[0]["mfu"] * event["images_per_second"] / events[0]["images_per_second"]) for event in events)
    info = read_info(newest(run))
    assert info.model.input.mean == (0.1, 0.2, 0.3) and info.model.input.crop_pct == 0.9
    assert "layer_0_decay 1 lr x0." in said
    traces = list((run / "profile").glob("rank*.json"))
    names = [event.get("name", "") for event in json.loads(traces[0].read_text())["traceEvents"]]
    backwards = sum(name.startswith("autograd::engine::evaluate_function: BinaryCrossEntropy") for name in names)
    assert len(traces) == 1 and backwards == 6 * 4  # micro-batches of the last ones
    kept = {path.name for path in (run / "checkpoints").glob("step-*")}
    best = (run / "checkpoints" / "best").read_text()
    evals = [event for event in read_metrics(run) if event["kind"] == "eval"]
    assert best == step(run, max(evals, key=lambda event: event["top1"])["step"]).name
    # of 4, 8, 12, 14: the newest, the best, and the first at or after each six steps
    assert kept == {step(run, number).name for number in (8, 12, 14)} | {best}


def start(*words: str | Path) -> subprocess.Popen:
    return subprocess.Popen([str(word) for word in words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, start_new_session=True)


def wait_for(run: Path, kind: str, count: int, process: subprocess.Popen) -> None:
    until = time.monotonic() + HANGS
    while sum(f'"kind": "{kind}"' in line for line in _lines(run / "metrics.jsonl")) < count:
        assert process.poll() is None and time.monotonic() < until, process.communicate(timeout=10)[0]
        time.sleep(0.02)


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def end(process: subprocess.Popen) -> str:
    """What it said, once it and its children are gone."""
    try:
        return process.communicate(timeout=HANGS)[0]
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


@pytest.mark.parametrize("launcher", [[*DEEPSPEED, "--num_accelerators", "2", "--module"],
                                      [*TORCHRUN, "--nproc_per_node", "2", "-m"]], ids=["deepspeed", "torchrun"])
def test_ctrl_c_saves_once_on_all_ranks(launcher, shards, tmp_path):
    """All processes get it; deepspeed then sends a SIGTERM to rank after rank, torchrun a second SIGINT to all."""
    port = free_port()
    words = [*launcher[:-1], "--master_port", port, launcher[-1], "vir.train"]
    run = tmp_path / "run"
    with Terminal(*words, *command(shards, run, "zero2_fp32", steps=2000, every=2000), OMP_NUM_THREADS="1") as terminal:
        wait_for(run, "train", 2, terminal.process)
        terminal.press_ctrl_c()
        said = terminal.wait(HANGS)
    remove_shared_memory(port)
    info = read_info(newest(run))
    verify(newest(run), info)
    assert info.step == len(train_events(run)) >= 2
    for line, place in (("; the same command continues: ", (run / "log.txt").read_text()),
                        ("stopped by SIGINT (Ctrl-C)", said), ("a second Ctrl-C ends at once", said)):
        assert place.count(line) == 1, said[-3000:]
    assert "vir/" not in said, said[-3000:]  # the launchers' tracebacks are theirs, and of no file of ours


def test_a_closed_terminal_saves(shards, tmp_path):
    """Nothing can be written there any more, neither lines nor the progress bar."""
    run = tmp_path / "run"
    with Terminal(sys.executable, "-m", "vir.train", *command(shards, run, steps=2000, every=2000)) as terminal:
        wait_for(run, "train", 2, terminal.process)
        terminal.close()
        assert terminal.process.wait(HANGS) == 75
    assert read_info(newest(run)).step == len(train_events(run)) >= 2
    assert (run / "log.txt").read_text().count("stopped by SIGHUP (a closed terminal); the same command continues") == 1


def test_a_signal_during_evaluation_saves_and_the_evaluation_is_made_up_for(shards, tmp_path):
    run = tmp_path / "run"
    words = command(shards, run, "zero0_fp32", "--eval.every_epochs", epochs(1), "--eval.batch_size", "2", steps=3)
    process = start(sys.executable, "-m", "vir.train", *words)
    try:
        wait_for(run, "train", 2, process)  # its evaluation of 130 passes comes right after
        process.send_signal(signal.SIGUSR1)
    finally:
        said = end(process)
    assert process.returncode == 75, said
    assert read_info(newest(run)).step == 2
    assert [event["step"] for event in read_metrics(run) if event["kind"] == "eval"] == [1]
    done = alone(*words)
    assert done.returncode == 0, done.stdout
    assert [(event["kind"], event["step"]) for event in read_metrics(run)] == [
        ("start", 1), ("train", 1), ("eval", 1), ("train", 2), ("eval", 2), ("start", 3), ("train", 3), ("eval", 3)]


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler of a signal, as Linux tells it."""
    (caught,) = (line.split()[1] for line in Path(f"/proc/{pid}/status").read_text().splitlines()
                 if line.startswith("SigCgt:"))
    return bool(int(caught, 16) >> (number - 1) & 1)


def test_a_signal_during_start_up_is_not_lost(shards, tmp_path):
    process = start(sys.executable, "-m", "vir.train", *command(shards, tmp_path / "run"))
    try:
        while not catches(process.pid, signal.SIGTERM):  # seconds of imports follow
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
    finally:
        said = end(process)
    assert process.returncode == 75 and not train_events(tmp_path / "run"), said
    assert newest(tmp_path / "run") is None


def test_a_full_disk_ends_the_run_and_leaves_the_checkpoints_before(base, shards, tmp_path):
    """A limit on the size of files stands for the disk: writes fail half way, as there."""
    run = took_back(base, tmp_path / "run", 8)
    words = command(shards, run, "zero2_fp32", *FIXED, steps=STEPS)
    process = start("bash", "-c", 'ulimit -f 2000; exec "$@"', "bash", sys.executable, "-m", "vir.train", *words)
    said = end(process)
    assert process.returncode == 3, said
    assert re.search(rf"{step(run, 12)} could not be written: rank 0: \S+: \[Errno 27\] File too large "
                     r"\(.* MB are free there\); .*: free some space", said), said[-3000:]
    assert newest(run) == step(run, 8) and not list((run / "checkpoints").glob("*.part"))
    verify(step(run, 8), read_info(step(run, 8)))


def test_weights_to_begin_from_are_taken_and_a_head_of_other_classes_is_new(base, tmp_path):
    import timm

    from vir.errors import DataError
    from vir.models import initialize_from

    saved = weights(base, STEPS, tmp_path)
    args = dict(img_size=28, patch_size=14, embed_dim=128, depth=2, num_heads=2)
    for classes in (10, 3):
        model = timm.create_model("vir_tiny_patch16_224", num_classes=classes, **args)
        head = model.head.weight.clone()
        initialize_from(model, tmp_path / "w.safetensors")
        found = model.state_dict()
        assert all(torch.equal(found[name], saved[name]) for name in saved if not name.startswith("head."))
        assert torch.equal(found["head.weight"], saved["head.weight"] if classes == 10 else head)
    larger = timm.create_model("vir_tiny_patch16_224", num_classes=10, **args | {"img_size": 56})
    initialize_from(larger, tmp_path / "w.safetensors")  # positions are resampled
    assert torch.equal(larger.blocks[0].mlp.fc1.weight, saved["blocks.0.mlp.fc1.weight"])
    with pytest.raises(DataError, match="does not fit: it holds a vir_tiny_patch16_224 with .* tensors missing"):
        initialize_from(timm.create_model("vir_tiny_patch16_224", **args | {"depth": 3}), tmp_path / "w.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no weights")
    with pytest.raises(DataError, match="broken.safetensors cannot be read as weights"):
        initialize_from(larger, tmp_path / "broken.safetensors")
