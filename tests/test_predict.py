"""What vir-predict says of images: the same as timm's own preprocessing and the model give, whatever the form."""

import csv
import io
import json
import math
import os
import re
import socket
import time
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config

from support.forked import forked
from support.http_server import HttpServer
from vir import predict
from vir.data.decode import decode_image
from vir.data.strip_decoding import LooksDamagedError, open_strips
from vir.data.transforms import EvalTransform
from vir.errors import SettingsError
from vir.evaluation import labelling
from vir.export import export_hub
from vir.models import VisionRetention, load
from vir.weights.metadata import WeightsMetadata
from vir.weights.portable import save_weights
from vir.weights.spec import InputSpec, ModelSpec

ARGS = dict(img_size=28, patch_size=7, embed_dim=16, depth=2, num_heads=2, num_classes=7)
SPEC = ModelSpec(name="vir_tiny_patch16_224", args=ARGS, classes=tuple("abcdefg"), input=InputSpec(
    size=(3, 28, 28), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), interpolation="bicubic", crop_pct=0.875))
TIMM = dict(name="test_vit", args=dict(num_classes=7, img_size=28, patch_size=14))


def write_weights(path, **changed):
    """Random weights that tell images apart: all are large."""
    torch.manual_seed(0)
    spec = replace(SPEC, **changed)
    state = {name: value * 3 for name, value in timm.create_model(spec.name, **spec.args).state_dict().items()}
    save_weights(path, state, WeightsMetadata(model=spec, step=3, samples_seen=30, ema=False, dtype="fp32"))
    return path


