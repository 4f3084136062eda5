"""What a launch script does while its ranks work: codes, signals, restarts. The launchers here are small programs that
do what the real ones were seen to do; tests/test_launch.py and tests/test_nodes.py have the real ones."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from support.small_disk import small_disk  # noqa: F401, a fixture
from vir import files
from vir.cluster import supervisor
from vir.cluster.supervisor import Start, supervise
from vir.errors import SettingsError
from vir.run_folder import LOCK

pytestmark = pytest.mark.timeout(120)

# A launcher's program, in which `end(code)` leaves the status as a rank does.
BEGIN = """
import os, signal, subprocess, sys, time
from pathlib import Path
from vir import files, status
run = Path(sys.argv[1])
starts = run.parent.parent / "starts"
with starts.open("a") as file:
    file.write(os.environ["NAME"] + "\\n")
count = len(starts.read_text().splitlines())
def end(code, said="as it was told"):
    status.write(code, said)
def wait_for_stop():
    while not (number := status.asked_to_stop(Path(os.environ[status.FILE]))):
        time.sleep(0.02)
    return number
RANK = [sys.executable, "-c"]
"""


class Program:
    """A launch of such a program."""

    without: frozenset[str] = frozenset()

    def __init__(self, folder: Path, body: str, silent=()):
        self.run, self._body, self._silent = folder / "runs" / "a", body, list(silent)
        self.asked = 0

    @contextmanager
    def start(self, name, file):
        yield Start([sys.executable, "-c", BEGIN + self._body, str(self.run)],
                    {"NAME": name, "PYTHONPATH": os.getcwd()}, Path.cwd(), self.without)

    def unreachable(self):
        self.asked += 1
        return {"node-b": "no route"} if self._silent and self._silent.pop() else {}

    def starts(self):
        file = self.run.parent.parent / "starts"
        return file.read_text().split() if file.exists() else []

    def ended(self, found):
        self.heard.append(found.code)

    def supervise(self, max_restarts=0, steps=(0,), passes_codes_on=False):
        left, self.max_restarts, self.heard = iter([*steps, *[steps[-1]] * 9]), max_restarts, []
        self.passes_codes_on = passes_codes_on
        return supervise(self, self.run, lambda: next(left))


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(supervisor, "_ENDS_S", {0: 1.0, 75: 1.0})
    monkeypatch.setattr(supervisor, "_ENDS_AFTER_FAILURE_S", 1.0)
    monkeypatch.setattr(supervisor, "_GONE_S", 3.0)
    monkeypatch.setattr(supervisor, "_ASKS_EVERY_S", 0.05)


@pytest.mark.parametrize("body, code, said", [
    ("end(0, 'done')", 0, "exit code 0, told by rank 0 (.*): done"),
    ("end(3, 'a shard is missing'); sys.exit(1)", 3, "told by rank 0 .*: a shard is missing"),
    ("end(4); os.kill(os.getpid(), 9)", 4, "exit code 4"),
    ("end(75)", 75, "exit code 75"),
    ("sys.exit(0)", 5, "the ranks ended without a word"),  # deepspeed's runner, after a launcher of its own was killed
    ("os.kill(os.getpid(), 9)", 5, "the ranks ended without a word"),
])
def test_the_code_is_that_of_the_run_whatever_the_launcher_says(tmp_path, capfd, body, code, said):
    import re

    program = Program(tmp_path, body)
    assert program.supervise() == code
    assert re.search(said, capfd.readouterr().err)
    assert not program.run.exists() and len(program.starts()) == 1  # nothing was left in it


@pytest.mark.parametrize("code, passes_on, becomes", [
    (2, True, 2), (3, True, 3), (0, True, 5), (247, True, 5), (1, True, 5), (3, False, 5)])
def test_where_no_rank_could_tell_a_code_of_the_table_is_believed_if_the_launcher_passes_it_on(
        tmp_path, code, passes_on, becomes):
    program = Program(tmp_path, f"sys.exit({code})")
    assert program.supervise(max_restarts=1, passes_codes_on=passes_on) == becomes
    assert len(program.starts()) == (2 if becomes == 5 else 1)


FILL = """
with suppress(OSError), (run / 'filler').open('wb', buffering=0) as file:
    while True:
        file.write(bytes(512))
