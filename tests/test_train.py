"""End to end under the real launcher: every DeepSpeed configuration trains on two ranks, resumes bit for bit,
consolidates to what DeepSpeed itself finds, and keeps the average of weights that its definition gives."""

import fcntl
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml

import vir.models
from support.launchers import ACCELERATE, HANGS, ROOT, TORCHRUN, call, deepspeed, free_port, torchrun
from support.tiny_runs import BATCH, EMA_DECAY, alone, command, launch, train_events, weights
from vir.checkpoints.consolidate import consolidate
from vir.checkpoints.info import read_info
from vir.checkpoints.names import newest
from vir.data.shards import read_index
from vir.reports.metrics import read_metrics
from vir.run_folder import LOCK
from vir.train import main

pytestmark = [pytest.mark.launcher, pytest.mark.timeout(2 * HANGS)]

# ZeRO++ quantises on GPUs alone.
CONFIGS = sorted(path.stem for path in (ROOT / "ds_configs").glob("*.json") if path.stem != "zero3pp_bf16")
EVERY_STEP = {"zero0_fp32", "zero0_bf16", "zero2_fp32", "zero3_fp16"}  # these leave a checkpoint at each step
STEPS, HALF = 8, 4


def of(config: str, shards: Path, tmp: Path) -> list[str]:
    return command(shards, tmp / config, config, steps=STEPS, every=1 if config in EVERY_STEP else HALF)


@pytest.fixture(scope="module")
def runs(shards, tmp_path_factory) -> Path:
    """A finished run per configuration."""
    tmp = tmp_path_factory.mktemp("runs")
    codes, said = launch(tmp, [of(config, shards, tmp) for config in CONFIGS], launcher=deepspeed)
    assert codes == [0] * len(CONFIGS), said[-6000:]
    return tmp


@pytest.fixture(scope="module")
def resumed(runs, shards, tmp_path_factory) -> Path:
    """The same runs, taken back to the middle and continued by new processes of another launcher."""
    tmp = tmp_path_factory.mktemp("resumed")
    for config in CONFIGS:
        take_back(runs / config, tmp / config)
    codes, said = launch(tmp, [of(config, shards, tmp) for config in CONFIGS], launcher=torchrun)
    assert codes == [0] * len(CONFIGS), said[-6000:]
    return tmp


def take_back(run: Path, copy: Path) -> None:
    """Copy a run without what came after its middle."""
    shutil.copytree(run, copy)
    for later in (copy / "checkpoints").glob("step-*"):
        if later.name > f"step-{HALF:08d}":
            shutil.rmtree(later)
    (copy / "checkpoints" / "latest").write_text(f"step-{HALF:08d}")


@pytest.mark.parametrize("config", CONFIGS)
def test_loss_goes_down_and_the_run_folder_is_complete(config, runs):
    events = train_events(runs / config)
    assert [event["step"] for event in events] == list(range(1, STEPS + 1))
    losses = [event["loss"] for event in events]
    assert sum(losses[-3:]) < sum(losses[:3])
    assert events[-1]["updates"] + sum(event["skipped"] for event in events) == STEPS
    assert events[-1]["samples_seen"] == STEPS * BATCH
    names = {path.name for path in (runs / config).iterdir()}
    assert names == {"config.yaml", "ds_config.json", "metrics.jsonl", "tensorboard", "curves.png", "checkpoints",
                     "log.txt", ".lock"}
    assert newest(runs / config).name == f"step-{STEPS:08d}"
    assert yaml.safe_load((runs / config / "config.yaml").read_text())["train"]["global_batch_size"] == 48


@pytest.mark.parametrize("config", CONFIGS)
def test_resumed_run_is_bit_identical_to_the_uninterrupted_one(config, runs, resumed, tmp_path):
    are_bit_identical(runs / config, resumed / config, tmp_path)


def are_bit_identical(one: Path, other: Path, tmp: Path) -> None:
    kept = ("step", "samples_seen", "epoch", "loss", "lr", "grad_norm", "loss_scale", "updates", "skipped")
    expected, found = ([{key: event[key] for key in kept} for event in train_events(run)] for run in (one, other))
    assert found == expected
    for ema in (False, True):
        expected, found = (weights(run, STEPS, tmp, ema=ema) for run in (one, other))
        assert expected.keys() == found.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("one, other, tolerance", [
    ("zero0_fp32", "zero2_fp32", 1e-5),
    ("zero2_bf16", "zero1_bf16", 1e-2),  # bf16 keeps 8 bits: sums in another order differ by about 2^-8
    ("zero2_bf16", "zero3_bf16", 1e-2),
    ("zero2_bf16", "zero0_bf16", 1e-2),
])
def test_zero_stages_train_to_the_same_losses(one, other, tolerance, runs):
    for left, right in zip(train_events(runs / one), train_events(runs / other)):
        assert left["loss"] == pytest.approx(right["loss"], rel=tolerance), left["step"]


