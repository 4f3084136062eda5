"""Export: what is written gives the model's logits in other runtimes, in every form, and nothing wrong is left.

Each export takes seconds: those that succeed are made once, and shared.
"""

import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from PIL import Image
from torch.nn import functional as F

from support.launchers import ROOT
from vir import cli, export
from vir.errors import DataError, SettingsError
from vir.export import export_model
from vir.files import sha256
from vir.models import load
from vir.models.export import onnx as to_onnx
from vir.models.export import program
from vir.models.export.graphs import graphs, logits_of
from vir.models.strips import resampling_weights
from vir.weights.metadata import WeightsMetadata
from vir.weights.portable import save_weights
from vir.weights.spec import InputSpec, ModelSpec

SIZE = (3, 32, 24)
TINY = dict(img_size=(32, 24), patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=5)
CLASSES = ("a", "b", "ü", "d, e", "f")


def write_weights(path, name="vir_tiny_patch16_224", size=SIZE, **args):
    """Random weights with large logits: those of a wrong graph are far off."""
    torch.manual_seed(0)
    spec = ModelSpec(name=name, args=args, classes=CLASSES, input=InputSpec(
        size=size, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3), interpolation="bilinear", crop_pct=0.9))
    state = timm.create_model(name, **args).state_dict()
    for end in ("pos_embed", "cls_token", "head.weight", "gamma"):
        state |= {name: tensor * 10 for name, tensor in state.items() if name.endswith(end)}
    save_weights(path, state, WeightsMetadata(model=spec, step=7, samples_seen=70, ema=True, dtype="fp32"))
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_weights(tmp_path_factory.mktemp("weights") / "w.safetensors", **TINY)


@pytest.fixture(scope="module")
def exported_onnx(weights, tmp_path_factory):
    """With another operator set than torch's own, and an image of one's own that is not square."""
    folder = tmp_path_factory.mktemp("onnx") / "a" / "b"
    photograph = folder.parent.parent / "p.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8)).save(photograph)
    written = export_model(weights, folder, opset=18, dynamic_size=True, images=photograph)
    assert [(one.path, one.about, one.images) for one in written] == [(folder / "model.onnx", "opset 18", 1)]
    assert 0 <= written[0].difference < 1e-4
    return folder / "model.onnx"


def random_images(batch, height, width):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("batch, height, width", [(1, 32, 24), (5, 32, 24), (2, 16, 16), (1, 24, 160), (1, 160, 168)])
def test_an_onnx_file_takes_any_batch_and_size(weights, exported_onnx, batch, height, width):
    """Up to 420 patches: the model's own way cuts more than 80 into blocks."""
    images = random_images(batch, height, width)
    expected = load(weights, dynamic_img_size=True)(images).detach()
    assert expected.std() > 0.1
    session = onnxruntime.InferenceSession(exported_onnx, providers=["CPUExecutionProvider"])
    assert [one.shape for one in (*session.get_inputs(), *session.get_outputs())] == [
        ["batch", 3, "height", "width"], ["batch", 5]]
    found, = session.run(["logits"], {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=2e-5, rtol=0)


def test_an_onnx_file_tells_its_classes_and_preprocessing(weights, exported_onnx):
    model = onnx.load(exported_onnx)
    onnx.checker.check_model(model)
    assert [(one.domain, one.version) for one in model.opset_import if not one.domain] == [("", 18)]
    told = {one.key: one.value for one in model.metadata_props}
    assert told["interpolation"] == "bilinear" and told["crop_mode"] == "center" and told["form"] == "parallel"
    assert told["model_name"] == "vir_tiny_patch16_224"
    expected = {"classes": list(CLASSES), "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3], "input_size": list(SIZE),
                "crop_pct": 0.9, "step": 7, "ema": True, "weights_sha256": {weights.name: sha256(weights)}}
    assert {name: json.loads(told[name]) for name in expected} == expected


@pytest.mark.parametrize("new, old", [(3, 7), (7, 3), (5, 5), (2, 1), (14, 24)])
def test_positions_are_resampled_as_torch_resizes(new, old):
    expected = F.interpolate(torch.eye(old)[None, :, None], (1, new), mode="bicubic", antialias=True)[0, :, 0].T
    torch.testing.assert_close(resampling_weights(new, old), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name, more", [
    *((name, {"global_pool": pool}) for name in ("vir_tiny_patch16_224", "vir2d_tiny_patch16_224")
      for pool in ("token", "avg")),
    ("vir_tiny_patch16_224", {"distilled": True})])
