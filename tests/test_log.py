"""When a progress bar is shown; a log file, or a terminal, that cannot be written."""

import fcntl
import io
import logging
import os
import resource
import struct
import sys
import termios
from datetime import datetime

import pytest

from vir.log import log, shows_bars, start


@pytest.fixture()
def restored():
    """The logger as it was before."""
    before = log.handlers[:], log.propagate, log.level
    yield
    log.handlers[:], log.propagate, level = before
    log.setLevel(level)  # and forget for which levels it was enabled


@pytest.mark.parametrize("columns, shown", [(120, True), (0, False)])
def test_a_bar_needs_a_terminal_that_has_a_width(monkeypatch, columns, shown):
    ours, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
    with open(ours, "rb"), open(terminal, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        assert shows_bars() is shown


def test_a_file_shows_no_bar(monkeypatch, tmp_path):
    with open(tmp_path / "out", "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        assert shows_bars() is False


def test_lines_go_to_the_terminal_and_to_the_file_and_come_after_those_of_an_earlier_start(restored, tmp_path, capsys):
    file = tmp_path / "log.txt"
    for text in ("höre", "höre wieder"):
        start(0, file)
        log.info(text)
    today = datetime.now().strftime("%Y-%m-%d ")
    lines = file.read_text("utf-8").splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == ["höre", "höre wieder"]
    assert [today + line for line in capsys.readouterr().err.splitlines()] == lines


def test_other_ranks_leave_the_file_alone(restored, tmp_path, capsys):
    start(1, tmp_path / "log.txt")
    log.info("not said")
    log.warning("said")
    assert not (tmp_path / "log.txt").exists()
    assert capsys.readouterr().err.endswith("[rank 1] said\n")


def test_a_file_on_a_full_disk_is_told_once_and_tried_with_each_line(restored, tmp_path, capsys):
    file = tmp_path / "log.txt"
    file.symlink_to("/dev/full")
    start(0, file)
    for number in range(3):
        log.info("line %d", number)
    said = [line.split(" ", 1)[1] for line in capsys.readouterr().err.splitlines()]
    assert said == ["line 0", f"cannot write {file}: No space left on device; the run goes on, and each later line is "
                    "tried", "line 1", "line 2"]
    file.unlink()
    log.info("line 3")
    assert file.read_text().endswith("line 3\n")
    for handler in log.handlers:
        handler.flush()
        handler.close()
    logging.shutdown([lambda handler=handler: handler for handler in log.handlers])


def test_half_a_line_is_taken_back(restored, tmp_path, capsys):
    file = tmp_path / "log.txt"
    start(0, file)
    log.info("first")
    before = file.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 8, limits[1]))  # SIGXFSZ is ignored by Python
    try:
        log.info("second")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == before and "File too large" in capsys.readouterr().err
    log.info("third")
    assert [line.split(" ", 2)[2] for line in file.read_text().splitlines()] == ["first", "third"]


def test_a_terminal_that_cannot_be_written_ends_nothing(restored, tmp_path, monkeypatch):
    with open("/dev/full", "wb", buffering=0) as full:
        monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(full, write_through=True))
        start(0, tmp_path / "log.txt")
        log.info("a line")
    log.info("and one when it is closed")
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 2


def test_a_file_name_that_is_no_utf8_is_written_escaped(restored, tmp_path, capsys):
    start(0, tmp_path / "log.txt")
    log.info("bad sample %s", os.fsdecode(b"\xff.jpg"))
    assert (tmp_path / "log.txt").read_text().endswith("bad sample \\udcff.jpg\n")
