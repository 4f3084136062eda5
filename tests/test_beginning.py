"""The phases of a start."""

import time

from vir.beginning import Beginning


def test_phases_add_up_to_the_time_since_the_beginning():
    since = time.time() - 2.0
    beginning = Beginning(since)
    beginning.ended("imports")
    time.sleep(0.05)
    beginning.ended("data")
    before = time.time()
    beginning.ended("imports")
    seconds = beginning.seconds
    assert list(seconds) == ["imports", "data"] and seconds["imports"] >= 2.0 and seconds["data"] >= 0.05
    assert before - since <= sum(seconds.values()) + 1e-6 and sum(seconds.values()) <= time.time() - since + 1e-6
    assert str(beginning) == (f"{sum(seconds.values()):.1f} s to the end of the first step: imports "
                              f"{seconds['imports']:.1f}, data {seconds['data']:.1f}")
