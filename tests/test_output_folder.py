"""Folders of several files: all of them, or what was there."""

import re

import pytest

from vir.errors import DataError, SettingsError
from vir.output_folder import check_folder, filling

NAMES = ["model.data", "model", "index"]


def contents(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_files_take_the_place_of_all_old_ones_and_others_stay(tmp_path):
    folder = tmp_path / "out"
    for text, made in (("old", NAMES), ("new", NAMES[1:])):
        with filling(folder, NAMES) as temporary:
            assert temporary.parent == tmp_path and temporary.name.startswith(".out.")
            for name in made:
                (temporary / name).write_text(text)
            if text == "old":
                assert not folder.exists()
                continue
            (folder / "mine.txt").write_text("mine")
            assert contents(folder) == dict.fromkeys(NAMES, "old") | {"mine.txt": "mine"}
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


def test_a_kill_leaves_no_mixture_with_the_last_file(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    for name in NAMES:
        (tmp_path / "out" / name).write_text("old")

    def killed(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr("vir.output_folder.os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        with filling(tmp_path / "out", NAMES) as temporary:
            (temporary / "model").write_text("new")
    assert "index" not in contents(tmp_path / "out")


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="cannot write .*/file/out: .*; free some space or choose another folder"):
        with filling(tmp_path / "file" / "out", NAMES):
            pass


def test_what_is_there_already_is_told_at_the_door(tmp_path):
    check_folder(tmp_path / "out", NAMES, force=False)
    (tmp_path / "model").write_text("old")
    check_folder(tmp_path, NAMES, force=True)
    with pytest.raises(SettingsError, match=re.escape(f"{tmp_path} has model already; give another folder, or --f")):
        check_folder(tmp_path, NAMES, force=False)
    with pytest.raises(SettingsError, match="model is a file; give the name of a folder"):
        check_folder(tmp_path / "model", NAMES, force=True)
