"""Shards as a source: those of ours give what their folder gave, those of others keep keys, labels and bytes."""

import json
import os
import tarfile
import tracemalloc

import numpy as np
import pytest

from support.imagenet import contents, jpeg, tar
from vir.data.shards import ShardSample, write_shard, write_split
from vir.data.sources.choose import open_source
from vir.data.sources.listing import Source
from vir.data.sources.tars import tars_of
from vir.errors import DataError

NAMES = ("a/1.jpg", "a/1.png", "a/1.x.jpg", "a/1_x.jpg", "a/1-1.jpg", "a/new\nline.jpg", "a/b_c.jpg", "a_b/c.jpg",
         "a_b/a_b_7.JPEG", "n01/ILSVRC2012_val_00000001.JPEG", "n01/n01_5.JPEG", "n01/é ü.webp", "z/x.webp")


@pytest.fixture
def folder(tmp_path):
    for name in NAMES:
        path = tmp_path / "images" / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(name))
    return open_source(tmp_path / "images", "train")


def shard(source: Source, root, samples_per_shard=4, classes=None, drop=(), manifest=True):
    """The source as shards, in another order, as vir-convert writes them."""
    root.mkdir(parents=True, exist_ok=True)
    rows = [ShardSample(key, data, "jpg", 8, 8, label, filename) for key, label, filename, data in contents(source)
            if filename not in drop]
    order = np.random.default_rng(0).permutation(len(rows))
    shards = [write_shard(root / f"x-train-{start:06d}.tar", [rows[i] for i in order[start:start + samples_per_shard]])
              for start in range(0, len(rows), samples_per_shard)]
    if manifest:
        write_split(root, shards, name="x", split="train", classes=source.classes, seed=0,
                    samples_per_shard=samples_per_shard)
    return root


@pytest.mark.parametrize("place", ["shards/train", "shards"])
def test_our_own_shards_give_what_their_folder_gave(place, folder, tmp_path):
    shard(folder, tmp_path / place)
    source = open_source(tmp_path / "shards", "train")
    assert contents(source) == contents(folder) and source.classes == folder.classes
    assert source.kind == "WebDataset shards" and source.sizes.sum() == sum(len(data) for *_, data in contents(folder))
    shard(source, tmp_path / "again", samples_per_shard=2)
    again = open_source(tmp_path / "again", "train")
    assert contents(again) == contents(folder)
    assert again.fingerprint != source.fingerprint


def test_without_a_manifest_the_class_list_gives_the_same(folder, tmp_path):
    shard(folder, tmp_path / "shards", manifest=False)
    source = open_source(tmp_path / "shards", "train", folder.classes)
    assert contents(source) == contents(folder)


def test_without_any_list_classes_are_numbers_and_keys_stay(folder, tmp_path):
    shard(folder, tmp_path / "shards", manifest=False)
    source = open_source(tmp_path / "shards", "train")
    assert source.classes == ("0", "1", "2", "3")
    assert sorted((key, label, data) for key, label, _, data in contents(source)) == sorted(
        (key, label, data) for key, label, _, data in contents(folder))
    assert {filename for _, _, filename, _ in contents(source)} >= {"0/a_1.jpg", "0/a_1-2.jpg", "2/n01_é ü.jpg"}


def test_a_key_stays_although_the_sample_that_made_it_unique_is_gone(folder, tmp_path):
    shard(folder, tmp_path / "shards", drop={"a/1.jpg", "a/1.x.jpg"})
    expected = [sample for sample in contents(folder) if sample[2] not in ("a/1.jpg", "a/1.x.jpg")]
    assert contents(open_source(tmp_path / "shards", "train")) == expected
    assert {"a_1-2", "a_1_x-1"} <= {key for key, *_ in expected}


def test_one_shard_is_a_source_of_its_own(folder, tmp_path):
    root = shard(folder, tmp_path / "shards" / "train")
    names = sorted(path.name for path in root.glob("*.tar"))
    parts = [contents(open_source(root / name, "train")) for name in names]
    assert len(names) == 4 and sorted(sum(parts, [])) == sorted(contents(folder))


def test_a_filename_that_is_none_or_gives_another_key_is_left(tmp_path):
    told = {"a_k0": "b/k0.jpg", "a_k1": "a/../k1.jpg", "a_k2": "/k2.jpg", "a_k3": "k3.jpg", "a_": "a/", "a_k5": 7,
            "a_k6": "a/k6.\ud800", "a_k7": "a/k7.j\0pg", "a_k8": "a/k8." + "j" * 300, "a_k9-01": "a/k9.jpg",
            "a_k10": "a/other.jpg", "a_k11": None, "a_k12": "A/k12.jpg"}
    members = {}
    for key, filename in told.items():
        about = json.dumps({"filename": filename, "label": 0}).encode()
        members |= {f"d/{key}.jpg": key.encode(), f"d/{key}.json": about}
    (tmp_path / "x.tar").write_bytes(tar(members))
    assert sorted(contents(open_source(tmp_path, "train", ["a"]))) == sorted(
        (key, 0, f"a/{key}.jpg", key.encode()) for key in told)


