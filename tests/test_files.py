"""Files that are either as they were or complete."""

import errno
import hashlib
import os
import resource
import stat
from contextlib import contextmanager

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


def failing(monkeypatch, name, code, of_folders):
    """Let os.fsync or os.open fail for folders, or for all else."""
    works = getattr(os, name)

    def attempt(what, *others):
        if stat.S_ISDIR(os.stat(what).st_mode) == of_folders:
            raise OSError(code, os.strerror(code))
        return works(what, *others)

    monkeypatch.setattr(os, name, attempt)
    monkeypatch.setattr(files, "_warned", set())


@pytest.mark.parametrize("name, code", [("fsync", errno.EINVAL), ("fsync", errno.EBADF), ("fsync", errno.ENOTSUP),
                                        ("open", errno.EACCES), ("open", errno.EISDIR)])
def test_a_file_system_that_flushes_no_folders_is_told_once_and_ends_nothing(
        tmp_path, monkeypatch, caplog, name, code):
    failing(monkeypatch, name, code, of_folders=True)
    for text in ("old", "new"):
        files.replace_text(tmp_path / "a.txt", text)
    assert (tmp_path / "a.txt").read_text() == "new" and names(tmp_path) == ["a.txt"]
    assert caplog.messages == [f"{tmp_path}: this file system flushes no folders ({os.strerror(code)}): a power cut "
                               "can take back what was written last"]


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("of_folders", [False, True])
def test_what_the_disk_says_is_an_error(tmp_path, monkeypatch, caplog, code, of_folders):
    failing(monkeypatch, "fsync", code, of_folders)
    with pytest.raises(OSError) as error:
        files.replace_text(tmp_path / "a.txt", "new")
    assert error.value.errno == code and not caplog.messages


@pytest.mark.parametrize("name, code", [("fsync", errno.EINVAL), ("fsync", errno.EBADF), ("open", errno.EACCES)])
def test_a_file_that_cannot_be_flushed_is_an_error(tmp_path, monkeypatch, caplog, name, code):
    (tmp_path / "a.txt").write_text("a")
    failing(monkeypatch, name, code, of_folders=False)
    with pytest.raises(OSError) as error:
        files.flush(tmp_path / "a.txt")
    assert error.value.errno == code and not caplog.messages


def test_a_trial_leaves_everything_as_it_was(tmp_path):
    (tmp_path / "old.json").write_text("old")
    before = os.stat(tmp_path / "old.json")
    for name in ("new.json", "old.json"):
        files.try_to_write(tmp_path / name)
    assert names(tmp_path) == ["old.json"] and (tmp_path / "old.json").read_text() == "old"
    assert os.stat(tmp_path / "old.json").st_mtime_ns == before.st_mtime_ns


def test_where_others_write_too_no_link_of_theirs_leads_to_another_file(tmp_path):
    """Neither from a temporary name that they could foresee nor from that of a lock."""
    (tmp_path / "mine").write_text("mine")
    for name in (f".new.json.{os.getpid()}.tmp", "lock"):
        (tmp_path / name).symlink_to("mine")
    files.try_to_write(tmp_path / "new.json")
    with pytest.raises(OSError, match="lock"):
        files.lock(tmp_path / "lock")
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_trial_tells_what_is_in_the_way(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for path, code in ((tmp_path / "none" / "a", errno.ENOENT), (tmp_path / "file" / "a", errno.ENOTDIR),
                       (tmp_path / "folder", errno.EISDIR), (tmp_path / "pipe", errno.EINVAL),
                       (tmp_path / ("a" * 300), errno.ENAMETOOLONG)):
        with pytest.raises(OSError) as error:
            files.try_to_write(path)
        assert error.value.errno == code
    assert names(tmp_path) == ["file", "folder", "pipe"] and names(tmp_path / "folder") == []


def test_a_trial_on_a_full_disk_fails_and_leaves_nothing(tmp_path):
    with files_may_not_grow(), pytest.raises(OSError) as error:
        files.try_to_write(tmp_path / "a.json")
    assert error.value.errno == errno.EFBIG and names(tmp_path) == []


@contextmanager
def files_may_not_grow():
    """A full disk, for this process."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))  # SIGXFSZ is ignored by Python
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("size", [0, 1, (1 << 22) - 1, 1 << 22, (1 << 22) + 1])     # around the block that is read
def test_the_checksum_is_that_of_the_whole_file(tmp_path, size):
    content = bytes(range(256)) * (size // 256) + b"\1" * (size % 256)
    (tmp_path / "a").write_bytes(content)
    assert files.sha256(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def test_the_checksum_of_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        files.sha256(tmp_path / "a")
