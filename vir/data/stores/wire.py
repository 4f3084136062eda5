"""What urllib3 reads from: sockets whose waits have an end, also where a server sends byte by byte, and can be broken
off by a request to stop."""

from __future__ import annotations

import io
import socket
import time
from contextlib import suppress
from http.client import HTTPResponse
from typing import Any

from urllib3 import BaseHTTPResponse, HTTPConnectionPool, HTTPSConnectionPool
from urllib3.connection import HTTPConnection, HTTPSConnection

from vir.data.executors import Stopped, stopping

_SLICE = 0.1
"""Seconds between two looks whether to go on waiting."""


class Wire(io.RawIOBase):
    """The bytes of one answer.

    Args:
        raw: the file that http.client has made of the socket; closed with this one.
        connected: the socket; its timeout is that of the whole head of the answer, in seconds.
    """

    def __init__(self, raw: io.RawIOBase, connected: socket.socket) -> None:
        self._raw, self._socket = raw, connected
        self._timeout = connected.gettimeout()
        self.until = float("inf") if self._timeout is None else time.monotonic() + self._timeout
        """The time until which bytes are waited for, of time.monotonic."""

    def readinto(self, buffer: Any) -> int:
        """Raises TimeoutError where `until` is over, Stopped where the task is to end."""
        while True:
            if stopping():
                raise Stopped
            left = self.until - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self._socket.settimeout(min(left, _SLICE))
            try:
                return self._socket.recv_into(buffer)
            except TimeoutError:
                pass

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        with suppress(OSError):  # of a socket that is closed by now
            self._socket.settimeout(self._timeout)  # a proxy's answer is followed by a handshake
        self._raw.close()
        super().close()


class _Wired:
    """A connection that hands out what its answers are read from."""

    wire: Wire

    def response_class(self, connected: socket.socket, *arguments: Any, **named: Any) -> HTTPResponse:
        answer = HTTPResponse(connected, *arguments, **named)
        self.wire = Wire(answer.fp.detach(), connected)
        answer.fp = io.BufferedReader(self.wire)
        return answer


class _Http(_Wired, HTTPConnection):  # type: ignore[misc]  # a method stands for a class
    pass


class _Https(_Wired, HTTPSConnection):  # type: ignore[misc]
    pass


class _HttpPool(HTTPConnectionPool):
    ConnectionCls = _Http


class _HttpsPool(HTTPSConnectionPool):
    ConnectionCls = _Https


def expect(response: BaseHTTPResponse, seconds: float) -> None:
    """From now on what is read of the body has to come within so much time, all of it."""
    if isinstance(response.connection, _Wired):  # not where all has come
        response.connection.wire.until = time.monotonic() + seconds


POOLS = {"http": _HttpPool, "https": _HttpsPool}
"""For pool_classes_by_scheme of urllib3."""


if __name__ == "__main__":
    raise SystemExit("vir.data.stores.wire is a part of the library; the program is vir-train")
