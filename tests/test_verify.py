"""Every kind of damage to a split is named, by shard, key and offset; a sound one passes; what is damaged is mended."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vir.data.convert import convert
from vir.data.damage import MAX_ALIKE, Finding
from vir.data.shards import ShardSample, read_index, read_manifest, write_shard, write_split
from vir.data.verify import repair_split, restore_index, split_folders, verify_split
from vir.errors import DataError, SettingsError
from vir.files import sha256

ROOT = Path(__file__).resolve().parent.parent
LONG = "n01_größe_" + "x" * 90
KEYS = ["n01_0", "n01_1", LONG, "n02_3", "n02_4", "n03_5", "n03_6", "n03_7"]  # the long one has extended tar headers
LABELS = [0, 0, 0, 1, 1, 2, 2, 2]
NAMES = ["s-000000.tar", "s-000001.tar", "s-000002.tar"]


def jpeg(number):
    file = BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (16 + number, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


IMAGES = [jpeg(number) for number in range(len(KEYS))]


def write(folder, split="train", keys=KEYS, labels=LABELS, cut=(4, 7)):
    folder.mkdir(parents=True)
    samples = [ShardSample(key, data, "jpg", 16, 16 + number, label, f"{key.partition('_')[0]}/{key}.JPEG")
               for number, (key, data, label) in enumerate(zip(keys, IMAGES, labels))]
    parts = [samples[:cut[0]], samples[cut[0]:cut[1]], samples[cut[1]:]]
    shards = [write_shard(folder / name, part) for name, part in zip(NAMES, parts)]
    write_split(folder, shards, name="s", split=split, classes=["n01", "n02", "n03"], seed=0, samples_per_shard=4)
    return folder


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return write(tmp_path_factory.mktemp("sound") / "shards" / "train")


@pytest.fixture()
def folder(sound, tmp_path):
    return Path(shutil.copytree(sound, tmp_path / "train"))


def flip(path, offset, bit=0):
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ (1 << bit)]))


def member(path, name):
    """By another reader of tars: where header and content of a member begin."""
    with tarfile.open(path) as tar:
        found = next(item for item in tar if item.name == name)
        return found.offset, found.offset_data, found.size


def edit_manifest(folder, edit):
    """As a knowing hand would: what the manifest says of itself is true again afterwards."""
    content = json.loads((folder / "manifest.json").read_text())
    edit(content)
    (folder / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="contradicts itself"):
        read_manifest(folder)
    from vir.data import shards
    manifest = shards._manifest_of(content)
    content.update(num_samples=manifest.num_samples, fingerprint=manifest.fingerprint)
    (folder / "manifest.json").write_text(json.dumps(content))


def edit_index(folder, edit, is_named=True):
    index = edit(read_index(folder).copy())
    text, before = (folder / "manifest.json").read_text(), sha256(folder / "index.npy")
    np.save(folder / "index.npy", index)
    if is_named:
        (folder / "manifest.json").write_text(text.replace(before, sha256(folder / "index.npy")))


def setting(field, row, value):
    def edit(index):
        index[field][row] = value
        return index
    return lambda folder: edit_index(folder, edit)


def found(folder, jobs=2):
    return [(finding.shard, finding.key, finding.offset, finding.what) for finding in verify_split(folder, jobs=jobs)]


def test_a_sound_split_has_no_findings(sound):
    assert verify_split(sound, jobs=1) == verify_split(sound, jobs=3) == []


def image_bit(folder):
    flip(folder / NAMES[1], member(folder / NAMES[1], "n03_5.jpg")[1] + 77)
    return NAMES[1], "n03_5", member(folder / NAMES[1], "n03_5.jpg")[1], r"the image's \d+ bytes are damaged: their CRC"


def header_bit(name, key, back=0, at=0):
    """A flip in the header of a member of the first shard; back: to its extended header."""
    def damage(folder):
        path = folder / NAMES[0]
        header = member(path, name)[0] if back == 0 else member(path, name)[1] - back
        flip(path, header + at)
        return NAMES[0], key, header, "damaged tar header: the checksum"
    return damage


def label_text(name, new, what):
    def damage(folder):
        _, offset, size = member(folder / NAMES[0], name)
        with open(folder / NAMES[0], "r+b") as file:
            file.seek(offset)
            old = file.read(size)
            file.seek(offset)
            file.write(new(old))
        return NAMES[0], name.partition(".")[0], offset, what
    return damage


def padding(folder):
    _, offset, size = member(folder / NAMES[0], "n01_1.cls")
    flip(folder / NAMES[0], offset + size + 9)
    return NAMES[0], "n01_1", offset + size + 9, "belong to no image .*padding after 'n01_1.cls' is not zero"


def end_of_tar(folder):
    size = (folder / NAMES[2]).stat().st_size
    flip(folder / NAMES[2], size - 5)
    return NAMES[2], None, size - 5, "belong to no image .*the end of the tar is not zero"


def quiet_header_bit(folder):
    """A leading zero of the checksum becomes a space: for tar, the same number."""
    header = member(folder / NAMES[0], "n01_1.json")[0]
    flip(folder / NAMES[0], header + 148, bit=4)
    return NAMES[0], "n01_1", header, "belong to no image .*the tar header of 'n01_1.json' is not as vir-convert"


def zeroed_header(folder):
    header, offset, _ = member(folder / NAMES[0], "n01_1.jpg")
    with open(folder / NAMES[0], "r+b") as file:
        file.seek(header)
        file.write(bytes(512))
    return NAMES[0], "n01_1", header, "zeros where a tar header belongs"


def missing(folder):
    (folder / NAMES[1]).unlink()
    return NAMES[1], None, None, "^missing$"


def extra(folder):
    shutil.copy(folder / NAMES[1], folder / "more.tar")
    return "more.tar", None, None, "^extra: the manifest does not name it"


def fifo(folder):
    (folder / NAMES[1]).unlink()
    os.mkfifo(folder / NAMES[1])
    return NAMES[1], None, None, "cannot be opened: it is no regular file"


def device(folder):
    (folder / NAMES[1]).unlink()
    (folder / NAMES[1]).symlink_to("/dev/zero")
    return NAMES[1], None, None, "cannot be opened: it is no regular file"


def duplicate_key(folder):
    offsets = read_index(folder)["offset"].tolist()
    setting("key", 6, b"n01_0")(folder)
    return "index.npy", "n01_0", None, rf"^row 6, {NAMES[1]}@{offsets[6]}: a duplicate key: .* {NAMES[0]}@{offsets[0]} has"


def label_out_of_range(folder):
    offset = read_index(folder)["offset"][5]
    setting("label", 5, 3)(folder)
    return "index.npy", "n03_5", None, f"^row 5, {NAMES[1]}@{offset}: label 3 is out of range: the manifest lists 3"


def overflowing_offset(folder):
    setting("offset", 1, (1 << 63) - 1)(folder)
    return "index.npy", "n01_1", None, r"^row 1, .*: its \d+ bytes are not all in the shard"


def broken_key(folder):
    setting("key", 3, b"n02_\xff")(folder)
    return "index.npy", "n02_\\xff", None, "^row 3, .*: the key is not UTF-8"


def index_bit(folder):
    flip(folder / "index.npy", (folder / "index.npy").stat().st_size - 200)
    return "index.npy", None, None, "^it is damaged or of another split: its sha256 is .*--repair makes it anew"


def index_of_another_split(folder):
    other = write(folder.parent / "val", "val", labels=[2, 1, 0, 1, 1, 2, 2, 2])
    shutil.copy(other / "index.npy", folder / "index.npy")
    return "index.npy", None, None, "^it is the index of another split, val: copy the right one"


def rows_of_another_shard(folder):
    setting("shard", 4, 0)(folder)
    return "index.npy", "n02_4", None, "^row 4, .*: it is in the place of another shard"


def fewer_rows(folder):
    edit_index(folder, lambda index: index[:-1])
    return "index.npy", None, None, "^it has 7 samples, the manifest says 8"


def no_index(folder):
    (folder / "index.npy").unlink()
    return "index.npy", None, None, "no such file: .*; --repair makes it anew"


def manifest_hash_edited(folder):
    edit_manifest(folder, lambda content: content["shards"][2].update(sha256="0" * 64))
    return NAMES[2], None, None, "images, labels, headers and padding are sound, so .* or the manifest was edited"


def manifest_size_edited(folder):
    path = folder / "manifest.json"
    size = (folder / NAMES[2]).stat().st_size
    path.write_text(path.read_text().replace(f'"bytes": {size}', '"bytes": 20480'))
    return NAMES[2], None, None, f"the manifest was edited: it says 20480 bytes, and the sha256 of this file of {size}"


def manifest_classes_edited(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"n01"', '"n09"'))
    return "manifest.json", None, None, "contradicts itself"


@pytest.mark.parametrize("damage", [
    image_bit,
    header_bit("n01_1.jpg", "n01_1", back=512),
    header_bit("n01_1.cls", "n01_1", back=512, at=126),
    header_bit("n01_1.json", "n01_1", back=512, at=100),
    header_bit("n01_0.jpg", "n01_0", back=512),
    header_bit("n02_3.json", "n02_3", back=512),
    header_bit(f"{LONG}.jpg", LONG, back=512),
    header_bit(f"{LONG}.jpg", LONG, back=1536, at=156),
    label_text("n02_3.cls", lambda old: b"2", "damaged label: the cls is b'2', the index says 1"),
    label_text("n02_3.cls", lambda old: b"q", "damaged label: the cls is b'q', the index says 1"),
    label_text("n02_3.json", lambda old: old.replace(b'"label": 1', b'"label": 3'), "json's label is 3, the index says 1"),
    label_text("n02_3.json", lambda old: old.replace(b'"width": 16', b'"width": 17'), "json's width is 17, the index"),
    label_text("n02_3.json", lambda old: b"[" + old[1:], "damaged label: the json is none"),
    label_text("n02_3.json", lambda old: old.replace(b"n02/", b"n03/"), "belong to no image .*'n02_3.json' is not as vir"),
    padding, end_of_tar, quiet_header_bit, zeroed_header, missing, extra, fifo, device, duplicate_key,
    label_out_of_range, overflowing_offset, broken_key, index_bit, index_of_another_split, rows_of_another_shard,
    fewer_rows, no_index, manifest_hash_edited, manifest_size_edited, manifest_classes_edited,
])
def test_one_damage_is_one_finding(folder, damage):
    shard, key, offset, what = damage(folder)
    (finding,) = verify_split(folder, jobs=2)
    assert (finding.shard, finding.key, finding.offset) == (shard, key, offset), str(finding)
    assert re.search(what, finding.what), str(finding)
    assert "\n" not in str(finding)
