"""What a source is: labelled images in a fixed order, listed in little memory, each a part of a file."""

from __future__ import annotations

import hashlib
import os
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vir.data.repeats import among, repeated
from vir.errors import DataError

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")
"""Endings of image file names, in upper or lower case (ImageNet writes .JPEG). The format follows from the bytes."""

MAX_KEY_BYTES = 100
"""The longest key made of a file's name, in UTF-8: the size of the name field in a tar header."""

MAX_KEPT_KEY_BYTES = 512
"""The longest key of a sample that has one already."""

WHOLE = -1
"""The size of a sample that is a file of its own."""

_UNSAFE_IN_KEYS = {ord(character): "_" for character in "./\\\x7f"} | {code: "_" for code in range(32)}


class Sample(NamedTuple):
    """One image of a source."""

    key: str
    """Name in the shard, without extension: unique in the split, without a dot (WebDataset cuts names at dots)."""
    label: int
    filename: str
    """CLASS/IMAGE, as the shard's json tells it."""
    path: str
    """The file that holds the image, relative to the root of the source."""
    offset: int
    """Of the image's first byte in that file."""
    size: int
    """Of the image, in bytes; WHOLE: it is all of the file."""


class Image(NamedTuple):
    """An image on its way into a listing; the class is told apart from it."""

    name: str
    """Without folder, with extension."""
    file: int = 0
    """For images within larger files: the position of the file among those given to Listing."""
    offset: int = 0
    size: int = WHOLE
    key: str | None = None
    """For the few whose key does not follow from the name."""


@dataclass(frozen=True)
class Source:
    """Labelled images. Samples are sorted by class name, then file name, so that the same images make the same shards,
    whatever kind of source they come from."""

    kind: str
    """For messages: "image folder", ..."""
    root: Path
    classes: tuple[str, ...]
    """Class names; the position is the label. The split may have no images of some classes."""
    samples: Samples
    ignored: int
    """What lies among the images and is none by its name; hidden files are not counted."""
    sizes: np.ndarray | None
    """[len(samples)] int64, of the images in bytes; None where they were not asked."""
    fingerprint: str
    """sha256 of class list, file names and labels, and of places and sizes where they are known."""

    def holds(self, folder: Path) -> bool:
        """Whether what is written to `folder` would lie among the images."""
        # Unlike resolve, realpath says nothing of links that go round in circles: reading or writing them does.
        root, path = Path(os.path.realpath(self.root)), Path(os.path.realpath(folder))
        return path == root or (path.is_relative_to(root) and "/" in self.samples[0].path)


class Listing:
    """Collects the images of a source, class by class in the order of the class names, and then makes the Source.

    A sample takes the bytes of its name and 16 to 40 more while the listing is made, 8 to 28 afterwards.

    Args:
        label_of: from class name to label, for all classes of the list.
        files: for images that lie within larger files: these, relative to the root of the source.
        sized: whether the size of each image is told.
        flat: the images lie in the root itself, not in a folder of their class.
    """

    def __init__(self, label_of: dict[str, int], *, files: Sequence[str] = (), sized: bool = False,
                 flat: bool = False) -> None:
        self._label_of, self._files, self._sized, self._flat = label_of, tuple(files), sized, flat
        self._groups: list[_Group] = []
        self._keys: dict[int, str] = {}
        self._starts = array("q")
        self._names: list[bytes] = []
        self._name_bytes = 0
        self._ends, self._hashes = array("q"), array("q")
        self._file, self._offset, self._size = array("i"), array("q"), array("q")

    def add(self, class_name: str, images: Iterable[Image], class_in_key: bool = True) -> None:
        """The images of the next class, in any order.

        Args:
            class_in_key: whether their keys begin with the class; False where the names are those of a whole split.

        Raises:
            DataError: a name from which no key can be made, or a class that the list lacks.
        """
        if class_name not in self._label_of:
            raise DataError(f"the class list of {len(self._label_of)} classes lacks {class_name!r}; give the right "
                            "list with --classes")
        self._groups.append(_Group(class_name, self._label_of[class_name], class_in_key))
        self._starts.append(len(self._ends))
        names = []
        for image in sorted(images):
            if image.key is not None:
                self._keys[len(self._ends)] = image.key
            key = image.key or make_key(class_name, image.name, class_in_key)
            limit = MAX_KEY_BYTES if class_in_key and image.key is None else MAX_KEPT_KEY_BYTES
            self._hashes.append(hash(_checked_key(key, class_name, image.name, limit)))
            names.append(image.name.encode())
            self._name_bytes += len(names[-1])
            self._ends.append(self._name_bytes)
            if self._files:
                self._file.append(image.file)
                self._offset.append(image.offset)
            if self._sized:
                self._size.append(image.size)
        self._names.append(b"".join(names))

    def source(self, kind: str, root: Path, classes: tuple[str, ...], ignored: int) -> Source:
        """What was added, as a Source."""
        samples = Samples(
            groups=tuple(self._groups), starts=list(self._starts), names=b"".join(self._names), files=self._files,
            ends=np.frombuffer(self._ends, np.int64), file=np.frombuffer(self._file, np.int32),
            offset=np.frombuffer(self._offset, np.int64), size=np.frombuffer(self._size, np.int64), flat=self._flat,
            keys=self._keys)
        samples.suffixes.update(_suffixes(np.frombuffer(self._hashes, np.int64), samples))
        about = (classes, [tuple(group) for group in self._groups], samples.starts, self._files, [*self._keys.items()])
        digest = hashlib.sha256(repr(about).encode())
        digest.update(samples.names)
        for numbers in (samples.ends, samples.file, samples.offset, samples.size):
            digest.update(numbers.data)
        return Source(kind, root, classes, samples, ignored, samples.size if self._sized else None,
                      digest.hexdigest())


