"""Bytes of one file by offset, wherever it lies: in an open file, or on a server from which little is to be asked."""

from __future__ import annotations

import os
from typing import Protocol

from vir.data.stores.store import Identity, Store
from vir.files import retried

_FIRST = 4096
"""Bytes of a request that nothing is known for: behind an image they hold its labels and the next header."""
_MOST = 1 << 20
_SHORT = 1 << 14
"""Where the bytes that are passed over are no more than this on average, it costs less to ask for them too."""


class RandomAccess(Protocol):
    """A file whose parts are read in any order; by one thread at a time."""

    @property
    def size(self) -> int:
        """In bytes."""

    def pread(self, size: int, offset: int) -> bytes:
        """These bytes, or fewer where the file ends before.

        Raises:
            OSError: it cannot be read.
            DataError: what can be tried was tried.
        """


class LocalFile:
    """An open file of this machine; whoever has opened it closes it."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    @property
    def size(self) -> int:
        return os.fstat(self.descriptor).st_size

    def pread(self, size: int, offset: int) -> bytes:
        try:
            return os.pread(self.descriptor, size, offset)
        except OSError:  # of the millions of small reads of a large archive one may fail
            return retried(lambda: os.pread(self.descriptor, size, offset))


class RemoteFile:
    """An object on a server. It is asked for few bytes, and seldom: what two requests brought is kept, and while what
    is passed over is short, a request brings up to 1 MB.

    Two, because the labels of a sample are read after the header of what follows it.
    """

    def __init__(self, store: Store, url: str, identity: Identity) -> None:
        self.size = identity.size
        self._store, self._url, self._identity = store, url, identity
        self._parts = [(0, b""), (0, b"")]
        self._asked = _FIRST
        self._end, self._passed, self._hops = 0, 0, 0

    def pread(self, size: int, offset: int) -> bytes:
        size = min(size, self.size - offset)
        if size <= 0:
            return b""
        gap, self._end = offset - self._end, offset + size
        if gap > _FIRST:  # less than that is padding, or a label whose turn comes later
            self._passed, self._hops = self._passed + gap, self._hops + 1
        for begin, part in self._parts:
            if begin <= offset and offset + size <= begin + len(part):
                return part[offset - begin:offset - begin + size]
        return self._ask(size, offset)

    def _ask(self, size: int, offset: int) -> bytes:
        begin, part = self._parts[-1]
        if offset < begin:  # what comes next lies behind that part, which is kept
            return self._store.read(self._url, offset, size, self._identity)
        if part:
            is_short = self._passed <= _SHORT * self._hops
            self._asked = min(2 * self._asked, _MOST) if is_short else _FIRST
        self._passed = self._hops = 0
        part = self._store.read(self._url, offset, min(max(size, self._asked), self.size - offset), self._identity)
        self._parts = [self._parts[-1], (offset, part)]
        return part[:size]


def read_exactly(file: RandomAccess, size: int, offset: int) -> bytes:
    """`size` bytes.

    Raises:
        EOFError: the file ends before that.
        OSError, DataError: as RandomAccess.pread.
    """
    data = file.pread(size, offset)
    while len(data) < size:  # after a signal, or because one call reads at most 2 GiB
        more = file.pread(size - len(data), offset + len(data))
        if not more:
            raise EOFError(f"the file ends after {len(data)} of {size} bytes")
        data += more
    return data


if __name__ == "__main__":
    raise SystemExit("vir.data.random_access is a part of the library; the program is vir-index")
