"""The claim to a run's folder, in a world of one; test_distributed.py has one of two."""

import errno
import fcntl
import os
from pathlib import Path

import pytest
import torch

from vir import files, run_folder
from vir.distributed import World
from vir.errors import SettingsError

WORLD = World(rank=0, size=1, device=torch.device("cpu"))


def test_the_folder_is_made_with_its_parents_and_the_claim_leaves_its_lock_file_alone_in_it(tmp_path):
    folder = tmp_path / "runs" / "a"
    found = []
    for _ in range(2):
        with run_folder.claim(folder, WORLD):
            found += [(path.name, path.stat().st_ino) for path in folder.iterdir()]
    found += [(path.name, path.stat().st_ino) for path in folder.iterdir()]
    assert {name for name, _ in found} == {run_folder.LOCK} and len(found) == 3 and len(set(found)) == 1


def test_a_claim_that_shall_not_stay_leaves_nothing_of_its_own(tmp_path):
    folder = tmp_path / "runs" / "a"
    with run_folder.claim(folder, WORLD, stays=False):
        assert (folder / run_folder.LOCK).is_file()
    assert list(tmp_path.iterdir()) == []
    (folder / "notes").mkdir(parents=True)
    with run_folder.claim(folder, WORLD, stays=False):
        pass
    assert [path.name for path in folder.iterdir()] == ["notes"]
    with run_folder.claim(folder, WORLD):
        pass
    with run_folder.claim(folder, WORLD, stays=False):
        pass
    assert {path.name for path in folder.iterdir()} == {"notes", run_folder.LOCK}


@pytest.mark.parametrize("made_anew", [False, True])
def test_who_opened_a_lock_file_that_is_then_removed_takes_the_new_one(tmp_path, monkeypatch, made_anew):
    """As the run does that comes between the removal and the release of a dry run."""
    locks, path = fcntl.flock, tmp_path / run_folder.LOCK

    def flock(descriptor, operation):
        monkeypatch.setattr(fcntl, "flock", locks)
        path.unlink()
        if made_anew:  # by a third run
            path.touch()
        locks(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with run_folder.claim(tmp_path, WORLD):
        with pytest.raises(SettingsError, match="another run is writing there"), run_folder.claim(tmp_path, WORLD):
            pass


def test_a_second_run_is_kept_out_until_the_first_has_ended(tmp_path):
    with run_folder.claim(tmp_path, WORLD):
        with pytest.raises(SettingsError, match=f"--output {tmp_path}: another run is writing there"):
            with run_folder.claim(tmp_path, WORLD):
                pass
        with run_folder.claim(tmp_path / "b", WORLD):  # another folder is free
            pass
    with run_folder.claim(tmp_path, WORLD):
        pass


def test_the_lock_is_on_the_file(tmp_path):
    with open(tmp_path / run_folder.LOCK, "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(SettingsError, match="another run is writing there"), run_folder.claim(tmp_path, WORLD):
            pass
    with run_folder.claim(tmp_path, WORLD):
        pass


def test_nfs_locks_too(tmp_path, monkeypatch):
    """There a lock needs a descriptor that is open for writing (flock(2), Linux 2.6.12)."""
    locks = fcntl.flock

    def flock(descriptor, operation):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        locks(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with run_folder.claim(tmp_path, WORLD):
        with pytest.raises(SettingsError, match="another run is writing there"), run_folder.claim(tmp_path, WORLD):
            pass


def test_a_file_system_without_locks_keeps_nobody_out_and_is_told_once(tmp_path, monkeypatch, caplog):
    def flock(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(files, "_warned", set())
    with run_folder.claim(tmp_path, WORLD), run_folder.claim(tmp_path, WORLD):
        pass
    assert caplog.messages == [f"{tmp_path}: this file system has no locks (No locks available): nothing keeps a "
                               "second program out"]


def test_a_forked_process_does_not_hold_the_lock(tmp_path):
    """As loader workers that outlive a trainer which was killed."""
    (began, begin), (wait, end) = os.pipe(), os.pipe()
    with run_folder.claim(tmp_path, WORLD):
        child = os.fork()
        if not child:
            os.close(end)
            os.write(begin, b"1")
            os.read(wait, 1)  # until the parent closes its end
            os._exit(0)
        os.read(began, 1)
        with pytest.raises(SettingsError, match="another run is writing there"), run_folder.claim(tmp_path, WORLD):
            pass  # the parent holds it still
    try:
        with run_folder.claim(tmp_path, WORLD):
            assert os.waitpid(child, os.WNOHANG) == (0, 0)  # alive
    finally:
        for descriptor in (began, begin, wait, end):
            os.close(descriptor)
        assert os.waitpid(child, 0)[1] == 0


def test_a_forked_process_may_leave_the_block(tmp_path):
    """Its copy of the descriptor is closed; by then the number may be that of another file."""
    with run_folder.claim(tmp_path, WORLD):
        child = os.fork()
        if not child:
            other = os.open(os.devnull, os.O_RDONLY)  # takes the lowest free number
    if not child:
        os._exit(0 if os.path.samestat(os.fstat(other), os.stat(os.devnull)) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_refused_and_ended_claims_leave_no_descriptor_open(tmp_path):
    before = os.listdir("/proc/self/fd")
    with run_folder.claim(tmp_path, WORLD):
        with pytest.raises(SettingsError), run_folder.claim(tmp_path, WORLD):
            pass
        assert len(os.listdir("/proc/self/fd")) == len(before) + 1
    assert os.listdir("/proc/self/fd") == before


def test_a_lock_file_that_cannot_be_opened_is_told(tmp_path):
    (tmp_path / run_folder.LOCK).mkdir()
    with pytest.raises(SettingsError, match=f"--output {tmp_path}: its .lock cannot be opened: Is a directory; give "):
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
