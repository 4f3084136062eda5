"""An image folder gives what the shards give that are made of it: the same keys, labels, bytes, in the same order."""

import io
import os
import pickle
import re
import shutil
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from support.imagenet import jpeg
from vir import files
from vir.config import AugmentConfig
from vir.data.convert import convert
from vir.data.decode import BadSampleError, decode_image
from vir.data.folder_reader import FolderReader
from vir.data.loader import train_batches
from vir.data.order import SampleOrder
from vir.data.reader import ShardReader
from vir.data.sources import reading
from vir.errors import DataError
from vir.weights.spec import InputSpec

torch.set_num_threads(1)
CLASSES = [f"n{number:02d}" for number in range(12)]
IMAGES = 2300  # three shards by default


def encode(kind, seed):
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return file.getvalue()


def write(root, images):
    for name, data in images.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """train: 12 classes of different sizes, of all formats, with names whose keys collide; val: 4 of the classes."""
    root = tmp_path_factory.mktemp("source")
    train = {f"{name}/{name}_{number}.JPEG": jpeg(f"{name} {number}")
             for label, name in enumerate(CLASSES) for number in range(50 + 25 * label)}
    odd = {"n01/1.jpg": jpeg("a"), "n01/1.png": encode("PNG", 1), "n01/1.x.webp": encode("WEBP", 2),
           "n01/1_x.JPG": jpeg("b"), "n03/a b ä.png": encode("PNG", 3), "n04/really a png.JPEG": encode("PNG", 4)}
    left = IMAGES - len(train) - len(odd)
    write(root / "train", {**train, **odd, **{f"n00/more_{number}.jpeg": jpeg(f"m{number}") for number in range(left)}})
    (root / "train/n01/notes.txt").touch()
    write(root / "val", {f"{name}/ILSVRC2012_val_{number:08d}.JPEG": jpeg(f"v {name} {number}")
                         for name in CLASSES[1::3] for number in range(5)})
    return root


@pytest.fixture(scope="module")
def shards(source, tmp_path_factory):
    output = tmp_path_factory.mktemp("shards")
    for split in ("train", "val"):
        convert(source, split, output, workers=2)
    return output


@pytest.fixture()
def small(tmp_path):
    images = {f"{name}/{number}.jpg": jpeg(f"{name} {number}") for name in "ab" for number in range(4)}
    write(tmp_path / "train", images)
    return tmp_path / "train"


@pytest.mark.parametrize("split", ["train", "val"])
def test_samples_are_those_of_the_shards(source, shards, split):
    folder, converted = FolderReader(source / split), ShardReader(shards / split)
    assert folder.shard_sizes == converted.shard_sizes and len(folder.shard_sizes) == {"train": 3, "val": 1}[split]
    assert len(folder) == len(converted) == sum(folder.shard_sizes)
    assert folder.classes == converted.classes == tuple(CLASSES)
    assert folder.labels.tolist() == converted.labels.tolist()
    assert folder.labels.dtype == np.int32 and not folder.labels.flags.writeable
    for i in range(len(converted)):
        assert (folder.key(i), folder.read(i)) == (converted.key(i), converted.read(i))
        path = Path(folder.name, folder.where(i))
        assert Path(path).read_bytes() == folder.read(i)
        assert Path(path).parent.name == folder.classes[folder.labels[i]]


def test_epochs_are_the_same_sequence(source, shards):
    readers = FolderReader(source / "train"), ShardReader(shards / "train")
    orders = [SampleOrder(7, reader.shard_sizes, 2, 300) for reader in readers]
    for first in range(0, 3 * IMAGES, 700):
        keys = [[reader.key(i) for i in order.samples(order.global_batch(first, 700)).tolist()]
                for reader, order in zip(readers, orders)]
        assert keys[0] == keys[1]


def test_substitutes_are_the_same(source, shards):
    readers = FolderReader(source / "train"), ShardReader(shards / "train")
    for i in (0, 766, 767, IMAGES - 1):
        assert list(readers[0].substitutes(i)) == list(readers[1].substitutes(i))


