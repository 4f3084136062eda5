"""An HTTP server on this host that can lie in every way a server on the net does, and counts what it sends.

    with HttpServer({"/a.tar": content}) as server:
        server.lie(Lie(status=503), Lie(sends=1000))  # the next two requests; all others are answered honestly
        store.read(server.url("/a.tar"), ...)
        assert [request.status for request in server.requests] == [503, 206, 206]
"""

import base64
import functools
import gzip
import hashlib
import re
import select
import socket
import ssl
import struct
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_PIECE = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Lie:
    """What is wrong with one answer. Headers and body are otherwise those of an honest one."""

    status: int | None = None
    """Instead of 200 or 206: with an empty body."""
    headers: dict[str, str | None] = field(default_factory=dict)
    """More headers, or other ones; None leaves one out."""
    body: bytes | None = None
    """Instead of the true one, whose length and range are claimed all the same."""
    sends: int | None = None
    """Only so many bytes of the body, and then `ends`."""
    ends: str = "close"
    """close: in good order; reset: by RST; stall: nothing more until the client goes or the server ends."""
    more: bytes = b""
    """After the body, and counted in Content-Length."""
    counted: bool = True
    """False: without Content-Length; the end of the connection is the end of the body."""
    chunked: bool = False
    """Without Content-Length, in chunks."""
    shift: int = 0
    """The bytes so much further on are sent, and Content-Range says so."""
    ranged: bool = True
    """False: Range is passed over, all is sent with 200."""
    zipped: bool = False
    """Content-Encoding: gzip, whatever the client accepts."""
    tag: str | None = None
    """Another ETag."""
    bytes_per_second: float | None = None
    """Of the body."""
    drips: float | None = None
    """Seconds between two bytes of the head."""
    waits: float = 0.0
    """Seconds before anything is answered."""


@dataclass(frozen=True)
class Request:
    """What the server saw and answered."""

    method: str
    path: str
    """With the query."""
    headers: dict[str, str]
    """Names in small letters."""
    status: int
    connection: int
    """The client's port: requests with one number came over one connection."""

    @property
    def range(self) -> str | None:
        return self.headers.get("range")


class HttpServer:
    """Serves `content`, which may be changed at any time, by threads; all of them have ended when the block has.

    Args:
        content: bytes by path.
        ranged: whether it knows Range.
        tagged: whether it sends ETags: of the content.
        latency: seconds before each answer.
        login: "user:password" without which it answers 401.
        certificate: path of a PEM with key and certificate: https instead of http.
        host: as `url` names it; anything that means this host.
    """

    def __init__(self, content: dict[str, bytes], *, ranged=True, tagged=True, latency=0.0, login: str | None = None,
                 certificate: str | None = None, host: str = "127.0.0.1"):
        self.content, self.ranged, self.tagged, self.latency = content, ranged, tagged, latency
        self.login, self.certificate, self.host = login, certificate, host
        self.requests: list[Request] = []
        """In the order in which they came."""
        self.bytes_of: Counter[str] = Counter()
        """Body bytes sent, by path without the query."""
        self.lock = threading.Lock()
        self.port = 0
        self.is_ending = threading.Event()
        self._lies: deque[Lie | None] = deque()
        self._always: Lie | None = None

    def url(self, path: str, user: str = "") -> str:
        scheme = "https" if self.certificate else "http"
        return f"{scheme}://{user + '@' if user else ''}{self.host}:{self.port}{path}"

    def lie(self, *lies: Lie | None) -> None:
        """The answers to the next requests, in order; None is an honest one."""
        with self.lock:
            self._lies.extend(lies)

    def always(self, lie: Lie | None) -> None:
        """The answer to all requests for which `lie` has none; None: honest ones again."""
        with self.lock:
            self._always = lie

    def next_lie(self) -> Lie:
        with self.lock:
            return (self._lies.popleft() if self._lies else self._always) or Lie()

    @property
    def bytes(self) -> int:
        """Body bytes sent in all."""
        return sum(self.bytes_of.values())

    def forget(self) -> None:
        """Counts from here on."""
        with self.lock:
            self.requests.clear()
            self.bytes_of.clear()
            self._lies.clear()

    def start(self) -> None:
        """At the same port as before, if there was one."""
        self.is_ending.clear()
        self._server = _Listener(("127.0.0.1", self.port), _Handler)
        self._server.lying = self
        if self.certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self.certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True,
                                                      do_handshake_on_connect=False)
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def stop(self) -> None:
        """All connections break off; `start` begins anew."""
        self.is_ending.set()
        self._server.shutdown()
        self._server.break_off()
        self._server.server_close()  # waits for the threads
        self._thread.join(timeout=10)

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *error):
        self.stop()