class _Group(NamedTuple):
    """Neighbours in a listing."""

    class_name: str
    label: int
    class_in_key: bool


class Samples(Sequence[Sample]):
    """The samples in arrays: a list of them would take 300 bytes each."""

    def __init__(self, *, groups: tuple[_Group, ...], starts: list[int], names: bytes, ends: np.ndarray,
                 files: tuple[str, ...], file: np.ndarray, offset: np.ndarray, size: np.ndarray, flat: bool,
                 keys: dict[int, str]) -> None:
        self.groups, self.starts, self.names, self.ends = groups, starts, names, ends
        self.files, self.file, self.offset, self.size = files, file, offset, size
        self.flat, self.keys = flat, keys
        self.suffixes: dict[int, int] = {}
        """For the few samples whose key another one has already: the number that makes theirs another."""

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> Sample:  # type: ignore[override]  # slices are not needed
        (class_name, label, _), name = self._name(i)
        key = self.base_key(i)
        if number := self.suffixes.get(i):
            key = f"{key}-{number}"
        filename = f"{class_name}/{name}"
        if self.files:
            return Sample(key, label, filename, self.files[self.file[i]], int(self.offset[i]), int(self.size[i]))
        return Sample(key, label, filename, name if self.flat else filename, 0, WHOLE)

    def labels(self) -> np.ndarray:
        """[len(self)] int32."""
        return np.repeat(np.array([group.label for group in self.groups], np.int32),
                         np.diff([*self.starts, len(self.ends)]))

    def base_key(self, i: int) -> str:
        """The key before it is made unique."""
        if key := self.keys.get(i):
            return key
        group, name = self._name(i)
        return make_key(group.class_name, name, group.class_in_key)

    def _name(self, i: int) -> tuple[_Group, str]:
        if not 0 <= i < len(self.ends):
            raise IndexError(i)
        group = self.groups[bisect_right(self.starts, i) - 1]
        begin = self.ends[i - 1] if i else 0
        return group, self.names[begin:self.ends[i]].decode()


def make_key(class_name: str, filename: str, class_in_key: bool = True) -> str:
    """CLASS_STEM; only STEM if it begins with CLASS_, as in ImageNet's training images. Dots become underscores."""
    stem = os.path.splitext(filename)[0]
    key = stem if not class_in_key or stem.startswith(f"{class_name}_") else f"{class_name}_{stem}"
    return key.translate(_UNSAFE_IN_KEYS)


def _checked_key(key: str, class_name: str, filename: str, limit: int) -> str:
    try:
        size = len(key.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise DataError(f"the name of {class_name}/{filename!r} is not UTF-8; rename the file") from error
    if size > limit:
        way_out = "rename the file" if limit == MAX_KEY_BYTES else "write its tar again with shorter names"
        raise DataError(f"the name of {class_name}/{filename} makes a key of {size} bytes, the limit is {limit}; "
                        f"{way_out}")
    return key


def _suffixes(hashes: np.ndarray, samples: Samples) -> dict[int, int]:
    """For each sample whose key is taken, the number that makes it unique: the first of key-1, key-2, ... that is free.

    Only the keys that occur more than once by their hash are looked at as text, and those that meet a key which was
    made unique.
    """
    watched = set(repeated(hashes).tolist())
    while watched:
        taken: set[str] = set()
        numbers: dict[int, int] = {}
        for i in np.flatnonzero(among(hashes, np.array(sorted(watched)))).tolist():
            key = base = samples.base_key(i)
            while key in taken:
                numbers[i] = numbers.get(i, 0) + 1
                key = f"{base}-{numbers[i]}"
            taken.add(key)
        met = {value for i in numbers if (value := hash(f"{samples.base_key(i)}-{numbers[i]}")) not in watched}
        met &= set(hashes[among(hashes, np.array(sorted(met)))].tolist())
        if not met:
            return numbers
        watched |= met
    return {}
