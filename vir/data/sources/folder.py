"""A folder of labelled images, SOURCE/SPLIT/CLASS/IMAGE as ImageNet's or SOURCE/CLASS/IMAGE -> a Source."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from vir.data.sources.listing import IMAGE_EXTENSIONS, Image, Listing, Source
from vir.errors import DataError


def read_folder(root: Path, classes: Sequence[str] | None = None, sized: bool = False) -> Source:
    """Lists `root/CLASS/IMAGE`: names only, no image is opened. Symbolic links are followed.

    Args:
        classes: the class list, in label order; the sorted names of the class folders if None.
        sized: also ask the size of each file: a call for each, which takes long on network disks.

    Raises:
        DataError: no class folders, a class folder without images, a class folder that `classes` lacks, a file name
            from which no key can be made.
    """
    folders = class_folders(root)
    if not folders:
        raise DataError(f"{root} has no class folders; expected {root}/<class>/<image>, found {some(names_in(root))}")
    classes = tuple(folders if classes is None else classes)
    label_of = {name: label for label, name in enumerate(classes)}
    if unknown := [name for name in folders if name not in label_of]:
        raise DataError(f"{root} has class folders that the class list of {len(classes)} classes lacks: "
                        f"{some(unknown)}; move them away, or choose another --output and give the right "
                        "list with --classes")
    listing = Listing(label_of, sized=sized)
    empty: list[str] = []
    ignored = 0
    for name in folders:
        images, others = images_in(root / name, sized)
        ignored += others
        if not images:
            empty.append(name)
        listing.add(name, images)
    if empty:
        raise DataError(f"class folders without images in {root}: {some(empty)}; images end in "
                        f"{' '.join(IMAGE_EXTENSIONS)}; complete the folders or remove them")
    return listing.source("image folder", root, classes, ignored)


def class_folders(folder: Path) -> list[str]:
    """Sorted names of the folders in `folder`, without hidden ones: the class list, unless another one is given."""
    with _scan(folder) as entries:
        return sorted(entry.name for entry in entries if not entry.name.startswith(".") and _is_folder(entry))


def classes_beside(path: Path, split: str) -> list[str] | None:
    """The class folders of `path/train`, so that another split with fewer of them keeps its labels; None where there
    are none, or `split` is train itself."""
    train = path / "train"
    if split != "train" and train.is_dir():
        return class_folders(train) or None
    return None


def read_class_list(path: Path) -> tuple[str, ...]:
    """Class names from a text file, one a line, in label order; empty lines are skipped."""
    try:
        names = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the class list {path}: {error}") from error
    names = [name for name in names if name]
    if not names:
        raise DataError(f"the class list {path} is empty; expected one class name a line")
    if wrong := [name for name in names if not name.isprintable()]:
        raise DataError(f"the class list {path} has {wrong[0][:50]!r}, which is no name; expected one class a line")
    if twice := sorted(name for name, count in Counter(names).items() if count > 1):
        raise DataError(f"the class list {path} names classes twice: {some(twice)}")
    return tuple(names)


def images_in(folder: Path, sized: bool = False) -> tuple[list[Image], int]:
    """The image files in a folder, and the number of its other entries."""
    images: list[Image] = []
    others = 0
    with _scan(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            # No check that the file exists: a broken link with an image's name is listed too. Reading it fails later,
            # so that the user learns of it.
            if entry.name.lower().endswith(IMAGE_EXTENSIONS) and not _is_folder(entry):
                images.append(Image(entry.name, size=_size(entry)) if sized else Image(entry.name))
            else:
                others += 1
    return images, others


def names_in(folder: Path) -> list[str]:
    """The sorted names of what lies in a folder, without hidden ones."""
    with _scan(folder) as entries:
        return sorted(entry.name for entry in entries if not entry.name.startswith("."))


def some(names: Sequence[str], limit: int = 5) -> str:
    """The first few names and the number of the others, for messages."""
    shown = ", ".join(repr(name) for name in names[:limit])
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (shown + more) or "nothing"


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_size
    except OSError:  # a broken link: reading it says so
        return 0


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


if __name__ == "__main__":
    raise SystemExit("vir.data.sources.folder is a part of the library; the program is vir-convert")
