"""Tars, index and manifest: what other programs read in them, and which broken ones are refused."""

import hashlib
import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import zlib
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
import webdataset
from PIL import Image

from vir.data.shards import (
    INDEX_FIELDS,
    ShardSample,
    SkippedFile,
    read_index,
    read_manifest,
    sample_json,
    write_shard,
    write_split,
)
from vir.errors import DataError

KEYS = ["n01_1", "x" * 100, "größe_3", "n01_4"]  # the long and the non-ASCII one need extra tar headers


def jpeg(number):
    file = BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (8 + number, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def samples():
    return [ShardSample(key, jpeg(number), "jpg", 16, 8 + number, number % 2, f"n01/{number}.JPEG")
            for number, key in enumerate(KEYS)]


def write(folder):
    folder.mkdir()
    shards = [write_shard(folder / "s-train-000000.tar", samples()[:3]),
              write_shard(folder / "s-train-000001.tar", samples()[3:])]
    return write_split(folder, shards, name="s", split="train", classes=["a", "b"], seed=5, samples_per_shard=3,
                       skipped=[SkippedFile("n01/9.JPEG", "the file is empty")])


@pytest.fixture()
def folder(tmp_path):
    write(tmp_path / "train")
    return tmp_path / "train"


def test_gnu_tar_extracts_the_very_bytes(folder, tmp_path):
    names = subprocess.run(["tar", "tf", folder / "s-train-000000.tar"], check=True, capture_output=True, text=True,
                           env={"LC_ALL": "C.UTF-8", "PATH": "/usr/bin:/bin"}).stdout.split()
    assert names[:6] == ["n01_1.jpg", "n01_1.cls", "n01_1.json", *(f"{'x' * 100}.{e}" for e in ("jpg", "cls", "json"))]
    for shard in folder.glob("*.tar"):
        subprocess.run(["tar", "xf", shard, "-C", tmp_path], check=True)
    for sample in samples():
        assert (tmp_path / f"{sample.key}.jpg").read_bytes() == sample.data
        assert (tmp_path / f"{sample.key}.cls").read_text() == str(sample.label)
        assert json.loads((tmp_path / f"{sample.key}.json").read_text()) == {
            "filename": sample.filename, "height": sample.height, "label": sample.label, "width": sample.width}


def test_the_bytes_are_those_of_webdatasets_writer(folder, tmp_path):
    """Shards that were converted before, with it, and after have one fingerprint."""
    with open(tmp_path / "theirs.tar", "wb") as file, \
            webdataset.TarWriter(file, encoder=False, mtime=0, user="", group="") as tar:
        for sample in samples()[:3]:
            about = sample_json(sample.filename, sample.label, sample.width, sample.height)
            for member in ({"jpg": sample.data}, {"cls": str(sample.label).encode()}, {"json": about}):
                tar.write({"__key__": sample.key, **member})
    assert (tmp_path / "theirs.tar").read_bytes() == (folder / "s-train-000000.tar").read_bytes()


def test_webdataset_reads_the_samples(folder):
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    read = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("__key__", "jpg", "cls", "json"))
    assert [key for key, *_ in read] == KEYS
    for (_, image, label, info), sample in zip(read, samples()):
        assert image.size == (sample.width, sample.height) == (info["width"], info["height"])
        assert label == sample.label == info["label"]


def test_the_index_points_at_the_images(folder):
    index, manifest = read_index(folder), read_manifest(folder)
    for row, sample in zip(index, samples(), strict=True):
        shard = (folder / manifest.shards[row["shard"]].name).read_bytes()
        assert shard[row["offset"]:row["offset"] + row["size"]] == sample.data
        assert row["crc32"] == zlib.crc32(sample.data)
        assert (row["label"], row["width"], row["height"]) == (sample.label, sample.width, sample.height)
        assert row["key"].decode() == sample.key
    with tarfile.open(folder / "s-train-000000.tar") as tar:  # an independent opinion
        assert [m.offset_data for m in tar if m.name.endswith(".jpg")] == index["offset"][:3].tolist()


def test_the_manifest_tells_what_was_written(folder):
    manifest = read_manifest(folder)
    assert manifest.num_samples == 4 and manifest.classes == ("a", "b") and manifest.seed == 5
    assert manifest.skipped == (SkippedFile("n01/9.JPEG", "the file is empty"),)
    for shard, count in zip(manifest.shards, [3, 1], strict=True):
        content = (folder / shard.name).read_bytes()
        assert (shard.num_samples, shard.bytes) == (count, len(content))
        assert shard.sha256 == hashlib.sha256(content).hexdigest()
    assert sorted(path.name for path in folder.iterdir()) == [
        "index.npy", "manifest.json", "s-train-000000.tar", "s-train-000001.tar"]


