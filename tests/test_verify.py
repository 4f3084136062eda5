"""Every kind of damage to a split is named, by shard, key and offset; a sound one passes; what is damaged is mended."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import zlib
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from support.manifests import edit_manifest, name_index
from vir import verify as verify_module
from vir.data.convert import convert
from vir.data.damage import MAX_ALIKE, Finding, damaged_structure
from vir.data.executors import Stopped
from vir.data.foreign import index_shards
from vir.data.shards import (
    ShardInfo,
    ShardSample,
    index_dtype,
    read_index,
    read_manifest,
    write_shard,
    write_split,
)
from vir.data.verify import repair_split, restore_index, split_folders, verify_split
from vir.errors import DataError, SettingsError
from vir.files import open_regular, sha256
from vir.verify import main

ROOT = Path(__file__).resolve().parent.parent
LONG = "n01_größe_" + "x" * 80
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


def edit_index(folder, edit, is_named=True):
    index = edit(read_index(folder).copy())
    np.save(folder / "index.npy", index)
    if is_named:
        name_index(folder)


def setting(field, row, value):
    def edit(index):
        index[field][row] = value
        return index
    return lambda folder: edit_index(folder, edit)


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
    return "index.npy", "n01_0", None, (
        rf"^row 6, {NAMES[1]}@{offsets[6]}: a duplicate key: the sample at {NAMES[0]}@{offsets[0]} has it too")


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
    size = (folder / NAMES[2]).stat().st_size
    edit_manifest(folder, lambda content: content["shards"][2].update(bytes=20480))
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
    label_text("n02_3.json", lambda old: old.replace(b'"label": 1', b'"label": 3'), "json's label is 3, the index"),
    label_text("n02_3.json", lambda old: old.replace(b'"width": 16', b'"width": 17'), "json's width is 17, the index"),
    label_text("n02_3.json", lambda old: b"[" + old[1:], "damaged label: the json is none"),
    *[label_text("n02_3.json", lambda old, pair=pair: old.replace(*pair), "belong to no image .*'n02_3.json' is not as")
      for pair in [(b"n02/", b"n03/"), (b"JPEG", b"JPEF"), (b"JPEG", b"JpEG"), (b"/n02_3", b"/n02\x7f3"),
                   (b"n02_3.J", b"n02_2.J"), (b"filename", b"fi,ename"), (b"height", b"hdight"), (b", ", b",\t")]],
    label_text(f"{LONG}.json", lambda old: old.replace(b"e_x", b"e\x7fx"), "belong to no image .*json' is not as"),
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


def test_any_flipped_bit_of_a_shard_is_found_near_its_place(folder):
    path, index = folder / NAMES[0], read_index(folder)
    starts = [*index["offset"][:4].tolist(), path.stat().st_size]
    whole = path.read_bytes()
    for place, bit in zip(np.random.default_rng(5).integers(0, len(whole), 150).tolist(), [*range(8)] * 20):
        flip(path, place, bit)
        findings = verify_split(folder, jobs=1)
        assert findings and all(finding.shard == NAMES[0] for finding in findings), place
        assert len(findings) == 1, (place, bit, list(map(str, findings)))
        (finding,) = findings
        # At most two blocks after it: a name in an extended header is told of its member.
        assert finding.offset is not None and finding.offset <= place + 1024, (place, bit, str(finding))
        assert finding.offset >= max([start for start in starts if start <= place], default=0), (place, str(finding))
        path.write_bytes(whole)


@pytest.mark.parametrize("first_lost, what", [
    (0, "^cut off: 4 images, from this one on, lie beyond the end of the file"), (1, "^cut off: 3 images"),
    (3, "^cut off: 1 image, this one, lies"), (4, "")])
def test_a_truncated_shard(folder, first_lost, what):
    path = folder / NAMES[0]
    whole, last = path.stat().st_size, read_index(folder)[max(first_lost - 1, 0)]
    size = int(last["offset"] + last["size"]) if first_lost else 100
    os.truncate(path, size)
    first, *others = verify_split(folder, jobs=1)
    assert first == Finding(NAMES[0], None, size, f"truncated: it has {size} bytes, the manifest says {whole}")
    assert len(others) == (first_lost < 4)
    for finding in others:
        assert finding.key == KEYS[first_lost] and re.search(what, finding.what)
        assert finding.offset == read_index(folder)["offset"][first_lost]
    with open(path, "ab") as file:
        file.write(bytes(whole - size + 7))
    assert verify_split(folder, jobs=1)[0].what == f"too long: it has {whole + 7} bytes, the manifest says {whole}"


def test_swapped_shards_are_told_apart(folder):
    os.rename(folder / NAMES[0], folder / "x")
    os.rename(folder / NAMES[1], folder / NAMES[0])
    os.rename(folder / "x", folder / NAMES[1])
    assert [str(finding) for finding in verify_split(folder, jobs=2) if "swapped" in finding.what] == [
        f"{NAMES[0]}: swapped: it holds the bytes of {NAMES[1]}",
        f"{NAMES[1]}: swapped: it holds the bytes of {NAMES[0]}"]


def test_all_damages_are_reported_in_the_order_of_the_shards(folder):
    offsets = read_index(folder)["offset"].tolist()
    for i in (0, 3):
        flip(folder / NAMES[0], offsets[i] + 30)
    flip(folder / NAMES[0], member(folder / NAMES[0], "n01_1.cls")[0])
    extra(folder), missing(folder)
    flip(folder / NAMES[2], offsets[7] + 30)
    assert [(finding.shard, finding.key) for finding in verify_split(folder, jobs=3)] == [
        ("more.tar", None), (NAMES[0], "n01_0"), (NAMES[0], "n02_3"), (NAMES[0], "n01_1"), (NAMES[1], None),
        (NAMES[2], "n03_7")]


def test_a_damaged_shard_beside_a_damaged_index_is_still_named(folder):
    flip(folder / NAMES[0], read_index(folder)["offset"][1] + 30)
    flip(folder / NAMES[1], 5)
    index_bit(folder)
    of_index, first, second = verify_split(folder, jobs=1)
    assert of_index.shard == "index.npy"
    assert first.shard == NAMES[0] and "cannot be said, because the index is damaged too" in first.what
    assert (second.shard, second.offset) == (NAMES[1], 0) and "damaged tar header" in second.what


def without_checksums(folder):
    edit_index(folder, lambda index: np.array([(*row[:4], 0, 0, 0, row[7]) for row in index.tolist()], index.dtype))
    edit_manifest(folder, lambda content: [shard.update(sha256=None) for shard in content["shards"]])


def test_without_checksums_the_headers_are_compared_with_the_index(folder):
    without_checksums(folder)
    assert verify_split(folder, jobs=1) == []
    image_bit(folder)
    assert verify_split(folder, jobs=1) == []  # contents are not checked, and the summary says so
    shard, key, offset, what = header_bit("n01_1.cls", "n01_1", back=512)(folder)
    (finding,) = verify_split(folder, jobs=1)
    assert (finding.shard, finding.key, finding.offset) == (shard, key, offset) and re.search(what, finding.what)


def test_without_checksums_another_tar_does_not_fit_the_index(folder):
    without_checksums(folder)
    shutil.copy(folder / NAMES[1], folder / NAMES[0])
    findings = verify_split(folder, jobs=1)
    assert {"n01_0", "n02_4"} <= {finding.key for finding in findings}
    assert any("the index does not know 'n02_4.cls'" in finding.what for finding in findings)


@pytest.fixture()
def foreign(tmp_path):
    """As others make them: names with folders, owners and times, a label before its image, a text after it."""
    path = tmp_path / "other.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for number, (key, image) in enumerate(zip([f"some/{'folder' * 20}/a", "some/b", "c"], IMAGES)):
            for extension, content in (("cls", b"%d\n" % number), ("JPEG", image), ("txt", b"a caption")):
                item = tarfile.TarInfo(f"{key}.{extension}")
                item.size, item.uname, item.mtime = len(content), "someone", 1.5e9
                tar.addfile(item, BytesIO(content))
    with tarfile.open(path) as tar:
        rows = [(0, number, item.offset_data, item.size, zlib.crc32(IMAGES[number]), 16, 16 + number,
                 item.name.partition(".")[0].encode())
                for number, item in enumerate(item for item in tar.getmembers() if item.name.endswith("JPEG"))]
    info = ShardInfo(path.name, 3, path.stat().st_size, sha256(path))
    rows = np.array(rows, index_dtype(max(len(row[-1]) for row in rows)))
    write_split(tmp_path, [(info, rows)], name="o", split="t", classes=["x", "y", "z"], seed=0, samples_per_shard=3)
    return tmp_path


def test_a_sound_foreign_shard_looks_sound_also_from_close_by(foreign):
    assert verify_split(foreign, jobs=1) == []
    descriptor = open_regular(foreign / "other.tar")
    info = read_manifest(foreign).shards[0]
    assert damaged_structure(descriptor, info, read_index(foreign), ["x", "y", "z"]) == []
    assert damaged_structure(descriptor, info, None, ["x", "y", "z"]) == []
    os.close(descriptor)


@pytest.mark.parametrize("name, inside, key, what", [
    ("some/b.JPEG", 40, "some/b", "the image's .* bytes are damaged"),
    ("some/b.cls", 0, "some/b", "the cls is b'0', the index says 1"),
    ("some/b.cls", -500, "some/b", "damaged tar header"),
    ("some/b.txt", 3, None, "so other members are damaged or the manifest was edited"),
])
def test_damage_to_a_foreign_shard(foreign, name, inside, key, what):
    flip(foreign / "other.tar", member(foreign / "other.tar", name)[1] + inside)
    (finding,) = verify_split(foreign, jobs=1)
    assert finding.key == key and re.search(what, finding.what), str(finding)


@pytest.mark.parametrize("members, extension, old, new, what", [
    ({"json": b'{"label": 1}'}, "json", b"1", b"2", "the json's label is 2, the index says 1$"),
    ({"json": b'{"label": 1}'}, "json", b"lab", b"lac", 'the json has no "label", the index says 1$'),
    ({"json": b'{"label": 1}'}, "json", b"{", b"[", r"the json is none: b'\["),
    ({"json": b'{"label": 7}', "cls": b"1"}, "cls", b"1", b"2", "the cls is b'2', the index says 1$"),
    ({"json": b'{"label": 7}', "cls": b"1"}, "json", b"7", b"6", None),
    ({"txt": b"1"}, "txt", b"1", b"0", r"the txt is b'0', the index says 1 \(bee\)$"),
    ({"txt": b"bee"}, "txt", b"bee", b"bed", r"the txt is b'bed', the index says 1 \(bee\)$"),
    ({"txt": b"bee"}, "txt", b"bee", b"\xffee", r"the txt is b'.xffee', the index says 1 \(bee\)$"),
    ({"json": b'{"label": 1}', "txt": b"a caption"}, "txt", b"cap", b"cab", None),
    ({"txt": b"a caption", "cls": b"1"}, "txt", b"cap", b"cab", None),
])
def test_a_damaged_label_of_a_foreign_shard(tmp_path, members, extension, old, new, what):
    """What tells the label is compared, and what does not is not: then the shard alone is named."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for key in ("a", "b", "c"):
            for kind, content in (("jpg", IMAGES[0]), *members.items()):
                item = tarfile.TarInfo(f"{key}.{kind}")
                item.size, item.mtime = len(content), 5
                tar.addfile(item, BytesIO(content))
    index_shards(str(tmp_path), classes=["ant", "bee", "cat"], checksums=True, jobs=1)
    _, offset, _ = member(tmp_path / "a.tar", f"b.{extension}")
    with open(tmp_path / "a.tar", "r+b") as file:
        file.seek(offset + members[extension].index(old))
        file.write(new)
    (finding,) = verify_split(tmp_path, jobs=1)
    if what is None:
        assert (finding.key, finding.offset) == (None, None) and "other members are damaged" in finding.what
    else:
        assert (finding.key, finding.offset) == ("b", offset) and re.search(what, finding.what), str(finding)


