"""Stopping on request: signals that this process really gets."""

import os
import signal

import pytest

from vir.cluster.signals import StopRequest

STOPPING = [signal.SIGTERM, signal.SIGUSR1]


@pytest.fixture
def handlers():
    """What was there before is there again, whatever a test did."""
    before = {number: signal.getsignal(number) for number in STOPPING}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOPPING)
def test_a_signal_is_remembered(handlers, number):
    stop = StopRequest()
    assert stop.agree() is False
    os.kill(os.getpid(), number)
    assert stop.agree() is True and stop.agree() is True


def test_a_signal_before_joining_is_not_lost(handlers):
    stop = StopRequest()
    os.kill(os.getpid(), signal.SIGTERM)
    stop.join(1)
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


def test_an_interrupt_from_the_keyboard_stays_one(handlers):
    StopRequest()
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