def write_image(path, seed, size=(45, 36)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_weights(tmp_path_factory.mktemp("weights") / "w.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of every format, in the order in which they are told; others are no images, or hidden."""
    root = tmp_path_factory.mktemp("images") / "photos"
    names = ["10.jpg", "9.PNG", "b/a.webp", "b/c/x.gif", "b/z.bmp", "c.tif", "d.ppm"]
    for seed, name in enumerate(names):
        write_image(root / name, seed)
    (root / "notes.txt").write_text("no image")
    write_image(root / ".hidden.png", 9)
    write_image(root / ".cache" / "x.png", 9)
    (root / "b" / "back").symlink_to(root)  # not followed round and round
    return root, [str(root / name) for name in names]


@pytest.fixture
def said(weights, capsys):
    """What the program prints, and how it ends."""
    def run(*words, code=0):
        assert predict.main([str(weights), *map(str, words)]) == code
        return capsys.readouterr()

    return run


def lines_of(text):
    return [json.loads(line) for line in text.splitlines()]


def expected_of(model, name):
    """Probabilities by timm's transform of Pillow's images, which differ by a level of a pixel here and there."""
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    with torch.no_grad():
        return model(transform(Image.open(name).convert("RGB"))[None]).softmax(dim=1)[0]


@pytest.mark.parametrize("more", [[], ["--batch-size", "3", "--workers", "1"], ["--dtype", "bf16"]], ids=str)
def test_each_image_of_a_folder_gets_its_classes_in_order(said, weights, folder, more):
    root, names = folder
    found = lines_of(said(root, "--json", "--topk", "9", *more).out)
    assert [each["image"] for each in found] == names
    model = load(weights)
    for each in found:
        expected = expected_of(model, each["image"])
        told = {guess["class"]: guess["probability"] for guess in each["predictions"]}
        assert [guess["class"] for guess in each["predictions"]] == ["abcdefg"[guess["logit"]]
                                                                     for guess in each["predictions"]]
        assert list(told.values()) == sorted(told.values(), reverse=True) and len(told) == 7
        limit = 0.05 if "bf16" in more else 0.01
        assert all(abs(told[name] - float(p)) < limit for name, p in zip("abcdefg", expected))
    assert len({guess["class"] for each in found for guess in each["predictions"][:1]}) > 1, "images look alike"


def test_text_and_csv_say_what_json_says(said, folder):
    _, (first, second, *_) = folder
    expected = lines_of(said(second, first, "--topk", "2", "--json").out)
    rows = list(csv.reader(io.StringIO(said(second, first, "--topk", "2", "--csv").out)))
    assert rows[0] == ["image", "rank", "class", "probability", "description", "error"]
    assert rows[1:] == [[each["image"], str(rank), guess["class"], f"{guess['probability']:.6g}", "", ""]
                        for each in expected for rank, guess in enumerate(each["predictions"], 1)]
    text = "".join(f"{each['image']}\n" + "".join(f"{100 * guess['probability']:7.2f} %  {guess['class']}\n"
                                                  for guess in each["predictions"]) for each in expected)
    assert said(second, first, "--topk", "2").out == text


def test_flags_of_the_images_are_heeded(said, folder):
    name = folder[1][0]
    plain = said(name, "--json").out
    for flags in (["--crop-pct", "0.5"], ["--crop-mode", "squash"], ["--img-size", "42"]):
        assert said(name, "--json", *flags).out != plain


def test_an_image_that_cannot_be_read_is_named_and_the_others_go_on(said, tmp_path):
    good = [write_image(tmp_path / f"{seed}.png", seed) for seed in range(3)]
    (tmp_path / "0a.jpg").write_text("no image")
    (tmp_path / "0b.png").write_bytes(good[0].read_bytes()[:900])
    (tmp_path / "0c.png").symlink_to("gone")
    for flags in ([], ["--stream"], ["--batch-size", "1"]):
        done = said(tmp_path, "--json", *flags, code=3)
        found = {Path(each["image"]).name: each for each in lines_of(done.out)}
        assert list(found) == ["0.png", "0a.jpg", "0b.png", "0c.png", "1.png", "2.png"]
        assert [name for name, each in found.items() if "error" in each] == ["0a.jpg", "0b.png", "0c.png"]
        assert found["0a.jpg"]["error"] == ("neither JPEG, PNG, WebP, GIF, BMP, TIFF nor PPM: it begins with "
                                            "b'no image'")
        assert "does not decode" in found["0b.png"]["error"]
        assert found["0c.png"]["error"] == "it cannot be read: No such file or directory"
        for name in ("0a.jpg", "0b.png", "0c.png"):
            assert f"vir-predict: {tmp_path / name}: {found[name]['error']}" in done.err
        assert done.err.endswith("vir-predict: 3 of 6 images could not be read or have no answer; the others are "
                                 "done\n")
    rows = list(csv.reader(io.StringIO(said(tmp_path / "0c.png", "--csv", code=3).out)))
    assert rows[1:] == [[str(tmp_path / "0c.png"), "", "", "", "", found["0c.png"]["error"]]]


@pytest.mark.parametrize("flags", [[], ["--stream"]], ids=str)
def test_an_image_that_takes_too_much_memory_is_named_and_the_others_go_on(said, tmp_path, monkeypatch, flags):
    """Python's own lack of memory where it is read, and torch's where it is computed, or resized."""
    read, stream = labelling.read_picture, VisionRetention.forward_stream_features
    resized, too_much = EvalTransform.apply, 1 << 60

    def reading(name, timeout):
        if name.endswith("1.png"):
            raise MemoryError
        return read(name, timeout)

    def streaming(model, strips, size):
        return torch.empty(too_much) if size == (50, 50) else stream(model, strips, size)

    def resizing(transform, pixels, crop):
        return torch.empty(too_much) if pixels.shape[:2] == (50, 50) else resized(transform, pixels, crop)

    monkeypatch.setattr(labelling, "read_picture", reading)
    monkeypatch.setattr(labelling, "to_stream", reading)
    monkeypatch.setattr(VisionRetention, "forward_stream_features", streaming)
    monkeypatch.setattr(EvalTransform, "apply", resizing)
    for seed in range(4):
        write_image(tmp_path / f"{seed}.png", seed, (50, 50) if seed == 2 else (45, 36))
    done = said(tmp_path, "--json", "--features", tmp_path / "f.npz", *flags, code=3)
    assert [each.get("error", "").partition(" (")[0].partition(";")[0] for each in lines_of(done.out)] == [
        "", "it needs more memory than there is", "it needs more memory than there is", ""]
    assert "can't allocate memory" in lines_of(done.out)[2]["error"]
    assert [Path(name).name for name in np.load(tmp_path / "f.npz")["images"]] == ["0.png", "3.png"]


def test_names_of_classes_stay_in_their_line(tmp_path, folder, capsys):
    path = write_weights(tmp_path / "w.safetensors", classes=("a\nb", "\x1b[2J", *"cdefg"))
    assert predict.main([str(path), folder[1][0], "--topk", "7"]) == 0
    told = capsys.readouterr().out
    assert told.count("\n") == 8 and "\x1b" not in told
    assert " %  'a\\nb'\n" in told and " %  '\\x1b[2J'\n" in told


def test_a_model_of_timm_names_the_classes_of_its_folder(weights, folder, tmp_path, caplog):
    export_hub(weights, tmp_path / "hub")
    of_file, = labelling.predict_images(weights, folder[1][:1])
    model = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True)
    found, = labelling.predict_images(model.eval(), folder[1][:1])
    assert found.guesses == of_file.guesses and "name no classes" not in caplog.text
    other = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True, num_classes=3)
    found, = labelling.predict_images(other.eval(), folder[1][:1])
    assert {guess.name for guess in found.guesses} == set("012") and "name no classes" in caplog.text


