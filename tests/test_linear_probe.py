"""A linear probe: what is trained, what is not, features that are computed once, and what is refused."""

import json
import logging
import re
import shutil
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from safetensors.torch import load_file

from support.forked import forked
from support.launchers import HANGS
from support.tiny_runs import command, launch, train_events, weights
from vir.config import AugmentConfig, DataConfig, ModelConfig, RunConfig, TrainConfig
from vir.data.shards import read_index
from vir.distributed import World
from vir.errors import SettingsError
from vir.models import WeightsMetadata, save_weights
from vir.models.build import build
from vir.models.linear_probe import classifier_inputs, classifiers, feature_width, make_probe
from vir.training.features import can_be_kept, describe
from vir.weights.spec import InputSpec

pytestmark = [pytest.mark.launcher, pytest.mark.timeout(2 * HANGS)]

torch.set_num_threads(1)
VIR = dict(name="vir_tiny_patch16_224", img_size=28, args=dict(patch_size=14, embed_dim=32, depth=2, num_heads=2))
STILL = ["--augment.scale", "[1, 1]", "--augment.hflip", "0", "--augment.color_jitter", "0", "--augment.auto_augment",
         "null", "--augment.interpolation", "bicubic", "--augment.reprob", "0", "--augment.mixup", "0",
         "--augment.cutmix", "0"]
STEPS, HALF = 8, 4
RUNS = ["zero0_fp32", "zero3_bf16", "drawn", "whole"]


def still(**changed):
    return AugmentConfig(**dict(scale=(1.0, 1.0), hflip=0, color_jitter=0, auto_augment=None, interpolation="bicubic",
                                reprob=0, mixup=0, cutmix=0) | changed)


# Which model is a probe

MODELS = {
    "vir": (lambda: build(ModelConfig(**VIR, drop_path_rate=0.5), "abc")[0], ["head"], 28),
    "batch norm": (lambda: timm.create_model("test_resnet", num_classes=3, drop_rate=0.5), ["fc"], 64),
    "convolution": (lambda: timm.create_model("resnetv2_18", num_classes=3, drop_rate=0.5), ["head.fc"], 32),
    "two heads": (lambda: timm.create_model("deit_tiny_distilled_patch16_224", num_classes=3, img_size=32,
                                            embed_dim=24, depth=2, num_heads=2, drop_path_rate=0.5),
                  ["head", "head_dist"], 32),
}


@pytest.fixture
def probe():
    """A function: a model of that kind, made a probe in training mode, and two images for it."""
    def of(kind):
        torch.manual_seed(0)
        model = MODELS[kind][0]()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        make_probe(model)
        return model.train(), torch.randn(2, 3, MODELS[kind][2], MODELS[kind][2])
    return of


@pytest.mark.parametrize("kind", MODELS)
def test_only_the_classifier_is_trained_and_nothing_else_moves(kind, probe):
    model, images = probe(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert before.keys() == MODELS[kind][0]().state_dict().keys()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {f"{head}.{part}" for head in MODELS[kind][1] for part in ("weight", "bias")}
    assert all(head.training for head in classifiers(model))
    logits = model(images)
    assert torch.equal(logits, model(images)) and torch.equal(logits, model.eval()(images))  # nothing is dropped
    logits.square().sum().backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == trained
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", MODELS)
def test_logits_of_features_are_those_of_images(kind, probe):
    model, images = probe(kind)
    with classifier_inputs(model) as found:
        expected = model(images)
    taken = torch.cat([found[number] for number in sorted(found)], dim=1)
    assert taken.shape == (2, feature_width(model)) and not taken.requires_grad
    torch.testing.assert_close(model(taken), expected, rtol=1e-6, atol=1e-6)


class Doubled(torch.nn.Module):
    """Its logits are twice what its head makes of the mean of each channel."""

    default_cfg = {"classifier": "head"}

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, x):
        return 2 * self.head(x.mean(dim=(2, 3)))


OTHERS = {"twice the logits": lambda: Doubled(torch.nn.Linear(3, 2)),
          "two layers": lambda: Doubled(torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 2))),
          "zeros": lambda: Doubled(torch.nn.Linear(3, 2, bias=False).apply(lambda head: head.weight.data.zero_())),
          "not finite": lambda: Doubled(torch.nn.Linear(3, 2).apply(lambda head: head.bias.data.fill_(torch.inf)))}


def test_a_model_without_a_classifier_is_refused():
    model = build(ModelConfig(**VIR), "abc")[0]
    model.reset_classifier(0)
    with pytest.raises(SettingsError, match="--train.linear_probe: VisionRetention has no classifier 'head'; take an"):
        make_probe(model)
    model.default_cfg = {}
    with pytest.raises(SettingsError, match="VisionRetention does not say which of its modules is the classifier; "):
        make_probe(model)


