"""A folder of labelled images in ImageNet's layout, SOURCE/SPLIT/CLASS/IMAGE -> a list of samples."""

import os
from collections import Counter
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, NamedTuple, Sequence

from vir.errors import DataError

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")
"""Endings of image file names, in upper or lower case (ImageNet writes .JPEG). The format follows from the bytes."""

MAX_KEY_BYTES = 100
"""The longest key, in UTF-8: the size of the name field in a tar header."""

_UNSAFE_IN_KEYS = {ord(character): "_" for character in "./\\\x7f"} | {code: "_" for code in range(32)}


class Sample(NamedTuple):
    """One image of a folder source."""

    filename: str
    """CLASS/IMAGE, relative to the split folder."""
    label: int
    key: str
    """Name in the shard, without extension: unique in the split, without a dot (WebDataset cuts names at dots)."""


@dataclass(frozen=True)
class FolderSource:
    """What a split folder holds; `samples` are sorted by class name, then file name."""

    root: Path
    classes: tuple[str, ...]
    """Class names; the position is the label. The split may have no images of some classes."""
    samples: list[Sample]
    ignored: int
    """The number of folders and of files without an image's name in class folders; hidden ones are not counted."""


def read_folder(source: Path, split: str, classes: Sequence[str] | None = None) -> FolderSource:
    """Lists `source/split`: names only, no image is opened. Symbolic links are followed.

    Args:
        classes: the class list, in label order; the sorted names of the class folders if None.

    Raises:
        DataError: no such folder, no class folders, a class folder without images, a class folder that `classes` lacks,
            a file name from which no key can be made.
    """
    root = _split_folder(Path(source), split)
    folders = class_folders(root)
    if not folders:
        raise DataError(f"{root} has no class folders; expected {root}/<class>/<image>, found {_some(_names(root))}")
    classes = tuple(folders if classes is None else classes)
    label_of = {name: label for label, name in enumerate(classes)}
    if unknown := [name for name in folders if name not in label_of]:
        raise DataError(f"{root} has class folders that the class list of {len(classes)} classes lacks: "
                        f"{_some(unknown)}; move them away, or choose another --output and give the right "
                        "list with --classes")
    samples: list[Sample] = []
    taken: set[str] = set()
    empty: list[str] = []
    ignored = 0
    for name in folders:
        images, others = _images(root / name)
        ignored += others
        if not images:
            empty.append(name)
        for image in images:
            key = _unique_key(name, image, taken)
            taken.add(key)
            samples.append(Sample(f"{name}/{image}", label_of[name], key))
    if empty:
        raise DataError(f"class folders without images in {root}: {_some(empty)}; images end in "
                        f"{' '.join(IMAGE_EXTENSIONS)}; complete the folders or remove them")
    return FolderSource(root, classes, samples, ignored)


def class_folders(folder: Path) -> list[str]:
    """Sorted names of the folders in `folder`, without hidden ones: the class list, unless another one is given."""
    with _scan(folder) as entries:
        return sorted(entry.name for entry in entries if not entry.name.startswith(".") and _is_folder(entry))


def read_class_list(path: Path) -> tuple[str, ...]:
    """Class names from a text file, one a line, in label order; empty lines are skipped."""
    try:
        names = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the class list {path}: {error}") from error
    names = [name for name in names if name]
    if not names:
        raise DataError(f"the class list {path} is empty; expected one class name a line")
    if twice := sorted(name for name, count in Counter(names).items() if count > 1):
        raise DataError(f"the class list {path} names classes twice: {_some(twice)}")
    return tuple(names)


def make_key(class_name: str, filename: str) -> str:
    """CLASS_STEM; only STEM if it begins with CLASS_, as in ImageNet's training images. Dots become underscores."""
    stem = os.path.splitext(filename)[0]
    key = stem if stem.startswith(f"{class_name}_") else f"{class_name}_{stem}"
    return key.translate(_UNSAFE_IN_KEYS)


def _unique_key(class_name: str, filename: str, taken: set[str]) -> str:
    """The first of key, key-1, key-2, ... that is free. Files come in sorted order, so each gets the same key again."""
    key = base = make_key(class_name, filename)
    number = 0
    while key in taken:
        number += 1
        key = f"{base}-{number}"
    try:
        size = len(key.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise DataError(f"the name of {class_name}/{filename!r} is not UTF-8; rename the file") from error
    if size > MAX_KEY_BYTES:
        raise DataError(f"the name of {class_name}/{filename} makes a key of {size} bytes, the limit is "
                        f"{MAX_KEY_BYTES}; rename the file")
    return key


def _split_folder(source: Path, split: str) -> Path:
    if not source.is_dir():
        raise DataError(f"no such folder: {source}")
    root = source / split
    if not root.is_dir():
        raise DataError(f"no such folder: {root}; {source} has {_some(_names(source))} "
                        f"(images are expected at SOURCE/SPLIT/CLASS/IMAGE)")
    return root


def _images(folder: Path) -> tuple[list[str], int]:
    """Sorted names of the image files in a class folder, and the number of other entries."""
    images: list[str] = []
    others = 0
    with _scan(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            # No check that the file exists: a broken link with an image's name is listed too. Reading it fails later,
            # so that the user learns of it.
            if entry.name.lower().endswith(IMAGE_EXTENSIONS) and not _is_folder(entry):
                images.append(entry.name)
            else:
                others += 1
    return sorted(images), others


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a loop of links: it is listed as a file, and reading it fails with an error
        return False


def _scan(folder: Path) -> AbstractContextManager[Iterator[os.DirEntry[str]]]:
    try:
        return os.scandir(folder)
    except OSError as error:
        raise DataError(f"cannot list {folder}: {error.strerror}") from error


def _names(folder: Path) -> list[str]:
    with _scan(folder) as entries:
        return sorted(entry.name for entry in entries if not entry.name.startswith("."))


def _some(names: Sequence[str], limit: int = 5) -> str:
    """The first few names and the number of the others, for messages."""
    shown = ", ".join(repr(name) for name in names[:limit])
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (shown + more) or "nothing"


if __name__ == "__main__":
    raise SystemExit("vir.data.folder is a part of the library; the program is vir-convert")
