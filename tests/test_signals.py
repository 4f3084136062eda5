"""Stopping on request: signals that this process really gets."""

import os
import signal
import sys
import time

import pytest

from support.terminal import Terminal
from vir.cluster.signals import StopRequest

STOPPING = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP]
BLOCKED = """
import ctypes
import sys
from vir.cluster import signals
signals.SECOND_AFTER_S = float(sys.argv[1])
signals.StopRequest()
print("ready", flush=True)
lock, of_c = ctypes.create_string_buffer(64), ctypes.CDLL(None).pthread_mutex_lock
of_c(lock), of_c(lock)
"""
"""Waits in C for ever, as for a rank that is lost: no handler of Python's is called there."""


@pytest.fixture
def handlers():
    """What was there before is there again, whatever a test did."""
    before = {number: signal.getsignal(number) for number in STOPPING}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)
    signal.set_wakeup_fd(-1)


@pytest.mark.parametrize("number", STOPPING)
def test_a_signal_is_remembered(handlers, number):
    stop = StopRequest()
    assert stop.agree() is False
    os.kill(os.getpid(), number)
    assert stop.agree() is True and stop.agree() is True


def test_a_signal_before_joining_is_not_lost(handlers):
    stop = StopRequest()
    os.kill(os.getpid(), signal.SIGTERM)
    stop.join()
    assert stop.agree() is True


def test_closing_gives_the_handlers_back(handlers):
    got = []
    for number in STOPPING:
        signal.signal(number, lambda number, frame: got.append(number))
    stop = StopRequest()
    stop.close()
    for number in STOPPING:
        os.kill(os.getpid(), number)
    assert got == STOPPING and stop.agree() is False


def test_the_first_signal_is_the_cause(handlers):
    stop = StopRequest()
    for number in (signal.SIGINT, signal.SIGTERM):  # as the launchers go on
        os.kill(os.getpid(), number)
    assert stop.agree() and stop.cause == "SIGINT (Ctrl-C)"


@pytest.mark.parametrize("number, heard", [(signal.SIGINT, False), (signal.SIGHUP, False), (signal.SIGTERM, True)])
def test_what_nohup_or_a_background_job_ignores_stays_ignored(handlers, number, heard):
    """But for the signals of batch systems."""
    signal.signal(number, signal.SIG_IGN)
    stop = StopRequest()
    os.kill(os.getpid(), number)
    assert stop.agree() is heard


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_second_ctrl_c_ends_at_once_even_within_a_call_into_c_and_one_rank_says_it(rank):
    with Terminal(sys.executable, "-c", BLOCKED, "0", LOCAL_RANK=rank) as terminal:
        wait_until(lambda: "ready" in terminal.said())
        wait_until(lambda: terminal.press_ctrl_c() or terminal.process.poll() is not None)
        said = terminal.wait(60)
    assert terminal.process.returncode == 130
    for line in ("a second Ctrl-C ends at once", "ended by a second Ctrl-C, without saving"):
        assert said.count(line) == (rank == "0")


def test_what_comes_right_after_a_ctrl_c_is_a_launchers_echo():
    with Terminal(sys.executable, "-c", BLOCKED, "3600", LOCAL_RANK="0") as terminal:
        wait_until(lambda: "ready" in terminal.said())
        for _ in range(5):
            terminal.press_ctrl_c()
            time.sleep(0.1)
        assert terminal.process.poll() is None and terminal.said().count("a second Ctrl-C ends at once") == 1


def wait_until(holds):
    until = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.05)
