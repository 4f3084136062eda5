"""For what other processes and threads do, within a bound."""

import time

HANGS = 100
"""Seconds after which something counts as hanging: disks and cores may be busy with other tests."""


def wait_for(holds, what="it"):
    """It fails the test when that does not come."""
    until = time.monotonic() + HANGS
    while not holds():
        assert time.monotonic() < until, f"{what} did not come within {HANGS} s"
        time.sleep(0.01)
