"""When a progress bar is shown."""

import fcntl
import os
import struct
import sys
import termios

import pytest

from vir.log import shows_bars


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