def test_wnids_are_told_in_words(tmp_path, folder, capsys):
    wnids = ImageNetInfo().label_names()[:7]
    path = write_weights(tmp_path / "i.safetensors", classes=tuple(wnids))
    assert predict.main([str(path), folder[1][0], "--json", "--topk", "7"]) == 0
    guesses = lines_of(capsys.readouterr().out)[0]["predictions"]
    assert {(guess["class"], guess["description"]) for guess in guesses} >= {
        ("n01440764", "tench, Tinca tinca"), ("n01484850", "great white shark, white shark, man-eater, man-eating "
                                                           "shark, Carcharodon carcharias")}
    assert predict.main([str(path), folder[1][0], "--topk", "7"]) == 0
    assert " %  n01440764 tench, Tinca tinca\n" in capsys.readouterr().out


def test_weights_without_class_names_tell_numbers_and_say_so_once(tmp_path, folder, capsys, caplog):
    path = write_weights(tmp_path / "n.safetensors", classes=())
    assert predict.main([str(path), str(folder[0]), "--json"]) == 0
    assert all(guess["class"] == str(guess["logit"]) for each in lines_of(capsys.readouterr().out)
               for guess in each["predictions"])
    assert caplog.text.count("the weights name no classes: the numbers of the 7 logits, from 0 on, stand in") == 1


def test_strange_names_come_out_as_they_are(weights, tmp_path, capfdbinary):
    name = os.fsencode(tmp_path) + b"/new\nline, \xff.png"
    os.rename(write_image(tmp_path / "x.png", 1), name)
    outputs = {}
    for form in ("--json", "--csv", ""):
        assert predict.main([str(weights), str(tmp_path), "--topk", "1", "--features", str(tmp_path / "f.npz"),
                             "--force", *filter(None, [form])]) == 0
        outputs[form] = capfdbinary.readouterr().out
    assert os.fsencode(json.loads(outputs["--json"])["image"]) == name
    assert b'"' + name + b'",1,' in outputs["--csv"]
    assert outputs[""].count(b"\n") == 2 and b"new\\nline, \\udcff.png'" in outputs[""]
    with np.load(tmp_path / "f.npz") as file:
        assert [os.fsencode(each) for each in file["images"]] == [name]


# ---- features


@pytest.mark.parametrize("changed", [{}, dict(args=ARGS | {"global_pool": "avg"}), TIMM], ids=["token", "avg", "timm"])
def test_features_are_what_the_head_reads(tmp_path, folder, capsys, changed):
    path, file = write_weights(tmp_path / "w.safetensors", **changed), tmp_path / "f.npz"
    (tmp_path / "bad.png").write_text("no")
    assert predict.main([str(path), str(folder[0]), str(tmp_path / "bad.png"), "--json", "--features", str(file)]) == 3
    told = lines_of(capsys.readouterr().out)
    with np.load(file) as found:
        names, features = found["images"].tolist(), found["features"]
    assert names == folder[1] and features.dtype == np.float32
    model = load(path)
    logits = model.get_classifier()(torch.from_numpy(features)).detach()
    for each, probabilities in zip(told, logits.softmax(dim=1).tolist()):
        for guess in each["predictions"]:
            assert guess["probability"] == pytest.approx(probabilities[guess["logit"]], abs=1e-5)


