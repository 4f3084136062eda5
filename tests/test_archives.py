"""The official archives of ImageNet are read where they lie, and give what the class folders give."""

import gzip
import io
import os
import struct
import sys
import tarfile
import zlib

import pytest

from support.imagenet import (
    contents,
    flat,
    ground_truth,
    meta_mat,
    tar,
    tiny_imagenet,
    write_archives,
    write_devkit,
    write_folders,
)
from vir.data.sources import imagenet as class_list
from vir.data.sources.archives import read_archive
from vir.data.sources.choose import open_source
from vir.data.sources.folder import read_folder
from vir.errors import DataError

TRAIN, VAL, DEVKIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"


@pytest.fixture(scope="module")
def imagenet():
    return tiny_imagenet()


@pytest.fixture(scope="module")
def root(imagenet, tmp_path_factory):
    root = tmp_path_factory.mktemp("official") / "archives"
    write_archives(root, imagenet)
    return root


@pytest.fixture(scope="module")
def folders(imagenet, tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    for split, images in imagenet.images.items():
        write_folders(root / split, images)
    return root


@pytest.fixture
def copy(root, tmp_path):
    """The archives, to be damaged: links, which a test replaces."""
    for name in os.listdir(root):
        os.link(root / name, tmp_path / name)
    return tmp_path


def replace(path, data):
    path.unlink()
    path.write_bytes(data)


@pytest.mark.parametrize("split, archive", [("train", TRAIN), ("val", VAL), ("validation", VAL)])
def test_an_archive_gives_what_the_class_folders_give(split, archive, root, folders):
    expected = read_folder(folders / ("train" if split == "train" else "val"))
    before = sorted(os.listdir(root))
    source = open_source(root, split)
    assert contents(source) == contents(expected) and len(source.samples) == (1500 if split == "train" else 1200)
    assert source.classes == expected.classes and source.kind == "ImageNet archive"
    assert source.sizes.sum() == sum(len(data) for *_, data in contents(expected))
    assert contents(open_source(root / archive, split)) == contents(source)
    assert sorted(os.listdir(root)) == before


def test_timm_is_not_imported_for_its_class_list(root):
    code = ("import sys; from pathlib import Path; from vir.data.sources.choose import open_source; "
            f"open_source(Path({str(root)!r}), 'val'); print(*{{'timm', 'torch'}} & set(sys.modules))")
    done = os.popen(f"{sys.executable} -c \"{code}\"").read()
    assert done == "\n"


def test_names_with_folders_are_read_and_other_files_are_counted(copy, imagenet):
    wnids = dict(imagenet.images["train"])
    first = min(wnids)
    inner = {f"./{wnid}.tar": tar({f"./{name}": data for name, data in files.items()})
             for wnid, files in wnids.items()}
    inner[f"./{first}.tar"] = tar({f"./{first}_1.JPEG": b"1", f"./._{first}_1.JPEG": b"", "./notes.txt": b""})
    replace(copy / TRAIN, tar({**inner, "README": b"", ".hidden": b""}))
    source = open_source(copy, "train")
    assert source.ignored == 2 and source.samples[0].filename == f"{first}/{first}_1.JPEG"


def test_a_class_list_of_ones_own_takes_the_place_of_imagenets(tmp_path, imagenet):
    few = sorted(imagenet.images["train"])[:3]
    (tmp_path / TRAIN).write_bytes(tar({f"{wnid}.tar": tar(imagenet.images["train"][wnid]) for wnid in few}))
    source = open_source(tmp_path, "train", [few[2], few[0], few[1]])
    assert [label for _, label, *_ in contents(source)] == [1, 2, 2, 0]
    with pytest.raises(DataError, match=f"classes than the 3 of the class list: 'n00000000' is missing and '{few[1]}'"):
        open_source(tmp_path, "train", [few[0], few[2], "n00000000"])
    with pytest.raises(DataError, match=r"other classes than the 1000 of ImageNet-1k: .* and 992 more are missing; "
                                        "complete it, or give its own list with --classes"):
        open_source(tmp_path, "train")
    with pytest.raises(DataError, match="'n1' is missing and 'n2', 'n3' are not in the list"):
        class_list.check_classes(["n0", "n2", "n3"], ["n0", "n1"], "it")


def test_without_timm_the_list_must_be_given(monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "path_importer_cache", {})
    for name in [name for name in sys.modules if name == "timm"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(DataError, match="no timm with data/_info/imagenet_synsets.txt, .*--classes"):
        class_list.imagenet_classes()


@pytest.mark.parametrize("split", ["test", "trainval"])
def test_a_split_without_labels_or_archive_is_refused(split, root):
    with pytest.raises(DataError, match=f"is not the archive of split '{split}'.*the test images have no labels"):
        read_archive(root / TRAIN, split)
    with pytest.raises(DataError, match=f"is not the archive of split '{split}'.*the test images have no labels"):
        open_source(root, split)


@pytest.mark.parametrize("left", ["nothing", "flat", "inner tars"])
def test_archives_beside_a_folder_that_was_half_unpacked_are_read(left, copy, root, imagenet):
    for split in ("train", "val"):
        (copy / split).mkdir()
        if left == "flat":
            (copy / split / "ILSVRC2012_val_00000001.JPEG").touch()
        elif left == "inner tars":
            (copy / split / "n01440764.tar").write_bytes(tar(imagenet.images["train"]["n01440764"]))
        assert contents(open_source(copy, split)) == contents(open_source(root, split))


def test_a_missing_archive_or_devkit_is_named_with_its_place(copy):
    (copy / DEVKIT).unlink()
    with pytest.raises(DataError, match=f"no such file: {copy / DEVKIT}, which has the labels of {VAL}"):
        open_source(copy, "val")
    (copy / VAL).unlink()
    with pytest.raises(DataError, match=f"no such folder: {copy}/val; .* has '{TRAIN}' .*in SOURCE/{VAL} with"):
        open_source(copy, "val")


@pytest.mark.parametrize("cut", [100, 700, 3000, 1 << 20])
def test_an_archive_that_is_cut_off_is_refused_by_name_and_byte(cut, copy, root):
    for name, split in ((TRAIN, "train"), (VAL, "val")):
        replace(copy / name, (root / name).read_bytes()[:cut])
        with pytest.raises(DataError, match=rf"{name}.*(cut off|has left).*copy or download it again"):
            open_source(copy, split)


def test_a_damaged_inner_tar_is_named_with_the_byte_in_it(copy, imagenet):
    files = imagenet.images["train"]
    wnid = sorted(files)[700]
    for broken, message in (
            (tar(files[wnid])[:512], f"{wnid}.tar in .*{TRAIN}: the member at byte 0"),
            (b"not a tar".ljust(1024), f"{wnid}.tar in .*{TRAIN} is damaged or no tar: at byte 0"),
            (tar({})[:1024], f"{wnid}.tar in .*{TRAIN} has no images"),
            (b"", f"{wnid}.tar in .*{TRAIN} is cut off at byte 0"),
            (tar(files[wnid]).replace(b"0000644", b"0000640", 1), f"{wnid}.tar in .*{TRAIN} is damaged or no tar"),
            (tar({f"{wnid}_1.JPEG": b"1", f"x/{wnid}_1.JPEG": b"2"}),
             f"{wnid}.tar in .*{TRAIN} has '{wnid}_1.JPEG' twice, at bytes 0 and 1024")):
        inner = {f"{name}.tar": broken if name == wnid else tar(images) for name, images in files.items()}
        replace(copy / TRAIN, tar(inner))
        with pytest.raises(DataError, match=message):
            open_source(copy, "train")


def test_other_classes_than_imagenets_are_named(copy, imagenet):
    files = {f"{wnid}.tar": tar(images) for wnid, images in imagenet.images["train"].items()}
    first = min(files)
    files["n99999999.tar"] = files.pop(first)
    replace(copy / TRAIN, tar(files))
    with pytest.raises(DataError, match=rf"{TRAIN} has other classes than the 1000 of ImageNet-1k: '{first[:-4]}' is "
                                        "missing and 'n99999999' is not in the list"):
        open_source(copy, "train")
    wnids = tuple("n99999999" if wnid == first[:-4] else wnid for wnid in imagenet.wnids)
    write_devkit(copy, meta_mat(wnids), ground_truth(imagenet))
    with pytest.raises(DataError, match=f"{DEVKIT} has other classes than .*'n99999999' is not in the list"):
        open_source(copy, "val")


def edited(truth, line, value):
    lines = truth.split(b"\n")
    lines[line - 1] = value
    return b"\n".join(lines)


@pytest.mark.parametrize("edit, message", [
    (lambda truth: truth[:truth.rindex(b"\n", 0, -1) + 1], r"has 1200 images, but the ground truth .* has 1199 lines"),
    (lambda truth: truth + b"7\n", r"has 1200 images, but the ground truth .* has 1201 lines"),
    (lambda truth: edited(truth, 17, b"0"), r"line 17 is '0', expected the ILSVRC2012_ID of one of the 1000"),
    (lambda truth: edited(truth, 17, b"1001"), r"line 17 is '1001'"),  # an inner node
    (lambda truth: edited(truth, 3, b"-1"), r"line 3 is '-1'"),
    (lambda truth: edited(truth, 3, b""), r"line 3 is ''"),
    (lambda truth: edited(truth, 3, b"9" * 5000), r"line 3 is '9{50}'"),
    (lambda truth: edited(truth, 3, b"\xff"), r"line 3 is '\ufffd'"),
    (lambda truth: b"", r"line 1 is ''"),
    (lambda truth: None, r"has no ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt"),
])
def test_a_ground_truth_that_cannot_be_is_refused(edit, message, copy, imagenet):
    write_devkit(copy, meta_mat(imagenet.wnids), edit(ground_truth(imagenet)))
    with pytest.raises(DataError, match=message):
        open_source(copy, "val")


def test_lines_may_end_as_on_windows(copy, imagenet, root):
    write_devkit(copy, meta_mat(imagenet.wnids, compressed=False), ground_truth(imagenet).replace(b"\n", b"\r\n"))
    assert contents(open_source(copy, "val")) == contents(open_source(root, "val"))


@pytest.mark.parametrize("meta, message", [
    (None, "has no ILSVRC2012_devkit_t12/data/meta.mat"),
    (b"", "meta.mat in .* is damaged .*; copy or download it again"),
    (bytes(9 << 20), "has no ILSVRC2012_devkit_t12/data/meta.mat, or one of more than"),
])
def test_a_meta_mat_that_cannot_be_is_refused(meta, message, copy, imagenet):
    write_devkit(copy, meta, ground_truth(imagenet))
    with pytest.raises(DataError, match=message):
        open_source(copy, "val")


def test_two_synsets_of_one_number_or_name_are_refused(copy, imagenet):
    write_devkit(copy, meta_mat((*imagenet.wnids[:-1], imagenet.wnids[0])), ground_truth(imagenet))
    with pytest.raises(DataError, match="1000 synsets without children, some of them with one ILSVRC2012_ID or WNID"):
        open_source(copy, "val")


def test_a_devkit_that_is_no_gz_cut_off_flipped_or_endless_is_refused(copy, root):
    whole = (root / DEVKIT).read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xff
    bomb = io.BytesIO()
    with gzip.open(bomb, "wb", compresslevel=1) as file:
        for _ in range(129):
            file.write(bytes(1 << 20))
    for data, message in ((b"text" * 1000, "is damaged .Not a gzipped file"), (whole[:-5000], "is damaged"),
                          (bytes(flipped), "is damaged"), (b"", "is cut off at byte 0"),
                          (gzip.compress(b"no tar".ljust(2048)), "is damaged or no tar"),
                          (bomb.getvalue(), "unpacks to more than 134217728 bytes")):
        replace(copy / DEVKIT, data)
        with pytest.raises(DataError, match=f"{DEVKIT} ({message})"):
            open_source(copy, "val")


@pytest.mark.parametrize("name", [TRAIN, VAL, DEVKIT])
def test_a_pipe_a_folder_or_a_device_is_no_archive(name, copy):
    (copy / name).unlink()
    os.mkfifo(copy / name)
    split = "train" if name == TRAIN else "val"
    with pytest.raises(DataError, match=f"cannot read {copy / name}: it is no regular file"):
        open_source(copy, split)
    (copy / name).unlink()
    (copy / name).symlink_to("/dev/zero")
    with pytest.raises(DataError, match=f"cannot read {copy / name}: it is no regular file"):
        open_source(copy, split)


def test_members_without_end_fill_no_memory(copy, monkeypatch):
    monkeypatch.setattr("vir.data.sources.archives._MAX_MEMBERS", 100)
    replace(copy / VAL, tar({f"{i}.JPEG": b"" for i in range(101)}))
    with pytest.raises(DataError, match="has more than 100 members: it is no archive of ImageNet"):
        open_source(copy, "val")


def test_the_builder_of_these_archives_is_as_official_ones_are(root, imagenet):
    """IDs are no labels, the order in the tar is none of names, numbers are kept in the smallest types."""
    with tarfile.open(root / VAL) as archive:
        names = archive.getnames()
    assert names != sorted(names) and imagenet.wnids != sorted(imagenet.wnids)
    data = meta_mat(imagenet.wnids)
    assert data[126:128] == b"IM" and struct.unpack_from("<I", data, 128) == (15,)
    assert b"n01440764" in zlib.decompress(data[136:]) and len(flat(imagenet)) == 1200
