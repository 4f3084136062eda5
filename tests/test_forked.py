"""Programs forked from a process that has imported much are processes as any others."""

import json
import os
import signal
import subprocess
import time

import pytest

from support import forked as of_forks
from support.forked import Imported, forked

TELLS = "import json, os, sys; print(json.dumps([sys.argv, dict(os.environ), os.getsid(0) == os.getpid(), __name__]))"


@pytest.fixture(scope="module")
def imported():
    with Imported(["decimal"]) as imported:
        yield imported


def test_a_program_has_its_own_words_variables_session_and_exit_code(imported, tmp_path):
    program = imported.start(["-c", TELLS + "; sys.exit(7 if 'decimal' in sys.modules else 1)", "word"],
                             tmp_path / "log", {"NAME": "value"})
    assert program.wait(60) == 7 and program.poll() == 7
    words, variables, leads, name = json.loads((tmp_path / "log").read_text())
    assert words == ["-c", "word"] and variables["NAME"] == "value" and "HOME" not in variables
    assert leads and name == "__main__"


@pytest.mark.parametrize("words", [["-m", "a_module"], ["a_module.py"]], ids=" ".join)
def test_a_module_or_a_file_is_run_as_the_main_one(words, imported, tmp_path):
    (tmp_path / "a_module.py").write_text("import sys\nprint(__name__, sys.argv[1:])\n")
    code = f"import os, runpy, sys; sys.path.insert(0, {str(tmp_path)!r}); os.chdir({str(tmp_path)!r})\n"
    program = imported.start(["-c", code + f"from support.forked import run; run({[*words, '1']})"], tmp_path / "log",
                             dict(os.environ))
    assert program.wait(60) == 0, (tmp_path / "log").read_text()
    assert (tmp_path / "log").read_text() == "__main__ ['1']\n"


@pytest.mark.parametrize("code, ends, said", [
    ("import atexit; atexit.register(print, 'at its end')", 0, "at its end\n"),
    ("import threading, time; threading.Thread(target=lambda: time.sleep(0.5) or print('of a thread')).start()", 0,
     "of a thread\n"),
    ("import sys; sys.exit('a reason')", 1, "a reason\n"), ("print('x', end=''); 1 / 0", 1, "ZeroDivisionError")])
def test_its_end_is_that_of_an_interpreter(code, ends, said, imported, tmp_path):
    assert imported.start(["-c", code], tmp_path / "log", {}).wait(60) == ends
    assert said in (tmp_path / "log").read_text()


def test_a_signal_reaches_it_and_is_its_exit_code(imported, tmp_path):
    program = imported.start(["-c", "import time; time.sleep(1000)"], tmp_path / "log", {})
    with pytest.raises(subprocess.TimeoutExpired):
        program.wait(0.1)
    program.send_signal(signal.SIGTERM)
    assert program.wait(60) == -signal.SIGTERM
    program.kill()  # nothing: it has ended


def test_the_first_rank_that_fails_ends_all(imported, monkeypatch):
    monkeypatch.setattr(of_forks, "of_this_session", lambda: imported)
    began = time.monotonic()
    done = forked("-c", "import os, sys, time; print('rank', os.environ['RANK'], 'of', os.environ['WORLD_SIZE'])\n"
                        "if os.environ['RANK'] == '1': sys.exit(3)\ntime.sleep(1000)", ranks=3)
    assert done.returncode == 3 and "rank 1 of 3" in done.stdout and time.monotonic() - began < 100


def test_its_session_and_its_log_are_there_as_soon_as_it_is(imported, tmp_path):
    for number in range(20):
        process = imported.start(["-c", "import time; time.sleep(1000)"], tmp_path / str(number), {})
        assert os.getsid(process.pid) == process.pid and (tmp_path / str(number)).exists()
        os.killpg(process.pid, signal.SIGKILL)


def test_nothing_of_it_stays(tmp_path):
    with Imported([]) as imported:
        assert imported.start(["-c", "print('done')"], tmp_path / "log", {}).wait(60) == 0
        pid = imported._process.pid
    assert imported._process.returncode == 0 and not os.path.exists(f"/proc/{pid}")
    assert (tmp_path / "log").read_text() == "done\n"