@pytest.mark.parametrize("kind, why_not", [
    ("vir", ""), ("two heads", ""), ("twice the logits", "more than linear layers on one vector"),
    ("two layers", "more than linear layers on one vector"), ("zeros", "its logits are all zero at the start"),
    ("not finite", "its logits of noise are not finite")])
def test_features_are_kept_where_they_tell_the_logits(kind, why_not, probe, caplog):
    caplog.set_level(logging.INFO, logger="vir")
    side = 8
    if kind in MODELS:
        model, side = probe(kind)[0], MODELS[kind][2]
    else:
        model = OTHERS[kind]()
        make_probe(model)
    of_images = InputSpec(size=(3, side, side), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", crop_pct=1.0)

    @contextmanager
    def evaluating(averaged):
        with torch.no_grad():
            yield model.eval()

    config, engine = RunConfig(data=DataConfig(train="t"), augment=still()), SimpleNamespace(
        module=model, evaluating=evaluating, dtype=torch.float32)
    plan = SimpleNamespace(num_samples=9, total_steps=1, samples=lambda step: 4 * step)
    told = describe(still(), plan, engine)  # which comes first, and tells what is seen without computing
    assert can_be_kept(config, engine, of_images, World(0, 1, torch.device("cpu"))) == (not why_not)
    said = [line for line in (told, caplog.text) if "each step runs the whole model, because" in line]
    assert len(said) == bool(why_not) and all(why_not in line for line in said)


# What is asked for

@pytest.mark.parametrize("changed, draws", [
    ({}, False), (dict(ratio=(0.5, 2.0)), False), (dict(interpolation="bilinear", remode="const"), False),
    (dict(scale=(0.5, 1.0)), True), (dict(hflip=0.1), True), (dict(color_jitter=0.1), True),
    (dict(auto_augment="rand-m1"), True), (dict(interpolation="random"), True), (dict(reprob=0.1), True),
    (dict(mixup=0.1), True), (dict(cutmix=0.1), True),
])
def test_what_draws(changed, draws):
    assert still(**changed).draws == draws


def test_a_freeze_beside_it_is_refused():
    with pytest.raises(SettingsError, match="--train.linear_probe true and --model.freeze 'norm' are both given; a "):
        RunConfig(data=DataConfig(train="t"), model=ModelConfig(freeze="norm"), train=TrainConfig(linear_probe=True))


def test_random_weights_are_warned_of(caplog):
    caplog.set_level(logging.WARNING, logger="vir")
    build(ModelConfig(**VIR), "abc", linear_probe=True)
    assert "give weights by --model.init_from or --model.pretrained" in caplog.text
    caplog.clear()
    build(ModelConfig(**VIR), "abc", fresh=False, linear_probe=True)  # those of a checkpoint follow
    assert not caplog.text


# Runs

TWO_PATHS = """
import runpy, sys
from vir.training import features
asked = features.can_be_kept
features.can_be_kept = lambda config, *rest: not config.output.endswith("whole") and asked(config, *rest)
runpy.run_path(sys.argv[1])
"""
A_SIGNAL_COMES = """
import os, signal, sys
from vir.train import main
from vir.training import features
normalize = features.normalize
features.normalize = lambda *given: (os.kill(os.getpid(), signal.SIGTERM), normalize(*given))[1]
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    """Weights to begin from, of other classes."""
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    torch.manual_seed(1)
    model, spec = build(ModelConfig(**VIR), "abc")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    save_weights(path, model.state_dict(), WeightsMetadata(model=spec, step=7, samples_seen=56, ema=True, dtype="fp32"))
    return path


@pytest.fixture(scope="module")
def damaged(shards, tmp_path_factory) -> Path:
    """A copy of the shards, one bit of every 50th training image turned over."""
    folder = tmp_path_factory.mktemp("damaged") / "shards"
    shutil.copytree(shards, folder)
    index = read_index(folder / "train")
    for number, shard in enumerate(sorted((folder / "train").glob("*.tar"))):
        content = bytearray(shard.read_bytes())
        for row in index[index["shard"] == number][::50]:
            content[row["offset"] + row["size"] // 2] ^= 1
        shard.write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def of(file, damaged):
    """A function: the command of a run of eight steps, each of 48 of 400 images."""
    def command_of(output, config="zero0_fp32", *more):
        return command(damaged, output, config, "--model.args", json.dumps(VIR["args"]), *STILL,
                       "--model.drop_path_rate", "0.5", "--train.linear_probe", "true", "--model.init_from", str(file),
                       "--data.max_bad_fraction", "0.5", "--optim.lr", "0.03", *more, steps=STEPS, every=HALF)
    return command_of


def on_two_paths(*program, ranks: int):
    return forked("-c", TWO_PATHS, *program, ranks=ranks)


@pytest.fixture(scope="module")
def runs(of, tmp_path_factory) -> tuple[Path, str]:
    """Runs of two ranks, the first two interrupted in their middle, and what was said before."""
    tmp = tmp_path_factory.mktemp("runs")
    (tmp / "zero3_bf16.json").write_text(json.dumps({"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}}))
    first = [of(tmp / "zero0_fp32"), of(tmp / "zero3_bf16", tmp / "zero3_bf16.json"),
             of(tmp / "drawn", "zero2_fp32", "--augment.hflip", "0.5")]
    codes, said = launch(tmp / "first", first)
    assert codes == [0] * 3, said[-6000:]
    for name in ("zero0_fp32", "zero3_bf16"):
        shutil.copytree(tmp / name, tmp / "uninterrupted" / name)
        shutil.rmtree(tmp / name / "checkpoints" / f"step-{STEPS:08d}")
        (tmp / name / "checkpoints" / "latest").write_text(f"step-{HALF:08d}")
    codes, more = launch(tmp / "second", [*first[:2], of(tmp / "whole")], launcher=on_two_paths)
    assert codes == [0] * 3 and more.count("continuing after step 4") == 2, more[-6000:]
    return tmp, said


@pytest.fixture(scope="module")
def trained(runs, tmp_path_factory):
    """A function: the weights of a run after its last step."""
    return lambda name, **options: weights(runs[0] / name, STEPS, tmp_path_factory.mktemp("w"), **options)


def losses(run: Path) -> list[float]:
    return [event["loss"] for event in train_events(run)]


@pytest.mark.parametrize("name", RUNS)
def test_the_classifier_learns_and_the_rest_stays_that_of_the_file(name, runs, trained, file):
    found = losses(runs[0] / name)
    assert len(found) == STEPS and sum(found[-3:]) < sum(found[:3]) - 0.3
    begun = load_file(file)
    for ema in (False, True):
        after = trained(name, ema=ema)
        assert after.keys() == begun.keys()
        others = {key: value for key, value in begun.items() if not key.startswith("head.")}
        if "bf16" in name:
            others = {key: value.bfloat16().float() for key, value in others.items()}
        assert [key for key, value in others.items() if not torch.equal(after[key], value)] == []
        assert after["head.weight"].std() > 0.03  # it began at 0.02


def test_steps_on_features_are_those_of_the_whole_model(runs, trained):
    """Damaged images among them have the same substitutes."""
    tmp, said = runs
    assert said.count("linear probe: 32 features in float32 of each of 384 images take 4.92e-05 GB of CPU memory") == 1
    assert said.count("linear probe: 32 features in bfloat16 of each of 384 images take 2.46e-05 GB of CPU mem") == 1
    assert said.count("linear probe: features of 384 images computed in") == 2
    assert losses(tmp / "zero0_fp32") == pytest.approx(losses(tmp / "whole"), rel=1e-6)
    torch.testing.assert_close(trained("zero0_fp32"), trained("whole"), rtol=1e-5, atol=1e-6)
    of_whole, of_features = ((tmp / name / "log.txt").read_text() for name in ("whole", "uninterrupted/zero0_fp32"))
    told = set(re.findall("bad sample replaced: (.*):", of_features))
    assert told > set(re.findall("bad sample replaced: (.*):", of_whole)) > set()  # there rank 0's are in its log alone
    assert of_features.count("bad sample replaced") == len(told)  # each once


@pytest.mark.parametrize("name", ["zero0_fp32", "zero3_bf16"])
def test_a_run_that_goes_on_computes_the_same_features(name, runs, trained):
    tmp, _ = runs
    assert losses(tmp / name) == losses(tmp / "uninterrupted" / name)
    expected, found = trained(f"uninterrupted/{name}"), trained(name)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_without_zero_and_in_zero_3_the_losses_are_the_same(runs):
    assert losses(runs[0] / "zero3_bf16") == pytest.approx(losses(runs[0] / "zero0_fp32"), rel=1e-2)


def test_where_images_are_drawn_each_step_runs_the_model(runs):
    tmp, said = runs
    assert said.count("each step runs the whole model, because --augment draws other images in each epoch") == 1
    assert losses(tmp / "drawn") != pytest.approx(losses(tmp / "whole"), rel=1e-3)


def test_a_signal_while_features_are_computed_stops_the_run(of, tmp_path):
    done = forked("-c", A_SIGNAL_COMES, *of(tmp_path / "run", "zero0_fp32", "--eval.batch_size", "100"), ranks=1)
    assert done.returncode == 75, done.stdout[-6000:]
    assert f"stopped by SIGTERM; the same command continues: {tmp_path / 'run'}" in done.stdout
    assert "step 1/8" not in done.stdout and not list((tmp_path / "run").glob("checkpoints/step-*"))