def test_activation_checkpointing_changes_no_bit(runs, tmp_path):
    plain, recomputed = (weights(runs / config, STEPS, tmp_path) for config in ("zero3_bf16", "zero3_bf16_ckpt"))
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


@pytest.mark.parametrize("config", [config for config in CONFIGS if not config.startswith("zero0")])
def test_consolidated_weights_equal_those_of_zero_to_fp32(config, runs, tmp_path):
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    expected = get_fp32_state_dict_from_zero_checkpoint(str(runs / config / "checkpoints"))
    found = weights(runs / config, STEPS, tmp_path)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("config", ["zero0_fp32", "zero0_bf16"])
def test_consolidated_weights_without_zero_round_to_those_of_the_module(config, runs, tmp_path):
    saved = torch.load(newest(runs / config) / "mp_rank_00_model_states.pt", weights_only=False)["module"]
    found = weights(runs / config, STEPS, tmp_path)
    assert saved.keys() == found.keys()
    assert all(torch.equal(found[name].to(saved[name].dtype), saved[name]) for name in saved)
    assert all(tensor.dtype == torch.float32 for tensor in found.values())


@pytest.mark.parametrize("config", sorted(EVERY_STEP))
def test_ema_is_the_average_that_its_definition_gives(config, runs, tmp_path):
    info = read_info(newest(runs / config))
    torch.manual_seed(42)
    average = timm.create_model(info.model.name, drop_path_rate=0.1, **info.model.args).state_dict()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[info.precision]
    average = {name: value.to(dtype).float() for name, value in average.items()}  # DeepSpeed's masters come from these
    update = 0
    for step in range(1, STEPS + 1):
        if (updates := read_info(runs / config / "checkpoints" / f"step-{step:08d}").updates) == update:
            continue  # fp16: the loss scale was too high
        update = updates
        decay = min(EMA_DECAY, (1 + update) / (10 + update))
        now = weights(runs / config, step, tmp_path)
        average = {name: decay * value + (1 - decay) * now[name] for name, value in average.items()}
    found = weights(runs / config, STEPS, tmp_path, ema=True)
    assert average.keys() == found.keys()
    for name in found:  # twelve roundings of float32
        torch.testing.assert_close(found[name], average[name], rtol=1e-5, atol=1e-7)


def test_weights_evaluate_to_what_training_saw_under_python_torchrun_and_accelerate(runs, shards, tmp_path):
    run = runs / "zero0_fp32"
    seen = [event for event in read_metrics(run) if event["kind"] == "eval"][-1]
    consolidate(run, tmp_path / "w.safetensors")
    consolidate(run, tmp_path / "ema.safetensors", ema=True)
    call_python = (sys.executable, "-m", "vir.evaluate")
    call_torchrun = (*TORCHRUN, "--standalone", "--nproc_per_node", "2", "-m", "vir.evaluate")
    call_accelerate = (*ACCELERATE, "--config_file", ROOT / "launch" / "accelerate.yaml", "--num_processes", "2",
                       "--main_process_port", free_port(), "-m", "vir.evaluate")
    results = []
    for start, name in ((call_python, "w"), (call_torchrun, "w"), (call_accelerate, "ema")):
        done = call(*start, "--weights", tmp_path / f"{name}.safetensors", "--data", shards / "val", "--workers", "1",
                    "--batch-size", "16", "--compare-modes", "--json", tmp_path / "result.json", "--force")
        assert done.returncode == 0 and "Traceback" not in done.stdout, done.stdout
        assert f"top-1 {json.loads((tmp_path / 'result.json').read_text())['top1']:.2f} %" in done.stdout
        results.append(json.loads((tmp_path / "result.json").read_text()))
    one, two, ema = results
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["images"] == two["images"] == 130
    assert (one["top1"], one["top5"]) == (two["top1"], two["top5"]) == (seen["top1"], seen["top5"])
    for other in (two, seen):  # float32 in batches of another size
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
    assert (ema["top1"], ema["ema"], ema["processes"]) == (seen["ema_top1"], True, 2)
    assert all(of_mode["largest_logit_difference"] < 1e-5 for of_mode in one["modes"].values())


