"""What asks a run to stop, save or evaluate: files in its folder, and a launcher that has gone."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from vir import launcher, status
from vir.cluster.signals import EVALUATE, SAVE, LauncherGrace, StopRequest
from vir.cluster.switches import STOP, Switches
from vir.launcher import Place

FIRST, SECOND = Place(0, 1, 0, "127.0.0.1", 0), Place(1, 2, 1, "127.0.0.1", 0)


@pytest.fixture
def stop(monkeypatch):
    monkeypatch.delenv(status.FILE, raising=False)
    request = StopRequest()
    yield request
    request.close()


def wait_until(holds):
    until = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_a_file_asks_to_stop_and_goes_when_it_is_heeded(stop, tmp_path):
    switches = Switches(FIRST, tmp_path / "run", stop)
    (tmp_path / "run").mkdir()  # later: the run makes it
    time.sleep(0.1)
    assert not stop.agree()
    (tmp_path / "run" / STOP).touch()
    wait_until(lambda: stop.asked)
    assert stop.agree() and stop.cause == "the file STOP in the run folder"
    assert (tmp_path / "run" / STOP).exists()  # until all is saved
    switches.close(heeded_stop=True)
    assert not (tmp_path / "run" / STOP).exists()


def test_files_ask_to_save_and_to_evaluate_once(stop, tmp_path):
    switches = Switches(FIRST, tmp_path, stop)
    for name in (SAVE, EVALUATE):
        (tmp_path / name).touch()
        wait_until(lambda: not (tmp_path / name).exists())
        wait_until(lambda: not stop.agree() and stop.agreed_wishes == {name})
        assert not stop.agree() and stop.agreed_wishes == frozenset()
    switches.close()


def test_rank_0_alone_looks_for_them_and_not_where_the_folder_is_anothers(stop, tmp_path):
    (tmp_path / STOP).touch()
    (tmp_path / SAVE).touch()
    looking = [Switches(SECOND, tmp_path, stop), Switches(FIRST, None, stop)]
    time.sleep(0.2)
    assert not stop.agree() and stop.agreed_wishes == frozenset() and (tmp_path / SAVE).exists()
    for switches in looking:
        switches.close(heeded_stop=True)
    assert (tmp_path / STOP).exists()


def test_the_first_rank_of_a_machine_hears_its_launch_script(stop, tmp_path, monkeypatch):
    monkeypatch.setenv(status.FILE, str(tmp_path / ".status-x.json"))
    status.make_room(tmp_path / ".status-x.json")
    switches = Switches(Place(4, 8, 0, "127.0.0.1", 0), tmp_path, stop)
    time.sleep(0.2)
    assert not stop.asked
    status.ask_to_stop(tmp_path / ".status-x.json", signal.SIGUSR1)
    wait_until(lambda: stop.asked)
    assert stop.agree() and stop.cause == "SIGUSR1"
    switches.close()
    other = StopRequest()
    switches = Switches(SECOND, tmp_path, other)
    time.sleep(0.2)
    assert not other.asked
    switches.close()
    other.close()


def test_what_cannot_be_removed_is_heeded_once_and_told(stop, tmp_path, caplog):
    (tmp_path / SAVE).mkdir()  # a folder of that name
    switches = Switches(FIRST, tmp_path, stop)
    wait_until(lambda: not stop.agree() and stop.agreed_wishes == {SAVE})
    time.sleep(1.5)
    assert not stop.agree() and stop.agreed_wishes == frozenset()
    (tmp_path / STOP).mkdir()
    wait_until(lambda: stop.asked)
    switches.close(heeded_stop=True)
    assert [record.getMessage().split(" was heeded")[0] for record in caplog.records if record.name == "vir"] == [
        str(tmp_path / SAVE), str(tmp_path / STOP)]


RANK = """
import os, sys, time
from pathlib import Path
from vir.cluster.signals import StopRequest
from vir.cluster.switches import Switches
from vir.launcher import Place
stop = StopRequest()
Switches(Place(0, 1, 0, "", 0), None, stop)
Path(sys.argv[1]).write_text(str(os.getpid()))
while not stop.asked:
    time.sleep(0.05)
stop.agree()
Path(sys.argv[1] + ".cause").write_text(stop.cause)
"""
LAUNCHER = "import subprocess, sys\nsubprocess.run([sys.executable, '-c', sys.argv[1], sys.argv[2]])"


@pytest.mark.parametrize("name, is_known", [("torchrun", True), ("deepspeed", True), ("something", False)])
def test_a_launcher_that_has_gone_lets_its_ranks_stop(tmp_path, name, is_known):
    """The launcher is known by its command line; what else is above a rank may go as it likes."""
    (tmp_path / name).write_text(LAUNCHER)
    process = subprocess.Popen([sys.executable, tmp_path / name, RANK, tmp_path / "rank"])
    wait_until((tmp_path / "rank").exists)
    wait_until(lambda: (tmp_path / "rank").read_text())
    rank = psutil.Process(int((tmp_path / "rank").read_text()))
    try:
        process.kill()
        process.wait(30)
        if is_known:
            wait_until((tmp_path / "rank.cause").exists)
            wait_until(lambda: (tmp_path / "rank.cause").read_text() == "its launcher, which has gone")
        else:
            time.sleep(2.5)
            assert rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE
    finally:
        if rank.is_running():
            rank.kill()


def test_without_a_launcher_there_is_none_to_go():
    assert not any(process.pid == os.getpid() for process in launcher.launchers())


def test_a_checkpoint_that_takes_longer_than_a_launcher_waits_is_told_once(monkeypatch):
    monkeypatch.setattr(launcher, "launchers", lambda: [psutil.Process()])
    grace = LauncherGrace()
    grace.stepped(8)
    grace.stepped(5)
    assert grace.saved(20) == ""
    said = grace.saved(23)
    assert f"take 31 s, and the launcher (process {os.getpid()}) kills a rank 30 s after a SIGTERM" in said
    assert "launch/deepspeed.sh" in said and "STOP" in said and grace.saved(60) == ""
    monkeypatch.setattr(launcher, "launchers", list)
    assert LauncherGrace().saved(600) == ""
