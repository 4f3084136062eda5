"""Objects on HTTP servers, by ranged GETs. Every answer is compared with what was asked for and what is known."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

from urllib3 import BaseHTTPResponse
from urllib3.exceptions import HTTPError

from vir.addresses import shown
from vir.data.stores.connections import Connections, leave, passing
from vir.data.stores.retries import FLOOR, PASSING, PROGRESS, WINDOW, PassingError, persist, retry_after
from vir.data.stores.store import MAX_BLOCK, Identity, MissingError, StoreError, changed, check_part
from vir.data.stores.wire import expect

_PIECE = 1 << 20
_SIZE = re.compile(r"[0-9]{1,18}")
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)")
_STRONG = re.compile(r'"[!#-~]*"')


class HttpStore:
    """Servers of http: and https:. User and password come from the URL or from ~/.netrc ($NETRC), proxies from the
    environment.

    Args:
        timeout: see Store, in seconds.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self.connections = Connections()

    def stat(self, url: str) -> Identity:
        return persist(lambda left, patience: self._stat(url, left, patience), url, self.timeout)

    def read(self, url: str, offset: int, size: int, identity: Identity) -> bytes:
        if not identity.ranged:
            raise StoreError(f"{shown(url)} cannot be read in parts: its server does not know Range; give a folder for "
                             "whole shards with --data.cache")
        check_part(url, offset, size, identity)
        answers = _Answers(self, url, identity, offset, offset + size)
        try:
            return answers.take(size)
        finally:
            answers.close()

    def blocks(self, url: str, identity: Identity) -> Iterator[bytes]:
        answers = _Answers(self, url, identity, 0, identity.size)
        try:
            for start in range(0, identity.size, MAX_BLOCK):
                yield answers.take(min(MAX_BLOCK, identity.size - start))
        finally:
            answers.close()

    def names(self, url: str) -> list[str] | None:
        return None

    def _stat(self, url: str, left: float, patience: float) -> Identity:
        response = self.connections.get(url, {"Range": "bytes=0-0"}, left, patience)
        try:
            tag = _tag(response)
            if response.status == 416 and re.fullmatch(r"bytes \*/0", response.headers.get("Content-Range", "")):
                return Identity(0, tag)
            _refuse_status(url, response)
            first, last, size = _claims(response)
            if response.status == 206 and (first, last) != (0, 0):
                raise PassingError(f"sent bytes {first} to {last} when asked for the first one")
            if size is None:
                raise StoreError(f"{shown(url)}: its server does not tell how long it is, so an end that comes "
                                 "too early could not be seen; serve it with Content-Length, or download it and give "
                                 "the path")
            return Identity(size, tag, ranged=response.status == 206)
        finally:
            leave(response)


class _SlowError(PassingError):
    """An answer slower than FLOOR: as good as none, whatever it brought."""