def test_weights_file_makes_a_timm_model(runs, tmp_path):
    consolidate(runs / "zero2_bf16", tmp_path / "w.safetensors", dtype="bf16")
    model = vir.models.load(tmp_path / "w.safetensors")
    args = model.weights_metadata.model.args
    same = timm.create_model("vir_tiny_patch16_224", checkpoint_path=str(tmp_path / "w.safetensors"), **args).eval()
    images = torch.randn(2, 3, 28, 28)
    assert torch.equal(model(images), same(images))
    assert model.weights_metadata.model.classes == tuple(sorted(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]))


def test_bad_settings_end_every_rank_with_one_message(shards, tmp_path):
    done = deepspeed("--module", "vir.train", *command(shards, tmp_path / "run"), "--train.global_batch_size", "50")
    assert done.returncode == 2
    assert done.stdout.count("is not a multiple of --train.micro_batch_size 12 x 2 ranks = 24; nearest: 48 or 72") == 1
    assert "Traceback" not in done.stdout and not (tmp_path / "run").exists()


@pytest.mark.parametrize("change, code, said", [
    (["--data.train", "nowhere"], 3, "--data.train: no such folder: "),
    (["--data.val", "nowhere"], 3, "--data.val: no such folder: "),
    (["--model.name", "vir_smal_patch16_224"], 2, "did you mean vir_small_patch16_224"),
    (["--model.args", "{dept: 3}"], 2, "dept"),
    (["--optim.lrr", "1"], 2, "--optim.lrr"),
    (["--deepspeed_config", "none.json"], 2, "none.json: no such file"),
    (["--model.args", "{pretrained: true}"], 2, "--model.args sets pretrained"),
    (["--model.args", "{patch_size: 0}"], 2, "patch_size is 0x0"),
    (["--model.args", "{patch_size: 14, num_heads: 0}"], 2, "not divisible by num_heads 0"),
    (["--model.args", "{patch_size: 14, in_chans: 1}"], 2, "leave in_chans at 3"),
])
def test_bad_input_is_named_on_one_screen(change, code, said, shards, tmp_path, capsys):
    assert main([*command(shards, tmp_path / "run"), *change]) == code
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) < 15 and "Traceback" not in error


def test_a_run_folder_is_continued_only_with_the_settings_it_began_with(runs, shards, capsys):
    again = command(shards, runs / "zero0_fp32", "zero0_fp32", "--optim.lr", "2e-3")
    assert main(again) == 2
    assert "optim.lr: 0.001 -> 0.002" in capsys.readouterr().err
    assert main([*command(shards, runs / "zero0_fp32"), "--resume", "none"]) == 2
    assert "holds a run and --resume is none" in capsys.readouterr().err


def test_fp16_on_a_cpu_is_refused_on_every_rank(shards, tmp_path):
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().is_fp16_supported():
        pytest.skip("this device has fp16")
    (tmp_path / "fp16.json").write_text('{"fp16": {"enabled": true}}')
    done = torchrun("-m", "vir.train", *command(shards, tmp_path / "run"), "--deepspeed_config", tmp_path / "fp16.json")
    assert re.search(r"exitcode +: 2 ", done.stdout), done.stdout
    said = "enables fp16, which this machine's cpu does not support; take a"
    assert said in done.stdout and said in done.stdout.splitlines()[-2]  # torchrun's report, which comes last


# ---- what becomes of runs that meet trouble, or a folder that another run has begun: two ranks, in one launch


@pytest.fixture(scope="module")
def troubled(runs, shards, digits, tmp_path_factory) -> tuple[Path, dict[str, int], str]:
    """The runs' folder, their exit codes, what they said."""
    tmp = tmp_path_factory.mktemp("troubled")
    for name in ("other classes", "finished"):
        shutil.copytree(runs / "zero0_fp32", tmp / name)
    shutil.copytree(runs / "zero2_fp32", tmp / "weight decay")
    for later in sorted((tmp / "weight decay" / "checkpoints").glob("step-*"))[HALF:]:
        shutil.rmtree(later)
    (tmp / "weight decay" / "checkpoints" / "latest").write_text(f"step-{HALF:08d}")
    (tmp / "taken").mkdir()
    descriptor = os.open(tmp / "taken" / LOCK, os.O_RDWR | os.O_CREAT)
    jobs = {
        "damaged": command(damaged_samples(shards, tmp / "damaged shards"), tmp / "damaged"),
        "not finite": command(shards, tmp / "not finite", "zero0_fp32", "--optim.lr", "1e30",
                              "--schedule.warmup_epochs", "0", "--optim.clip_grad", "0", every=1),
        "other classes": command(two_classes(digits, tmp), tmp / "other classes"),
        "weight decay": command(shards, tmp / "weight decay", "zero2_fp32", "--optim.weight_decay", "300",
                                "--accept_config_change", "true"),
        "taken": command(shards, tmp / "taken"),
        "finished": command(shards, tmp / "finished"),
        "nothing gathered": command(shards, tmp / "nothing gathered", nothing_stays_gathered(tmp), "--eval.batch_size",
                                    "48", every=HALF),
        "frozen": command(shards, tmp / "frozen", "zero2_bf16", "--model.freeze", "patch_embed|blocks\\.0\\."),
        "not finite in bf16": command(shards, tmp / "not finite in bf16", "zero0_bf16", "--optim.lr", "1e30",
                                      "--schedule.warmup_epochs", "0", "--optim.clip_grad", "0", every=1),
    }
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        codes, said = launch(tmp / "launch", list(jobs.values()))
    finally:
        os.close(descriptor)
    assert "Traceback" not in said, said
    return tmp, dict(zip(jobs, codes)), said


