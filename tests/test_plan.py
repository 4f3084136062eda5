"""The numbers of a run, counted by hand, and the lines about them."""

import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from vir.config import (
    CheckpointConfig,
    DataConfig,
    EmaConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)
from vir.data.reader import ShardReader
from vir.data.shards import ShardSample, write_shard, write_split
from vir.distributed import World
from vir.engine.optimizer import parameter_groups
from vir.errors import SettingsError
from vir.models.build import build
from vir.training import schedule
from vir.training.plan import describe, make_plan

WORLD = World(rank=1, size=2, device=torch.device("cpu"))
CLASSES = ["a", "b", "c"]


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """50 samples in shards of 30 and 20."""
    folder = tmp_path_factory.mktemp("split")
    samples = [ShardSample(f"k{i}", b"no image is decoded here", "jpg", 1, 1, i % 3, f"{i}.jpg") for i in range(50)]
    shards = [write_shard(folder / f"s-{i}.tar", part) for i, part in enumerate((samples[:30], samples[30:]))]
    write_split(folder, shards, name="s", split="train", classes=CLASSES, seed=0, samples_per_shard=30, skipped=[])
    return ShardReader(folder)


@pytest.fixture(scope="module")
def network():
    return build(ModelConfig(name="vir_tiny_patch16_224", img_size=28, args=dict(
        patch_size=14, embed_dim=16, depth=1, num_heads=2)), CLASSES)


def config(**train):
    return RunConfig(
        deepspeed_config="x", output="y", data=DataConfig(train="t", val="v", lanes=2, window=5),
        ema=EmaConfig(decay=0.9),
        train=TrainConfig(**{"epochs": 2, "global_batch_size": 8, "micro_batch_size": 2} | train),
        optim=OptimConfig(lr_base=0.32, weight_decay=0.1, weight_decay_end=0.3),
        schedule=ScheduleConfig(name="constant", warmup_epochs=0.8, warmup_lr=0.0), eval=EvalConfig(every_epochs=1),
        checkpoint=CheckpointConfig(every_epochs=0.5))


def plan_of(reader, network, **train):
    return make_plan(config(**train), reader, network[1], WORLD, "bf16")


def test_steps_and_batches_follow_from_samples_and_ranks(reader, network):
    plan = plan_of(reader, network)
    assert (plan.num_samples, plan.num_classes, plan.global_batch_size) == (50, 3, 8)
    assert plan.accumulation == 2                            # 8 = 2 x 2 x 2 ranks
    assert plan.total_steps == 13                            # 100 samples in batches of 8
    assert plan.eval_steps == {7, 13}                        # 50 and 100 samples are complete after 6.25 and 12.5
    assert plan.checkpoint_steps == {4, 7, 10, 13}
    assert plan.steps_per_epoch == 6.25


def test_intervals_in_steps_take_the_place_of_those_in_epochs(reader, network):
    given = replace(config(steps=10), eval=EvalConfig(every_steps=4), checkpoint=CheckpointConfig(every_steps=5))
    plan = make_plan(given, reader, network[1], WORLD, "bf16")
    assert (plan.total_steps, plan.eval_steps, plan.checkpoint_steps) == (10, {4, 8, 10}, {5, 10})


def test_without_validation_data_nothing_is_evaluated(reader, network):
    given = replace(config(), data=DataConfig(train="t", lanes=2, window=5))
    assert make_plan(given, reader, network[1], WORLD, "bf16").eval_steps == frozenset()


def test_samples_and_epochs_after_so_many_steps(reader, network):
    plan = plan_of(reader, network)
    assert [plan.samples(done) for done in (0, 1, 13)] == [0, 8, 104]
    assert [plan.epoch(done) for done in (0, 1, 13)] == [0, 0.16, 2.08]


