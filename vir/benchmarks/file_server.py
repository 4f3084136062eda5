"""A server of files on this machine, in a process of its own, that answers as late as it is asked to."""

from __future__ import annotations

import multiprocessing
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass(frozen=True)
class Answer:
    """A file, or a part of it, that was asked for."""

    name: str
    sent_bytes: int
    """Fewer than were asked for where the client broke off."""
    file_bytes: int


@contextmanager
def serving(folder: Path, log: Path = Path(os.devnull)) -> Iterator[str]:
    """The URL under which the server has the files: URL/MS/NAME is `folder`/NAME, MS milliseconds later.

    Args:
        log: gets a line after each answer; see answers.
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, folder, log))
    # What the system holds ready for a client that breaks off would count as sent.
    server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 17)
    process = multiprocessing.get_context("fork").Process(target=server.serve_forever, daemon=True)
    process.start()
    server.server_close()  # this process's copy
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        process.kill()
        process.join()


def answers(log: Path) -> list[Answer]:
    """What a server has sent so far, in this order."""
    lines = map(str.split, log.read_text(encoding="utf-8").splitlines())
    return [Answer(name, int(sent), int(size)) for name, sent, size in lines]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else the body waits up to 40 ms for the client to confirm the head

    def __init__(self, folder: Path, log: Path, *args: object) -> None:
        self._folder, self._log = folder, log
        super().__init__(*args)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        _, milliseconds, name = self.path.split("/")
        time.sleep(float(milliseconds) / 1000)
        path = self._folder / name
        if not path.is_file():
            self.send_error(404)
            return
        size = path.stat().st_size
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        first, last = map(int, asked.groups()) if asked else (0, size - 1)
        last = min(last, size - 1)
        with path.open("rb") as file:
            file.seek(first)
            body = file.read(last - first + 1)
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{size}"')
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.end_headers()
        sent = self._send(memoryview(body))
        with self._log.open("a", encoding="utf-8") as log:  # one write, so lines of threads do not mix
            log.write(f"{name} {sent} {size}\n")

    def _send(self, body: memoryview) -> int:
        """How much of it went out before the client broke off."""
        sent = 0
        try:
            while sent < len(body):
                sent += self.connection.send(body[sent:])
        except ConnectionError:
            self.close_connection = True
        return sent

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the table is the output."""
