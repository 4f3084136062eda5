"""Files that a kill or a power cut leaves either as they were or complete; their checksums."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import secrets
import stat
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Callable, Container, Iterator, TypeVar

T = TypeVar("T")

TEMPORARY = ".tmp"
"""The end of the names under which files are written before they take their own; they begin with a dot."""

RETRY_WAITS_S = (0.1, 0.4, 1.6)
"""Pauses before a failed read is tried again; a failure after the last pause is an error."""

# How file systems that cannot flush a folder say so (CIFS, 9p, some of FUSE). EIO, ENOSPC and EDQUOT are none of them.
_UNSUPPORTED = {errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EACCES, errno.EISDIR}
_warned: set[tuple[int, str]] = set()
"""Of which file systems what has been said."""

_held: set[int] = set()
"""Descriptors that hold the locks of this process."""


def _let_go() -> None:
    """Close what a fork has inherited: a lock lasts as long as any copy of its descriptor, and loader workers can
    outlive a trainer that was killed."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_let_go)


def lock(path: Path) -> int:
    """A descriptor of the file, made where it is missing, with its lock, where the file system has locks.

    A file that is open for writing, not the folder: NFS refuses a lock to any other descriptor. Whoever holds it may
    remove the file; who has opened it in the meantime finds that out and takes the new one. A file system without locks
    gets a warning, once.

    Raises:
        BlockingIOError: another process has the lock.
        OSError: the file cannot be opened, or is a link: in a folder of several users it could lead to any file.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    _held.add(descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        unlock(descriptor)
        raise
    except OSError as error:
        _warn_once(path.parent, f"has no locks ({error.strerror}): nothing keeps a second program out")
    if not path.exists() or not os.path.samestat(os.fstat(descriptor), os.stat(path)):
        unlock(descriptor)
        return lock(path)
    return descriptor


def is_held(descriptor: int | None) -> bool:
    """Whether this process holds that lock: one that was forked from it does not."""
    return descriptor in _held


def is_locked(path: Path) -> bool:
    """Whether a process has the lock of a file. Where none has, it is taken for the moment of asking, as a reader's."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:  # other errors: a file system without locks
        return isinstance(error, BlockingIOError)
    finally:
        os.close(descriptor)
    return False


def unlock(descriptor: int | None) -> None:
    if descriptor is not None and descriptor in _held:
        _held.remove(descriptor)
        os.close(descriptor)


def flush(path: Path) -> None:
    """Force a file, or the names in a folder, to disk: a rename survives a power cut only after this.

    A file system that flushes no folders gets a warning, once. Raises OSError in every other case of failure.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED or not path.is_dir():
            raise
        _warn_once(path, f"flushes no folders ({error.strerror}): a power cut can take back what was written last")


def _warn_once(folder: Path, words: str) -> None:
    with suppress(OSError):  # gone meanwhile
        said = (os.stat(folder).st_dev, words)
        if said not in _warned:
            _warned.add(said)
            logging.getLogger("vir").warning("%s: this file system %s", folder, words)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`; what is written there takes its place, flushed, when the block ends well."""
    temporary = _beside(path)
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    flush(path.parent)


def _beside(path: Path) -> Path:
    """A temporary name. Two machines would mix what they write under the same one, and where others may write into the
    folder, they could put a link to another file in the place of one that they foresee."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY}")


def try_to_write(path: Path) -> None:
    """Write a file beside `path` and remove it again, to learn before long work whether its result can be written.

    Raises:
        OSError: that failed, or what is at `path` is no file that could be replaced, such as a folder or a device.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
    if path.exists() and not path.is_file():  # the renaming would put a file in the place of /dev/null for all
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    temporary = _beside(path)
    try:
        temporary.write_bytes(b"0")
    finally:
        with suppress(OSError):
            temporary.unlink()


def replace_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def refused(work: Callable[[], object]) -> str:
    """Do this, and tell what the system has refused of it; empty where it has nothing."""
    try:
        work()
    except OSError as error:
        return str(error)
    return ""


def open_regular(path: Path | str) -> int:
    """A descriptor of a regular file, for reading. Never waits for one who writes into a pipe.

    Raises:
        OSError: there is none, it cannot be opened, or it is a folder, a pipe or a device.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return descriptor


def read_regular(path: Path | str, limit: int) -> bytes:
    """All of a regular file that has at most `limit` bytes. Raises OSError, as open_regular, and where it has more."""
    descriptor = open_regular(path)
    try:
        if (size := os.fstat(descriptor).st_size) > limit:
            raise OSError(errno.EFBIG, f"it has {size} bytes, more than the {limit} that it may have", str(path))
        return pread(descriptor, size, 0)
    finally:
        os.close(descriptor)


def retried(act: Callable[[], T], final: Container[int | None] = (), failed: Callable[[], None] = lambda: None) -> T:
    """What `act` returns, in one of 1 + len(RETRY_WAITS_S) attempts.

    Args:
        final: errno of errors that another attempt would meet too.
        failed: called after each attempt that fails.

    Raises:
        OSError: that of the last attempt.
    """
    waits = iter(RETRY_WAITS_S)
    while True:
        try:
            return act()
        except OSError as error:
            failed()
            wait = next(waits, None)
            if wait is None or error.errno in final:
                raise
            time.sleep(wait)


def pread(descriptor: int, size: int, offset: int) -> bytes:
    """Exactly `size` bytes; OSError if the file ends before that."""
    data = os.pread(descriptor, size, offset)
    while len(data) < size:  # after a signal, or because one call reads at most 2 GiB
        more = os.pread(descriptor, size - len(data), offset + len(data))
        if not more:
            raise OSError(f"the file ends after {len(data)} of {size} bytes")
        data += more
    return data


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content in hexadecimal. Raises OSError where it cannot be read."""
    digest, block = hashlib.sha256(), memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(block):
            digest.update(block[:size])
    return digest.hexdigest()