class _Listener(ThreadingHTTPServer):
    daemon_threads = False
    request_queue_size = 128
    lying: HttpServer

    def __init__(self, *arguments):
        self._open: set[socket.socket] = set()
        super().__init__(*arguments)

    def process_request(self, request, client_address):
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request):
        self._open.discard(request)
        super().shutdown_request(request)

    def break_off(self):
        for connection in list(self._open):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:  # gone already
                pass

    def handle_error(self, request, client_address):
        """Clients that go are a part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        lying = self.server.lying
        lie = lying.next_lie()
        content = lying.content.get(self.path.split("?")[0])
        status, headers, body = self._honest(lying, lie, content)
        if lie.status is not None:
            status, headers, body = lie.status, {"Content-Length": "0"}, b""
        if lie.body is not None:
            body = lie.body
        if lie.zipped:
            body = gzip.compress(body)
            headers |= {"Content-Encoding": "gzip", "Content-Length": str(len(body))}
        if lie.more:
            body += lie.more
            headers["Content-Length"] = str(len(body))
        if lie.chunked or not lie.counted:
            headers["Content-Length"] = None
            headers["Transfer-Encoding" if lie.chunked else "Connection"] = "chunked" if lie.chunked else "close"
        self._answer(lying, lie, status, headers | lie.headers, body)

    do_HEAD = do_GET

    def do_CONNECT(self):
        """As a proxy to a port of this host, whatever the host's name; its bytes are late by `latency`."""
        lying = self.server.lying
        with lying.lock:
            lying.requests.append(Request(self.command, self.path, {}, 200, self.client_address[1]))
        with socket.create_connection(("127.0.0.1", int(self.path.rpartition(":")[2])), timeout=10) as other:
            self.send_response(200)
            self.end_headers()
            lying.is_ending.wait(lying.latency)
            ways = {self.connection: other, other: self.connection}
            while not lying.is_ending.is_set():
                for end in select.select(list(ways), [], [], 0.05)[0]:
                    if not (data := end.recv(_PIECE)):
                        self.close_connection = True
                        return
                    ways[end].sendall(data)

    def _honest(self, lying, lie, content):
        if lying.login is not None and self.headers.get("Authorization") != _basic(lying.login):
            return 401, {"Content-Length": "0", "WWW-Authenticate": "Basic"}, b""
        if content is None:
            return 404, {"Content-Length": "9"}, b"not found"
        tag = lie.tag or _tag(content)
        headers = {"ETag": tag} if lying.tagged else {}
        if lying.ranged and lie.ranged:
            headers["Accept-Ranges"] = "bytes"
        if (wanted := self.headers.get("If-Match")) and lying.tagged and wanted != tag:
            return 412, {"Content-Length": "0"}, b""
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        condition = self.headers.get("If-Range")
        if not (part and "Accept-Ranges" in headers) or (condition and condition != tag):
            return 200, headers | {"Content-Length": str(len(content))}, content
        first = int(part[1]) + lie.shift
        end = min(int(part[2]) + 1 + lie.shift if part[2] else len(content), len(content))
        if first >= len(content):
            return 416, headers | {"Content-Length": "0", "Content-Range": f"bytes */{len(content)}"}, b""
        body = content[first:end]
        return 206, headers | {"Content-Length": str(len(body)),
                               "Content-Range": f"bytes {first}-{end - 1}/{len(content)}"}, body

    def _answer(self, lying, lie, status, headers, body):
        with lying.lock:
            lying.requests.append(Request(self.command, self.path, {
                name.lower(): value for name, value in self.headers.items()}, status, self.client_address[1]))
        lying.is_ending.wait(lying.latency + lie.waits)
        self.send_response(status)
        for name, value in headers.items():
            if value is not None:
                self.send_header(name, value)
        if lie.drips is not None and not self._drip(lying, lie.drips):
            return
        self.end_headers()
        if self.command == "HEAD":
            return
        self._send(lying, lie, body if lie.sends is None else body[:lie.sends])
        if lie.sends is not None or not (lie.counted or lie.chunked):
            self._end(lying, lie.ends)

    def _drip(self, lying, seconds):
        """Whether it came to its end."""
        head, self._headers_buffer = b"".join(self._headers_buffer), []
        for place in range(len(head)):
            if lying.is_ending.wait(seconds):
                return False
            self.wfile.write(head[place:place + 1])
        return True

    def _send(self, lying, lie, body):
        piece = _PIECE if lie.bytes_per_second is None else max(1, int(lie.bytes_per_second / 20))
        for start in range(0, len(body), piece):
            if lie.bytes_per_second is not None and lying.is_ending.wait(piece / lie.bytes_per_second):
                return
            part = body[start:start + piece]
            with lying.lock:  # before the client can have them and look
                lying.bytes_of[self.path.split("?")[0]] += len(part)
            self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part) if lie.chunked else part)
        if lie.chunked and lie.sends is None:
            self.wfile.write(b"0\r\n\r\n")

    def _end(self, lying, how):
        self.close_connection = True
        if how == "stall":
            self.connection.settimeout(0.05)
            while not lying.is_ending.is_set():
                try:
                    if not self.connection.recv(1):
                        return
                except TimeoutError:
                    time.sleep(0.01)
        elif how == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.wfile.close()
            self.rfile.close()
            self.connection.close()


@functools.lru_cache(64)
def _tag(content: bytes) -> str:
    return f'"{hashlib.md5(content).hexdigest()}"'


def _basic(login: str) -> str:
    return "Basic " + base64.b64encode(login.encode()).decode()
