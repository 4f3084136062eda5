"""Files that are either as they were or complete."""

import hashlib

import pytest

from vir import files


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_is_written_takes_the_place_when_the_block_ends(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with files.replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old" and temporary.parent == tmp_path  # a rename needs the same file system
    assert path.read_text() == "new" and names(tmp_path) == ["a.txt"]


def test_an_error_in_the_block_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), files.replacing(path) as temporary:
        temporary.write_text("half")
        1 / 0
    assert path.read_text() == "old" and names(tmp_path) == ["a.txt"]


def test_a_replacement_that_fails_leaves_no_temporary_file(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    with pytest.raises(OSError), files.replacing(tmp_path / "a") as temporary:
        temporary.write_text("a folder is in the way")
    assert names(tmp_path) == ["a"]


def test_a_block_that_writes_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), files.replacing(tmp_path / "a.txt"):
        pass
    assert names(tmp_path) == []


def test_text_is_utf_8(tmp_path):
    files.replace_text(tmp_path / "a.txt", "dög\n")
    assert (tmp_path / "a.txt").read_bytes() == b"d\xc3\xb6g\n"


def test_files_and_folders_can_be_flushed_but_not_what_is_not_there(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    files.flush(tmp_path / "a.txt")
    files.flush(tmp_path)
    with pytest.raises(FileNotFoundError):
        files.flush(tmp_path / "b.txt")


@pytest.mark.parametrize("size", [0, 1, (1 << 22) - 1, 1 << 22, (1 << 22) + 1])     # around the block that is read
def test_the_checksum_is_that_of_the_whole_file(tmp_path, size):
    content = bytes(range(256)) * (size // 256) + b"\1" * (size % 256)
    (tmp_path / "a").write_bytes(content)
    assert files.sha256(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def test_the_checksum_of_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        files.sha256(tmp_path / "a")
