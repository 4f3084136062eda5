"""Teachers: what they say of the student's pixels, which are refused, and what a run keeps of them."""

import json
import logging
import re
from dataclasses import replace

import pytest
import timm
import torch
from torch import nn

from support.launchers import HANGS
from support.tiny_runs import command, launch, train_events, weights
from vir import distributed
from vir.checkpoints.info import read_info
from vir.checkpoints.names import newest
from vir.config import DistillConfig, ModelConfig
from vir.data.reader import ShardReader
from vir.errors import DataError, SettingsError
from vir.export import export_hub
from vir.models import WeightsMetadata, load, save_weights
from vir.models.build import build
from vir.training import distill
from vir.training.distill import Teacher, check_teacher, fingerprint, load_teacher
from vir.weights.spec import InputSpec, ModelSpec

torch.set_num_threads(1)
CPU = torch.device("cpu")
STUDENT = InputSpec(size=(3, 28, 28), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), interpolation="bicubic", crop_pct=0.9)


def student(classes, size=28):
    return ModelSpec(name="s", args={}, classes=tuple(classes), input=replace(STUDENT, size=(3, size, size)))


def vir_file(path, classes, seed=0, dtype="fp32", size=28, **settings):
    """A file of a tiny ViR that knows those classes."""
    torch.manual_seed(seed)
    args = dict(patch_size=14, embed_dim=16, depth=2, num_heads=2, init_values=None)
    model, spec = build(ModelConfig(name="vir_tiny_patch16_224", img_size=size, args=args, **settings), classes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    save_weights(path, {name: x.to(kind) for name, x in model.state_dict().items()}, WeightsMetadata(
        model=spec, step=7, samples_seen=56, ema=False, dtype=dtype))
    return str(path)


def teacher_of(path, spec):
    return load_teacher(DistillConfig(teacher=str(path)), spec, CPU)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_teacher_sees_the_students_pixels_by_its_own_normalisation_and_precision(tmp_path, dtype):
    path = vir_file(tmp_path / "t.safetensors", "abc", dtype=dtype, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    pixels = torch.rand(4, 3, 28, 28)

    def normalised(mean, std):
        return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)

    model = load(path, dtype=dtype)
    with torch.no_grad():
        wanted = model(normalised((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)).to(model.pos_embed.dtype)).float()
    teacher = teacher_of(path, student("abc"))
    found = teacher(normalised(STUDENT.mean, STUDENT.std).requires_grad_())
    assert found.dtype == torch.float32 and not found.requires_grad
    assert torch.allclose(found, wanted, atol=1e-5 if dtype == "fp32" else 5e-2) and wanted.std() > 0.1
    assert teacher.bytes == sum(x.numel() for x in model.state_dict().values()) * (4 if dtype == "fp32" else 2) + sum(
        x.numel() * x.element_size() for name, x in model.named_buffers())
    kind = {"fp32": "float32", "bf16": "bfloat16"}[dtype]
    assert teacher.describe().endswith(f"M parameters in {kind}, of images of 3x28x28; hard labels, alpha 0.5; "
                                       f"fingerprint {teacher.fingerprint[:12]}")


def test_a_teacher_is_in_evaluation_mode():
    network = timm.create_model("test_resnet", num_classes=3).train()
    before = {name: x.clone() for name, x in network.state_dict().items()}
    spec = ModelSpec(name="t", args={}, classes=tuple("abc"), input=STUDENT)
    teacher = Teacher(DistillConfig(teacher="t"), network, spec, student("abc"), CPU)
    teacher(torch.randn(2, 3, 28, 28))
    assert all(torch.equal(x, before[name]) for name, x in network.state_dict().items())  # also running statistics


def test_logits_are_those_of_the_runs_classes_by_their_names(tmp_path, caplog):
    path = vir_file(tmp_path / "t.safetensors", "cab")
    images = torch.randn(2, 3, 28, 28)
    own = teacher_of(path, student("cab"))(images)
    assert torch.equal(teacher_of(path, student("ab"))(images), own[:, [1, 2]])
    assert torch.equal(teacher_of(path, student("abc"))(images), own[:, [1, 2, 0]])
    assert not caplog.records


def test_a_teacher_that_names_no_classes_needs_as_many(tmp_path, caplog):
    caplog.set_level(logging.WARNING, logger="vir")
    path, nameless = vir_file(tmp_path / "t.safetensors", "abc"), tmp_path / "u.safetensors"
    model = load(path)
    save_weights(nameless, model.state_dict(), replace(model.weights_metadata, model=replace(
        model.weights_metadata.model, classes=())))
    images = torch.randn(2, 3, 28, 28)
    assert torch.equal(teacher_of(nameless, student("xyz"))(images), teacher_of(path, student("abc"))(images))
    assert [record.getMessage() for record in caplog.records] == [
        f"--distill.teacher {nameless} does not say which classes its 3 logits are; they are taken for those of this "
        "run, in their order"]
    with pytest.raises(SettingsError, match="has 3 logits and does not say of which classes; this run has 2 classes: "):
        teacher_of(nameless, student("ab"))


def test_a_teacher_that_does_not_know_a_class_is_refused(tmp_path):
    path = vir_file(tmp_path / "t.safetensors", "abc")
    with pytest.raises(SettingsError, match=re.escape("knows 3 classes, but not 2 of the 3 of this run (d, e); give")):
        teacher_of(path, student("ade"))


def test_a_teacher_of_one_size_needs_it_and_others_take_any(tmp_path):
    path = vir_file(tmp_path / "t.safetensors", "ab", size=56)
    with pytest.raises(SettingsError, match=r"t.safetensors takes images of 56x56 pixels alone, and those of this run "
                                            r"are 28x28; give --model.img_size 56, a teacher of that size, or one that "
                                            r"takes any, such as a resnet50"):
        teacher_of(path, student("ab"))
    images = torch.randn(2, 3, 56, 56)
    assert teacher_of(path, student("ab", 56))(images).shape == (2, 2)
    dynamic = load(path, dynamic_img_size=True)
    spec = ModelSpec(name="t", args={}, classes=("a", "b"), input=replace(STUDENT, size=(3, 56, 56)))
    teacher = Teacher(DistillConfig(teacher="t"), dynamic, spec, student("ab"), CPU)
    assert teacher(torch.randn(2, 3, 28, 28)).shape == (2, 2)


def test_a_teacher_that_gives_no_logits_is_refused():
    spec = ModelSpec(name="t", args={}, classes=(), input=STUDENT)
    with pytest.raises(SettingsError, match=r"--distill.teacher t cannot classify the images of this run, "
                                            r"\[3, 28, 28\]: it gives numbers of shape \[1, 3, 28, 28\], not logits"):
        Teacher(DistillConfig(teacher="t"), nn.Identity(), spec, student("ab"), CPU)


def test_a_fingerprint_is_of_all_that_makes_the_logits():
    spec = ModelSpec(name="t", args={"num_heads": 2}, classes=("a", "b"), input=STUDENT)
    tensors = {"w": torch.zeros(2, 3), "b": torch.zeros(1)}
    others = [fingerprint(spec, tensors | changed) for changed in (
        {"w": torch.zeros(3, 2)}, {"w": torch.zeros(2, 3).int()}, {"b": torch.ones(1)}, {"c": torch.zeros(1)})]
    others += [fingerprint(replace(spec, **changed), tensors) for changed in (
        {"args": {"num_heads": 1}}, {"classes": ("b", "a")}, {"input": replace(STUDENT, mean=(0.0, 0.0, 0.0))})]
    one = fingerprint(spec, dict(reversed(tensors.items())))
    assert one == fingerprint(spec, tensors) and len({one, *others}) == 8


def test_a_folder_for_hugging_face_is_a_teacher_as_the_file_that_it_was_made_of(tmp_path):
    path, spec = vir_file(tmp_path / "t.safetensors", "abc"), student("abc")
    export_hub(path, tmp_path / "hub")
    check_teacher(str(tmp_path / "hub"))
    assert teacher_of(tmp_path / "hub", spec).fingerprint == teacher_of(path, spec).fingerprint


@pytest.mark.parametrize("name, kind, said", [
    ("resnet18x", SettingsError, "resnet18x: neither a file nor a model of timm; did you mean resnet18"),
    ("resnet18.nothing", SettingsError, "resnet18.nothing: .*; leave the part after the dot out"),
    ("vir_tiny_patch16_224", SettingsError, "timm has no pretrained weights of vir_.* is given by --distill.teacher$"),
    ("runs/nowhere.pt", SettingsError, "runs/nowhere.pt: no such file; give a file of vir-consolidate, or the name "),
    (__file__, DataError, "test_distill.py is not a safetensors file .*; a teacher is a file of vir-consolidate, "
                          "or the name of a model of timm"),
])
def test_a_teacher_that_there_is_not_is_refused_at_the_door(name, kind, said):
    with pytest.raises(kind, match=f"--distill.teacher:? .*{said}" if "timm has" not in said else said):
        check_teacher(name)


def test_timms_imagenet_models_know_their_classes_where_the_run_has_some_of_these(monkeypatch, caplog):
    torch.manual_seed(0)
    network = timm.create_model("test_resnet")
    monkeypatch.setattr(distill, "pretrained_network", lambda name, flag, way_out: (network, "test_resnet.r160_in1k"))
    images = torch.randn(2, 3, 28, 28)
    every = [f"n{number}" for number in range(1000)]
    own = teacher_of("test_resnet", student(every))(images)
    assert [record.getMessage() for record in caplog.records] == [
        "--distill.teacher test_resnet does not say which classes its 1000 logits are; they are taken for those of "
        "this run, in their order"]
    found = teacher_of("test_resnet", student(["n01443537", "n01440764"]))  # goldfish and tench
    assert torch.equal(found(images), own[:, [1, 0]]) and found.describe().startswith("teacher: test_resnet.r160_in1k,")
    with pytest.raises(SettingsError, match=r"knows 1000 classes, but not 1 of the 2 of this run \(cat\); give"):
        teacher_of("test_resnet", student(["n01443537", "cat"]))


def test_weights_of_timm_that_cannot_be_had_are_told_with_the_teachers_flag(monkeypatch):
    def create_model(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(timm, "create_model", create_model)
    with pytest.raises(DataError, match="^--distill.teacher: the weights of test_resnet.r160_in1k .*: no network; .*, "
                                        "or give a file by --distill.teacher FILE$"):
        teacher_of("test_resnet", student("ab"))


def test_a_teacher_that_is_another_one_on_some_rank_is_refused(tmp_path, monkeypatch):
    path = vir_file(tmp_path / "t.safetensors", "ab")
    monkeypatch.setattr(distributed, "gather", lambda value: [value, value, "another"])
    with pytest.raises(SettingsError, match="t.safetensors is another model for rank 2 than for rank 0; see that the"):
        teacher_of(path, student("ab"))


@pytest.fixture(scope="module")
def runs(shards, tmp_path_factory):
    """Short runs of two ranks under a teacher, in one launch: their folder, exit codes, and what each has said.

    Those of ZeRO 3 come last: DeepSpeed leaves torch's linear layer in another form for all that follow.
    """
    tmp = tmp_path_factory.mktemp("runs")
    one, other = (vir_file(tmp / f"{seed}.safetensors", ShardReader(shards / "train").classes, seed) for seed in (1, 2))
    (tmp / "zero3.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    taught, by_other = ["--distill.teacher", one], ["--distill.teacher", other]
    begun = ["--resume", str(tmp / "zero0")]
    by_token = [*taught, "--distill.kind", "token"]
    has_token = ["--model.args", "{patch_size: 14, embed_dim: 32, depth: 2, num_heads: 2, distilled: true}"]
    jobs = {
        "zero0": taught, "again": [*taught, "--resume", str(tmp / "zero0" / "checkpoints" / "step-00000002")],
        "another": [*by_other, *begun], "none": begun,
        "accepted": [*by_other, *begun, "--accept_config_change", "true", "--dry_run"],
        "validate": ["--distill.teacher", "gone.safetensors", *begun, "--validate_only"],
        "gone": ["--distill.teacher", "gone.pt"],
        "no token": by_token, "short plain": [], "short alpha 0": [*taught, "--distill.alpha", "0"],
        "short token": [*by_token, *has_token], "short token zero3": [*by_token, *has_token], "zero3": taught}
    commands = [command(shards, tmp / name, tmp / "zero3.json" if "zero3" in name else "zero0_fp32",
                        *([] if name == "validate" else ["--data.val", ""]), *more, steps=3 if "short" in name else 4,
                        every=2) for name, more in jobs.items()]
    codes, said = launch(tmp / "launch", commands)
    return tmp, dict(zip(jobs, codes)), said


def losses(tmp, name):
    return [event["loss"] for event in train_events(tmp / name)]


@pytest.mark.launcher
@pytest.mark.timeout(2 * HANGS)
def test_a_teacher_teaches_the_same_in_every_layout_and_draws_no_random_number(runs):
    tmp, codes, said = runs
    names = ("zero0", "zero3", "short plain", "short alpha 0", "short token", "short token zero3")
    assert [codes[name] for name in names] == [0] * 6, said[-6000:]
    assert losses(tmp, "zero0") == pytest.approx(losses(tmp, "zero3"), rel=1e-5)
    assert losses(tmp, "short token") == pytest.approx(losses(tmp, "short token zero3"), rel=1e-5)
    assert losses(tmp, "short alpha 0") == losses(tmp, "short plain") and len(losses(tmp, "short plain")) == 3
    assert abs(losses(tmp, "zero0")[0] / losses(tmp, "short plain")[0] - 1) > 1e-3


@pytest.mark.launcher
@pytest.mark.timeout(2 * HANGS)
def test_a_checkpoint_has_the_teachers_fingerprint_and_nothing_else_of_it(runs):
    tmp, _, _ = runs
    for name in ("zero0", "zero3", "short token"):
        info = read_info(newest(tmp / name))
        assert info.teacher == teacher_of(tmp / "1.safetensors", student(info.model.classes)).fingerprint
        own = timm.create_model(info.model.name, **info.model.args).state_dict()
        assert weights(tmp / name, info.step, tmp).keys() == own.keys()
    taught, plain = (read_info(newest(tmp / name)) for name in ("zero0", "short plain"))
    assert plain.teacher == ""
    taught, plain = ({file: entry["bytes"] for file, entry in info.files.items()} for info in (taught, plain))
    assert taught == plain


@pytest.mark.launcher
@pytest.mark.timeout(2 * HANGS)
def test_the_token_learns_and_evaluation_takes_both_heads(runs):
    tmp, _, _ = runs
    first, last = (weights(tmp / "short token", 3, tmp, ema=ema) for ema in (True, False))
    assert all((first[name] != last[name]).any() for name in ("dist_token", "head_dist.weight", "head.weight"))
    model = load(tmp / "w.safetensors")
    images = torch.randn(2, 3, 28, 28)
    features = model.forward_features(images)
    both = (model.head(features[:, -2]) + model.head_dist(features[:, -1])) / 2
    assert torch.allclose(model(images), both, atol=1e-6)


@pytest.mark.launcher
@pytest.mark.timeout(2 * HANGS)
def test_a_run_with_a_teacher_resumes_bit_for_bit(runs):
    tmp, codes, said = runs
    assert codes["again"] == 0, said[-3000:]
    whole, again = ([(event["step"], event["loss"], event["grad_norm"]) for event in train_events(tmp / name)]
                    for name in ("zero0", "again"))
    assert whole[2:] == again
    expected, found = (weights(tmp / name, 4, tmp) for name in ("zero0", "again"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.launcher
@pytest.mark.timeout(2 * HANGS)
def test_another_teacher_is_refused_on_resume_unless_it_is_accepted(runs):
    tmp, codes, said = runs
    assert (codes["another"], codes["none"], codes["accepted"], codes["validate"]) == (2, 2, 0, 0), said[-6000:]
    classes = read_info(newest(tmp / "zero0")).model.classes
    one, other = (teacher_of(tmp / f"{seed}.safetensors", student(classes)).fingerprint[:12] for seed in (1, 2))
    assert (f"was trained with another teacher than --distill.teacher {tmp / '2.safetensors'}: its fingerprint was "
            f"{one}…, that of this one is {other}…; give the teacher of then, or --accept_config_change true") in said
    assert f"than --distill.teacher (not given): its fingerprint was {one}…, that of this one is none; " in said


@pytest.mark.launcher
@pytest.mark.timeout(2 * HANGS)
def test_the_plan_tells_the_teacher_and_its_memory_and_what_does_not_fit_is_refused(runs):
    tmp, codes, said = runs
    teacher = teacher_of(tmp / "2.safetensors", student(read_info(newest(tmp / "zero0")).model.classes))
    assert f"{teacher.describe()}\n" in said
    assert re.search(rf"memory per rank: .* \+ {teacher.bytes / 1e6:.1f} teacher, without activations", said)
    assert (codes["no token"], codes["gone"]) == (2, 2)
    assert ("--distill.kind token: vir_tiny_patch16_224 has no distillation token; a ViR has one with --model.args "
            "'{distilled: true}'") in said
    assert "--distill.teacher gone.pt: no such file; " in said
    assert not (tmp / "gone").exists()
