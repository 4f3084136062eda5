"""The bytes of a source's samples: what is retried, what is the file's fault and what the disk's."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vir import files
from vir.data.decode import BadSampleError
from vir.data.sources.listing import WHOLE, Sample
from vir.errors import DataError
from vir.files import open_regular, pread, retried

MAX_IMAGE_BYTES = 1 << 28
"""A file that is larger is no image to train on; it is not read into memory."""

OF_THE_FILE = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR,
               errno.EINVAL, errno.ENXIO, errno.EFBIG}
"""Trying again does not help, and the next file may be well."""

_MOST_UNREADABLE = 3
"""So many files in a row that fail otherwise are a disk that fails, or has gone."""


class UnreadableError(BadSampleError):
    """A file that could not be read in several attempts: perhaps it can be another day."""


class SampleReader:
    """Reads samples one after another; the file of the last one stays open."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._path: str | None = None
        self._descriptor = -1
        self._unreadable = 0

    def read(self, sample: Sample) -> bytes:
        """The image file of a sample.

        Raises:
            BadSampleError: this file cannot be read, or is too large for an image; UnreadableError where it is not
                the file's fault for certain.
            DataError: the disk does not answer.
        """
        try:
            # On network disks, a new descriptor may work where a stale one fails.
            data = retried(lambda: self._read(sample), OF_THE_FILE, self.close)
        except OSError as error:
            self._fail(sample, error)
        self._unreadable = 0
        return data

    def close(self) -> None:
        if self._path is not None:
            os.close(self._descriptor)
        self._path = None

    def _read(self, sample: Sample) -> bytes:
        if self._path != sample.path:
            self.close()
            self._descriptor, self._path = open_regular(self._root / sample.path), sample.path
        size = os.fstat(self._descriptor).st_size if sample.size == WHOLE else sample.size
        if size > MAX_IMAGE_BYTES:
            raise OSError(errno.EFBIG, f"it has {size} bytes, more than the {MAX_IMAGE_BYTES} that an image may have")
        return pread(self._descriptor, size, sample.offset)

    def _fail(self, sample: Sample, error: OSError) -> None:
        path, why = self._root / sample.path, error.strerror or str(error)
        refuse_lost(path, sample, error)
        if error.errno in OF_THE_FILE:
            raise BadSampleError(f"it cannot be read: {why}") from error
        self._unreadable += 1
        if self._unreadable >= _MOST_UNREADABLE:
            raise DataError(f"cannot read {path}: {why}, after {1 + len(files.RETRY_WAITS_S)} attempts, nor the "
                            f"{_MOST_UNREADABLE - 1} files before it; check the disk") from error
        raise UnreadableError(f"it cannot be read: {why}, after {1 + len(files.RETRY_WAITS_S)} attempts") from error


def refuse_lost(path: Path, sample: Sample, error: OSError) -> None:
    """Raises DataError where it is not one image that cannot be reached, but all."""
    why = error.strerror or str(error)
    if not _is_there(path.parent):
        raise DataError(f"cannot read {path}: {why}, and its folder is gone: is the disk still mounted?") from error
    if sample.size != WHOLE and error.errno in OF_THE_FILE - {errno.EFBIG}:  # that one is of the image
        raise DataError(f"cannot read {path}, which holds many images: {why}; is the disk still mounted?") from error


def _is_there(folder: Path) -> bool:
    try:
        return folder.is_dir()
    except OSError:  # as of a network disk that is lost
        return False


def states(root: Path, samples: Sequence[Sample]) -> np.ndarray:
    """[n, 2] int64: size and time of the last change, in seconds, of the file that holds each sample; -1 for one that
    cannot be reached by itself. A file that has changed is known by it without being read.

    Raises:
        DataError: the disk does not answer.
    """
    known: dict[str, tuple[int, int]] = {}
    for sample in samples:
        if sample.path not in known:
            known[sample.path] = _state(root / sample.path, sample)
    return np.array([known[sample.path] for sample in samples], np.int64).reshape(-1, 2)


def _state(path: Path, sample: Sample) -> tuple[int, int]:
    try:
        found = retried(lambda: os.stat(path), OF_THE_FILE)
        return found.st_size, int(found.st_mtime)
    except OSError as error:
        refuse_lost(path, sample, error)
        if error.errno not in OF_THE_FILE:
            raise DataError(f"cannot read {path}: {error.strerror}, after {1 + len(files.RETRY_WAITS_S)} attempts; "
                            "check the disk") from error
        return -1, -1
