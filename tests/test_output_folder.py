"""Folders of several files: all of them, or what was there."""

import errno
import os
import re
from contextlib import nullcontext
from pathlib import Path

import pytest

from support.small_disk import small_disk  # noqa: F401, a fixture
from vir.errors import DataError, SettingsError
from vir.output_folder import check_folder, filling

NAMES = ["model.data", "model", "index"]


def contents(folder):
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


def test_files_take_the_place_of_all_old_ones_and_others_stay(tmp_path):
    folder = tmp_path / "out"
    for text, made in (("old", NAMES), ("new", NAMES[1:])):
        with filling(folder, NAMES) as temporary:
            assert temporary.parent == folder and temporary.name.startswith(".")  # which may be a disk of its own
            for name in made:
                (temporary / name).write_text(text)
            if text == "old":
                continue
            (folder / "mine.txt").write_text("mine")
            assert {path.name for path in folder.iterdir()} == {*NAMES, "mine.txt", temporary.name}
    assert contents(folder) == {"model": "new", "index": "new", "mine.txt": "mine"}
    assert list(tmp_path.iterdir()) == [folder]


def test_after_an_error_nothing_has_changed(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "index").write_text("old")
    with pytest.raises(ZeroDivisionError):
        with filling(tmp_path / "out", NAMES) as temporary:
            (temporary / "index").write_text("new")
            1 / 0
    assert contents(tmp_path / "out") == {"index": "old"} and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("new_parents", ["", "a/b"])
def test_after_an_error_folders_that_were_made_are_gone(tmp_path, new_parents):
    with pytest.raises(FileNotFoundError, match="nowhere"):  # of the block: told by whom it concerns
        with filling(tmp_path / new_parents / "out", NAMES) as temporary:
            (temporary / "model").write_text("new")
            (tmp_path / "nowhere").read_text()
    assert list(tmp_path.iterdir()) == []


def test_a_kill_leaves_no_mixture_with_the_last_file(tmp_path, monkeypatch):
    """At each of the steps, before it is done: three names are removed, three come."""
    left = []

    def counted(act):
        def step(*args, **how):
            nonlocal steps
            steps -= 1
            if not steps:
                left.append(contents(folder))
                raise KeyboardInterrupt
            return act(*args, **how)
        return step

    with monkeypatch.context() as patch:
        for number in range(1, 8):
            folder = tmp_path / str(number)
            folder.mkdir()
            for name in NAMES:
                (folder / name).write_text("old")
            with pytest.raises(KeyboardInterrupt) if number < 7 else nullcontext():
                with filling(folder, NAMES) as temporary:
                    for name in NAMES:
                        (temporary / name).write_text("new")
                    steps = number
                    patch.setattr("vir.output_folder.os.replace", counted(os.replace))
                    patch.setattr("vir.output_folder.Path.unlink", counted(Path.unlink))
            patch.undo()
    old, new = (dict.fromkeys(NAMES, text) for text in ("old", "new"))
    assert len(left) == 6 and left[0] == old and contents(folder) == new
    assert all("index" not in found for found in left[1:])


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="cannot write .*/file/out: .*; free some space or choose another folder"):
        with filling(tmp_path / "file" / "out", NAMES):
            pass


def test_a_folder_may_be_a_disk_of_its_own(small_disk):  # noqa: F811
    with filling(small_disk, NAMES) as temporary:
        (temporary / "index").write_text("new")
        assert list(small_disk.parent.iterdir()) == [small_disk]  # which may be all that can be written
    assert contents(small_disk) == {"index": "new"}


def test_the_root_is_a_folder_too(monkeypatch):
    def cannot(*args, **how):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("vir.output_folder.Path.mkdir", cannot)
    with pytest.raises(DataError, match="cannot write /: .*Read-only file system"):
        with filling(Path("/"), NAMES):
            pass


def test_what_is_there_already_is_told_at_the_door(tmp_path):
    check_folder(tmp_path / "out", NAMES, force=False)
    (tmp_path / "model").write_text("old")
    check_folder(tmp_path, NAMES, force=True)
    with pytest.raises(SettingsError, match=re.escape(f"{tmp_path} has model already; give another folder, or --f")):
        check_folder(tmp_path, NAMES, force=False)
    (tmp_path / "index").mkdir()
    with pytest.raises(SettingsError, match=re.escape(f"{tmp_path} has index, which is no regular file; give another")):
        check_folder(tmp_path, NAMES, force=True)
    with pytest.raises(SettingsError, match="model is a file; give the name of a folder"):
        check_folder(tmp_path / "model", NAMES, force=True)