def test_findings_are_bounded(tmp_path):
    """A tar of many members that the index does not know, and one of a thousand damaged images."""
    samples = [ShardSample(f"k_{number}", IMAGES[0], "jpg", 16, 16, 0, f"n01/{number}.JPEG") for number in range(300)]
    shard = write_shard(tmp_path / "a.tar", samples)
    write_split(tmp_path, [shard], name="s", split="t", classes=["n01"], seed=0, samples_per_shard=300)
    descriptor = open_regular(tmp_path / "a.tar")
    findings = damaged_structure(descriptor, shard[0], read_index(tmp_path)[:0], ["n01"])
    os.close(descriptor)
    assert len(findings) == MAX_ALIKE + 1 and findings[-1].what == "and 800 more of its members"
    (tmp_path / "a.tar").write_bytes(bytes(shard[0].bytes))
    images = [finding for finding in verify_split(tmp_path, jobs=1) if "image" in finding.what]
    assert len(images) == MAX_ALIKE + 1 and images[-1].what == "and 200 more of its images"


def run(*arguments, cwd):
    return subprocess.run([sys.executable, ROOT / "tools" / "verify_shards.py", *map(str, arguments)], cwd=cwd,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60)


def test_the_command_line(folder, tmp_path):
    write(tmp_path / "val", "val")
    size = sum(shard.bytes for shard in read_manifest(folder).shards)
    done = run(tmp_path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for line, split in zip(done.stdout.splitlines(), ["train", "val"], strict=True):
        assert line.startswith(f"{tmp_path / split} is sound: 8 images in 3 shards, {size / 1e6:,.1f} MB in ")
    assert "train: 100%" in done.stderr and "B/s" in done.stderr
    _, key, offset, _ = image_bit(folder)
    broken = run("train", "--jobs", 1, cwd=tmp_path)
    *findings, summary = broken.stdout.splitlines()
    assert broken.returncode == 3 and "Traceback" not in broken.stderr
    assert findings[0].startswith(f"train/{NAMES[1]}:{key}@{offset}: the image's")
    assert summary == f"{folder} is NOT SOUND: 1 finding in 1 file"


def test_the_summary_says_what_was_not_checked(folder, capsys):
    without_checksums(folder)
    assert main([str(folder)]) == 0
    assert ("the contents of 3 of them were not checked, only their tar headers, because the manifest has no checksums "
            "of them: vir-index --checksums makes some") in capsys.readouterr().out


def test_what_is_no_split_and_what_is_no_number_of_jobs(tmp_path, folder, capsys):
    (tmp_path / "empty").mkdir()
    assert main([str(tmp_path / "empty")]) == 3
    assert "vir-verify: " in capsys.readouterr().err
    with pytest.raises(DataError, match="no such folder"):
        split_folders(tmp_path / "gone")
    with pytest.raises(SettingsError, match="--jobs must be at least 1, got 0"):
        verify_split(folder, jobs=0)
    with pytest.raises(DataError, match="no such folder"):
        verify_split(tmp_path / "gone", jobs=1)


@pytest.mark.parametrize("lost, found", [
    (["manifest.json"], "^missing: .*has an index.npy but no manifest.json; copy the split again"),
    (["manifest.json", "index.npy"], "^missing: .*holds 3 tar files")])
def test_a_split_without_its_manifest_is_found(folder, tmp_path, capsys, lost, found):
    write(tmp_path / "val", "val")
    shutil.copytree(folder, tmp_path / "test.partial")
    shutil.copytree(folder, tmp_path / ".scratch")
    (tmp_path / "notes").mkdir()
    (tmp_path / "a.tar").touch()
    for name in lost:
        (folder / name).unlink()
    assert split_folders(tmp_path) == [folder, tmp_path / "val"]
    (finding,) = verify_split(folder, jobs=1)
    assert (finding.shard, finding.key, finding.offset) == ("manifest.json", None, None)
    assert re.search(found, finding.what), finding.what
    assert main([str(tmp_path)]) == 3
    *_, of_train, of_val = capsys.readouterr().out.splitlines()
    assert of_train == f"{folder} is NOT SOUND: 1 finding in 1 file" and f"{tmp_path / 'val'} is sound" in of_val


@contextmanager
def without_rights():
    """As a user who is not root."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)


@pytest.fixture()
def public():
    """A folder that is not below one of root's."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


def test_a_split_beside_which_nothing_can_be_listed(sound, public):
    folder = Path(shutil.copytree(sound, public / "shards" / "train"))
    index_bit(folder)
    os.chmod(public / "shards", 0o311)
    with without_rights():
        (finding,) = verify_split(folder, jobs=1)
    os.chmod(public / "shards", 0o755)
    assert "damaged or of another split" in finding.what


def test_a_split_that_cannot_be_listed_is_no_sound_one(sound, public, capsys):
    folder = Path(shutil.copytree(sound, public / "train"))
    shutil.copytree(sound, public / "val")
    os.chmod(folder, 0)
    with without_rights():
        assert main([str(public)]) == 3
    os.chmod(folder, 0o755)
    said = capsys.readouterr()
    assert "val is sound" in said.out and "manifest.json: Permission denied" in said.err


@pytest.mark.parametrize("damage", [index_bit, index_of_another_split, no_index])
def test_the_index_is_made_anew_from_the_shards(folder, sound, damage):
    damage(folder)
    restore_index(folder, jobs=2)
    assert (folder / "index.npy").read_bytes() == (sound / "index.npy").read_bytes()
    assert verify_split(folder, jobs=1) == []


def test_an_index_is_not_made_from_damaged_shards(folder):
    no_index(folder)
    image_bit(folder)
    with pytest.raises(DataError, match=f"index.npy cannot be made anew, because {NAMES[1]} is damaged: copy it again"):
        restore_index(folder, jobs=1)
    assert not any("index" in name for name in os.listdir(folder))
    (folder / NAMES[0]).unlink()
    with pytest.raises(DataError, match=f"cannot make .*index.npy anew: .*{NAMES[0]}: No such file"):
        restore_index(folder, jobs=1)


def test_an_index_of_another_way_of_counting_is_not_put_in_place(folder):
    setting("width", 0, 99)(folder)
    no_index(folder)
    with pytest.raises(DataError, match="is not the one that the manifest names: it was made by another version"):
        restore_index(folder, jobs=1)
    assert not any("index" in name for name in os.listdir(folder))


@pytest.mark.parametrize("labels, classes", [
    (["cls"], None), (["json"], ["x", "y", "z"]), (["txt"], None), (["txt"], ["z", "a name", "y", "another"])])
def test_the_index_of_foreign_shards_is_made_anew(tmp_path, labels, classes):
    """Two members a sample, or more; by number or by name."""
    names = ["a name", "another", "a name"]
    for shard in range(2):
        with tarfile.open(tmp_path / f"o-{shard}.tar", "w") as tar:
            for number in range(3):
                told = {"cls": b"%d" % number, "json": b'{"label": %d}' % number, "txt": names[number].encode()}
                for extension, content in (("jpg", IMAGES[number]), *((kind, told[kind]) for kind in labels)):
                    item = tarfile.TarInfo(f"d/{shard}{number}.{extension}")
                    item.size = len(content)
                    tar.addfile(item, BytesIO(content))
    index_shards(str(tmp_path), classes=classes, checksums=True, jobs=1)
    before = (tmp_path / "index.npy").read_bytes()
    index_bit(tmp_path)
    findings = verify_split(tmp_path, jobs=1)
    repair_split(tmp_path, tmp_path / "no source is needed", findings, jobs=2)
    assert (tmp_path / "index.npy").read_bytes() == before and verify_split(tmp_path, jobs=1) == []


def test_without_checksums_no_repair_is_promised(folder, capsys):
    without_checksums(folder)
    (folder / "index.npy").write_bytes(b"")
    (folder / NAMES[0]).unlink()
    (finding, _) = verify_split(folder, jobs=1)
    assert finding.what.endswith("vir-index makes it and manifest.json anew")
    assert main([str(folder)]) == 3
    assert "--repair" not in capsys.readouterr().out


def test_a_split_that_cannot_be_repaired_does_not_end_the_work(sound, tmp_path, capsys):
    train, val = (Path(shutil.copytree(sound, tmp_path / name)) for name in ("train", "val"))
    image_bit(train)
    index_bit(val)
    assert main([str(tmp_path), "--repair", str(tmp_path)]) == 3
    said = capsys.readouterr()
    assert "train was not written by this version of vir-convert" in said.err
    assert f"{val} is sound" in said.out and verify_split(val, jobs=1) == []


@pytest.fixture()
def converted(tmp_path):
    for number, key in enumerate(KEYS):
        folder = tmp_path / "src" / "train" / key.partition("_")[0]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{key}.JPEG").write_bytes(IMAGES[number])
    convert(tmp_path / "src", "train", tmp_path / "out", workers=1)
    return tmp_path / "out" / "train"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_repair(converted, tmp_path, monkeypatch, capsys, number):
    repair = verify_module.repair_split

    def signal_and_repair(*arguments, **options):
        signal.raise_signal(number)
        repair(*arguments, **options)

    monkeypatch.setattr(verify_module, "repair_split", signal_and_repair)
    (shard,) = converted.glob("*.tar")
    shard.unlink()
    for damage in (lambda: None, lambda: index_bit(converted)):
        damage()
        assert main([str(converted), "--repair", str(tmp_path / "src")]) == 128 + number
        assert f"vir-verify: stopped by {number.name}" in capsys.readouterr().err
        assert sorted(os.listdir(converted)) == ["index.npy", "manifest.json"]
    monkeypatch.setattr(verify_module, "repair_split", repair)
    assert main([str(converted), "--repair", str(tmp_path / "src")]) == 0
    with pytest.raises(Stopped):
        restore_index(converted, jobs=1, is_stopping=lambda: True)


def test_the_summary_names_the_repair_where_there_is_one(converted, tmp_path, capsys):
    (shard,) = converted.glob("*.tar")
    flip(shard, 600)
    assert main([str(converted)]) == 3
    assert capsys.readouterr().out.endswith("in 1 file; --repair SOURCE writes what can be mended anew\n")
    shutil.copy(shard, converted / "more.tar")
    assert main([str(converted), "--repair", str(tmp_path / "src")]) == 3
    assert main([str(converted)]) == 3  # the extra file is left
    assert "--repair" not in capsys.readouterr().out


def test_repair_writes_the_very_bytes(converted, tmp_path, capsys):
    split = converted
    before = {path.name: path.read_bytes() for path in split.iterdir()}
    shard = read_manifest(split).shards[0].name
    flip(split / shard, int(read_index(split)["offset"][0]) + 30)
    index_bit(split)
    shutil.copy(split / shard, split / "more.tar")
    assert main([str(split), "--repair", str(tmp_path / "src")]) == 3
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "train/more.tar: extra: the manifest does not name it; remove it if it is not needed",
        f"{split} is NOT SOUND: 1 finding in 1 file"]
    assert {name: (split / name).read_bytes() for name in before} == before
    (split / "more.tar").unlink()
    (split / shard).unlink()
    repair_split(split, tmp_path / "src", verify_split(split, jobs=1), jobs=1)
    assert verify_split(split, jobs=1) == [] and (split / shard).read_bytes() == before[shard]
    (split / shard).unlink()
    (split / shard).mkdir()
    with pytest.raises(DataError, match="cannot write in .*train.*: Is a directory"):
        repair_split(split, tmp_path / "src", verify_split(split, jobs=1), jobs=1)
