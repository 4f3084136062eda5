"""The claim to a run's folder, in a world of one; test_distributed.py has one of two."""

from pathlib import Path

import pytest
import torch

from vir import run_folder
from vir.distributed import World
from vir.errors import SettingsError

WORLD = World(rank=0, size=1, device=torch.device("cpu"))


def test_the_folder_is_made_with_its_parents_and_the_claim_leaves_nothing_in_it(tmp_path):
    folder = tmp_path / "runs" / "a"
    with run_folder.claim(folder, WORLD):
        assert folder.is_dir() and not list(folder.iterdir())


def test_a_second_run_is_kept_out_until_the_first_has_ended(tmp_path):
    with run_folder.claim(tmp_path, WORLD):
        with pytest.raises(SettingsError, match=f"--output {tmp_path}: another run is writing there"):
            with run_folder.claim(tmp_path, WORLD):
                pass
        with run_folder.claim(tmp_path / "b", WORLD):  # another folder is free
            pass
    with run_folder.claim(tmp_path, WORLD):
        pass


def test_a_run_that_fails_gives_its_claim_up(tmp_path):
    with pytest.raises(ZeroDivisionError), run_folder.claim(tmp_path, WORLD):
        1 / 0
    with run_folder.claim(tmp_path, WORLD):
        pass


def test_what_is_in_the_folder_stays(tmp_path):
    (tmp_path / run_folder.CONFIG).write_text("kept")
    with run_folder.claim(tmp_path, WORLD):
        pass
    assert (tmp_path / run_folder.CONFIG).read_text() == "kept"


@pytest.mark.parametrize("inside", ["", "below"])
def test_a_file_in_the_place_of_the_folder_is_told(tmp_path, inside):
    (tmp_path / "a").write_text("a file")
    folder = tmp_path / "a" / inside if inside else tmp_path / "a"
    with pytest.raises(SettingsError, match=f"--output {folder} cannot be made: .*; give another folder"):
        with run_folder.claim(folder, WORLD):
            pass


def test_a_folder_in_which_nothing_can_be_written_is_told():
    with pytest.raises(SettingsError, match="--output /proc/self cannot be written to: .*; give another folder"):
        with run_folder.claim(Path("/proc/self"), WORLD):  # not even root can
            pass