def test_the_bytes_depend_on_the_content_alone(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("time.time", lambda: 1e9)
    again = tmp_path / "again"
    assert write(again) == read_manifest(folder)
    for path in folder.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name


def test_the_fingerprint_changes_with_shards_and_classes(folder, tmp_path):
    shard = write_shard(tmp_path / "s.tar", samples()[:2])
    settings = dict(name="s", split="t", seed=0, samples_per_shard=2, skipped=[])
    prints = {write_split(tmp_path, [shard], classes=["a", "b"], **settings).fingerprint,
              write_split(tmp_path, [shard], classes=["b", "a"], **settings).fingerprint,
              write_split(tmp_path, [shard, shard], classes=["a", "b"], **settings).fingerprint}
    assert len(prints) == 3
    assert write_split(tmp_path, [shard], classes=["a", "b"], **{**settings, "seed": 1}).fingerprint in prints


def change(**fields):
    def edit(folder):
        path = folder / "manifest.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return edit


@pytest.mark.parametrize("damage, message", [
    (change(format_version=3), r"manifest.json has format version 3, this code reads up to 2: update vir-at-scale"),
    (change(format_version=None), r"no manifest of shards \(format_version is None\)"),
    (change(num_samples=5), r"contradicts itself"),
    (change(classes=["b", "a"]), r"contradicts itself"),
    (change(split="val"), r"contradicts itself \(sample count, fingerprint or checksum\)"),
    (change(manifest_sha256="0" * 64), r"contradicts itself"),
    (change(format_version=1, seed=6), r"contradicts itself"),
    (change(shards=[{"name": "a"}]), r"is damaged \(TypeError"),
    (change(shards=[], num_samples=0), r"is damaged .*names no shards"),
    (lambda folder: (folder / "manifest.json").write_text('{"format_ver'), r"is not valid JSON"),
    (lambda folder: (folder / "manifest.json").write_text("[]"), r"no manifest of shards"),
    (lambda folder: (folder / "manifest.json").unlink(), r"train has an index.npy but no manifest.json; copy"),
])
def test_broken_manifests(folder, damage, message):
    damage(folder)
    with pytest.raises(DataError, match=message):
        read_manifest(folder)


def test_every_changed_byte_of_a_manifest_is_found(folder):
    """But for white space between the values: that is no value."""
    path = folder / "manifest.json"
    write_split(folder, [write_shard(folder / "s.tar", samples())], name="s", split="train", classes=["a", "b"], seed=5,
                samples_per_shard=4, conversion={"seed": 5, "changes": {"a PNG called JPEG": 3}, "quality": None})
    whole, before = path.read_bytes(), read_manifest(folder)
    for place, byte in enumerate(whole):
        for new in {byte ^ 1, byte ^ 16, byte ^ 32, ord("0"), ord(" ")} - {byte}:
            path.write_bytes(whole[:place] + bytes([new]) + whole[place + 1:])
            try:
                assert read_manifest(folder) == before and {chr(byte), chr(new)} <= set(" \n\t\r"), (place, chr(new))
            except DataError as error:
                assert "manifest.json" in str(error)


def test_version_1_had_no_checksum(folder):
    before = read_manifest(folder)
    content = json.loads((folder / "manifest.json").read_text())
    for key in ("fixed", "conversion", "manifest_sha256"):
        del content[key]
    (folder / "manifest.json").write_text(json.dumps({**content, "format_version": 1}))
    assert read_manifest(folder) == replace(before, format_version=1) and read_manifest(folder).is_converted
    (folder / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="is damaged .KeyError: 'manifest_sha256'"):
        read_manifest(folder)


def test_a_shard_name_cannot_leave_the_folder(folder):
    shards = json.loads((folder / "manifest.json").read_text())["shards"]
    shards[0]["name"] = "../" + shards[0]["name"]
    change(shards=shards)(folder)
    with pytest.raises(DataError, match="names shards outside its folder: '../s-train-000000.tar'"):
        read_manifest(folder)


def test_folders_that_are_not_a_split(folder, tmp_path):
    with pytest.raises(DataError, match=r"no such folder: .*gone; convert first: vir-convert --source SRC"):
        read_manifest(tmp_path / "gone")
    with pytest.raises(DataError, match=r"train has: give the folder of one split"):
        read_manifest(tmp_path)
    (tmp_path / "src/train/n01").mkdir(parents=True)
    with pytest.raises(DataError, match=r"looks like an ImageNet folder of 1 class folders \(n01, ...\): convert it "
                                        r"first: .*--source .*src --split train"):
        read_manifest(tmp_path / "src/train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty has no manifest.json: it is no converted split; convert first: vir"):
        read_manifest(tmp_path / "empty")
    with pytest.raises(DataError, match=r"index.npy is a file; give the folder of a converted split"):
        read_manifest(folder / "index.npy")
    (tmp_path / "val.partial").mkdir()
    with pytest.raises(DataError, match=r"no such folder: .*val; .*val.partial is there"):
        read_manifest(tmp_path / "val")


@pytest.mark.parametrize("names", [["ILSVRC2012_img_train.tar"],
                                   ["ILSVRC2012_devkit_t12.tar.gz", "ILSVRC2012_img_val.tar"]])
def test_archives_of_imagenet_are_to_be_converted(tmp_path, names):
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(DataError) as error:
        read_manifest(tmp_path)
    assert str(error.value).endswith(f"but no manifest.json: archives of ImageNet; convert them: vir-convert --source "
                                     f"{tmp_path} --split SPLIT --output SHARDS")


@pytest.mark.parametrize("names, said, way", [
    (["imagenet1k-train-0000.tar", "imagenet1k-train-0001.tar"], "2 tar files (imagenet1k-train-0000.tar, ...)", None),
    (["a.tar"], "1 tar file (a.tar)", None),
    (["a.tar.gz", "b.tgz"], "2 tar files (a.tar.gz, ...)",
     "they are compressed: unpack them (gunzip) to plain tars first")])
def test_tars_that_were_made_elsewhere_are_named_with_the_command_that_reads_them(tmp_path, names, said, way):
    folder = tmp_path / "train"
    (folder / "a folder.tar").mkdir(parents=True)
    for name in names:
        (folder / name).touch()
    with pytest.raises(DataError) as error:
        read_manifest(folder)
    assert str(error.value) == (
        f"{folder} holds {said} but no manifest.json: shards or archives made elsewhere; make the index of WebDataset "
        f"shards: {way or f'vir-index {folder}'}; convert other archives: vir-convert --source {folder} --split SPLIT "
        "--output SHARDS")


def test_archives_beside_what_was_unpacked_from_them_are_an_image_folder(tmp_path):
    for name in ("n01", "n02"):
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "train" / f"{name}.tar").touch()
    with pytest.raises(DataError, match="it looks like an ImageNet folder of 2 class folders"):
        read_manifest(tmp_path / "train")