def test_batches_have_the_same_pixels(source, shards):
    batches = []
    for reader in (FolderReader(source / "train"), ShardReader(shards / "train")):
        order = SampleOrder(7, reader.shard_sizes, 2, 300)
        loader = train_batches(reader, order, AugmentConfig(), InputSpec(
            size=(3, 16, 16), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear", crop_pct=1.0),
            seed=7, first_step=70, last_step=74, global_batch_size=32, micro_batch_size=16, rank=0, world_size=1,
            workers=2, prefetch=2, device=torch.device("cpu"))  # an epoch ends within
        batches.append([(batch.images, batch.labels, batch.positions) for batch in loader])
        loader.close()
    assert len(batches[0]) == 8
    assert all(torch.equal(a, b) for two in zip(*batches) for a, b in zip(*two))


def test_the_fingerprint_tells_names_and_classes_not_places(small, tmp_path):
    first = FolderReader(small).fingerprint
    shutil.copytree(small, tmp_path / "elsewhere" / "train")
    assert FolderReader(tmp_path / "elsewhere" / "train").fingerprint == first
    (small / "a/3.jpg").rename(small / "a/33.jpg")
    renamed = FolderReader(small).fingerprint
    (small / "b").rename(small / "c")
    assert len({first, renamed, FolderReader(small).fingerprint}) == 3


def test_threads_and_pickled_copies_read_the_same(small):
    reader = FolderReader(small)
    expected = [reader.read(i) for i in range(8)]
    copy = pickle.loads(pickle.dumps(reader))
    assert copy.fingerprint == reader.fingerprint and copy.name == reader.name == str(small)
    assert copy.labels.tolist() == reader.labels.tolist()
    found = [[] for _ in range(4)]
    threads = [threading.Thread(target=lambda into: into.extend(copy.read(i) for _ in range(20) for i in range(8)),
                                args=(into,)) for into in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert found == [expected * 20] * 4


def test_no_descriptor_stays_open(small):
    reader = FolderReader(small)
    before = len(os.listdir("/proc/self/fd"))
    (small / "a/0.jpg").unlink()
    for i in range(8):
        try:
            reader.read(i)
        except DataError:
            pass
    assert len(os.listdir("/proc/self/fd")) == before


# ---- files that fail


def at(reader, name):
    return next(i for i in range(len(reader)) if reader.where(i).endswith(name))


@pytest.mark.parametrize("data, message", [
    (b"", "the file is empty"), (b"\xff\xd8\xff but no more", "the image header is broken"),
    (b"<html>", "neither JPEG, PNG nor WebP"), (encode("JPEG", 5)[:-30], "the image does not decode")])
def test_a_broken_image_is_bad_by_itself(small, data, message):
    (small / "b/2.jpg").write_bytes(data)
    reader = FolderReader(small)
    with pytest.raises(BadSampleError, match=message):
        decode_image(reader.read(at(reader, "b/2.jpg")))


def test_a_huge_file_is_bad_and_not_read(small, monkeypatch):
    monkeypatch.setattr(files, "pread", None)
    with open(small / "b/2.jpg", "wb") as file:
        file.truncate(reading.MAX_IMAGE_BYTES + 1)
    reader = FolderReader(small)
    with pytest.raises(BadSampleError, match="it has 268435457 bytes, more than the 268435456 that it may have"):
        reader.read(at(reader, "b/2.jpg"))


def test_a_file_that_has_gone_is_named_with_the_way_out(small, monkeypatch):
    reader = FolderReader(small)
    i = at(reader, "a/1.jpg")
    monkeypatch.setattr(time, "sleep", None)  # no attempt more, as none would help
    (small / "a/1.jpg").unlink()
    with pytest.raises(DataError, match=re.escape(
            f"cannot read {small / 'a/1.jpg'}: No such file or directory; the folder was listed with it: make the file "
            "readable or put it back, or start a new run, which lists the folder again")) as found:
        reader.read(i)
    assert not isinstance(found.value, BadSampleError)  # no other image may silently take its place


def test_a_pipe_in_the_place_of_a_file_does_not_block(small):
    (small / "a/1.jpg").unlink()
    os.mkfifo(small / "a/1.jpg")
    reader = FolderReader(small)
    with pytest.raises(DataError, match="a/1.jpg: it is no regular file; the folder was listed with it"):
        reader.read(at(reader, "a/1.jpg"))


def test_a_folder_that_has_gone_is_the_disk(small):
    reader = FolderReader(small)
    small.rename(small.with_name("moved"))
    with pytest.raises(DataError, match="and its folder is gone: is the disk still mounted"):
        reader.read(0)


def test_reads_that_fail_are_tried_again(small, monkeypatch):
    monkeypatch.setattr(files, "RETRY_WAITS_S", (0, 0, 0))
    reader, good, failures = FolderReader(small), os.pread, []

    def broken(*args):
        if failures:
            raise failures.pop()
        return good(*args)

    monkeypatch.setattr(os, "pread", broken)
    failures += [OSError(5, "Input/output error")] * 3
    assert reader.read(0) and not failures
    failures += [OSError(5, "Input/output error")] * 4
    with pytest.raises(DataError, match=r"/\d\.jpg: Input/output error, after 4 attempts; check the disk"):
        reader.read(0)


# ---- folders that are refused


@pytest.mark.parametrize("images, message", [
    ({"1.jpg": b""}, "has no class folders; expected"), ({"a/1.txt": b""}, "class folders without images in .*: 'a'"),
    ({f"a/{'x' * 120}.jpg": b""}, "makes a key of 122 bytes, the limit is 100; rename the file")])
def test_a_folder_of_something_else_is_refused(tmp_path, images, message):
    write(tmp_path / "train", images)
    with pytest.raises(DataError, match=message):
        FolderReader(tmp_path / "train")


def test_no_folder_at_all(tmp_path):
    with pytest.raises(DataError, match="cannot list .*/nothing: No such file or directory"):
        FolderReader(tmp_path / "nothing")


def test_a_class_that_train_lacks_is_refused(small):
    write(small.with_name("val"), {"a/1.jpg": b"", "z/1.jpg": b""})
    with pytest.raises(DataError, match="val has class folders that .*/train beside it lacks: 'z'; the labels come "
                                        "from there: move them away, or give both the same classes"):
        FolderReader(small.with_name("val"))


def test_a_sample_takes_its_name_and_less_than_20_bytes(tmp_path):
    count = 4000
    for name in ("n00", "n01"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for number in range(count // 2):
            (tmp_path / "train" / name / f"{name}_{number:05d}.jpg").touch()
    FolderReader(tmp_path / "train")  # what the first use of a library takes
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    reader = FolderReader(tmp_path / "train")
    taken = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert len(reader) == count and taken < (len("n00_00000.jpg") + 20) * count, taken / count
