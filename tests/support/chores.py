"""Tasks for the tests of executors, in a module that other processes import; as a program, work without an end."""

import os
import signal
import sys
from pathlib import Path

from support.waiting import wait_for
from vir.data.executors import Stopped, run_tasks, stopping
from vir.errors import DataError


def double(number):
    return 2 * number


def process(number):
    return os.getpid()


def in_turn(path):
    """The first of two tasks ends when the result of the second has been seen; each is the name of a file."""
    path = Path(path)
    if path.name == "first":
        wait_for(path.with_name("seen").exists, "the result of the second task")
    return path.name


def obey(folder):
    """Works until told to end; leaves a file of its process' number."""
    (Path(folder) / str(os.getpid())).touch()
    wait_for(stopping, "the word to stop")
    raise Stopped


def first_of(folder):
    """Works until told to end where it is given a folder; ends at once where it is not."""
    if folder is not None:
        obey(folder)


def fail_third(task):
    """The third of the tasks (number, folder) fails as soon as another one works, until told to end or cancelled."""
    number, folder = task
    if number != 3:
        obey(folder)
    wait_for(lambda: os.listdir(folder), "another task")
    raise DataError("image 3: the file is empty")


def err(number):
    raise ValueError(f"a mistake of the program: {number}")


def die(number):
    os.kill(os.getpid(), signal.SIGKILL)


def die_once(path):
    """Kills its process in the first of its runs."""
    try:
        Path(path).touch(exist_ok=False)
    except FileExistsError:
        return os.getpid()
    die(0)


if __name__ == "__main__":
    signals = []
    for expected in (signal.SIGTERM, signal.SIGINT):
        signal.signal(expected, lambda number, frame: signals.append(number))
    try:
        list(run_tasks("local", obey, sys.argv[1:] * 9, 2, lambda: bool(signals), Path("unused")))
    except Stopped:
        print("stopped")