@pytest.mark.parametrize("damage, message", [
    (lambda path: path.unlink(), "no such file: .*index.npy"),
    (lambda path: path.write_bytes(path.read_bytes()[:-1]), "index.npy is damaged"),
    (lambda path: path.write_bytes(b""), "index.npy is damaged"),
    (lambda path: np.save(path, np.zeros(4)), "is no index of shards"),
    (lambda path: np.save(path, np.array([{}]), allow_pickle=True), "is no index of shards .its type is object"),
    (lambda path: path.write_bytes(pickle.dumps([1, 2])), "index.npy is damaged"),
    (lambda path: path.write_bytes(np.random.default_rng(0).bytes(5000)), "index.npy is damaged"),
    (lambda path: path.write_bytes(b"\x93NUMPY\x01\x00" + bytes(500)), "index.npy is damaged"),
    (lambda path: path.write_bytes(b"\x93NUMPY\x03\x00" + bytes(500)), "damaged .a header of version 3.0"),
    (lambda path: write_npy(path, "(" * 9000), "index.npy is damaged"),
    (lambda path: write_npy(path, "-" * 9000 + "1"), "index.npy is damaged"),
    (lambda path: write_npy(path, "{'descr': '<i4', 'fortran_order': False, 'shape': (1,)}" + " " * 20000), "damaged"),
    (lambda path: write_npy(path, header(shape=f"({10 ** 18},)")), r"is no index of shards .*, its shape .1000"),
    (lambda path: write_npy(path, header(shape=f"({10 ** 14},)")), r"it has \d+ bytes, its header asks for 4100"),
    (lambda path: write_npy(path, header(shape=f"({'9' * 4000},)")), "is no index of shards"),
    (lambda path: write_npy(path, header(shape="(-1,)")), "is no index of shards"),
    (lambda path: write_npy(path, header(shape="()")), "is no index of shards"),
    (lambda path: write_npy(path, header(shape="(0,)")) or os.truncate(path, 1 << 33), "it has 8589934592 bytes"),
    (lambda path: write_npy(path, header(key="S2000000000", shape="(0,)")), "is no index of shards"),
    (lambda path: write_npy(path, header(key="U5", shape="(0,)")), "is no index of shards"),
    (lambda path: write_npy(path, header(key="O", shape="(0,)")), "is no index of shards"),
    (lambda path: write_npy(path, header(shape="(0,)").replace("<i8", ">i8")), "is no index of shards"),
    (lambda path: np.savez(path.with_suffix(""), a=np.zeros(3)) or os.replace(f"{path.with_suffix('')}.npz", path),
     "index.npy is damaged"),
    (lambda path: (path.unlink(), os.mkfifo(path)), "cannot read .*index.npy: it is no regular file"),
    (lambda path: (path.unlink(), path.symlink_to("/dev/zero")), "cannot read .*index.npy: it is no regular file"),
    (lambda path: (path.unlink(), path.mkdir()), "cannot read .*index.npy: it is no regular file"),
])
def test_broken_indexes(folder, damage, message):
    damage(folder / "index.npy")
    with pytest.raises(DataError, match=message) as error:
        read_index(folder)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000


