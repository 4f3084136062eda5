"""A linear probe: what is trained, what is not, features that are computed once, and what is refused."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import timm
import torch

from support.tiny_runs import command, launch, train_events, weights
from vir.config import AugmentConfig, DataConfig, ModelConfig, RunConfig, TrainConfig
from vir.errors import SettingsError
from vir.models import WeightsMetadata, save_weights
from vir.models.build import build
from vir.models.linear_probe import classifier_inputs, classifiers, feature_width, make_probe
from vir.run_folder import METRICS
from vir.train import main
from vir.training import features

torch.set_num_threads(1)
VIR = dict(name="vir_tiny_patch16_224", img_size=28, args=dict(patch_size=14, embed_dim=32, depth=2, num_heads=2))
STILL = ["--augment.scale", "[1, 1]", "--augment.hflip", "0", "--augment.color_jitter", "0", "--augment.auto_augment",
         "null", "--augment.interpolation", "bicubic", "--augment.reprob", "0", "--augment.mixup", "0",
         "--augment.cutmix", "0"]
STEPS, HALF = 8, 4


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


def volo():
    """Its logits are those of the class token and half the largest of the patches'."""
    return timm.create_model("volo_d1_224", num_classes=3, img_size=32, layers=(1, 1, 1, 1), embed_dims=(24,) * 4,
                             num_heads=(2,) * 4)


def test_a_model_without_a_classifier_is_refused():
    model = build(ModelConfig(**VIR), "abc")[0]
    model.reset_classifier(0)
    with pytest.raises(SettingsError, match="--train.linear_probe: VisionRetention has no classifier 'head'; take anot"):
        make_probe(model)
    model.default_cfg = {}
    with pytest.raises(SettingsError, match="VisionRetention does not say which of its modules is the classifier; take"):
        make_probe(model)


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
    with pytest.raises(SettingsError, match="--train.linear_probe true and --model.freeze 'norm' are both given; .* leav"):
        RunConfig(data=DataConfig(train="t"), model=ModelConfig(freeze="norm"), train=TrainConfig(linear_probe=True))


def test_random_weights_are_warned_of(caplog):
    caplog.set_level(logging.WARNING, logger="vir")
    build(ModelConfig(**VIR), "abc", linear_probe=True)
    assert "give weights by --model.init_from or --model.pretrained" in caplog.text
    caplog.clear()
    build(ModelConfig(**VIR), "abc", fresh=False, linear_probe=True)  # those of a checkpoint follow
    assert not caplog.text


# Runs

@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    """Weights to begin from, of other classes."""
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    torch.manual_seed(1)
    model, spec = build(ModelConfig(**VIR), "abc")
    save_weights(path, model.state_dict(), WeightsMetadata(model=spec, step=7, samples_seen=56, ema=True, dtype="fp32"))
    return path


@pytest.fixture(scope="module")
def of(file, shards):
    """A function: the command of a probe of that file, without chance, in steps of 48 of 400 images."""
    def command_of(output, config="zero0_fp32", *more):
        return command(shards, output, config, "--model.args", json.dumps(VIR["args"]), *STILL, "--train.linear_probe",
                       "true", "--model.init_from", str(file), "--optim.lr", "0.03", *more, steps=STEPS, every=HALF)
    return command_of


@pytest.fixture(scope="module")
def runs(of, tmp_path_factory) -> Path:
    """Runs of two ranks, with features, under two ways of sharding; and the same from their middle on."""
    tmp = tmp_path_factory.mktemp("runs")
    (tmp / "zero3_fp32.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    commands = {"zero0_fp32": of(tmp / "zero0_fp32"), "zero3_fp32": of(tmp / "zero3_fp32", tmp / "zero3_fp32.json"),
                "zero2_bf16": of(tmp / "zero2_bf16", "zero2_bf16")}
    codes, said = launch(tmp, list(commands.values()))
    assert codes == [0] * len(commands), said[-6000:]
    assert said.count("128 numbers") == 0 and said.count("32 numbers in float32 of each of 384 images") == 2, said[-6000:]
    again = tmp / "again"
    for name in commands:
        shutil.copytree(tmp / name, again / name)
        shutil.rmtree(again / name / "checkpoints" / f"step-{STEPS:08d}")
        (again / name / "checkpoints" / "latest").write_text(f"step-{HALF:08d}")
    codes, said = launch(again / "launch", [[word.replace(f"{tmp}/{name}", f"{again}/{name}") if word == str(tmp / name)
                                             else word for word in words] for name, words in commands.items()])
    assert codes == [0] * len(commands) and "continuing after step 4" in said, said[-6000:]
    return tmp


def test_x(runs):
    for name in ("zero0_fp32", "zero3_fp32", "zero2_bf16"):
        print([e["loss"] for e in train_events(runs / name)])
        print([e["loss"] for e in train_events(runs / "again" / name)])
        print((runs / name / "log.txt").read_text())
