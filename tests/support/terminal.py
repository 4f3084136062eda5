"""A command in a terminal of its own, as a person starts it."""

import fcntl
import os
import signal
import struct
import subprocess
import termios
import threading
from pathlib import Path

from support.launchers import ROOT


def _become_its_own(terminal: int = 0) -> None:
    """In the child: take the terminal, and listen to what a shell that runs in the background may ignore."""
    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


class Terminal:
    """A process and its children in the foreground of a terminal of 100 columns; gone when the block ends."""

    def __init__(self, *words: str | Path, **environment: str):
        self._side, inner = os.openpty()
        fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        self.process = subprocess.Popen([str(word) for word in words], cwd=ROOT, stdin=inner, stdout=inner,
                                        stderr=inner, start_new_session=True, preexec_fn=_become_its_own,
                                        env={**os.environ, **environment})
        os.close(inner)
        self._said = bytearray()
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()

    def _read(self) -> None:
        try:
            while part := os.read(self._side, 4096):
                self._said += part
        except OSError:  # nobody holds the other side any more, or it was closed
            pass

    def press_ctrl_c(self) -> None:
        os.write(self._side, b"\x03")

    def close(self) -> None:
        """As a window is closed: all that runs there gets a SIGHUP and has nowhere to write."""
        os.close(self._side)

    def said(self) -> str:
        return self._said.decode(errors="replace")

    def wait(self, timeout: float) -> str:
        """What was said, once the process is gone and its children no longer hold the terminal."""
        self.process.wait(timeout)
        self._reading.join(timeout)
        return self.said()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait(timeout=30)