def test_samples_of_one_key_in_two_shards_become_unique(tmp_path):
    for shard_name in ("0.tar", "1.tar"):
        (tmp_path / shard_name).write_bytes(tar({"x/1.png": shard_name.encode(), "x/1.txt": b"dog",
                                                 "y/1.jpg": b"", "y/1.cls": b"1"}))
    assert contents(open_source(tmp_path, "train", ["dog", "cat"])) == [
        ("1", 1, "cat/1.jpg", b""), ("1-1", 1, "cat/1.jpg", b""),
        ("1-2", 0, "dog/1.png", b"0.tar"), ("1-3", 0, "dog/1.png", b"1.tar")]


@pytest.mark.parametrize("split, taken", [
    ("train", ["x-train-0.tar", "x_training1.tar"]), ("val", ["x-validation-0.tar"]),
    ("validation", ["x-validation-0.tar"]), ("old", ["old-train.tar"]),
])
def test_names_tell_the_split_where_tars_of_several_lie_together(split, taken, tmp_path):
    names = ["old-train.tar" if split == "old" else "x-train-0.tar", "x_training1.tar", "x-validation-0.tar", "y.tar"]
    assert tars_of(names, split, tmp_path) == taken
    with pytest.raises(DataError, match="has no tar of split 'test' by its name, but .*'x-validation-0.tar'"):
        tars_of(names, "test", tmp_path)
    assert tars_of(["y.tar", "strain-0.tar"], split, tmp_path) == ["y.tar", "strain-0.tar"]


def members(*pairs):
    return {f"k{i}{ending}": data for i, pair in enumerate(pairs) for ending, data in pair.items()}


@pytest.mark.parametrize("content, classes, message", [
    (members({".jpg": b"", ".cls": b"2"}), ["a", "b"],
     r"x.tar: sample 'k0' at byte 0 has the label 2, but the class list ends with 1; give the right list"),
    (members({".jpg": b"", ".txt": b"dog"}), None, r"the label 'dog', which is neither a number nor a name in the "
                                                   r"class list of 0 classes; give the right list with --classes"),
    (members({".jpg": b"", ".txt": b"dog"}), ["a"], r"the label 'dog', which is neither .* list of 1 classes"),
    (members({".jpg": b"", ".cls": b"2000000000"}), None, r"the label 2000000000; labels from 1048576 need"),
    (members({".jpg": b""}), None, r"x.tar: sample 'k0' at byte 0 has no label"),
    ({"k" * 513 + ".jpg": b"", "k" * 513 + ".cls": b"0"}, None, r"a key of 513 bytes, the limit is 512; write its tar"),
    ({"k" * 70000 + ".jpg": b"", "k" * 70000 + ".cls": b"0"}, None, r"a key of 70000 bytes, the limit is 512"),
    ({}, None, r"the tars in .* have no samples: 'x.tar'"),
], ids=range(8))
def test_what_cannot_be_a_source_is_refused(content, classes, message, tmp_path):
    (tmp_path / "x.tar").write_bytes(tar(content))
    with pytest.raises(DataError, match=message):
        open_source(tmp_path, "train", classes)


def test_tars_must_be_those_of_their_manifest(folder, tmp_path):
    root = shard(folder, tmp_path / "train")
    with pytest.raises(DataError, match=r"the class list of 1 classes is not that of .*manifest.json \(4 classes\)"):
        open_source(tmp_path, "train", ["a"])
    first = root / "x-train-000000.tar"
    data = first.read_bytes()
    first.write_bytes(tar(members({".jpg": b"", ".cls": b"0"})))
    with pytest.raises(DataError, match="x-train-000000.tar has 1 samples, but manifest.json says 4; copy the split"):
        open_source(tmp_path, "train")
    first.rename(root / "y.tar")
    with pytest.raises(DataError, match="other tars than its manifest.json: 'x-train-000000.tar', 'y.tar'"):
        open_source(tmp_path, "train")
    with pytest.raises(DataError, match="other tars than its manifest.json: 'y.tar'"):
        open_source(root / "y.tar", "train")
    (root / "y.tar").unlink()
    first.write_bytes(data[:700])
    with pytest.raises(DataError, match="x-train-000000.tar"):
        open_source(tmp_path, "train")
    first.unlink()
    os.mkfifo(first)
    with pytest.raises(DataError, match=f"cannot read {first}: it is no regular file"):
        open_source(tmp_path, "train")


def test_the_listing_of_many_samples_stays_small(tmp_path):
    count = 3_000
    with open(tmp_path / "x.tar", "wb") as file:
        for i in range(count):
            for ending in ("jpg", "cls"):
                header = tarfile.TarInfo(f"{i:08d}.{ending}")
                header.size = 2
                file.write(header.tobuf() + (b"%02d" % (i % 100)).ljust(512))
        file.write(bytes(1024))
    classes = [str(i) for i in range(100)]
    open_source(tmp_path, "train", classes)  # what is kept once is not counted
    tracemalloc.start()
    source = open_source(tmp_path, "train", classes)
    after, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(source.samples) == count and peak < 100 * count and after < 60 * count, (peak, after)