def test_a_file_of_features_is_replaced_only_by_force_and_only_by_some(said, folder, tmp_path):
    file = tmp_path / "f.npz"
    file.write_text("precious")
    assert said(folder[1][0], "--features", file, code=2).err == (
        f"vir-predict: --features {file} exists; give another file, or --force to replace it\n")
    (tmp_path / "bad.png").write_text("no")
    assert f"no image could be read, so --features {file} is not written" in said(
        tmp_path / "bad.png", "--features", file, "--force", code=3).err
    assert file.read_text() == "precious" and len(list(tmp_path.iterdir())) == 2
    said(folder[1][0], "--features", file, "--force")
    assert np.load(file)["features"].shape == (1, 16)
    assert f"give --features {tmp_path / 'f.npz'}" in said(folder[1][0], "--features", tmp_path / "f.npy", code=2).err


# ---- servers


def test_images_of_servers_are_told_without_secrets(said, folder):
    _, (first, second, *_) = folder
    with HttpServer({"/a.jpg": Path(first).read_bytes(), "/b.png": Path(second).read_bytes()}) as server:
        urls = [server.url("/a.jpg", user="me:geheim"), server.url("/none.jpg"), server.url("/b.png")]
        for flags in ([], ["--stream"]):
            done = said(*urls, "--json", *flags, code=3)
            expected = lines_of(said(first, second, "--json", *flags).out)
            found = lines_of(done.out)
            assert [each["image"].rsplit("/")[-1] for each in found] == ["a.jpg", "none.jpg", "b.png"]
            for each, same in zip((found[0], found[2]), expected, strict=True):
                assert each["predictions"][0] == same["predictions"][0] | {
                    "probability": pytest.approx(same["predictions"][0]["probability"], abs=1e-5)}
            assert "geheim" not in done.out + done.err and "none.jpg" in found[1]["error"]


UNHEARD = """
import os, sys
from vir import predict
reader, pipe = os.pipe()
os.close(reader)
output = sys.argv.pop()
os.dup2(pipe if output == "pipe" else os.open(output, os.O_WRONLY), 1)
sys.exit(predict.command())
"""


@pytest.mark.launcher
@pytest.mark.parametrize("output", ["/dev/full", "pipe"])
def test_an_output_that_cannot_be_written_ends_it_though_threads_wait_for_a_server(weights, folder, output):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        done = forked("-c", UNHEARD, weights, folder[1][0], f"http://127.0.0.1:{silent.getsockname()[1]}/x.jpg",
                      "--batch-size", "1", "--workers", "2", "--timeout", "250", "--device", "cpu", output, ranks=1)
        assert time.monotonic() - began < 100
    assert done.returncode == 3 and "Traceback" not in done.stdout and "Exception ignored" not in done.stdout
    assert ("vir-predict: standard output cannot be written: No space left on device; free some space, or send it "
            "elsewhere\n" in done.stdout) == (output != "pipe"), done.stdout


# ---- what is refused at the door


def test_what_cannot_be_is_told_before_anything_is_loaded(said, tmp_path, weights, folder, capsys, monkeypatch):
    monkeypatch.setattr(labelling, "load_model", None)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "x.txt").touch()
    assert said(folder[0], tmp_path / "none.jpg", code=3).err == (
        f"vir-predict: there is no '{tmp_path}/none.jpg'; give image files, folders of them or URLs\n")
    assert said(tmp_path / "empty", code=3).err == (
        f"vir-predict: {tmp_path}/empty holds no images: files that end in .jpg .jpeg .png .webp .gif .bmp .tiff .ppm "
        ".tif .pbm .pgm .pnm; give another folder, or the files themselves\n")
    assert "is on no server that data is read from" in said("ftp://host/x.jpg", code=2).err
    assert "cannot be written: No such file or directory" in said(
        folder[0], "--features", tmp_path / "gone" / "f.npz", code=2).err