"""


def test_a_status_fits_on_a_disk_that_is_full_by_then(small_disk):  # noqa: F811
    program = Program(small_disk, f"from contextlib import suppress\n{FILL}\nend(3, 'the disk is full'); sys.exit(1)")
    assert program.supervise() == 3 and program.heard == [3]


def test_a_folder_that_cannot_be_written_to_is_refused_before_anything_starts(small_disk):  # noqa: F811
    program = Program(small_disk, "end(0)")
    program.run.mkdir(parents=True)
    exec(FILL, {"run": program.run, "suppress": suppress})
    with pytest.raises(SettingsError, match="cannot be written to: No space left on device; free some space, or give"):
        program.supervise()
    assert program.starts() == [] and [path.name for path in program.run.iterdir()] == ["filler"]


def test_another_run_in_the_folder_is_not_waited_for(tmp_path):
    program = Program(tmp_path, "sys.exit(1)")
    program.run.mkdir(parents=True)
    descriptor = files.lock(program.run / LOCK)
    began = time.monotonic()
    assert program.supervise() == 5 and time.monotonic() - began < 20
    files.unlock(descriptor)


def test_what_a_launcher_has_left_behind_is_no_rank_and_is_ended(tmp_path):
    body = "subprocess.Popen([*RANK, 'import time; time.sleep(600)'], start_new_session=True)\nsys.exit(1)"
    began = time.monotonic()
    assert Program(tmp_path, body).supervise() == 5 and time.monotonic() - began < 30
    assert not left_of(tmp_path)


def test_ranks_that_never_end_without_their_launcher_are_ended(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(supervisor, "_ORPHANS_S", 2.0)
    body = ("subprocess.Popen([*RANK, 'import time; time.sleep(600)', 'vir.train'], start_new_session=True)\n"
            "os.kill(os.getpid(), signal.SIGKILL)")
    assert Program(tmp_path, body).supervise() == 5
    assert "its ranks have not ended within 2 s: ending those of this machine" in capfd.readouterr().err
    assert not left_of(tmp_path)


def test_a_signal_while_a_machine_is_waited_for_is_a_stop(tmp_path, capfd):
    program = Program(tmp_path, "end(5)", silent=[True] * 1000)
    threading.Timer(3, os.kill, [os.getpid(), signal.SIGUSR1]).start()
    assert program.supervise(max_restarts=1) == 75
    assert program.heard == [5, 75] and "stopped by SIGUSR1 before it could start again" in capfd.readouterr().err


def test_a_disk_that_fails_under_the_script_leaves_no_process(tmp_path, monkeypatch):
    asked = iter(range(1000))

    def read(path):
        if next(asked) > 3:
            raise OSError(116, "Stale file handle")

    monkeypatch.setattr(supervisor.status, "read", read)
    with pytest.raises(OSError, match="Stale file handle"):
        Program(tmp_path, "time.sleep(600)").supervise()
    assert not left_of(tmp_path)


def test_a_launcher_gets_no_variable_that_it_must_not(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret")
    program = Program(tmp_path, "end(0 if 'MLFLOW_TRACKING_PASSWORD' in os.environ else 3)")
    assert program.supervise() == 0
    program.without = frozenset(["MLFLOW_TRACKING_PASSWORD"])
    assert program.supervise() == 3


def test_the_command_is_printed(tmp_path, capfd):
    assert Program(tmp_path, "end(0)").supervise() == 0
    assert f"vir-launch: starting {sys.executable} -c" in capfd.readouterr().err


def test_what_is_in_the_folder_stays_and_the_status_does_not(tmp_path):
    program = Program(tmp_path, "(run / 'log.txt').touch(); end(0)")
    assert program.supervise() == 0
    assert [path.name for path in program.run.iterdir()] == ["log.txt"]


def test_a_launcher_that_hangs_after_the_end_of_the_run_is_ended_with_all_that_it_started(tmp_path):
    body = "subprocess.Popen([*RANK, 'import time; time.sleep(600)'], start_new_session=True)\nend(5)\ntime.sleep(600)"
    began = time.monotonic()
    assert Program(tmp_path, body).supervise() == 5
    assert time.monotonic() - began < 30
    assert not left_of(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_a_signal_becomes_a_file_for_the_ranks_and_comes_to_no_launcher(tmp_path, number):
    body = (f"Path('{tmp_path}/began').touch()\nnumber = wait_for_stop()\n"
            "(run / 'asked').write_text(str(number)); end(75)")
    with in_process(tmp_path, body) as process:
        process.send_signal(number)
        assert process.wait(60) == 75
    assert (tmp_path / "runs" / "a" / "asked").read_text() == str(int(number))
    assert {path.name for path in (tmp_path / "runs" / "a").iterdir()} == {"asked"}


def test_a_second_signal_ends_all_at_once(tmp_path):
    body = (f"Path('{tmp_path}/began').touch()\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
            "subprocess.Popen([*RANK, 'import time; time.sleep(600)'], start_new_session=True)\ntime.sleep(600)")
    with in_process(tmp_path, body) as process:
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)  # too early: it is the same wish
        time.sleep(1)
        assert process.poll() is None
        time.sleep(2)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    assert not left_of(tmp_path)


def left_of(tmp_path):
    """What still runs of a supervisor's launcher; zombies, which wait for their parent alone, do not."""
    return [process for process in psutil.process_iter(["environ", "status"])
            if str(tmp_path) in (process.info["environ"] or {}).get("VIR_STATUS", "")
            and process.info["status"] != psutil.STATUS_ZOMBIE]


