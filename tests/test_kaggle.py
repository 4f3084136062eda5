"""Kaggle's layout of ImageNet gives what the official archives give."""

import os

import pytest

from support.imagenet import contents, tiny_imagenet, write_archives, write_kaggle
from vir.data.sources.choose import open_source
from vir.data.sources.kaggle import SOLUTION, kaggle_images
from vir.errors import DataError

HEADER = "ImageId,PredictionString\n"


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    root = tmp_path_factory.mktemp("both")
    imagenet = tiny_imagenet()
    write_archives(root / "archives", imagenet)
    write_kaggle(root / "kaggle", imagenet)
    return root


@pytest.mark.parametrize("split", ["train", "val"])
def test_kaggles_layout_gives_what_the_archives_give(split, both):
    source = open_source(both / "kaggle", split)
    archive = open_source(both / "archives", split)
    assert contents(source) == contents(archive) and source.classes == archive.classes
    assert source.ignored == 0 and source.sizes is None
    assert source.kind == "Kaggle's ImageNet"
    for folder in ("ILSVRC", "ILSVRC/Data/CLS-LOC"):
        assert contents(open_source(both / "kaggle" / folder, split)) == contents(source)
    sized = open_source(both / "kaggle", split, sized=True)
    assert sized.sizes.tolist() == [len(data) for *_, data in contents(archive)]
    assert sized.sizes.tolist() == archive.sizes.tolist()


@pytest.fixture
def small(tmp_path):
    """Two classes, two images for validation."""
    for name in ("train/n1/n1_1.JPEG", "train/n2/n2_1.JPEG", "val/v1.JPEG", "val/v2.JPEG", "test/t1.JPEG"):
        path = tmp_path / "ILSVRC" / "Data" / "CLS-LOC" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (tmp_path / SOLUTION).write_text(HEADER + "v2,n1 1 2 3 4 n1 5 6 7 8\nv1,n2 1 2 3 4\n")
    return tmp_path


def test_the_csv_may_lie_in_ilsvrc_and_begin_with_a_mark(small):
    before = contents(open_source(small, "val", ["n2", "n1"]))
    assert before == [("n1_v2", 1, "n1/v2.JPEG", b"val/v2.JPEG"), ("n2_v1", 0, "n2/v1.JPEG", b"val/v1.JPEG")]
    text = (small / SOLUTION).read_text()
    (small / SOLUTION).unlink()
    (small / "ILSVRC" / SOLUTION).write_text("\ufeff" + text.replace("\n", "\r\n"))
    assert contents(open_source(small, "val", ["n2", "n1"])) == before
    assert contents(open_source(small / "ILSVRC", "val", ["n2", "n1"])) == before


def test_images_that_were_moved_into_class_folders_need_no_csv(small):
    val = kaggle_images(small) / "val"
    before = contents(open_source(small, "val", ["n1", "n2"]))
    for name, wnid in (("v1.JPEG", "n2"), ("v2.JPEG", "n1")):
        (val / wnid).mkdir()
        (val / name).rename(val / wnid / name)
    (small / SOLUTION).unlink()
    assert contents(open_source(small, "val", ["n1", "n2"])) == before


def test_other_files_among_the_images_are_counted(small):
    (kaggle_images(small) / "val" / "notes.txt").touch()
    (kaggle_images(small) / "val" / ".hidden").touch()
    assert open_source(small, "val", ["n1", "n2"]).ignored == 1


@pytest.mark.parametrize("split, classes, message", [
    ("test", ["n1", "n2"], r"test has no class folders, and LOC_val_solution.csv tells the labels of val alone: the "
                           r"images of split 'test' have no labels"),
    ("tset", ["n1", "n2"], r"no such folder: .*CLS-LOC/tset; the splits with labels are train and val"),
    ("train", None, r"CLS-LOC/train has other classes than the 1000 of ImageNet-1k: .* missing and 'n1', 'n2' are not"),
    ("val", ["n1", "n2", "n3"], r"solution.csv has other classes than the 3 of the class list: 'n3' is missing"),
    ("val", ["n1"], r"'n2' is not in the list"),
])
def test_other_splits_and_classes_are_refused(split, classes, message, small):
    with pytest.raises(DataError, match=message):
        open_source(small, split, classes)


@pytest.mark.parametrize("text, message", [
    (None, r"no such file: .*/LOC_val_solution.csv, which has the labels of .*CLS-LOC/val; download it"),
    ("", r"begins with '' instead of 'ImageId,PredictionString'"),
    ("ImageId\nv1,n1\n", r"begins with 'ImageId' instead"),
    (HEADER, r"has no line for images of .*/val: 'v1', 'v2'"),
    (HEADER + "v1,n1 1 2 3 4\n", r"has no line for images of .*/val: 'v2'; download the csv again"),
    (HEADER + "v1,n1\nv2,n2\nv3,n1\n", r"val lacks images that .*csv has a line for: 'v3'; copy or unpack"),
    (HEADER + "v1,n1\nv2\n", r"line 3 is 'v2', expected 'IMAGE,CLASS and boxes'"),
    (HEADER + "v1, \nv2,n2\n", r"line 2 is 'v1, '"),
    (HEADER + ",n1\nv2,n2\n", r"line 2 is ',n1'"),
    (HEADER + "v1,n1\n\nv2,n2\n", r"line 3 is ''"),
    (HEADER + "v1,n1,n2\nv2,n2\n", r"line 2 is 'v1,n1,n2'"),
    (HEADER + "v1,n1\nv1,n2\nv2,n2\n", r"line 3 names 'v1' again"),
    (HEADER + '"v1,n1\nv2,n2\n', r"is damaged \(unexpected end of data\)"),
    (HEADER + "v1,n1 " + "1 " * 100000 + "\n", r"is damaged \(field larger than field limit"),
    (HEADER + "v1,n\udcff\nv2,n2", r"is damaged \('utf-8' codec can't decode"),
])
def test_a_csv_that_cannot_be_is_refused(text, message, small):
    if text is None:
        (small / SOLUTION).unlink()
    else:
        (small / SOLUTION).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=message):
        open_source(small, "val", ["n1", "n2"])


def test_a_pipe_or_a_file_without_end_is_no_csv(small):
    (small / SOLUTION).unlink()
    os.mkfifo(small / SOLUTION)
    with pytest.raises(DataError, match=f"cannot read .*{SOLUTION}: it is no regular file"):
        open_source(small, "val", ["n1", "n2"])
    (small / SOLUTION).unlink()
    (small / SOLUTION).touch()
    os.truncate(small / SOLUTION, 1 << 40)
    with pytest.raises(DataError, match=f"cannot read .*{SOLUTION}: it has 1099511627776 bytes"):
        open_source(small, "val", ["n1", "n2"])