def test_weights_that_are_none_or_have_no_classifier_are_told(tmp_path, folder, capsys):
    def said(path, *flags):
        code = predict.main([str(path), folder[1][0], *flags])
        return code, capsys.readouterr().err

    assert said(tmp_path) == (2, f"vir-predict: WEIGHTS {tmp_path} is a folder; make a weights file of a run first: "
                                 f"vir-consolidate {tmp_path} --output {tmp_path.name}.safetensors\n")
    code, error = said(tmp_path / "none.safetensors")
    assert code == 3 and "no weights file at" in error
    headless = write_weights(tmp_path / "h.safetensors", classes=(), args=ARGS | {"num_classes": 0})
    code, error = said(headless)
    assert code == 2 and "this VisionRetention has no classifier; give weights that have one" in error
    timm_model = write_weights(tmp_path / "t.safetensors", **TIMM)
    assert said(timm_model, "--stream") == (2, "vir-predict: --stream is for ViR, whose retention is causal, not for "
                                               "VisionTransformer; leave it out\n")
    no_pool = write_weights(tmp_path / "p.safetensors", args=ARGS | {"global_pool": ""})
    code, error = said(no_pool, "--stream")
    assert code == 2 and "this model has global_pool=''; leave --stream out" in error


@pytest.mark.parametrize("asked, said", [
    (dict(topk=0), "--topk is 0; it must be at least 1"), (dict(batch_size=0), "--batch-size is 0; it must be"),
    (dict(workers=0), "--workers is 0; it must be at least 1"), (dict(img_size=0), "--img-size is 0; it must be"),
    (dict(crop_pct=1.5), "--crop-pct is 1.5; it must be in (0, 1]"), (dict(timeout=0.0), "--timeout is 0.0; it must"),
    (dict(timeout=math.inf), "--timeout is inf; it must be more than 0 seconds, and not infinite"),
    (dict(dtype="int8"), "--dtype is 'int8'; it must be one of fp32, bf16, fp16"),
    (dict(crop_mode="fit"), "--crop-mode is 'fit'; it must be one of center, squash, border"),
    (dict(stream=True, crop_pct=0.5), "--stream takes images at their own size; leave out --crop-pct")], ids=str)
def test_what_cannot_be_asked_is_told_by_the_program_and_the_call(capsys, asked, said):
    with pytest.raises(SettingsError, match=re.escape(said)):
        labelling.predict_images("w.safetensors", ["x.jpg"], **asked)
    flags = [f"--{name.replace('_', '-')}={value}".removesuffix("=True") for name, value in asked.items()]
    if asked.keys() & {"dtype", "crop_mode"}:
        with pytest.raises(SystemExit, match="2"):
            predict.main(["w.safetensors", "x.jpg", *flags])
    else:
        assert predict.main(["w.safetensors", "x.jpg", *flags]) == 2
        assert capsys.readouterr().err.startswith(f"vir-predict: {said}")


def test_a_model_answers_as_it_is_and_not_while_it_trains(weights):
    model = load(weights)
    for given in (dict(img_size=42), dict(dtype="bf16"), dict(device="cpu")):
        with pytest.raises(SettingsError, match=f"^{next(iter(given))} is for the model of a weights file, and a model "
                                                "is given; leave it out"):
            labelling.predict_images(model, ["x.jpg"], **given)
    with pytest.raises(SettingsError, match=r"in training mode.*; call model.eval\(\) first"):
        labelling.predict_images(model.train(), ["x.jpg"])


def test_logits_that_are_not_finite_are_no_answer(tmp_path, folder):
    model = load(write_weights(tmp_path / "w.safetensors"))
    torch.nn.init.constant_(model.head.bias, torch.inf)
    found = list(labelling.predict_images(model, folder[1][:1]))
    assert "its logits are not finite" in found[0].error and not found[0].guesses


# ---- streams


@pytest.mark.parametrize("changed", [{}, dict(args=ARGS | {"global_pool": "avg", "retention_dims": 2})],
                         ids=["token", "avg, 2-D"])