class _Answers:
    """The bytes from `start` up to `end` in order, from one answer or, where it breaks, from several."""

    def __init__(self, store: HttpStore, url: str, identity: Identity, start: int, end: int) -> None:
        self._store, self._url, self._identity = store, url, identity
        self._position, self._end = start, end
        self._response: BaseHTTPResponse | None = None
        self._since, self._came = 0.0, 0  # the time from which the speed is measured, and bytes since then
        self._window = WINDOW  # seconds over which it is

    def take(self, size: int) -> bytes:
        """The next `size` bytes."""
        buffer = bytearray()
        while len(buffer) < size:
            persist(lambda left, patience: self._fill(buffer, size, left, patience), self._url, self._store.timeout)
        return bytes(buffer)

    def close(self) -> None:
        if self._response is not None:
            leave(self._response)
            self._response = None

    def _fill(self, buffer: bytearray, size: int, left: float, patience: float) -> None:
        """Adds bytes until there are `size`, or until the answer breaks after some progress. PassingError: it broke
        before; what came is in the buffer, and the next attempt goes on from there."""
        before = len(buffer)
        self._window = min(WINDOW, left)
        self._since, self._came = time.monotonic(), 0
        try:
            if self._response is None:
                self._response = self._open(left, patience)
            while len(buffer) < size:
                data = self._piece(self._response, size - len(buffer))
                buffer += data
                self._position += len(data)
            if self._position == self._end and self._has_more(self._response):
                self._position -= len(buffer) - before
                del buffer[before:]
                raise PassingError("sent more than it was asked for")
        except (HTTPError, OSError, PassingError) as error:
            self.close()
            if len(buffer) - before < PROGRESS or isinstance(error, _SlowError):
                raise passing(error) from error

    def _piece(self, response: BaseHTTPResponse, most: int) -> bytes:
        expect(response, self._window)
        data = response.read1(min(_PIECE, most))
        if not data:
            raise PassingError(f"ended its answer after {self._position} of {self._identity.size} bytes")
        self._came += len(data)
        if (seconds := time.monotonic() - self._since) >= self._window:
            if self._came < FLOOR * seconds:
                raise _SlowError(f"sent {self._came} bytes in {seconds:.0f} s, which is too slow")
            self._since, self._came = time.monotonic(), 0
        return data

    def _has_more(self, response: BaseHTTPResponse) -> bool:
        """Whether bytes follow those that were announced or, where nothing was announced, asked for."""
        if response.length_remaining is not None:
            return response.length_remaining > 0
        try:
            expect(response, self._window)
            return bool(response.read1(1))
        except (HTTPError, OSError):
            return False

    def _open(self, left: float, patience: float) -> BaseHTTPResponse:
        """An answer whose next byte is the one at the position."""
        headers = {}
        if self._identity.ranged:
            headers["Range"] = f"bytes={self._position}-{self._end - 1}"
            if _STRONG.fullmatch(self._identity.tag):
                headers["If-Range"] = self._identity.tag
        response = self._store.connections.get(self._url, headers, left, patience)
        self._since = time.monotonic()
        try:
            self._check(response)
            skipped = 0 if self._identity.ranged else self._position
            while skipped > 0:
                skipped -= len(self._piece(response, skipped))
        except BaseException:
            leave(response)
            raise
        return response

    def _check(self, response: BaseHTTPResponse) -> None:
        """Raises PassingError where this is not what was asked for, StoreError where the object is another one."""
        if response.status in (412, 416):
            raise changed(self._url)
        _refuse_status(self._url, response)
        start = self._position if self._identity.ranged else 0
        first, last, size = _claims(response)
        if _is_other(_tag(response), self._identity.tag) or size not in (self._identity.size, None):
            raise changed(self._url)
        if first != start or last not in (self._end - 1, None):
            raise PassingError(f"sent bytes {first} to {last} when asked for {start} to {self._end - 1}")


def _refuse_status(url: str, response: BaseHTTPResponse) -> None:
    """Raises what an answer without the bytes means. No other one may be encoded: sizes would not be those of the
    object."""
    status = response.status
    if status in (401, 403, 407):
        raise StoreError(f"{shown(url)} is refused ({status}): give user and password in ~/.netrc, or a new URL where "
                         "this one was signed for a time that is over; for a proxy they belong into its URL")
    if status in (404, 410):
        raise MissingError(f"{shown(url)} does not exist ({status}); see whether the path is right")
    if status in PASSING:
        raise PassingError(f"answered {status}", retry_after(response.headers.get("Retry-After")))
    if status not in (200, 206):
        raise StoreError(f"{shown(url)} cannot be read: its server answered {status}; see whether the URL is right")
    if (encoding := response.headers.get("Content-Encoding", "").strip()).lower() not in ("", "identity"):
        raise StoreError(f"{shown(url)} is sent with Content-Encoding {encoding[:20]!r}, though asked for as it is; "
                         "have its server send the bytes themselves, or download it and give the path")


def _claims(response: BaseHTTPResponse) -> tuple[int, int | None, int | None]:
    """First and last byte of an answer and the size of the whole object; None where it does not tell."""
    if response.status == 200:
        length = response.headers.get("Content-Length", "").strip()
        return (0, int(length) - 1, int(length)) if _SIZE.fullmatch(length) else (0, None, None)
    found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", "").strip())
    if found is None:
        raise PassingError("sent a part without telling which")
    return int(found[1]), int(found[2]), None if found[3] == "*" else int(found[3])


def _tag(response: BaseHTTPResponse) -> str:
    return response.headers.get("ETag") or response.headers.get("Last-Modified") or ""


def _is_other(tag: str, known: str) -> bool:
    """Whether two tags mean different bytes: ETags, weak or not, are compared among each other, so are times."""
    comparable = bool(tag) and bool(known) and ('"' in tag) == ('"' in known)
    return comparable and tag.removeprefix("W/") != known.removeprefix("W/")


if __name__ == "__main__":
    raise SystemExit("vir.data.stores.http is a part of the library; the program is vir-train")