def nothing_stays_gathered(tmp: Path) -> Path:
    """ZeRO 3 in which each forward pass has to gather every weight, and so waits where a rank makes one less."""
    (tmp / "nothing.json").write_text(json.dumps({"zero_optimization": {
        "stage": 3, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0,
        "stage3_param_persistence_threshold": 0}}))
    return tmp / "nothing.json"


def damaged_samples(shards: Path, to: Path) -> Path:
    """A copy of the shards, every third training image with one bit turned over."""
    shutil.copytree(shards, to)
    index = read_index(to / "train")
    for number, shard in enumerate(sorted((to / "train").glob("*.tar"))):
        content = bytearray(shard.read_bytes())
        for row in index[index["shard"] == number][::3]:
            content[row["offset"] + row["size"] // 2] ^= 1
        shard.write_bytes(content)
    return to


def two_classes(digits: Path, tmp: Path) -> Path:
    for split in ("train", "val"):
        for of_class in ("one", "two"):
            shutil.copytree(digits / split / of_class, tmp / "images" / split / of_class)
        done = call(sys.executable, "tools/convert_imagenet.py", "--source", tmp / "images", "--split", split,
                    "--output", tmp / "two classes", "--workers", "1")
        assert done.returncode == 0, done.stdout
    return tmp / "two classes"


def test_gradients_that_are_not_finite_are_never_applied_and_stop_the_run(troubled):
    _, codes, said = troubled
    assert codes["not finite"] == 4, said
    assert "3 steps in a row: lower --optim.lr" in said and "rank 0: loss not finite" in said
    assert "last checkpoint: step" in said


def test_without_zero_a_step_that_is_not_finite_moves_neither_weights_nor_average(troubled, tmp_path):
    tmp, codes, said = troubled
    for name in ("not finite", "not finite in bf16"):
        assert codes[name] == 4
        updates = [event["updates"] for event in train_events(tmp / name)]
        skipped = next(step for step, (one, next_one) in enumerate(zip(updates, updates[1:]), 1) if one == next_one)
        for ema in (False, True):
            before, after = (weights(tmp / name, step, tmp_path, ema=ema) for step in (skipped, skipped + 1))
            assert all(torch.equal(before[key].view(torch.int32), after[key].view(torch.int32)) for key in before)


def test_zero_3_that_gathers_for_each_pass_trains_and_evaluates_as_without_zero(runs, troubled):
    """130 images in batches of 48 on two ranks: in the last one the first rank has 34 and the second none."""
    tmp, codes, _ = troubled
    assert codes["nothing gathered"] == 0
    events = [[event for event in read_metrics(run) if event["kind"] != "start"]
              for run in (runs / "zero0_fp32", tmp / "nothing gathered")]
    for one, other in zip(*events, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5), (one, other)


def test_frozen_parameters_stay_and_the_others_move(troubled, tmp_path):
    tmp, codes, _ = troubled
    assert codes["frozen"] == 0
    for ema in (False, True):
        first, last = (weights(tmp / "frozen", step, tmp_path, ema=ema) for step in (HALF, STEPS))
        assert {name for name in first if torch.equal(first[name], last[name])} == {
            name for name in first if name.startswith(("patch_embed.", "blocks.0."))}


def test_too_many_damaged_samples_end_every_rank(troubled):
    _, codes, said = troubled
    assert codes["damaged"] == 3, said
    assert "samples could not be decoded, more than --data.max_bad_fraction 0.001" in said
    assert "bad sample replaced: digits-train-0000" in said and "wrong checksum" in said


def test_an_output_that_is_a_checkpoint_is_refused(runs, shards, capsys):
    checkpoint = newest(runs / "zero0_fp32")
    assert main(command(shards, checkpoint)) == 2
    assert f"--output {checkpoint} is a checkpoint, not a run folder" in capsys.readouterr().err


def test_shards_of_other_classes_do_not_continue_a_run(troubled):
    tmp, codes, said = troubled
    assert codes["other classes"] == 2, said
    assert f"{tmp / 'other classes'}/checkpoints/step-{STEPS:08d} holds a" in said and "'num_classes': 10" in said


def test_changed_weight_decay_acts_after_a_resume_that_accepts_it(runs, troubled, tmp_path):
    tmp, codes, said = troubled
    assert codes["weight decay"] == 0, said
    before, after = (weights(run, STEPS, tmp_path)["head.weight"].norm()
                     for run in (runs / "zero2_fp32", tmp / "weight decay"))
    assert after < 0.8 * before


def test_a_second_run_in_one_folder_is_refused(troubled):
    tmp, codes, said = troubled
    assert codes["taken"] == 2 and f"--output {tmp / 'taken'}: another run is writing there" in said, said


def test_a_finished_run_is_left_alone(runs, troubled):
    tmp, codes, said = troubled
    assert codes["finished"] == 0, said
    assert read_metrics(tmp / "finished") == read_metrics(runs / "zero0_fp32")


@pytest.mark.gpu
def test_a_run_computes_on_cpu_where_told_to(shards, tmp_path):
    done = alone(*command(shards, tmp_path / "run", "zero2_fp32"), "--device", "cpu", "--dry_run")
    assert done.returncode == 0 and "1 ranks on cpu" in done.stdout, done.stdout[-4000:]


# ---- on GPUs

ON_GPU = ("zero0_fp32", "zero1_fp16", "zero2_bf16", "zero2_offload_bf16", "zero3_bf16", "zero3_bf16_ckpt")


def on_gpu(config: str, shards: Path, tmp: Path, *more: str) -> list[str]:
    return command(shards, tmp / config, config, "--train.deterministic", "true", *more, steps=STEPS, every=HALF)


@pytest.fixture(scope="module")
def gpu_runs(shards, tmp_path_factory) -> Path:
    """Finished runs of one rank."""
    tmp = tmp_path_factory.mktemp("gpu")
    codes, said = launch(tmp, [on_gpu(config, shards, tmp) for config in ON_GPU], ranks=1)
    assert codes == [0] * len(ON_GPU), said[-6000:]
    return tmp


@pytest.mark.gpu
def test_on_a_gpu_a_resumed_run_is_bit_identical_where_it_is_deterministic(gpu_runs, shards, tmp_path):
    for config in ON_GPU:
        take_back(gpu_runs / config, tmp_path / config)
    codes, said = launch(tmp_path, [on_gpu(config, shards, tmp_path) for config in ON_GPU], ranks=1)
    assert codes == [0] * len(ON_GPU), said[-6000:]
    for config in ON_GPU:
        are_bit_identical(gpu_runs / config, tmp_path / config, tmp_path)


@pytest.mark.gpu
def test_on_a_gpu_activation_checkpointing_changes_no_bit(gpu_runs, tmp_path):
    plain, recomputed = (weights(gpu_runs / config, STEPS, tmp_path) for config in ("zero3_bf16", "zero3_bf16_ckpt"))
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_train_as_one_evaluate_save_and_resume(shards, tmp_path):
    """By NCCL, and gloo for what is agreed on: without drop path, whose numbers belong to a rank."""
    configs = ("zero0_fp32", "zero2_bf16", "zero3_bf16")
    for ranks in (1, 2):
        tmp = tmp_path / str(ranks)
        codes, said = launch(tmp, [on_gpu(config, shards, tmp, "--model.drop_path_rate", "0") for config in configs],
                             ranks=ranks)
        assert codes == [0] * len(configs), said[-6000:]
    for config in configs:
        take_back(tmp_path / "2" / config, tmp_path / "again" / config)
    codes, said = launch(tmp_path / "again", [on_gpu(config, shards, tmp_path / "again", "--model.drop_path_rate", "0")
                                              for config in configs])
    assert codes == [0] * len(configs), said[-6000:]
    for config in configs:
        one, two = ([event["loss"] for event in train_events(tmp_path / ranks / config)] for ranks in ("1", "2"))
        assert two == pytest.approx(one, rel=1e-4 if config == "zero0_fp32" else 2e-2)
        are_bit_identical(tmp_path / "2" / config, tmp_path / "again" / config, tmp_path)
        assert [event["images"] for event in read_metrics(tmp_path / "2" / config) if event["kind"] == "eval"] == [130]