def test_a_stream_gives_the_logits_of_the_whole_image(tmp_path, monkeypatch, changed):
    """Of sizes that patches do not divide, and of one below a patch; by strips that patches do not divide."""
    monkeypatch.setattr("vir.data.strip_decoding._STRIP_PIXELS", 450)
    monkeypatch.setattr("vir.models.vision_retention.STREAM_TOKENS", 60)
    path = write_weights(tmp_path / "w.safetensors", **changed)
    names = [write_image(tmp_path / name, seed, size) for seed, (name, size) in enumerate([
        ("a.jpg", (95, 120)), ("b.png", (150, 40)), ("c.webp", (64, 65)), ("d.tif", (3, 5)), ("e.ppm", (28, 28))])]
    model = load(path, dynamic_img_size=True, dynamic_img_pad=True)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (SPEC.input.mean, SPEC.input.std))
    found = list(labelling.predict_images(path, [tmp_path / "a.jpg", *names[1:]], topk=7, stream=True, features=True))
    for name, prediction in zip(names, found, strict=True):
        pixels = np.array(Image.open(name).convert("RGB"))
        with torch.no_grad():
            tokens = model.forward_features(((torch.from_numpy(pixels).permute(2, 0, 1) / 255 - mean) / std)[None])
            logits, pooled = model.forward_head(tokens)[0], model.forward_head(tokens, pre_logits=True)[0]
        assert np.abs(prediction.features - pooled.numpy()).max() < 1e-5 * pooled.abs().max()
        streamed = model.head(torch.from_numpy(prediction.features))
        assert (streamed - logits).abs().max() < 1e-5 * logits.abs().max()
        for guess in prediction.guesses:
            assert guess.probability == pytest.approx(float(logits.softmax(dim=0)[guess.logit]), abs=1e-5)


def test_a_stream_of_a_file_that_only_looks_damaged_goes_on(weights, tmp_path):
    """Bytes between two scans of a progressive JPEG: libjpeg warns of them, and Pillow decodes the file."""
    path = tmp_path / "x.jpg"
    Image.open(write_image(tmp_path / "x.png", 1, (200, 300))).save(path, progressive=True)
    start, *scans = re.split(b"(?=\xff\xc4)", path.read_bytes())  # each begins with its table
    path.write_bytes(start + b"".join(scans[:-1]) + b"\1\2\3" + scans[-1])
    with pytest.raises(LooksDamagedError, match="extraneous bytes before marker"):
        with open_strips(path) as strips:
            list(strips.pixels)
    decode_image(path.read_bytes()).save(tmp_path / "y.png")
    found, expected = labelling.predict_images(weights, [path, tmp_path / "y.png"], stream=True)
    assert found.guesses == expected.guesses and found.guesses


WATCHED = """
import resource, sys
from pathlib import Path
from vir import predict
from vir.data.decode import decode_image
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
weights, low, high = sys.argv[1:]
assert predict.main([weights, low, "--stream", "--device", "cpu"]) == 0
at_first = peak()
assert predict.main([weights, high, "--stream", "--device", "cpu"]) == 0
streamed = peak()
decode_image(Path(high).read_bytes())
print("grown by", streamed - at_first, "and", peak() - streamed, "MB")
"""


@pytest.mark.launcher
@pytest.mark.parametrize("ending", ["jpg", "png"])
def test_a_stream_takes_no_memory_for_the_height_of_an_image(tmp_path, ending):
    """Of 18 and of 72 megapixels: 162 MB more as bytes and 648 MB more as the model's input. The first strips of a
    process take what later ones use again, up to 50 MB until all threads have had some."""
    weights = write_weights(tmp_path / "w.safetensors", args=ARGS | {"img_size": 128, "patch_size": 32})
    files = [tmp_path / f"{height}.{ending}" for height in (4500, 18000)]
    for file in files:
        image = Image.linear_gradient("L").resize((4000, int(file.stem))).convert("RGB")
        image.save(file, **({"compress_level": 1} if ending == "png" else {}))
    done = forked("-c", WATCHED, weights, *files, ranks=1)
    assert done.returncode == 0, done.stdout
    streamed, whole = map(int, re.findall(r"grown by (-?\d+) and (-?\d+) MB", done.stdout)[0])
    assert streamed < 80 < whole, done.stdout


# ---- as a library


def test_images_are_read_no_further_ahead_than_two_batches(weights, folder):
    """So that a folder of a million takes no memory."""
    asked = count()

    def endless():
        while True:
            next(asked)
            yield folder[1][0]

    found = labelling.predict_images(load(weights), endless(), batch_size=3, workers=2)
    for _ in range(7):
        assert next(found).guesses
    assert next(asked) <= 9 + 2 * 3
    found.close()


def test_a_model_that_was_not_made_to_stream_is_refused(weights, folder):
    with pytest.raises(SettingsError, match="make the model with dynamic_img_size=True and dynamic_img_pad=True"):
        labelling.predict_images(load(weights), folder[1], stream=True)
    assert isinstance(load(weights), VisionRetention)
