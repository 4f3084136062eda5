"""Reads the samples of an image folder by number, in the order of the shards that vir-convert makes of it."""

from __future__ import annotations

import errno
import hashlib
from pathlib import Path

import numpy as np

from vir import files
from vir.data.deal import SAMPLES_PER_SHARD, SEED, deal
from vir.data.decode import BadSampleError
from vir.data.reader import Reader
from vir.data.sources.folder import class_folders, classes_beside, read_folder, some
from vir.data.sources.listing import Sample
from vir.data.sources.reading import MAX_IMAGE_BYTES, OF_THE_FILE, refuse_lost
from vir.errors import DataError
from vir.files import read_regular, retried


class FolderReader(Reader):
    """FOLDER/CLASS/IMAGE, listed once: names only, no image is opened.

    Samples have the numbers, keys, labels and bytes that they have in the shards which vir-convert makes of the folder
    by its default settings; so both give the same training. Class names are those of the folder, or of the folder
    `train` beside it. A sample takes the bytes of its file's name and 16 more. Threads may share a reader, a forked
    process may continue to use it, and it can be pickled; the copy does not list again.

    Raises:
        DataError: no class folders, one without images or that `train` lacks, a name from which no key can be made.
    """

    def __init__(self, folder: Path | str) -> None:
        folder = Path(folder).absolute()
        source = read_folder(folder, _class_list(folder))
        parts = deal(len(source.samples))
        self.name, self._root, self._classes, self._samples = str(folder), folder, source.classes, source.samples
        self._shard_sizes = tuple(map(len, parts))
        self._order = np.concatenate(parts).astype(np.int32 if len(source.samples) < 2**31 else np.int64)
        self._labels = source.samples.labels()[self._order]
        self._labels.flags.writeable = False
        about = ("image folder", source.fingerprint, SEED, SAMPLES_PER_SHARD)
        self._fingerprint = hashlib.sha256(repr(about).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._order)

    @property
    def classes(self) -> tuple[str, ...]:
        return self._classes

    @property
    def fingerprint(self) -> str:
        """Changes with the class list, with any name of a file, and with the order; not with the files' bytes."""
        return self._fingerprint

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        """Samples in each of the shards that vir-convert would write."""
        return self._shard_sizes

    @property
    def labels(self) -> np.ndarray:
        return self._labels

    def key(self, i: int) -> str:
        return self._sample(i).key

    def file_of(self, i: int) -> tuple[str, int]:
        return self._sample(i).path, 0

    def where(self, i: int) -> str:
        """CLASS/IMAGE."""
        return self._sample(i).path

    def read(self, i: int) -> bytes:
        """The image file of sample i.

        Raises:
            DataError: it is not there any more, may not be read, or could not be in 1 + len(files.RETRY_WAITS_S)
                attempts.
            BadSampleError: it is too large for an image.
        """
        sample = self._sample(i)
        path = self._root / sample.path
        try:
            return retried(lambda: read_regular(path, MAX_IMAGE_BYTES), OF_THE_FILE)
        except OSError as error:
            raise _failure(path, sample, error) from error

    def _sample(self, i: int) -> Sample:
        return self._samples[int(self._order[i])]


def _class_list(folder: Path) -> list[str] | None:
    """None: the folder's own."""
    classes = classes_beside(folder.parent, folder.name)
    if classes is not None and (unknown := sorted(set(class_folders(folder)) - set(classes))):
        raise DataError(f"{folder} has class folders that {folder.with_name('train')} beside it lacks: "
                        f"{some(unknown)}; the labels come from there: move them away, or give both the same classes")
    return classes


def _failure(path: Path, sample: Sample, error: OSError) -> DataError:
    why = error.strerror or str(error)
    if error.errno == errno.EFBIG:
        return BadSampleError(why)
    refuse_lost(path, sample, error)
    if error.errno in OF_THE_FILE:
        return DataError(f"cannot read {path}: {why}; the folder was listed with it: make the file readable or put it "
                         "back, or start a new run, which lists the folder again")
    return DataError(f"cannot read {path}: {why}, after {1 + len(files.RETRY_WAITS_S)} attempts; check the disk")


if __name__ == "__main__":
    raise SystemExit("vir.data.folder_reader is a part of the library; the program is vir-train")
