"""A store whose objects are files: file:///path is the file /path. It notes each read in `notes`, one line each, so
that processes count together."""

import os
from pathlib import Path

from tests.support.waiting import wait_for
from vir.data.stores.store import Identity, MissingError, StoreError

BLOCK = 1 << 16


class FileStore:
    """Args:
        notes: a file to which each read appends "blocks NAME" or "read NAME OFFSET SIZE".
        gate: where it is given, a download waits after its first block until this file is there.
        ranged: whether parts can be read.
    """

    def __init__(self, notes: Path, gate: Path | None = None, ranged: bool = True):
        self.notes, self.gate, self.ranged = notes, gate, ranged

    def __call__(self, url, timeout):
        """As open_store."""
        return self

    def stat(self, url):
        found = _path(url).stat()
        return Identity(found.st_size, str(found.st_mtime_ns), self.ranged)

    def read(self, url, offset, size, identity):
        self._note(f"read {_path(url).name} {offset} {size}")
        if not self.ranged:
            raise StoreError(f"{url} cannot be read in parts")
        return self._bytes(url, identity)[offset:offset + size]

    def blocks(self, url, identity):
        self._note(f"blocks {_path(url).name}")
        data = self._bytes(url, identity)
        yield data[:BLOCK]
        if self.gate is not None:
            wait_for(self.gate.exists, "the gate")
        for start in range(BLOCK, len(data), BLOCK):
            yield data[start:start + BLOCK]

    def names(self, url):
        return None

    def noted(self):
        """The lines so far."""
        return self.notes.read_text().splitlines() if self.notes.exists() else []

    def _bytes(self, url, identity):
        if not _path(url).exists():
            raise MissingError(f"{url} is not there")
        return _path(url).read_bytes()

    def _note(self, line):
        descriptor = os.open(self.notes, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(descriptor, f"{line}\n".encode())
        os.close(descriptor)


def _path(url):
    return Path(url.removeprefix("file://"))


def make_shards(folder, sizes, seed=0):
    """Files 000.tar, 001.tar, ... of these sizes; their URLs."""
    import numpy as np

    folder.mkdir(exist_ok=True)
    urls = []
    for number, size in enumerate(sizes):
        path = folder / f"{number:03}.tar"
        path.write_bytes(np.random.default_rng((seed, number)).bytes(size))
        urls.append(f"file://{path}")
    return urls
