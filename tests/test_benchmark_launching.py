"""What a benchmark starts ends with it: the launcher, its ranks, and the folders that it wrote in."""

import os
import signal
import subprocess
import sys
import time
from threading import Event, Timer

import psutil
import pytest

from support.launchers import HANGS, ROOT
from vir.benchmarks import launching

LAUNCHER = """
import pathlib, subprocess, sys, time
pid = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid
pathlib.Path("rank.part").write_text(str(pid))
pathlib.Path("rank.part").rename("rank")
time.sleep(600)
"""
TOOL = """
import argparse, sys, tempfile
from vir.benchmarks import launching, program

def measure(args, command):
    with tempfile.TemporaryDirectory(dir="."):
        launching.launch(["sleepy"], 1, [], "nothing")
    return ""

sys.exit(program.run("tool.py", argparse.ArgumentParser(), [], measure))
"""


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_a_signal_ends_all_that_a_benchmark_started_and_leaves_nothing(number, code, tmp_path):
    (tmp_path / "sleepy.py").write_text(LAUNCHER)
    tool = subprocess.Popen([sys.executable, "-c", TOOL], cwd=tmp_path, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "PYTHONPATH": str(ROOT)})
    until = time.monotonic() + HANGS
    while not (tmp_path / "rank").exists():
        assert time.monotonic() < until and tool.poll() is None
        time.sleep(0.05)
    below = psutil.Process(tool.pid).children(recursive=True)
    assert int((tmp_path / "rank").read_text()) in [process.pid for process in below] and len(below) == 2
    tool.send_signal(number)
    _, said = tool.communicate(timeout=HANGS)
    assert tool.returncode == code and said == "tool.py: interrupted\n"
    assert not any(map(launching._runs, below))
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir() and path.name != "__pycache__") == []


def test_a_call_tells_code_and_words_and_ends_when_another_thread_says_so():
    words = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"
    assert launching.call([sys.executable, "-uc", words]) == (3, "out\nerr\n")
    ended, began = Event(), time.monotonic()
    Timer(0.2, ended.set).start()
    assert launching.call([sys.executable, "-c", f"import time; time.sleep({10 * HANGS})"], ended) == (-15, "")
    assert time.monotonic() - began < HANGS