def test_graphs_of_all_forms_have_the_logits_of_the_model(name, more):
    """As modules, before any exporter has seen them: retention_norm and no layer scale among them."""
    torch.manual_seed(0)
    args = {**TINY, **more, "retention_norm": "layernorm_gelu", "init_values": None}
    model = timm.create_model(name, dynamic_img_size=True, **args).eval()
    images = random_images(2, 32, 24)
    with torch.no_grad():
        expected = model(images)
        wider = random_images(2, 24, 48)
        assert expected.std() > 0.01
        for form, any_size, given in (("parallel", True, images), ("parallel", True, wider),
                                      ("recurrent", False, images)):
            runners = {graph.name: lambda *x, module=graph.module: _tuple(module(*x))
                       for graph in graphs(model, SIZE, form, any_size)}
            torch.testing.assert_close(logits_of(model, form, runners, given), model(given), atol=1e-5, rtol=0)


def _tuple(found):
    return found if isinstance(found, tuple) else (found,)


@pytest.mark.parametrize("name, patches, state", [
    ("vir_tiny_patch16_224", ["batch", 3, 8, 8], [1, "batch", 2, 8, 8]),
    ("vir2d_tiny_patch16_224", ["batch", 3, 8, 24], [1, "batch", 2, 3, 8, 8])])
def test_a_device_streams_with_a_state_of_one_size(tmp_path, name, patches, state):
    """By hand, from what the page says of the two files."""
    path = write_weights(tmp_path / "w.safetensors", name, **{**TINY, "depth": 1})
    written = export_model(path, tmp_path / "out", form="recurrent")
    assert [one.path.name for one in written] == ["step.onnx", "read.onnx"] and written[0].images == 3
    step, read = (onnxruntime.InferenceSession(one.path, providers=["CPUExecutionProvider"]) for one in written)
    assert [(one.name, one.shape) for one in step.get_inputs()] == [
        ("patches", patches), ("position", ["batch"]), ("state", state)]
    images = random_images(2, 32, 24).numpy()
    carried = np.zeros([2 if side == "batch" else side for side in state], dtype=np.float32)
    width = patches[3]
    parts = [images[:, :, top:top + 8, left:left + width] for top in range(0, 32, 8) for left in range(0, 24, width)]
    for number, part in enumerate(parts):
        carried, = step.run(["next_state"], {"patches": part, "position": np.array([number] * 2), "state": carried})
    found, = read.run(["logits"], {"state": carried})
    expected = load(path)(torch.from_numpy(images)).detach()
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=2e-5, rtol=0)


@pytest.fixture(scope="module")
def exported_program(tmp_path_factory):
    """Of a model that pools the mean, token by token, without a compiler."""
    folder = tmp_path_factory.mktemp("program")
    path = write_weights(folder / "w.safetensors", **{**TINY, "depth": 1, "global_pool": "avg"})
    (folder / "step.aoti.pt2").write_text("of another time")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "compiler", lambda: None)
        export_model(path, folder, to="torch_export", form="recurrent", force=True)
    return folder


def test_a_program_tells_what_it_is_and_gives_the_models_logits(exported_program):
    extra = {"vir.json": ""}
    step = torch.export.load(exported_program / "step.pt2", extra_files=extra).module()
    read = torch.export.load(exported_program / "read.pt2").module()
    told = json.loads(extra["vir.json"])
    assert (told["classes"], told["form"], told["step"]) == (list(CLASSES), "recurrent", 7)
    images, state, total = random_images(4, 32, 24), torch.zeros(1, 4, 2, 8, 8), torch.zeros(4, 16)
    parts = images.unfold(2, 8, 8).unfold(3, 8, 8).flatten(2, 3).unbind(2)  # [4, 3, 8, 8] each
    for number, part in enumerate(parts):
        state, total = step(part, torch.full((4,), number), state, total)
    found, = read(total)
    torch.testing.assert_close(found, load(exported_program / "w.safetensors")(images), atol=2e-5, rtol=0)


def test_without_a_compiler_there_are_programs_and_no_packages_of_another_time(exported_program):
    assert {path.name for path in exported_program.iterdir()} == {"w.safetensors", "step.pt2", "read.pt2"}


