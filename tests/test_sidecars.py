"""The files for other programs: read by those programs where they are installed, else by the formats' definitions."""

import io
import json
import os
import re
import sqlite3
import struct
import subprocess
import tarfile

import numpy as np
import pytest
from PIL import Image

from vir.data.foreign import index_shards
from vir.data.shards import ShardSample, write_shard, write_split
from vir.data.sidecars import KINDS, parse_kinds, write_sidecars
from vir.errors import DataError, SettingsError

LABELS = [2, 0, 1, 1, 0]
FILES = [".nv-meta/.info.json", ".nv-meta/.info.yaml", ".nv-meta/dataset.yaml", ".nv-meta/index.sqlite",
         ".nv-meta/index.uuid", ".nv-meta/split.yaml", "_info.json", "s-0.idx", "s-0.tar.idx", "s-1.idx", "s-1.tar.idx",
         "shardindex.json", "sizes.json"]


def jpeg(number):
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (16, 16 + number, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def convert(folder):
    folder.mkdir()
    samples = [ShardSample(f"k{number}", jpeg(number), "jpg", 16 + number, 16, label, f"a/{number}.JPEG")
               for number, label in enumerate(LABELS)]
    shards = [write_shard(folder / "s-0.tar", samples[:3]), write_shard(folder / "s-1.tar", samples[3:])]
    write_split(folder, shards, name="s", split="train", classes=["a", "b", "c"], seed=0, samples_per_shard=3)
    return folder


@pytest.fixture()
def folder(tmp_path):
    return convert(tmp_path / "train")


@pytest.fixture()
def foreign(tmp_path):
    """PAX and GNU headers, folders, links, hidden files, other members."""
    folder = tmp_path / "train"
    folder.mkdir()
    for number, form in enumerate((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        with tarfile.open(folder / f"x.{number}.tar", "w", format=form) as tar:
            for key in ("plain", "z" * 120, "größe/a", "a.folder/b"):
                key = f"{key}{number}"
                for name, data in ((f"{key}.jpg", jpeg(number)), (f"{key}.txt", b"cat"), (f"._{number}", b"hidden"),
                                   (f"{key}.seg.png", b"mask"), (f"{key}.json", b'{"label": 0}')):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
                link = tarfile.TarInfo("link")
                link.type, link.linkname = tarfile.SYMTYPE, "y" * 120
                tar.addfile(link)
    index_shards(str(folder), jobs=1)
    return folder


def members(path):
    """By Python's tarfile: key, ending, begin of the headers, begin and size of the content."""
    with tarfile.open(path) as tar:
        for member in tar:
            found = re.fullmatch(r"((?:.*/)?[^./]+)\.([^/]*)", member.name)
            if member.isreg() and found:
                yield (*found.groups(), member)


# ---- by definition

@pytest.mark.parametrize("kind", ["folder", "foreign"])
def test_the_indexes_are_those_of_their_definitions(kind, request):
    folder = request.getfixturevalue(kind)
    write_sidecars(folder, KINDS)
    database = sqlite3.connect(folder / ".nv-meta/index.sqlite")
    shards = sorted(folder.glob("*.tar"))
    for number, path in enumerate(shards):
        samples = {}
        for key, extension, member in members(path):
            samples.setdefault(key, []).append((extension, member))
        lines = [" ".join(f"{ending} {member.offset_data} {member.size} {member.name}" for ending, member in parts)
                 for parts in samples.values()]
        assert path.with_suffix(".idx").read_text("utf-8") == "\n".join([f"v1.2 {len(samples)}", *lines, ""])
        last = list(samples.values())[-1][-1][1]
        offsets = [parts[0][1].offset for parts in samples.values()] + [last.offset_data + -(-last.size // 512) * 512]
        assert path.with_suffix(".tar.idx").read_bytes() == struct.pack(f"<{len(offsets)}Q", *offsets)
        assert database.execute("SELECT sample_key, sample_index, byte_offset, byte_size FROM samples WHERE "
                                "tar_file_id = ?", [number]).fetchall() == [
            (key, i, offsets[i], offsets[i + 1] - offsets[i]) for i, key in enumerate(samples)]
        assert database.execute("SELECT sample_index, part_name, content_byte_offset, content_byte_size FROM "
                                "sample_parts WHERE tar_file_id = ? ORDER BY content_byte_offset", [number]).fetchall(
                                ) == [
            (i, extension, member.offset_data, member.size) for i, parts in enumerate(samples.values())
            for extension, member in parts]
    assert json.loads((folder / "sizes.json").read_text()) == {
        path.name: len({key for key, *_ in members(path)}) for path in shards}
    database.close()


def test_gnu_tar_agrees_on_where_contents_begin(folder):
    """tar counts in blocks of 512 bytes and tells where the headers of each member begin."""
    write_sidecars(folder, ["dali"])
    listing = subprocess.run(["tar", "-tRf", folder / "s-0.tar"], check=True, capture_output=True, text=True).stdout
    begins = {name: int(block) * 512 for block, name in re.findall(r"block (\d+): (k\S+)", listing)}
    words = (folder / "s-0.idx").read_text().split()[2:]
    assert {name: int(offset) - 512 for offset, name in zip(words[1::4], words[3::4])} == begins and len(begins) == 9


def test_the_bytes_depend_on_the_split_alone_and_old_files_are_replaced(folder, tmp_path):
    paths = write_sidecars(folder, KINDS)
    assert sorted(str(path.relative_to(folder)) for path in paths) == FILES
    again = convert(tmp_path / "again")
    (again / "sizes.json").write_text("old")
    write_sidecars(again, KINDS)
    assert sorted(os.listdir(folder)) == sorted(os.listdir(again)) and len(os.listdir(folder / ".nv-meta")) == 6
    for path in paths:
        assert path.read_bytes() == (again / path.relative_to(folder)).read_bytes(), path
    (folder / ".nv-meta/dataset.yaml").write_text("edited: by hand\n")
    assert folder / ".nv-meta/dataset.yaml" not in write_sidecars(folder, ["energon"])
    assert (folder / ".nv-meta/dataset.yaml").read_text() == "edited: by hand\n"


def test_only_the_kinds_that_are_asked_for(folder):
    before = set(os.listdir(folder))
    assert write_sidecars(folder, []) == [] and set(os.listdir(folder)) == before
    assert [path.name for path in write_sidecars(folder, ["dali", "open_clip", "dali"])] == [
        "s-0.idx", "s-1.idx", "sizes.json"]
    assert set(os.listdir(folder)) - before == {"s-0.idx", "s-1.idx", "sizes.json"}


def test_kinds_that_are_none(folder):
    assert parse_kinds("") == () and parse_kinds("dali, timm,dali") == ("dali", "timm")
    assert KINDS == ("timm", "dali", "energon", "wids", "open_clip")
    for call in (lambda: parse_kinds("timm,tf"), lambda: write_sidecars(folder, ["tf"])):
        with pytest.raises(SettingsError, match="^--also 'tf' is none of timm, dali, energon, wids, open_clip$"):
            call()


def repack(path, change):
    """The tar again, with each member's name as `change` has it; None leaves it out."""
    with tarfile.open(path) as tar:
        kept = [(change(member.name), tar.extractfile(member).read()) for member in tar]
    with tarfile.open(path, "w") as tar:
        for name, data in kept:
            if name is not None:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize("kind, change, message", [
    ("dali", lambda name: name.replace("k1", "k 1"), "s-0.tar has a member 'k 1.jpg': DALI's index cannot hold a name"),
    ("dali", lambda name: None if "k1" in name else name, "s-0.tar has 2 samples, the manifest says 3: the shard was"),
    ("energon", lambda name: name.replace("k1", "k0"), "s-0.tar has 2 samples, the manifest says 3"),
    ("energon", lambda name: name.replace("k2", "k3"), r"has a key twice \(UNIQUE constraint failed"),
    ("energon", lambda name: "__k/__x.jpg" if name == "k1.jpg" else name, "has a member '__k/__x.jpg' that is no samp"),
])
def test_shards_that_do_not_fit(folder, kind, change, message):
    repack(folder / "s-0.tar", change)
    with pytest.raises(DataError, match=message):
        write_sidecars(folder, [kind])
    assert not [path for path in folder.rglob("*") if path.name.endswith(".tmp")]


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_written_is_told(kind, folder):
    for name in ("_info.json", "s-0.idx", "shardindex.json", "sizes.json"):
        (folder / name).mkdir()
    (folder / ".nv-meta").touch()
    with pytest.raises(DataError, match=f"cannot write the files of {kind} in {folder}: .*; free some space, or make"):
        write_sidecars(folder, [kind])


def test_a_shard_that_is_gone_or_a_pipe(folder):
    (folder / "s-1.tar").unlink()
    with pytest.raises(DataError, match="cannot open .*s-1.tar: No such file or directory; copy the split again"):
        write_sidecars(folder, ["energon"])
    os.mkfifo(folder / "s-1.tar")
    with pytest.raises(DataError, match="cannot open .*s-1.tar: it is no regular file"):
        write_sidecars(folder, ["dali"])


# ---- by the readers themselves

def images_of(samples):
    return [np.asarray(sample.convert("RGB")).tobytes() for sample in samples]


PIXELS = images_of(Image.open(io.BytesIO(jpeg(number))) for number in range(5))


def test_timm_reads_the_split_by_its_name(folder):
    timm_data = pytest.importorskip("timm.data")
    write_sidecars(folder, ["timm"])
    dataset = timm_data.create_dataset("wds/s", root=str(folder), split="train", is_training=False, batch_size=1)
    assert len(dataset) == 5
    found = list(dataset)
    assert [label for _, label in found] == LABELS and images_of(image for image, _ in found) == PIXELS


def test_timm_finds_labels_that_are_in_the_json(foreign):
    timm_data = pytest.importorskip("timm.data")
    write_sidecars(foreign, ["timm"])
    assert json.loads((foreign / "_info.json").read_text())["splits"]["train"]["alt_label"] == "label"
    dataset = timm_data.create_dataset("wds/s", root=str(foreign), split="train", is_training=False, batch_size=1)
    assert [label for _, label in dataset] == [0] * 8 and len(dataset) == 8


def test_wids_reads_by_number(folder, tmp_path):
    wids = pytest.importorskip("wids")
    write_sidecars(folder, ["wids"])
    dataset = wids.ShardListDataset(str(folder / "shardindex.json"), cache_dir=str(tmp_path / "cache"), keep=True)
    assert len(dataset) == 5 and dataset.dataset_name == "s-train"
    samples = [dataset[i] for i in (4, 0, 3, 1, 2)]
    assert [sample["__key__"] for sample in samples] == ["k4", "k0", "k3", "k1", "k2"]
    assert [sample[".cls"] for sample in samples] == [LABELS[i] for i in (4, 0, 3, 1, 2)]
    assert images_of(sample[".jpg"] for sample in samples) == [PIXELS[i] for i in (4, 0, 3, 1, 2)]


def test_hugging_face_datasets_streams_the_shards(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    files = [str(path) for path in sorted(folder.glob("*.tar"))]
    stream = datasets.load_dataset("webdataset", data_files={"train": files}, split="train", streaming=True,
                                   cache_dir=str(tmp_path / "cache"))
    found = list(stream)
    assert [sample["__key__"] for sample in found] == [f"k{number}" for number in range(5)]
    assert [int(sample["cls"]) for sample in found] == LABELS == [sample["json"]["label"] for sample in found]
    assert images_of(sample["jpg"] for sample in found) == PIXELS


@pytest.mark.parametrize("kind", ["folder", "foreign"])
def test_energon_reads_without_a_question(kind, request):
    energon = pytest.importorskip("megatron.energon")
    folder = request.getfixturevalue(kind)
    write_sidecars(folder, ["energon"])
    dataset = energon.get_val_dataset(
        str(folder), split_part="train", batch_size=1, task_encoder=energon.DefaultTaskEncoder(),
        worker_config=energon.WorkerConfig(rank=0, world_size=1, num_workers=0))
    found = list(energon.get_loader(dataset))
    if kind == "folder":
        assert [sample.__key__[0] for sample in found] == [f"k{number}" for number in range(5)]
        assert [sample.label[0] for sample in found] == LABELS
        assert [(sample.image[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8).tobytes()
                for sample in found] == PIXELS
    else:
        assert len(found) == 8 and {sample.label[0] for sample in found} == {0}
        assert found[1].__key__ == ["z" * 120 + "0"] and tuple(found[5].image.shape) == (1, 3, 16, 17)


def test_dali_reads_by_the_index(folder):
    dali = pytest.importorskip("nvidia.dali")
    write_sidecars(folder, ["dali"])
    shards = sorted(map(str, folder.glob("*.tar")))
    pipeline = dali.pipeline.Pipeline(batch_size=5, num_threads=1, device_id=None)
    with pipeline:
        pipeline.set_outputs(*dali.fn.readers.webdataset(
            paths=shards, index_paths=[f"{path[:-4]}.idx" for path in shards], ext=["jpg", "cls"],
            missing_component_behavior="error"))
    pipeline.build()
    images, labels = pipeline.run()
    assert [bytes(np.array(images[number])) for number in range(5)] == [jpeg(number) for number in range(5)]
    assert [int(bytes(np.array(labels[number]))) for number in range(5)] == LABELS
    assert pipeline.reader_meta()["__Webdataset_0"]["epoch_size"] == 5


def test_open_clip_counts_samples_as_it_does(folder):
    """Its rule: the sum over the shards of sizes.json[base name]."""
    write_sidecars(folder, ["open_clip"])
    sizes = json.loads((folder / "sizes.json").read_text())
    assert sum(int(sizes[os.path.basename(path)]) for path in map(str, folder.glob("*.tar"))) == 5