def test_learning_rate_and_decay_are_those_of_the_schedule(reader, network):
    plan = plan_of(reader, network)
    rates = [plan.learning_rate(step) for step in range(13)]
    assert rates[:6] == pytest.approx([0, 0.002, 0.004, 0.006, 0.008, 0.01])  # 0.32 x 8 / 256 after 5 steps
    assert rates[6:] == [rates[5]] * 7
    given = config()
    assert rates == [schedule.learning_rate(step, 13, 6.25, 0.01, given.schedule) for step in range(13)]
    decays = [plan.weight_decay(step) for step in range(13)]
    assert decays == [schedule.weight_decay(step, 13, given.optim) for step in range(13)]
    assert decays[0] == pytest.approx(0.1) and decays == sorted(decays) and decays[-1] < 0.3


def test_the_peak_is_the_given_one_or_unknown_on_a_cpu(reader, network):
    assert plan_of(reader, network, peak_tflops=2.0).peak_flops == 2e12
    assert plan_of(reader, network).peak_flops is None
    assert plan_of(reader, network, peak_tflops=2.0, linear_probe=True).peak_flops is None


def test_a_batch_that_does_not_divide_is_refused_with_the_nearest_that_do(reader, network):
    with pytest.raises(SettingsError, match="--train.global_batch_size 10 is not .* x 2 ranks = 4; nearest: 8 or 12"):
        plan_of(reader, network, global_batch_size=10)


def test_the_lines_about_a_run_say_its_numbers(reader, network, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2_000_000_000))
    model, spec = network
    decayed, others = parameter_groups(model, config().optim)
    engine = SimpleNamespace(module=model, zero_stage=2, precision="bf16", dtype=torch.bfloat16, has_ema=True,
                             groups=[decayed, others | {"lr_scale": 0.5}])
    settings = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 1_500_000}, "bf16": {"enabled": True}}
    plan = plan_of(reader, network)
    given = replace(config(), output=str(tmp_path / "not yet" / "there"))
    what, optim, data, order, steps, course, memory, disk = describe(
        given, settings, plan, engine, spec, reader, reader, WORLD)
    count = sum(p.numel() for p in model.parameters())
    assert what.startswith(f"vir_tiny_patch16_224, {count / 1e6:.2f} M parameters, ")
    assert f"{plan.forward_flops / 1e9:.3g} GFLOP" in what and what.endswith(
        "forward per image of 3x28x28; ZeRO 2, bf16, 2 ranks on cpu")
    assert optim == (f"adamw, peak lr 0.01, tensors per group: decay {len(decayed['names'])}, "
                     f"no_decay {len(others['names'])} lr x0.5")
    assert data == "50 training images in 2 shards, 50 validation images, 3 classes"
    size = sum(reader.shard_bytes) / 1e9
    assert order == f"order: 2 lanes, window 5; about 2 shards of {size:.3g} GB in use at a time on each machine"
    assert steps == "13 steps of 8 = 2 x 2 x 2 ranks; 2 evaluations, 4 checkpoints, and one every 10 minutes"
    assert course == "learning rate: from 0 to 0.01 over 5 steps of warm-up, constant from 0.01 to 0.01 over 8"
    size = (2 + 4 + 4 * 3) * count                                  # bf16, masters, two moments and the average
    assert disk == (f"disk: 7 checkpoints of {size / 1e6:.1f} MB (3 newest, 2 by the clock, the best, one being "
                    f"written) take {7 * size / 1e9:.3g} GB; 0 GB are there, 2 GB are free")
    half = sum(-(-sum(p.numel() for p in group["params"]) // 4) * 2 for group in engine.groups)
    weights, state = 2 * count + 2 * 2 * half, (4 + 4 * 3) * half   # of two micro-batches; two moments and the average
    assert memory == (f"memory per rank: {(weights + state) / 1e6 + 3:.1f} MB = {weights / 1e6:.1f} weights and "
                      f"gradients + {state / 1e6:.1f} optimizer and EMA + 3.0 buckets of gradients, without "
                      f"activations; {(2 * count + (4 + 4 * 3) * half) / 1e6:.1f} MB of the machine's for the copies "
                      "of checkpoints")


@pytest.mark.parametrize("minutes, said", [(1.0, ", and one every minute"), (2.5, ", and one every 2.5 minutes"),
                                           (None, "")])
def test_checkpoints_by_the_clock_are_told_and_without_copies_none_are(reader, network, minutes, said):
    engine = SimpleNamespace(module=network[0], zero_stage=0, precision="fp32", dtype=torch.float32, has_ema=False,
                             groups=parameter_groups(network[0], config().optim))
    given = replace(config(), checkpoint=CheckpointConfig(every_minutes=minutes, asynchronous=False))
    steps, _, memory, _ = list(describe(given, {}, plan_of(reader, network), engine, network[1], reader, None,
                                        WORLD))[-4:]
    assert steps.endswith(" checkpoints" + said) and memory.endswith(", without activations")


def test_a_teacher_has_a_line_and_its_memory_is_counted(reader, network):
    engine = SimpleNamespace(module=network[0], zero_stage=2, precision="fp32", dtype=torch.float32, has_ema=False,
                             groups=parameter_groups(network[0], config().optim))
    teacher = SimpleNamespace(bytes=5_000_000, describe=lambda: "teacher: a resnet")
    settings = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 0}}
    plain, taught = ([*describe(config(), settings, plan_of(reader, network), engine, network[1], reader, None, WORLD,
                                *more)] for more in ((), (teacher,)))
    assert taught[1] == "teacher: a resnet" and taught[2:-2] == plain[1:-2]
    before, after = (float(re.search("memory per rank: ([0-9.]+) MB", lines[-2])[1]) for lines in (plain, taught))
    assert after == pytest.approx(before + 5, abs=0.11) and " + 5.0 teacher, without activations;" in taught[-2]