def test_a_package_is_compiled_of_the_program(tmp_path, capsys):
    path = write_weights(tmp_path / "w.safetensors", **{**TINY, "depth": 1})
    assert export.main([str(path), "--to", "torch_export", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    end = r"\d+\.\d MB; largest logit difference \S+ on 3 images\n"
    assert re.fullmatch(rf".*/model\.pt2: torch\.export program, {end}"
                        rf".*/model\.aoti\.pt2: AOTInductor package, {end}", said.out), said
    images = random_images(5, 32, 24)
    found = torch._inductor.aoti_load_package(str(tmp_path / "out" / "model.aoti.pt2"))(images)
    torch.testing.assert_close(found, load(path)(images).detach(), atol=2e-5, rtol=0)


def test_networks_without_retention_have_a_program_too():
    model = timm.create_model("test_resnet", num_classes=5).eval()
    graph, = graphs(model, (3, 32, 32), "parallel")
    images = random_images(5, 32, 32)
    torch.testing.assert_close(program.exported(graph).module()(images), model(images), atol=1e-5, rtol=0)


@pytest.mark.parametrize("made, said", [
    (RuntimeError("\ng++: no such flag\nmore"), "here (g++: no such flag); the programs are written"),
    (lambda images: (torch.zeros(len(images), 5),), "its logits differ from the model's by")])
def test_a_package_that_is_not_right_is_left_out_and_told(tmp_path, weights, monkeypatch, caplog, made, said):
    def compiled(path, given):
        path.write_text("half")
        if isinstance(made, Exception):
            raise made
        return made

    compare = export.Comparison(load(weights), "parallel", [random_images(3, 32, 24)], 3)
    monkeypatch.setattr(program, "compile_package", compiled)
    assert export._write_packages(tmp_path, {"model": None}, compare) == []
    assert list(tmp_path.iterdir()) == [] and said in caplog.text


@pytest.mark.parametrize("wrong", [0.001, float("nan")])
def test_a_graph_with_other_logits_leaves_nothing(tmp_path, weights, monkeypatch, wrong):
    model = load(weights)

    def saved(path, *rest):
        path.write_text("wrong")
        return 18

    monkeypatch.setattr(to_onnx, "save_onnx", saved)
    monkeypatch.setattr(program, "exported", lambda graph: None)
    monkeypatch.setattr(to_onnx, "load_onnx", lambda path: lambda images: (
        model(images) + wrong * (torch.arange(len(images))[:, None] == 2),))  # of the third image alone
    with pytest.raises(DataError, match=r"onnxruntime's logits differ from the model's by (0\.001|nan), more than "
                                        "0.0001; nothing is written"):
        export_model(weights, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name, args, how, said", [
    ("test_resnet", dict(num_classes=5), dict(dynamic_size=True), "--dynamic-size is of ViR models, and this is a Res"),
    ("test_resnet", dict(num_classes=5), dict(form="recurrent"), "--form recurrent is of ViR models"),
    ("vir_tiny_patch16_224", {**TINY, "global_pool": "max"}, dict(form="recurrent"), "global_pool is 'max'"),
    ("vir_tiny_patch16_224", {**TINY, "global_pool": ""}, dict(dynamic_size=True), "global_pool is ''"),
    ("vir_tiny_patch16_224", TINY, dict(to="hub"), "--to is 'hub'; choose onnx or torch_export, or call export_hub"),
    ("vir_tiny_patch16_224", TINY, dict(form="x"), "--form is 'x'; choose parallel or recurrent"),
    ("vir_tiny_patch16_224", TINY, dict(form="recurrent", dynamic_size=True), "leave out --form recurrent")])
def test_forms_that_a_model_has_not_are_refused(tmp_path, name, args, how, said):
    path = write_weights(tmp_path / "w.safetensors", name, **args)
    with pytest.raises(SettingsError, match=re.escape(said)):
        export_model(path, tmp_path / "out", **how)
    assert not (tmp_path / "out").exists()


def test_files_that_exist_are_replaced_by_force_alone(weights, exported_onnx):
    folder = exported_onnx.parent
    with pytest.raises(SettingsError, match=f"{folder} has model.onnx already; give another folder, or --force"):
        export_model(weights, folder)


def test_images_that_cannot_be_read_are_named(tmp_path, weights):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "none").mkdir()
    for given, said in (("broken.png", "broken.png: the image header is broken"), ("none", "none holds no images"),
                        ("nowhere.jpg", "nowhere.jpg'; give image files, folders of them or URLs"),
                        (".", "broken.png: the image")):
        with pytest.raises(DataError, match=re.escape(said)):
            export_model(weights, tmp_path / "out", images=tmp_path / given)


