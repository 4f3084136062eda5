"""The phases of a start, and how old a process is."""

import subprocess
import sys
import time

from vir.startup import StartupTimer, process_age


def test_phases_add_up_to_the_time_since_the_beginning():
    before = time.monotonic()
    startup = StartupTimer(2.0)
    startup.ended("imports")
    time.sleep(0.05)
    startup.ended("data")
    startup.ended("imports")
    seconds = startup.seconds
    assert list(seconds) == ["imports", "data"] and seconds["imports"] >= 2.0 and seconds["data"] >= 0.05
    assert 2.05 <= sum(seconds.values()) <= time.monotonic() - before + 2.0
    assert str(startup) == (f"{sum(seconds.values()):.1f} s to the end of the first step: imports "
                            f"{seconds['imports']:.1f}, data {seconds['data']:.1f}")


def test_the_age_of_a_process_is_the_time_since_it_was_started():
    began = time.monotonic()
    script = "import time; time.sleep(1); from vir.startup import process_age; print(process_age())"
    age = float(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)
    assert 1 <= age <= time.monotonic() - began + 0.02  # the kernel counts hundredths


def test_the_age_grows_with_the_clock():
    before = time.monotonic()
    first = process_age()
    middle = time.monotonic()
    time.sleep(0.1)
    later = time.monotonic()
    second = process_age()
    assert later - middle - 0.001 <= second - first <= time.monotonic() - before + 0.001