@contextmanager
def in_process(tmp_path, body):
    """A supervisor in a process of its own, once its launcher has begun."""
    (tmp_path / "body.py").write_text(body)
    program = ("import sys; sys.path.insert(0, 'tests')\nfrom pathlib import Path\n"
               "from test_supervisor import Program\nfrom vir.cluster import supervisor\n"
               "supervisor._ENDS_AFTER_FAILURE_S = 1.0\n"
               "sys.exit(Program(Path(sys.argv[1]), Path(sys.argv[1], 'body.py').read_text()).supervise())")
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)])
    try:
        until = time.monotonic() + 60
        while not (tmp_path / "began").exists():
            assert time.monotonic() < until and process.poll() is None
            time.sleep(0.05)
        yield process
    finally:
        process.kill()
        process.wait()


def test_ranks_that_outlive_their_launcher_are_asked_to_stop_and_waited_for(tmp_path, capfd):
    rank = ("import os, sys, time\\nfrom pathlib import Path\\nfrom vir import status\\n"
            "file = Path(os.environ[status.FILE])\\n"
            "while not status.asked_to_stop(file): time.sleep(0.02)\\n"
            "time.sleep(1)\\nstatus.write(75, 'saved')")
    body = (f"subprocess.Popen([*RANK, '''{rank}''', 'vir.train'], start_new_session=True)\n"
            "os.kill(os.getpid(), signal.SIGUSR1)")
    assert Program(tmp_path, body).supervise() == 75
    assert "the launcher has gone (exit code -10) before its ranks: waiting for them" in capfd.readouterr().err


def test_ranks_of_other_machines_are_seen_by_the_lock_of_the_run(tmp_path):
    """Here: by a process that has not the environment of this start, but the lock."""
    rank = (f"import sys, time\\nfrom pathlib import Path\\nfrom vir import files\\nfiles.lock(Path('{tmp_path}') / "
            f"'runs' / 'a' / '{LOCK}')\\nPath('{tmp_path}/locked').touch()\\ntime.sleep(6)")
    body = (f"process = subprocess.Popen([*RANK, '''{rank}'''], start_new_session=True, env={{**os.environ, "
            "'VIR_STATUS': ''})\n"
            f"while not Path('{tmp_path}/locked').exists(): time.sleep(0.02)\n"
            "os.kill(os.getpid(), signal.SIGKILL)")
    began = time.monotonic()
    assert Program(tmp_path, body).supervise() == 5
    assert time.monotonic() - began > 6


@pytest.mark.parametrize("code, restarts", [(5, 2), (0, 0), (2, 0), (3, 0), (4, 0), (75, 0)])
def test_only_a_lost_rank_lets_the_run_start_again(tmp_path, code, restarts):
    program = Program(tmp_path, f"end({code})")
    assert program.supervise(max_restarts=2, steps=(0, 10, 20, 30)) == code
    assert len(program.starts()) == restarts + 1 and len(set(program.starts())) == restarts + 1


def test_a_start_again_ends_as_the_last_one(tmp_path, capfd):
    program = Program(tmp_path, "end(5 if count < 3 else 0)")
    assert program.supervise(max_restarts=5, steps=(0, 10, 10, 20)) == 0
    said = capfd.readouterr().err
    assert "starting again from step 10, restart 1 of 5" in said and "restart 2 of 5" in said
    assert len(program.starts()) == 3


def test_three_starts_without_a_checkpoint_end_it_with_the_step(tmp_path, capfd):
    program = Program(tmp_path, "end(5)")
    assert program.supervise(max_restarts=9, steps=(100, 200, 200, 200, 200)) == 5
    assert len(program.starts()) == 4  # the first one has left a checkpoint
    said = capfd.readouterr().err
    assert "3 starts in a row ended without a new checkpoint, the newest is of step 200: not starting again" in said


def test_a_machine_is_waited_for_before_a_start_again(tmp_path, capfd):
    program = Program(tmp_path, "end(5 if count < 2 else 0)", silent=[False, True, True, True])
    assert program.supervise(max_restarts=1) == 0
    assert program.asked == 4 and "waiting for node-b (no route)" in capfd.readouterr().err


def test_a_machine_that_does_not_come_back_in_an_hour_ends_it(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(supervisor, "_HOSTS_WITHIN_S", 0.2)
    program = Program(tmp_path, "end(5)", silent=[True] * 1000)
    assert program.supervise(max_restarts=1) == 5
    assert "node-b did not come back within 0 s" in capfd.readouterr().err and len(program.starts()) == 1


def test_what_cannot_be_started_or_made_is_named(tmp_path):
    program = Program(tmp_path, "")
    program.start = lambda name, file: nowhere()
    with pytest.raises(SettingsError, match="/no/such/launcher cannot be started: No such file or directory"):
        program.supervise()
    (tmp_path / "runs").touch()
    with pytest.raises(SettingsError, match="--output .*/runs/a cannot be made: .*; give another folder"):
        program.supervise()


@contextmanager
def nowhere():
    yield Start(["/no/such/launcher"], {}, Path.cwd())