def test_pictures_and_weights_that_are_gone_are_told(tmp_path, weights, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(export, "_PHOTOGRAPHS", ("gone.jpg",))
        with pytest.raises(SettingsError, match="matplotlib has come without its pictures .*gone.jpg.*; give --images"):
            export_model(weights, tmp_path / "out")
    monkeypatch.setattr(export, "sha256", lambda path: Path("/no/such").read_text())
    with pytest.raises(DataError, match="w.safetensors cannot be read: .*; copy it again"):
        export_model(weights, tmp_path / "out")


def test_an_interrupted_export_leaves_nothing(tmp_path, weights, monkeypatch, capsys):
    def interrupted(folder, *rest):
        (folder / "model.onnx").write_text("half")
        raise cli.Interrupted(15)

    monkeypatch.setitem(export._WRITERS, "onnx", interrupted)
    assert export.main([str(weights), "--to", "onnx", str(tmp_path / "out")]) == 143
    assert capsys.readouterr().err == "vir-export: interrupted, nothing was written\n"
    assert list(tmp_path.iterdir()) == []


def test_a_library_that_is_missing_is_told_with_its_extra(tmp_path, weights, monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxruntime" else name)
    said = "--to onnx needs onnxruntime; install it: pip install 'vir-at-scale[export]'"
    with pytest.raises(SettingsError, match=re.escape(said)):
        export_model(weights, tmp_path / "out")


def test_an_operator_set_that_torch_cannot_reach_is_refused(tmp_path):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2), torch.nn.GELU())
    graph, = graphs(model, (3, 2, 2), "parallel")
    with pytest.raises(SettingsError, match=r"--opset 99: torch \S+ comes no nearer than \d+ with this model; give"):
        to_onnx.save_onnx(tmp_path / "m.onnx", program.exported(graph), graph, {}, 99)
    (tmp_path / "m.onnx").write_text("none")
    with pytest.raises(DataError, match="onnxruntime .* does not run m.onnx"):
        to_onnx.load_onnx(tmp_path / "m.onnx")


class Values(torch.nn.Module):
    def forward(self, images):
        return torch.linalg.svdvals(images)


def test_an_operator_that_onnx_has_not_is_told(tmp_path):
    graph, = graphs(Values(), (3, 2, 2), "parallel")
    with pytest.raises(SettingsError, match="torch translates no model of this model into ONNX: .*; take --to"):
        to_onnx.save_onnx(tmp_path / "m.onnx", program.exported(graph), graph, {})


class Branches(torch.nn.Module):
    def forward(self, images):
        return images if images.sum() > 0 else -images


def test_a_model_that_torch_cannot_trace_is_told():
    graph, = graphs(Branches(), (3, 2, 2), "parallel")
    with pytest.raises(SettingsError, match="torch.export cannot express model of this Branches"):
        program.exported(graph)


@pytest.mark.parametrize("more, said", [
    (["--to", "torch_export", "--opset", "18"], "--opset is of ONNX, not for --to torch_export; leave it out"),
    (["--to", "hub", "--opset", "18"], "--opset is not for --to hub"),
    (["--to", "onnx", "--opset", "0"], "--opset is 0; it must be at least 1"),
    (["--to", "onnx", "--evaluation", "r.json"], "--evaluation is for the model card of --to hub"),
    (["--to", "hub", "--dynamic-size"], "--dynamic-size is not for --to hub"),
    (["--to", "onnx", "--dynamic-size", "--form", "recurrent"], "--dynamic-size is of the parallel form")])
def test_flags_that_do_not_go_together_are_refused(capsys, more, said):
    """By the flags, or by the call that they are for."""
    try:
        code = export.main(["w.safetensors", "out", *more])
    except SystemExit as end:
        code = end.code
    assert code == 2 and said in capsys.readouterr().err


def test_a_folder_of_hugging_face_is_told_the_file_in_it(tmp_path, weights):
    export.export_hub(weights, tmp_path / "hub")
    said = re.escape(f"{tmp_path / 'hub'} is a folder; give the weights file in it: {tmp_path}/hub/model.safetensors")
    for call in (export.export_model, export.export_hub):
        with pytest.raises(SettingsError, match=said):
            call(tmp_path / "hub", tmp_path / "out")
        with pytest.raises(SettingsError, match=f"{tmp_path} is a folder; make a weights file of a run first"):
            call(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("ending", ["pt2", "onnx"])
def test_a_full_disk_is_told(tmp_path, ending):
    """Not by the end of the process, as torch's writer does it."""
    graph, = graphs(torch.nn.Flatten(), (3, 2, 2), "parallel")
    made, path = program.exported(graph), tmp_path / f"model.{ending}"
    path.symlink_to("/dev/full")
    with pytest.raises(DataError, match=f"cannot write model.{ending}: .*No space left on device; free some space or"):
        if ending == "pt2":
            program.save_program(path, made, {})
        else:
            to_onnx.save_onnx(path, made, graph, {})


def test_the_tool_is_the_program(tmp_path, monkeypatch, capsys):
    missing = tmp_path / "none.safetensors"
    monkeypatch.setattr(sys, "argv", ["export_model.py", str(missing), "--to", "onnx", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "tools" / "export_model.py"), run_name="__main__")
    assert end.value.code == 3 and re.match(f"vir-export: .*{missing}", capsys.readouterr().err)
