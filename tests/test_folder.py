"""Listing an image folder: labels, keys, and what is refused."""

from pathlib import Path

import pytest

from vir.data.sources.choose import open_source
from vir.data.sources.folder import read_class_list
from vir.data.sources.listing import WHOLE, make_key
from vir.errors import DataError


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def test_labels_follow_sorted_class_names_and_samples_are_sorted(tmp_path):
    touch(tmp_path, "train/n02/n02_7.JPEG", "train/n01/n01_9.jpeg", "train/n01/n01_10.PNG", "train/n01/x.WebP")
    listing = open_source(tmp_path, "train")
    assert listing.classes == ("n01", "n02")
    assert [(sample.filename, sample.label, sample.key) for sample in listing.samples] == [
        ("n01/n01_10.PNG", 0, "n01_10"), ("n01/n01_9.jpeg", 0, "n01_9"),
        ("n01/x.WebP", 0, "n01_x"), ("n02/n02_7.JPEG", 1, "n02_7")]


def test_other_files_are_counted_hidden_ones_are_not_and_links_are_followed(tmp_path):
    touch(tmp_path, "train/a/1.jpg", "train/a/notes.txt", "train/a/inner/2.jpg", "train/a/.DS_Store", "train/a/._1.jpg",
          "train/.cache/3.jpg", "train/README", "elsewhere/4.jpg")
    (tmp_path / "train/b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "train/a/5.jpg").symlink_to(tmp_path / "elsewhere/4.jpg")
    (tmp_path / "train/a/6.jpg").symlink_to(tmp_path / "gone.jpg")  # listed, so that reading it is an error
    listing = open_source(tmp_path, "train")
    assert [sample.filename for sample in listing.samples] == ["a/1.jpg", "a/5.jpg", "a/6.jpg", "b/4.jpg"]
    assert listing.ignored == 2


@pytest.mark.parametrize("class_name, filename, key", [
    ("n01440764", "n01440764_3778.JPEG", "n01440764_3778"),
    ("n01440764", "ILSVRC2012_val_00000293.JPEG", "n01440764_ILSVRC2012_val_00000293"),
    ("v1.0", "v1.0_a.b.jpg", "v1_0_a_b"),
    ("..", "a..jpg", "___a_"),
    ("a", "new\nline\\.jpg", "a_new_line_"),
    ("ab", "abc.jpg", "ab_abc"),
])
def test_keys(class_name, filename, key):
    assert make_key(class_name, filename) == key


def test_colliding_keys_become_unique_in_sorted_order(tmp_path):
    touch(tmp_path, "train/a/1.jpg", "train/a/1.png", "train/a/1.x.jpg", "train/a/1_x.jpg", "train/a/1-1.jpg",
          "train/a/b_c.jpg", "train/a_b/c.jpg")
    keys = {sample.filename: sample.key for sample in open_source(tmp_path, "train").samples}
    assert keys == {"a/1-1.jpg": "a_1-1", "a/1.jpg": "a_1", "a/1.png": "a_1-2", "a/1.x.jpg": "a_1_x",
                    "a/1_x.jpg": "a_1_x-1", "a/b_c.jpg": "a_b_c", "a_b/c.jpg": "a_b_c-1"}


def test_a_split_with_fewer_classes_keeps_the_labels_of_the_list(tmp_path):
    touch(tmp_path, "val/a/1.jpg", "val/c/2.jpg")
    listing = open_source(tmp_path, "val", ["a", "b", "c"])
    assert [sample.label for sample in listing.samples] == [0, 2] and listing.classes == ("a", "b", "c")


@pytest.mark.parametrize("files, split, classes, message", [
    (["val/a/1.jpg"], "train", None, r"no such folder: .*train; .* has 'val'"),
    (["train/1.jpg", "train/2.jpg"], "train", None, r"train has no class folders; .*found '1.jpg', '2.jpg'"),
    (["train/a/1.jpg", "train/b/1.txt"], "train", None, r"class folders without images in .*train: 'b'"),
    (["train/a/1.jpg", "train/b/1.jpg"], "train", ["a"], r"the class list of 1 classes lacks: 'b'; .*--classes"),
    ([f"train/a/{'é' * 60}.jpg"], "train", None, r"a key of 122 bytes, the limit is 100; rename"),
    (["train/a/\udcff.jpg"], "train", None, r"is not UTF-8"),
])
def test_refusals_name_the_value_and_the_way_out(tmp_path, files, split, classes, message):
    touch(tmp_path, *files)
    with pytest.raises(DataError, match=message):
        open_source(tmp_path, split, classes)


def test_any_folder_of_classes_is_a_source_without_splits(tmp_path):
    touch(tmp_path, "dogs/1.jpg", "dogs/notes.txt", "cats/2.PNG", ".cache/3.jpg", "README")
    for split in ("train", "val", "everything"):
        source = open_source(tmp_path, split)
        assert [(sample.path, sample.label) for sample in source.samples] == [("cats/2.PNG", 0), ("dogs/1.jpg", 1)]
        assert source.root == tmp_path and source.ignored == 1
    assert [sample.label for sample in open_source(tmp_path, "train", ["dogs", "cats"]).samples] == [1, 0]
    touch(tmp_path, "train/a/4.jpg")
    assert [sample.filename for sample in open_source(tmp_path, "train").samples] == ["a/4.jpg"]


def test_class_folders_are_taken_before_the_tar_they_were_unpacked_from(tmp_path):
    touch(tmp_path, "train/a/1.jpg", "train/a.tar", "ILSVRC2012_img_train.tar")
    assert open_source(tmp_path, "train").kind == "image folder"


@pytest.mark.parametrize("files", [["train/a/1.jpg", "val/a/1.jpg"], ["train/1.jpg", "val/2.jpg"], ["a.txt"], []])
def test_a_mistyped_split_is_refused_with_what_is_there_and_what_was_looked_for(files, tmp_path):
    touch(tmp_path, *files)
    there = ", ".join(sorted({repr(name.split("/")[0]) for name in files})) or "nothing"
    with pytest.raises(DataError, match=f"no such folder: {tmp_path}/trian; {tmp_path} has {there} .images are "
                                        "expected at SOURCE/SPLIT/CLASS/IMAGE, in SOURCE/ILSVRC/Data/CLS-LOC/trian, in "
                                        "tars in SOURCE/SPLIT or SOURCE, or at SOURCE/CLASS/IMAGE.$"):
        open_source(tmp_path, "trian")
    (tmp_path / "x").mkdir()
    with pytest.raises(DataError, match="in SOURCE/ILSVRC2012_img_train.tar, in"):
        open_source(tmp_path / "x", "train")


def test_a_file_that_is_no_tar_is_refused(tmp_path):
    touch(tmp_path, "x.zip", "x.tar")
    with pytest.raises(DataError, match="x.zip is neither a folder nor a tar; give a folder, ILSVRC2012_img_train.tar"):
        open_source(tmp_path / "x.zip", "train")
    with pytest.raises(DataError, match="x.tar is cut off at byte 0"):
        open_source(tmp_path / "x.tar", "train")
    with pytest.raises(DataError, match="neither a folder nor a tar"):
        open_source(Path("/dev/null"), "train")
    with pytest.raises(DataError, match="cannot read .*: File name too long"):
        open_source(tmp_path, "x" * 300)


def test_sizes_are_asked_where_they_are_needed(tmp_path):
    touch(tmp_path, "train/a/1.jpg", "train/a/2.jpg")
    (tmp_path / "train/a/2.jpg").write_bytes(b"12345")
    (tmp_path / "train/a/3.jpg").symlink_to("gone")
    sized = open_source(tmp_path, "train", sized=True)
    assert sized.sizes.tolist() == [0, 5, 0] and sized.sizes.sum() == 5
    plain = open_source(tmp_path, "train")
    assert [sample.size for sample in plain.samples] == [WHOLE] * 3 and plain.sizes is None


def test_a_missing_source_is_named(tmp_path):
    with pytest.raises(DataError, match=f"no such folder: {tmp_path / 'gone'}"):
        open_source(tmp_path / "gone", "train")


def test_class_lists(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("zebra\n\n apple \n")
    assert read_class_list(path) == ("zebra", "apple")
    path.write_text("a\na\n")
    with pytest.raises(DataError, match="names classes twice: 'a'"):
        read_class_list(path)
    path.write_text("\n")
    with pytest.raises(DataError, match="is empty"):
        read_class_list(path)
    with pytest.raises(DataError, match="cannot read the class list"):
        read_class_list(tmp_path / "gone.txt")
