"""Shards that others made: what is read in them, and what is refused in a sentence."""

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from support.manifests import edit_manifest
from vir import index as index_module
from vir.data import foreign
from vir.data.executors import Stopped
from vir.data.foreign import index_shards
from vir.data.reader import ShardReader
from vir.data.shards import ShardSample, read_index, read_manifest, write_shard, write_split
from vir.errors import DataError, SettingsError

ROOT = Path(__file__).resolve().parent.parent
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
KINDS = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP", "JPEG": "JPEG"}


def image(number, extension="jpg", height=20):
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (height, 16 + number, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, KINDS[extension])
    return file.getvalue()


def make_tar(path, members, form="gnu"):
    """By Python's tarfile; the members are (name, bytes)."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w", format=FORMATS[form]) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sample(number, key=None, extension="jpg", label=None):
    key = f"k{number:03d}" if key is None else key
    return [(f"{key}.{extension}", image(number, extension)),
            *(label if label is not None else [(f"{key}.cls", b"%d" % (number % 3))])]


def make_split(folder, shards=3, per_shard=4):
    for shard in range(shards):
        make_tar(folder / f"set-train-{shard:02d}.tar",
                 [member for number in range(per_shard) for member in sample(per_shard * shard + number)])
    return folder


@pytest.fixture()
def folder(tmp_path):
    return make_split(tmp_path / "train")


def index(pattern, **options):
    return index_shards(str(pattern), **{"jobs": 1, **options})


def refused(pattern, message, error=DataError, **options):
    with pytest.raises(error, match=message) as caught:
        index(pattern, **options)
    assert "\n" not in str(caught.value) and "\0" not in str(caught.value) and len(str(caught.value)) < 700


# ---- what is read

@pytest.mark.parametrize("form", FORMATS)
def test_every_kind_of_image_and_label_is_read(form, tmp_path):
    keys = ["plain", "folder/of/it", "x" * 90, "a.folder/with dots"]
    keys += [] if form == "ustar" else ["größe/写真", "y" * 200]
    labels = [lambda key: [(f"{key}.cls", b"2")], lambda key: [(f"{key}.cls", b" 0\n")],
              lambda key: [(f"{key}.json", b'{"label": 1, "filename": "n01/a.JPEG"}')],
              lambda key: [(f"{key}.txt", b"1\n"), (f"{key}.npy", b"other")],
              lambda key: [(f"{key}.json", b"[1]"), (f"{key}.txt", b"a caption"), (f"{key}.cls", b"2")],
              lambda key: [(f"{key}.CLS", b"0")]]
    extensions = ["jpg", "jpeg", "png", "webp", "JPEG", "jpg"]
    members = []
    for number, (key, label, extension) in enumerate(zip(keys, labels, extensions)):
        members += sample(number, key, extension, label(key))
    make_tar(tmp_path / "s/a.tar", members, form)
    summary = index(tmp_path / "s")
    reader = ShardReader(tmp_path / "s")
    assert [reader.key(i) for i in range(len(reader))] == keys
    assert [reader.read(i) for i in range(len(reader))] == [
        image(number, extension) for number, extension in zip(range(len(keys)), extensions)]
    assert reader.labels.tolist() == [2, 0, 1, 1, 2, 0][:len(keys)] and reader.classes == ("0", "1", "2")
    assert f"{len(keys)} images of 3 classes in 1 shard, 0.0 MB" in str(summary) and "--checksums" in str(summary)
    assert str(summary).endswith(f"written to {tmp_path / 's'}")


def test_a_folder_packed_by_gnu_tar(tmp_path):
    for number in range(3):
        for name, data in sample(number, f"in/{number}/k{number}"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(data)
    (tmp_path / "s").mkdir()
    subprocess.run(["tar", "--sort=name", "-cf", tmp_path / "s/a.tar", "-C", tmp_path / "in", "."], check=True)
    index(tmp_path / "s")
    reader = ShardReader(tmp_path / "s")
    assert [(reader.key(i), reader.read(i), reader.labels[i]) for i in range(3)] == [
        (f"./{number}/k{number}", image(number), number) for number in range(3)]


def test_checksums_are_those_of_the_bytes(folder):
    index(folder)
    bare, manifest = read_index(folder).copy(), read_manifest(folder)
    assert not bare["crc32"].any() and not bare["width"].any() and not bare["height"].any()
    assert {shard.sha256 for shard in manifest.shards} == {None} and manifest.conversion is None
    assert (manifest.name, manifest.split, manifest.samples_per_shard) == ("set", "train", 4)
    summary = index(folder, checksums=True)
    rows, manifest = read_index(folder), read_manifest(folder)
    for shard in manifest.shards:
        content = (folder / shard.name).read_bytes()
        assert (shard.bytes, shard.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    for number, row in enumerate(rows):
        assert (row["crc32"], row["width"], row["height"]) == (zlib.crc32(image(number)), 16 + number, 20)
    for field in ("shard", "label", "offset", "size", "key"):
        assert (rows[field] == bare[field]).all()
    assert "--checksums" not in str(summary)
    with open(folder / "set-train-01.tar", "r+b") as file:
        file.seek(rows["offset"][5] + 50)
        file.write(bytes([image(5)[50] ^ 1]))
    with pytest.raises(DataError, match="wrong checksum"):
        ShardReader(folder).read(5)


@pytest.mark.parametrize("checksums", [False, True])
def test_any_number_of_jobs_writes_the_same_bytes(folder, checksums):
    written = []
    for jobs in (1, 3):
        index(folder, jobs=jobs, checksums=checksums)
        written.append([(folder / name).read_bytes() for name in ("index.npy", "manifest.json")])
        assert sorted(os.listdir(folder)) == ["index.npy", "manifest.json", *(f"set-train-0{n}.tar" for n in range(3))]
    assert written[0] == written[1]


def test_names_of_classes(tmp_path):
    make_tar(tmp_path / "s/a.tar", sample(0, label=[("k000.txt", "Größe\n".encode())]) +
             sample(1, label=[("k001.txt", b"cat")]))
    make_tar(tmp_path / "s/b.tar", sample(2, label=[("k002.txt", b"cat")]) + sample(3, label=[("k003.txt", b"ant")]))
    index(tmp_path / "s")
    reader = ShardReader(tmp_path / "s")
    assert reader.classes == ("Größe", "ant", "cat") and reader.labels.tolist() == [0, 2, 2, 1]
    index(tmp_path / "s", classes=["cat", "dog", "Größe", "ant"])
    reader = ShardReader(tmp_path / "s")
    assert reader.classes == ("cat", "dog", "Größe", "ant") and reader.labels.tolist() == [2, 0, 0, 3]
    refused(tmp_path / "s", "b.tar:k003 has the class 'ant', which the list of 2 classes lacks; give the right list",
            classes=["cat", "Größe"])
    make_tar(tmp_path / "s/c.tar", sample(4, label=[("k004.cls", b"7")]))
    refused(tmp_path / "s", "a.tar:k001 has the class 'Größe', c.tar:k004 has the number 7: all labels of a split are"
            .replace("k001", "k00."))


def test_numbers_and_a_class_list(folder):
    index(folder, classes=["a", "b", "c", "d"])
    assert ShardReader(folder).classes == ("a", "b", "c", "d")
    refused(folder, "set-train-00.tar:k002 has the label 2, but the list has 2 classes", classes=["a", "b"])
    make_tar(folder / "z.tar", sample(99, label=[("k099.cls", b"2147483647")]))
    refused(folder, "z.tar:k099 has the label 2147483647, but without a class list 1048575 is the highest")


# ---- which shards

def test_patterns(folder, monkeypatch):
    def names(pattern):
        index(pattern)
        return [shard.name[-6:] for shard in read_manifest(folder).shards]

    assert names(folder) == names(folder / "*.tar") == names(folder / "set-*") == ["00.tar", "01.tar", "02.tar"]
    assert names(folder / "set-train-{02..01}.tar") == ["02.tar", "01.tar"]
    assert names(folder / "set-train-{00,0[12]}.tar") == ["00.tar", "01.tar", "02.tar"]
    assert names(folder / "set-train-01.tar") == ["01.tar"]
    monkeypatch.chdir(folder)
    assert names("set-train-{01..02}.tar") == names("*-0[12].tar") == ["01.tar", "02.tar"]
    assert names(".") == ["00.tar", "01.tar", "02.tar"] and read_manifest(folder).split == "train"


def test_patterns_that_are_refused(folder, tmp_path, monkeypatch):
    refused(folder / "set-train-{00..05}.tar", r"3 of the 6 shards that .* names are missing: '.*set-train-03.tar'")
    refused(folder / "no-*.tar", "no .tar is named by .*quote the pattern")
    refused(folder / "gone.tar", "gone.tar does not exist; give a folder of tars, or a quoted pattern")
    refused(tmp_path, "holds no .tar; found 'train'")
    refused(folder / "set-train-{00..02.tar", "has braces that do not match", SettingsError)
    refused(folder / "{0..99999999999999}.tar", "names more than 262144 files", SettingsError)
    with monkeypatch.context() as patch:
        patch.setattr(foreign, "MAX_SHARDS", 50)
        refused(folder / "{0..9}{0..9}.tar", "names more than 50 files", SettingsError)
    make_split(tmp_path / "val")
    refused(tmp_path / "{train,val}/*.tar", "names tars in 2 folders: .*index each folder by itself", SettingsError)
    (folder / "b.tar.gz").touch()
    refused(folder / "b.tar.gz", "do not end in .tar: .*compressed ones must be unpacked before", SettingsError)
    refused(folder, "--jobs must be at least 1, got 0", SettingsError, jobs=0)
    refused(folder, "--split 'a/b' cannot be a name", SettingsError, split="a/b")
    refused(folder, "--name '' cannot be a name", SettingsError, name="")
    assert not (folder / "manifest.json").exists()


def test_a_manifest_of_this_command_is_replaced_and_no_other(folder, tmp_path):
    index(folder / "set-train-{00..01}.tar")
    index(folder)  # a third shard was downloaded
    assert len(ShardReader(folder)) == 12
    make_tar(folder / "set-validation-00.tar", sample(50))
    refused(folder / "set-validation-00.tar", "is the manifest of other shards .*give each split a folder of its own")
    assert len(ShardReader(folder)) == 12
    for change in ({"conversion": {"seed": 0}}, {"format_version": 1, "conversion": None}):
        edit_manifest(folder, lambda content: content.update(change))
        text = (folder / "manifest.json").read_text()
        refused(folder, "manifest.json was written by vir-convert, .*it stays")
        assert (folder / "manifest.json").read_text() == text
    (folder / "manifest.json").write_text("[" * 100_000)
    refused(folder, "is not valid JSON")


def test_what_was_given_once_is_not_lost(folder, tmp_path, capsys):
    """Files for other readers are written beside an index as it is; to index anew asks for the same again."""
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    given = ["--classes", str(tmp_path / "classes.txt"), "--checksums"]
    main = index_module.main
    assert main([str(folder), *given, "--jobs", "1"]) == 0
    before = [(folder / name).read_bytes() for name in ("index.npy", "manifest.json")]
    for pattern in (folder, f"{folder}/set-train-{{02..00}}.tar"):
        assert main([str(pattern), "--also", "wids"]) == 0
        (folder / "shardindex.json").unlink()
    for arguments, message in [
        (["--classes", given[1]], "manifest.json has checksums, which would be lost: give --checksums, or remove "),
        (["--checksums"], "manifest.json has a list of 3 classes ('a', 'b', 'c'), which would be lost: give the list "),
        (["--checksums", "--also", "wids"], "has a list of 3 classes"),
        (["--also", "wids", "--split", "val"], "has checksums, which would be lost"),
    ]:
        assert main([str(folder), *arguments, "--jobs", "1"]) == 3
        assert message in capsys.readouterr().err
    assert [(folder / name).read_bytes() for name in ("index.npy", "manifest.json")] == before
    make_tar(folder / "set-train-03.tar", sample(40))  # with another shard, the index is made anew
    assert main([str(folder), "--also", "wids"]) == 3
    assert main([str(folder), "--also", "wids", *given, "--jobs", "1"]) == 0
    assert len(json.loads((folder / "shardindex.json").read_text())["shardlist"]) == 4
    assert main([str(folder), *given, "--split", "val", "--jobs", "1"]) == 0 and read_manifest(folder).split == "val"
    index(folder, checksums=True, classes=["0", "1", "2"])
    index(folder, checksums=True)  # these are no names


def test_names_from_txt_may_become_more_but_their_order_stays(tmp_path):
    make_tar(tmp_path / "s/a.tar", sample(0, label=[("k000.txt", b"cat")]) + sample(1, label=[("k001.txt", b"eel")]))
    index(tmp_path / "s")
    make_tar(tmp_path / "s/b.tar", sample(2, label=[("k002.txt", b"dog")]))
    index(tmp_path / "s")
    assert read_manifest(tmp_path / "s").classes == ("cat", "dog", "eel")
    index(tmp_path / "s", classes=["eel", "dog", "cat"])
    refused(tmp_path / "s", "has a list of 3 classes .*, which would be lost")


def test_a_folder_that_cannot_be_written_is_told_before_the_work(folder, monkeypatch):
    (folder / "manifest.json").mkdir()  # not by its mode: root writes everywhere
    refused(folder, "cannot|Is a directory|is a folder")
    (folder / "manifest.json").rmdir()

    def refuse(path):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(foreign, "try_to_write", refuse)
    refused(folder, "cannot write manifest.json in .*: Read-only file system; .* elsewhere with --index-dir")


def test_keys_must_differ_within_the_split(folder, monkeypatch):
    make_tar(folder / "z.tar", sample(99) + sample(98, "k005"))
    refused(folder, "the key 'k005' is in set-train-01.tar and in z.tar: keys must differ")
    monkeypatch.setattr(foreign, "hash", lambda key: 7, raising=False)  # all keys collide: the keys themselves decide
    refused(folder, "the key 'k005' is in set-train-01.tar and in z.tar: keys must differ")
    (folder / "z.tar").unlink()
    index(folder)


def test_names_of_shards_that_no_manifest_can_hold(folder):
    for name in (b"a\xff.tar", b"a\n.tar"):
        shutil.copy(folder / "set-train-00.tar", path := os.fsencode(folder) + b"/" + name)
        refused(folder, r"the name of the shard 'a\\(udcff|n)\.tar' in .* is not UTF-8 or cannot be printed; rename it")
        os.unlink(path)


def test_shards_without_samples(folder):
    make_tar(folder / "empty.tar", [])
    refused(folder, r"shards without samples: '.*/empty\.tar'")


# ---- hostile shards

def hostile(name, data=b"1"):
    return [(name, data)]


HOSTILE = {
    "json nested a million deep": (sample(0, label=hostile("k000.json", b"[" * 500_000 + b"]" * 500_000)),
                                   "sample 'k000' at byte .* has a json that is none"),
    "a json of 2 MB": (sample(0, label=hostile("k000.json", b" " * (2 << 20))), "has a json of 2097152 bytes, the lim"),
    "no image": (hostile("k000.cls"), "sample 'k000' at byte 0 has no image"),
    "no label": (sample(0, label=[]), "sample 'k000' at byte 0 has no label"),
    "an image of no bytes": (hostile("k000.jpg", b"") + hostile("k000.cls"), "image of sample 'k000' .* has 0 bytes"),
    "a long key": (sample(0, "f/" * 300 + "k"), r"the key 'f/f/.*\.\.\. at byte 0 has 601 bytes, the limit is 512"),
    "a class name of control characters": (sample(0, label=hostile("k000.txt", b"a\0b")), r"has 'a\\x00b' in its txt"),
    "an empty txt": (sample(0, label=hostile("k000.txt", b"")), "has '' in its txt, which is neither a number nor"),
    "a negative label": (sample(0, label=hostile("k000.cls", b"-1")), "label '-1' in its cls"),
    "a key that comes again": (sample(0) + sample(1) + sample(0), "sample 'k000' at byte .* was there already"),
    "archives": (hostile("n01440764.tar"), "has no image: it begins with 'n01440764.tar'"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_members_are_refused_with_shard_key_and_byte(name, tmp_path):
    members, message = HOSTILE[name]
    make_tar(tmp_path / "s/a.tar", members)
    refused(tmp_path / "s", f"{tmp_path}/s/a.tar: .*{message}")


@pytest.mark.parametrize("name, message", [(b"k\0x.jpg", "has a NUL"), (b"k\xff.jpg", "is not UTF-8")])
def test_hostile_names(tmp_path, name, message):
    body = b" path=" + name + b"\n"
    record = b"%d" % (len(body) + 2) + body
    info = tarfile.TarInfo("PaxHeader")
    info.type, info.size = b"x", len(record)
    content = info.tobuf(tarfile.USTAR_FORMAT) + record + bytes(-len(record) % 512)
    (tmp_path / "s").mkdir()
    (tmp_path / "s/a.tar").write_bytes(content + tarfile.TarInfo("k").tobuf() + bytes(1024))
    refused(tmp_path / "s", f"s/a.tar is damaged or no tar: at byte 1024, the name .*{message}")


@pytest.mark.parametrize("make, message", [
    (os.mkfifo, "it is no regular file"), (lambda path: path.symlink_to("/dev/zero"), "it is no regular file"),
    (lambda path: path.symlink_to("gone"), "No such file"),
    (lambda path: path.write_bytes(b""), "is cut off at byte 0"),
    (lambda path: path.write_bytes(b"\x1f\x8b" + bytes(1000)), "it is compressed"),
    (lambda path: path.write_bytes(path.with_name("set-train-00.tar").read_bytes()[:3000]), "cut off"),
])
def test_what_is_no_tar_is_named(folder, make, message):
    make(folder / "x.tar")
    for checksums in (False, True):
        refused(folder, f"x.tar.*{message}", checksums=checksums)


def test_captions_are_no_class_names(folder, monkeypatch):
    monkeypatch.setattr(foreign, "MAX_CLASS_NAMES", 3)
    for shard, numbers in (("x", (48, 49)), ("y", (50, 51)), ("z", (52, 53))):
        make_tar(folder / "in" / f"{shard}.tar", [member for number in numbers for member in sample(
            number, label=[(f"k{number:03d}.txt", b"a caption %d" % number)])])
    refused(folder / "in", "the txt hold more than 3 different texts, as 'a caption ..' in .*captions.*--classes")
    run_tasks = foreign.run_tasks

    def at_most(count):
        def results(*arguments):
            ended = run_tasks(*arguments)
            for _ in range(count):
                yield next(ended)
            raise AssertionError(f"what {count} shards hold is enough, yet another is waited for")
        return results

    monkeypatch.setattr(foreign, "run_tasks", at_most(2))
    refused(folder / "in", "more than 3 different texts")
    monkeypatch.setattr(foreign, "run_tasks", at_most(1))
    refused(folder / "in", "[xyz].tar:k0.. has the class 'a caption ..', which the list of 1 classes lacks",
            classes=["a"])
    make_tar(folder / "in/y.tar", [member for number in range(6) for member in sample(
        number, label=[(f"k{number:03d}.txt", b"a caption %d" % number)])])
    with pytest.raises(DataError, match="y.tar: the txt hold more than 3 different texts, .*captions"):
        foreign.index_shard(folder / "in/y.tar", "y.tar", False)


def test_an_image_of_gigabytes_is_not_read(tmp_path):
    info = tarfile.TarInfo("k.jpg")
    info.size = 3 << 30
    with open(tmp_path / "a.tar", "wb") as file:
        file.write(info.tobuf())
        file.truncate((3 << 30) + 512)  # a hole, no bytes on the disk
        file.seek(0, os.SEEK_END)
        label = tarfile.TarInfo("k.cls")
        label.size = 1
        file.write(label.tobuf() + b"1" + bytes(511 + 1024))
    refused(tmp_path, "the image of sample 'k' at byte 512 has 3221225472 bytes, expected 1 to 268435456",
            checksums=True)


def test_an_image_that_is_none_is_seen_where_images_are_read(folder):
    make_tar(folder / "z.tar", [("bad.jpg", image(1)[:200]), ("bad.cls", b"1")])
    refused(folder, "z.tar: sample 'bad' at byte 512: .*; copy or download the shard again, or index it without",
            checksums=True)
    index(folder)


# ---- the command

def test_the_command(folder, tmp_path):
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    done = subprocess.run(
        [sys.executable, ROOT / "tools/index_shards.py", "train/set-train-{00..02}.tar", "--classes", "classes.txt",
         "--split", "t", "--name", "n", "--jobs", "2", "--checksums", "--also", "timm,open_clip"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "12 images of 3 classes in 3 shards" in done.stdout and "3/3" in done.stderr  # the progress bar
    assert "for timm, open_clip: 2 files written, _info.json, ..." in done.stdout
    manifest = read_manifest(folder)
    assert (manifest.name, manifest.split, manifest.classes) == ("n", "t", ("a", "b", "c"))
    assert json.loads((folder / "sizes.json").read_text()) == {f"set-train-0{n}.tar": 4 for n in range(3)}


def test_the_command_tells_errors_in_a_line(folder, tmp_path, capsys):
    for arguments, code, message in [
        ([str(tmp_path / "gone")], 3, f"vir-index: {tmp_path / 'gone'} does not exist; give"),
        ([str(folder), "--also", "timm,tf"], 2, "vir-index: --also 'tf' is none of timm, dali, energon, wids, open_"),
        ([str(folder), "--classes", str(tmp_path / "no")], 3, "vir-index: cannot read the class list"),
    ]:
        assert index_module.main(arguments) == code
        assert capsys.readouterr().err.startswith(message)
    assert not (folder / "manifest.json").exists()


def test_beside_shards_of_vir_convert_only_the_other_files_are_written(tmp_path, capsys):
    shard = write_shard(tmp_path / "s-0.tar", [ShardSample("k", image(0), "jpg", 16, 20, 0, "a/k.JPEG")])
    write_split(tmp_path, [shard], name="s", split="train", classes=["a"], seed=0, samples_per_shard=1,
                conversion={"seed": 0})
    before = (tmp_path / "manifest.json").read_bytes()
    assert index_module.main([str(tmp_path)]) == 3
    assert "was written by vir-convert" in capsys.readouterr().err
    assert index_module.main([str(tmp_path), "--also", "open_clip"]) == 0
    assert (tmp_path / "sizes.json").exists() and (tmp_path / "manifest.json").read_bytes() == before


def test_a_signal_ends_it_with_nothing_written(folder, monkeypatch, capsys):
    find = index_module.find_shards

    def find_and_signal(pattern):
        signal.raise_signal(signal.SIGINT)
        return find(pattern)

    monkeypatch.setattr(index_module, "find_shards", find_and_signal)
    for jobs in ("1", "2"):
        assert index_module.main([str(folder), "--jobs", jobs]) == 130
        assert "stopped by SIGINT; nothing was written" in capsys.readouterr().err
        assert all(name.endswith(".tar") for name in os.listdir(folder))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(Stopped):
        index(folder, is_stopping=lambda: True)


def test_help_needs_no_torch():
    code = "import sys, vir.index\ntry: vir.index.main(['--help'])\nexcept SystemExit: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout.startswith("usage: vir-index") and done.stdout.endswith("False\n")


def test_shards_that_are_links(folder, tmp_path):
    """The way to index a split of a folder that holds several, or that cannot be written."""
    (tmp_path / "links").mkdir()
    for number in range(2):
        (tmp_path / f"links/set-train-0{number}.tar").symlink_to(folder / f"set-train-0{number}.tar")
    index(tmp_path / "links")
    assert ShardReader(tmp_path / "links").read(7) == image(7)
    shutil.rmtree(tmp_path / "links")
