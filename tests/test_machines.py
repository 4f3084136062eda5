"""Machines that answer by an ssh that is none, a script that runs here what it is told to run there; and by a store."""

import subprocess
import sys
import threading
import time

import psutil
import pytest
from torch.distributed import HashStore

from support.launchers import ROOT, fake_ssh
from vir.cluster.machines import Answer, BySsh, ByStore


@pytest.mark.parametrize("text, said", [
    ("echo no route >&2; echo; exit 255", "ssh does not reach it (no route)"),
    ("exit 255", "ssh does not reach it (without a word)"),
    ("echo a >&2; echo 'no module' >&2; echo >&2; exit 1", "vir.check cannot run there (no module)"),
    ("exit 3", "vir.check cannot run there (exit code 3)"),
    ("exec sleep 60", "it has not answered within 1 s")])
def test_why_a_machine_does_not_answer(text, said, tmp_path, monkeypatch):
    fake_ssh(tmp_path, monkeypatch, text)
    with BySsh(["a"], "true", None) as machines:
        assert machines.answers(["a"], 1 if "sleep" in text else 30) == {"a": Answer(problem=said)}


MANY = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (48, int(sys.argv[1])))
from vir.cluster.machines import BySsh
from vir.errors import SettingsError
names = [str(number) for number in range(40)]
try:
    with BySsh(names, "true", None) as machines:
        print(sum(answer.said == 1 for answer in machines.answers(names, 60).values()))
except SettingsError as error:
    print(error)
"""


def test_many_machines_raise_the_number_of_open_files_or_are_told_it(tmp_path, monkeypatch):
    fake_ssh(tmp_path, monkeypatch, f"echo $$ >> {tmp_path}/pids; echo 'vir-check: 1'; exec sleep 60")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    said = [subprocess.run([sys.executable, "-c", MANY, most], cwd=ROOT, timeout=120, text=True,
                           capture_output=True, check=True).stdout for most in ("1024", "48")]
    assert said == ["40\n", "40 machines need 80 open files and some more, but a process may have 48 here; raise it "
                            "(ulimit -n), or check the machines of a shorter hostfile\n"]
    assert [pid for pid in (tmp_path / "pids").read_text().split() if psutil.pid_exists(int(pid))] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pids", "ssh"]


def test_an_answer_has_the_time_at_which_it_came_also_while_names_are_missing():
    store = HashStore()
    store.set("name-0", "a")
    store.set("answer-0-1", "1")
    late = threading.Timer(1.0, lambda: store.set("name-1", ""))
    began = time.time()
    late.start()
    ranks = ByStore(store, 2, 5)
    assert time.time() - began > 0.9 and ranks.names == ["a"]
    (answer,) = ranks.answers(["a"], 5).values()
    assert answer.said == 1 and answer.at - began < 0.5
    store.set("answer-0-2", "2")
    assert ranks.answers(["a"], 5)["a"].said == 2
    assert ranks.answers(["a"], 0.1)["a"] == Answer(problem="it has not answered within 0 s")