def header(key="S5", shape="(1,)"):
    """Of a .npy file, as text."""
    return str({"descr": [*INDEX_FIELDS, ("key", f"|{key}")], "fortran_order": False, "shape": 0}).replace(
        "'shape': 0", f"'shape': {shape}")


def write_npy(path, header):
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode())


def test_an_index_without_rows_can_be_read(folder):
    write_npy(folder / "index.npy", header(shape="(0,)"))
    assert len(read_index(folder)) == 0


def names(*names):
    """Other names for the shards, in a manifest that fits itself."""
    def edit(folder):
        shards = json.loads((folder / "manifest.json").read_text())["shards"]
        change(shards=[{**shard, "name": name} for shard, name in zip(shards, names)])(folder)
    return edit


def numbers(**fields):
    def edit(folder):
        shards = json.loads((folder / "manifest.json").read_text())["shards"]
        change(shards=[{**shards[0], **fields}, shards[1]])(folder)
    return edit


def text(content):
    return lambda folder: (folder / "manifest.json").write_text(content)


def other_file(make):
    def damage(folder):
        (folder / "manifest.json").unlink()
        make(folder / "manifest.json")
    return damage


@pytest.mark.parametrize("damage, message", [
    (text("[" * 1_000_000), "is not valid JSON"),
    (text('{"format_version": ' + "[" * 1_000_000), "is not valid JSON"),
    (text('{"format_version": 2, "seed": ' + "9" * 5000 + "}"), "is not valid JSON"),
    (text('{"format_version": 1e999}'), "no manifest of shards .format_version is inf"),
    (text('{"format_version": true}'), "no manifest of shards .format_version is True"),
    (lambda folder: (folder / "manifest.json").write_bytes(b"\xff\xfe\x00"), "is not valid JSON"),
    (names(7, "b"), "is damaged .ValueError: '7' where a name belongs"),
    (names("a\0b", "b"), "where a name belongs"),
    (names("", "b"), "where a name belongs"),
    (names("a\ud800", "b"), "where a name belongs"),
    (names(["a"], "b"), "where a name belongs"),
    (names("..", "b"), r"names shards outside its folder: '\.\.'"),
    (names(".", "b"), r"names shards outside its folder: '\.'"),
    (names("/etc/passwd", "b"), "names shards outside its folder: '/etc/passwd'"),
    (names("a/b", "b"), "names shards outside its folder: 'a/b'"),
    (names("b", "b"), "names the shard 'b' 2 times"),
    (numbers(num_samples=-1), "-1 where a count belongs"),
    (numbers(num_samples=10 ** 30), "1000000000000000000000000000000 where a count belongs"),
    (numbers(bytes=1.5), "1.5 where a count belongs"),
    (numbers(bytes=True), "True where a count belongs"),
    (numbers(sha256="0" * 63), "where a sha256 belongs"),
    (numbers(sha256=5), "'5' where a sha256 belongs"),
    (change(classes=[1, 2]), "'1' where a name belongs"),
    (change(classes="ab"), "classes is no list"),
    (change(classes={"a": 1}), "classes is no list"),
    (change(shards={}), "shards is no list"),
    (change(shards=[1]), "is damaged .TypeError"),
    (change(conversion=[1]), "conversion is"),
    (change(skipped=None), "skipped is no list"),
    (change(samples_per_shard="3"), "3 where a count belongs"),
    (other_file(os.mkfifo), "cannot read .*manifest.json: it is no regular file"),
    (other_file(lambda path: path.symlink_to("/dev/zero")), "cannot read .*manifest.json: it is no regular file"),
    (other_file(lambda path: path.mkdir()), "cannot read .*manifest.json: it is no regular file"),
    (other_file(lambda path: path.symlink_to(path)), "cannot read .*manifest.json: Too many levels"),
    (lambda folder: os.truncate(folder / "manifest.json", 300 << 20), "cannot read .*it has 314572800 bytes, more "),
])
def test_hostile_manifests_are_refused_by_a_sentence(folder, damage, message):
    damage(folder)
    with pytest.raises(DataError, match=message) as error:
        read_manifest(folder)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000


def test_reading_needs_neither_webdataset_nor_torch():
    code = "import sys, vir.data.reader; print([m for m in ('webdataset', 'torch') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True,
                          env=None).stdout == "[]\n"