def test_a_disk_that_is_too_small_is_told_and_what_is_there_already_counts(reader, network, tmp_path, monkeypatch):
    model, spec = network
    engine = SimpleNamespace(module=model, zero_stage=0, precision="fp32", dtype=torch.float32, has_ema=False,
                             groups=parameter_groups(model, config().optim))
    usage = shutil.disk_usage(tmp_path)
    size = (4 + 4 * 2) * sum(p.numel() for p in model.parameters())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2 * size))
    step = tmp_path / "checkpoints" / "step-00000004"
    step.mkdir(parents=True)
    given = replace(config(), output=str(tmp_path),
                    checkpoint=CheckpointConfig(keep=2, keep_every_epochs=1.5, every_minutes=None))
    plan = make_plan(given, reader, spec, WORLD, "fp32")

    def disk() -> str:
        return list(describe(given, {}, plan, engine, spec, reader, None, WORLD))[-1]

    assert "5 checkpoints" in disk() and "(2 newest, the best, 1 for good, one being written)" in disk()
    assert f": {3 * size / 1e9:.3g} GB TOO FEW, lower --checkpoint.keep or free some space" in disk()
    (step / "file").write_bytes(bytes(3 * size))
    assert "TOO FEW" not in disk()


def test_a_model_that_cannot_be_counted_has_no_number(reader, network):
    spec = replace(network[1], args={**network[1].args, "num_hats": 1})
    assert make_plan(config(), reader, spec, WORLD, "bf16").forward_flops is None


def test_what_is_offloaded_is_told_apart(reader, network):
    """Of 2 ranks in bf16 each steps a half on the host: 4 bytes of masters, two moments and gradients, and 2 beside.
    Without the last two that is what a checkpoint copies."""
    engine = SimpleNamespace(module=network[0], zero_stage=3, precision="bf16", dtype=torch.bfloat16, has_ema=False,
                             groups=parameter_groups(network[0], config().optim))
    settings = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": 0},
                "bf16": {"enabled": True}}
    memory = list(describe(config(), settings, plan_of(reader, network), engine, network[1], reader, None, WORLD))[-2]
    half = sum(-(-p.numel() // 2) for p in network[0].parameters())
    assert memory == (f"memory per rank: {2 * half / 1e6:.1f} MB = {2 * half / 1e6:.1f} weights and gradients, without "
                      f"activations; {18 * half / 1e6:.1f} MB of the machine's, to which it is offloaded; "
                      f"{12 * half / 1e6:.1f} MB of the machine's for the copies of checkpoints")
